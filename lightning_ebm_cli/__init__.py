"""The command `lightning-ebm`. A package of its own: it answers before torch and Lightning have been imported."""

from lightning_ebm_cli.parser import main

__all__ = ["main"]
