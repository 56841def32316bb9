"""One training step: its first pass, its relaxations, and what becomes of a batch that cannot relax."""
