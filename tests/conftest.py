"""Settings of the machine and of loggers, for every test."""

import os
import socket

import pytest
import torch

# One thread a worker: on a busy machine two are slower than one, and sums are added in another order.
torch.set_num_threads(1)
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("WANDB_CONSOLE", "off")
os.environ.setdefault("WANDB_X_DISABLE_STATS", "true")
os.environ.setdefault("WANDB_X_DISABLE_META", "true")


@pytest.fixture(autouse=True)
def no_process_group_left():
    """A Trainer leaves its process group to the end of the process; the next test must not find itself distributed."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def free_port():
    """For a process group of this test alone."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
