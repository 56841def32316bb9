"""python -m lightning_ebm_cli."""

import sys

from lightning_ebm_cli.parser import main

sys.exit(main())
