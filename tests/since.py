"""What the oldest torch that is promised does not have, or does otherwise than the one that is tested most."""

import pytest
import torch

NEWER = torch.__version__ >= "2.8"
newer = pytest.mark.skipif(not NEWER, reason="torch 2.8 or newer")
