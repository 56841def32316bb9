"""What the first training steps cost: finding layers, making code."""

import logging
import os
import tempfile
import time
from unittest.mock import patch

import torch
from contenders import euler
from networks import NETS, Net, chain
from page import Lines, Settings, line, table
from sweeping import bounded
from timing import Contest

import lightning_ebm as ebm

HEAD = """## The first steps

What the first 4 training steps take beyond 4 later ones, which is finding layers, recording, checking and making
code; in seconds and in later steps of the same algorithm. Wall time at 1 thread, measured once, in this process,
where torch and what it compiles with are loaded. With compile=True from an empty cache of Inductor's, its workers
on all cores."""
STEPS = 4


def first_steps(given: Settings) -> Lines:
    """The first steps."""
    yield HEAD
    yield table("network", "algorithm", "first 4 steps, s", "of which code, s", "a later step, ms", "later steps")
    nets: dict[str, Net] = dict(list(NETS.items())[:2])
    for depth in (100, 300):
        nets[f"{depth} layers of 64, batch 64"] = chain(64, 784, *[64] * depth, 10, steps=5)
    for title, net in nets.items():
        kinds: dict[str, ebm.Algorithm | str | None] = {
            "zero-divergence": "zero-divergence",
            f"PC, {net.steps} Euler steps": euler(net.steps),
            "default": None,
        }
        for name, algorithm in kinds.items():
            yield _row(title, net, name, algorithm, False)
        if given.compile and title in NETS:
            name = f"PC, {net.steps} Euler steps"
            yield _row(title, net, f"{name}, compile=True", kinds[name], True)
    hopfield = bounded(784, 512, 512, 10)
    yield _row("784-512-512-10, batch 128", hopfield, "equilibrium-propagation", "equilibrium-propagation", False)


def _row(title: str, net: Net, name: str, algorithm: ebm.Algorithm | str | None, compiled: bool) -> str:
    logging.getLogger("lightning_ebm").setLevel(logging.ERROR)
    contest = Contest(net)
    contest.add(name, algorithm, compile=compiled)
    step = contest.steps[name]
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        if compiled:
            torch.compiler.reset()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        first = time.perf_counter() - start
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    later = sorted(times)[2]
    code = first - STEPS * later
    return line(title, name, f"{first:.2f}", f"{code:.2f}", 1e3 * later, code / later)
