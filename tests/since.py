"""What the oldest versions that are promised do not have, or do otherwise than those that are tested most."""

from importlib.metadata import version

import pytest
import torch

NEWER = torch.__version__ >= "2.8"
newer = pytest.mark.skipif(not NEWER, reason="torch 2.8 or newer")

older_wandb = tuple(map(int, version("wandb").split(".")[:2])) < (0, 31)
reads_wandb = pytest.mark.skipif(older_wandb, reason="wandb 0.31 or newer reads its own files")
