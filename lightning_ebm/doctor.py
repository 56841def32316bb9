"""What is installed here, on which devices and by which kernels it computes, and whether its rules are right."""

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ebm import metrics, reference
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.counted import counted
from lightning_ebm.errors import EBMError
from lightning_ebm.learner import Learner
from lightning_ebm.nudges import OneSided
from lightning_ebm.presets import algorithm
from lightning_ebm.relaxers import ErrorCoordinates

TESTED = {
    "torch": "2.13.0",
    "lightning": "2.6.6",
    "torchmetrics": "1.9.0",
    "wandb": "0.31.0",
    "jsonargparse": "4.53.0",
    "numpy": "2.4.6",
    "plotly": "7.1.0",
}
"""The versions that this release has been tested with, as constraints.txt has them."""

TESTED_PYTHON = "3.11"
"""The Python that they are tested on."""

PROMISED = {
    "torch": "2.6",
    "lightning": "2.5",
    "torchmetrics": "1.4",
    "wandb": "0.18",
    "jsonargparse": "4.51",
    "plotly": "6",
}
"""The lowest versions that are promised to work, as pyproject.toml has them."""

Status = Literal["ok", "note", "wrong"]
Line = tuple[Status, str, str]


def versions() -> Iterator[Line]:
    """Every package this library stands on; a note where the tests have not seen that version."""
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.python_version().rpartition(".")[0] == TESTED_PYTHON and platform.system() == "Linux":
        yield "ok", "Python", here
    else:
        yield "note", "Python", f"{here}; tested with {TESTED_PYTHON} on Linux, so this one is untested"
    try:
        yield "ok", "lightning-ebm", version("lightning-ebm")
    except PackageNotFoundError:
        yield "note", "lightning-ebm", "from a checkout that is not installed"
    for name, tested in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield "wrong", name, f"not installed: pip install {name}"
            continue
        lowest = PROMISED.get(name)
        if lowest is not None and _numbers(found) < _numbers(lowest):
            yield "wrong", name, f"{found}; {lowest} is the lowest that is promised to work: pip install -U {name}"
        elif _numbers(found)[:2] == _numbers(tested)[:2]:
            yield "ok", name, found
        else:
            yield "note", name, f"{found}; tested with {tested}, so this one is untested"
    if _installed("pytorch-lightning") and not _installed("lightning"):
        yield (
            "wrong",
            "pytorch-lightning",
            "its Trainer is another one: pip install lightning, and import lightning as L",
        )


def _numbers(text: str) -> list[int]:
    """2.6.0rc1+cpu as [2, 6, 0]."""
    return [int(number) for number in re.findall(r"^\d+|(?<=\.)\d+", text.split("+")[0])]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def devices() -> Iterator[Line]:
    """The processors that torch sees."""
    capability = torch.backends.cpu.get_cpu_capability()
    cores, threads = counted(os.cpu_count() or 1, "core"), counted(torch.get_num_threads(), "thread")
    yield "ok", "CPU", f"{cores}, {threads} in use, instructions {capability}"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        yield "ok", f"cuda:{index}", f"{found.name}, {memory:.0f} GiB, compute capability {found.major}.{found.minor}"
    if torch.backends.mps.is_available():
        yield "note", "mps", "Apple's GPU; the tests have not run there"


def usable_devices() -> list[torch.device]:
    """Those that the self-test runs on."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def problem(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A small network and its loss, the same every time; random numbers of the caller are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
    net, x, y = net.to(device, dtype), x.to(device, dtype), y.to(device)
    return net, lambda: F.cross_entropy(net(x), y)


def error(rule: Algorithm, device: torch.device) -> float:
    """|update - gradient| / |gradient| over all parameters, in float64."""
    net, closure = problem(device)
    update = Learner(net, rule).gradients(closure)
    return metrics.alignment(update, reference.backprop(net, closure))["relative_error"]


def weak(nudge: float) -> Algorithm:
    """Predictive coding at a weak nudge, relaxed to rounding."""
    return algorithm("pc-nudge", nudge=OneSided(nudge), relaxer=ErrorCoordinates(max_steps=400, tol=1e-10))


def exact_rule(device: torch.device) -> Line:
    """The one-sweep rule equals autograd's gradient, to rounding."""
    found = error(algorithm("zero-divergence"), device)
    verdict: Status = "ok" if found < 1e-12 else "wrong"
    return verdict, f"exact rule, {device}", f"relative error to autograd {found:.1e} (expected below 1e-12)"


def weak_rule(device: torch.device) -> Line:
    """The error of a one-sided nudge is proportional to the nudge: ten times less nudge, ten times less error."""
    large, small = error(weak(1e-2), device), error(weak(1e-3), device)
    ratio = large / small if small else float("inf")
    verdict: Status = "ok" if 9 < ratio < 11 else "wrong"
    return verdict, f"weak nudge, {device}", f"a tenth of the nudge has 1/{ratio:.2f} of the error (expected 1/10)"


def kernels(device: torch.device) -> Line:
    """Which way relaxations run here: interpreted, traced, or compiled."""
    net, closure = problem(device, torch.float32)
    learner = Learner(net, "predictive-coding")
    for _ in range(3):
        learner.gradients(closure)
    return "ok", f"kernels, {device}", learner.report["kernels"]


def tests() -> Iterator[Line]:
    """The self-test, on every device."""
    for device in usable_devices():
        for check in (exact_rule, weak_rule, kernels):
            try:
                yield check(device)
            except (EBMError, RuntimeError) as failure:
                yield "wrong", f"{check.__name__.replace('_', ' ')}, {device}", f"{type(failure).__name__}: {failure}"


def main(self_test: bool = True) -> int:
    """Prints everything; returns 1 where something is wrong."""
    marks = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
    found: list[Line] = []
    began = time.monotonic()
    for part in (versions, devices, *((tests,) if self_test else ())):
        for line in part():
            found.append(line)
            print(f"{marks[line[0]]}  {line[1]:22}  {line[2]}", flush=True)
    wrong = sum(status == "wrong" for status, _, _ in found)
    notes = sum(status == "note" for status, _, _ in found)
    ended = "nothing is wrong" if not wrong else f"{wrong} wrong"
    noted = f"; {counted(notes, 'note')}" if notes else ""
    print(f"\n{ended}{noted}; this took {time.monotonic() - began:.1f} s")
    return int(wrong > 0)
