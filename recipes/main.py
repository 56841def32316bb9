"""The command `lightning-ebm fit`, from a clone.

python recipes/main.py fit --config recipes/configs/digits.yaml
python recipes/main.py fit --config recipes/configs/digits.yaml --algorithm pc-nudge --trainer.max_epochs 5
"""

import sys

from lightning_ebm.recipes.training import command

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
