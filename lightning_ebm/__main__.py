"""python -m lightning_ebm: the command `lightning-ebm`."""

import sys

from lightning_ebm_cli import main

if __name__ == "__main__":
    sys.exit(main())
