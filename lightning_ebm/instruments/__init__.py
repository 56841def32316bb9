"""What an equilibrium looks like: its states by the names of layers, and the curvatures it rests in."""
