"""Settings of the machine and of loggers, for every test."""

import gc
import logging
import os
import socket
import sys

import pytest
import torch

# One thread a worker: on a busy machine two are slower than one, and sums are added in another order.
torch.set_num_threads(1)
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("WANDB_CONSOLE", "off")
os.environ.setdefault("WANDB_X_DISABLE_STATS", "true")
os.environ.setdefault("WANDB_X_DISABLE_META", "true")


@pytest.hookimpl(tryfirst=True)  # before "not slow" is asked
def pytest_collection_modifyitems(items):
    """Of a test marked crossed(n) one variant in n is quick, as in a Latin square, with each value of a parameter."""
    places = {}  # of each value among those of its parameter; pytest's own indices count the variants
    for item in items:
        crossed = item.get_closest_marker("crossed")
        if crossed is None:
            continue
        total = 0
        for name, value in item.callspec.params.items():
            of_parameter = places.setdefault((item.parent.nodeid, item.originalname, name), {})
            total += of_parameter.setdefault(id(value), len(of_parameter))
        if total % crossed.args[0]:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What is imported by now stays, and need not be looked through for garbage again and again; the rest, rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def not_distributed():
    """What a Trainer leaves to the end of the process must not meet the next test, nor the scripts it starts.

    That is a process group, and LOCAL_RANK and its like in the environment: a Trainer that finds them there takes the
    other processes to have been started by somebody else, and waits for them.
    """
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.run = None  # torn down by one test, it would be taken for one in progress by the next


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """What a command of the library silences for its own process, the next test may wait to hear."""
    names = ["lightning_ebm", *(name for name in logging.root.manager.loggerDict if name.startswith("lightning"))]
    before = [(logger := logging.getLogger(name), logger.level) for name in names]
    yield
    for logger, level in before:
        if logger.level != level:  # setting one makes all loggers of the process forget what they know
            logger.setLevel(level)


@pytest.fixture
def free_port():
    """For a process group of this test alone."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
