"""Ready-made training runs: modules, networks, data, and settings in YAML; `lightning-ebm recipes list` shows them."""
