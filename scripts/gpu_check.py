"""One run on one GPU: the tests that need one, then what steps cost in time, memory and waits; writes docs/gpu.md.

    python scripts/gpu_check.py                                       # at most 8 minutes
    python scripts/gpu_check.py --device cpu --size tiny --out /tmp/gpu.md --ways eager --networks MLP

Five networks, seven algorithms and backprop; fp32, tf32 and bf16 (autocast); as recorded ("eager") and through
torch.compile. What is most asked for comes first, so that a budget that runs out costs the least; the page says what it
has left out. Before a row is timed its update is compared with backprop's gradient. Without a GPU the page says that no
figure exists yet: ``--page`` writes that one.
"""

import argparse
import contextlib
import itertools
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from common_networks import GPT, Batch, CausalBlock, ViT, images, next_letter, text, vgg  # noqa: E402
from networks import Block, mlp  # noqa: E402

from lightning_ebm.recipes.nets import ResNet18  # noqa: E402

VGG7 = (128, 128, 256, 256, 512, 512)
PRECISIONS = ("fp32", "bf16", "tf32")
WAYS = ("eager", "compiled")
WARM_UP, REPEATS, LONGEST = 4, 12, 2.0


@dataclass(frozen=True)
class Net:
    """What is trained: a network, a batch of a size, a loss, and which modules are layers if that is not found."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    size: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    layers: type[nn.Module] | None = None


def flat(size: int) -> Batch:
    """28 x 28 pixels as vectors."""
    x, y = images(1, 28)(size)
    return x.flatten(1), y


NETWORKS = {
    "full": {
        "MLP": Net(lambda: mlp(784, 1024, 1024, 1024, 1024, 10), flat, 512),
        "VGG7": Net(lambda: vgg(VGG7, (1, 3, 5), nn.ReLU), images(3, 32), 128),
        "ResNet18": Net(ResNet18, images(3, 32), 128),
        "ViT-S": Net(lambda: ViT(12, 384), images(3, 32), 64, layers=Block),
        "GPT": Net(lambda: GPT(6, 512, 32, 256), text(257), 16, next_letter, CausalBlock),
    },
    "tiny": {
        "MLP": Net(lambda: mlp(784, 16, 16, 10), flat, 8),
        "VGG7": Net(lambda: vgg((4, 4, 8, 8, 8, 8), (1, 3, 5), nn.ReLU), images(3, 32), 4),
        "ResNet18": Net(lambda: ResNet18(4), images(3, 32), 4),
        "ViT-S": Net(lambda: ViT(2, 16), images(3, 32), 4, layers=Block),
        "GPT": Net(lambda: GPT(2, 16, 32, 8), text(9), 4, next_letter, CausalBlock),
    },
}
ALGORITHMS: dict[str, Any] = {
    "backprop": "backprop",
    "zero-divergence": "zero-divergence",
    "PC, 20 steps": ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 20)),
    "error-pc": "error-pc",
    "pc-nudge": "pc-nudge",
    "predictive-coding": "predictive-coding",
    "EP, 20 + 10 + 10": ebm.algorithm(
        "equilibrium-propagation", relaxer=ebm.FixedPoint(10), free_relaxer=ebm.FixedPoint(20)
    ),
}


@dataclass(frozen=True)
class Row:
    """What one setting costs; where it could not be measured, why.

    Attributes:
        ms: of a training step with Adam, median.
        memory: most that a step allocates beyond parameters and optimizer, MiB; nan on a CPU.
        waits: how often a step made the host wait for the device; nan on a CPU.
        cosine: of the update and backprop's gradient.
    """

    network: str
    algorithm: str
    precision: str
    way: str
    ms: float = float("nan")
    memory: float = float("nan")
    waits: float = float("nan")
    cosine: float = float("nan")
    why: str = ""


def settings(networks: list[str], ways: list[str], precisions: list[str]) -> list[Row]:
    """All rows, in the order of measurement: every network in fp32 first, compiled code last."""
    order = itertools.product(ways, precisions, networks, ALGORITHMS)
    return [Row(network, algorithm, precision, way) for way, precision, network, algorithm in order]


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Within it products of float32 are computed in this precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Within it a `TimeoutError` comes when the time is up."""

    def stop(*_: object) -> None:
        raise TimeoutError

    if seconds <= 0:
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(row: Row, net: Net, device: torch.device) -> Row:
    """The row with its figures."""
    torch.manual_seed(0)
    module = net.make().to(device)
    x, y = (t.to(device) for t in net.batch(net.size))
    compiles = row.way == "compiled"
    learner = ebm.Learner(module, ALGORITHMS[row.algorithm], layers=net.layers, compile=compiles)
    optimizer = torch.optim.Adam(module.parameters(), 1e-4)

    def loss() -> Tensor:
        # As Lightning does: what comes after the loss comes after autocast.
        with torch.autocast(device.type, torch.bfloat16, enabled=row.precision == "bf16"):
            return net.loss(module(x), y)

    def step() -> None:
        learner.step(loss, optimizer)

    with products(row.precision):
        found = ebm.metrics.alignment(learner.gradients(loss), ebm.reference.backprop(module, loss))
        for _ in range(WARM_UP):
            step()
        memory, waits = on_gpu(step, device) if device.type == "cuda" else (float("nan"), float("nan"))
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < LONGEST:
            wait(device)
            start = time.perf_counter()
            step()
            wait(device)
            times.append(time.perf_counter() - start)
    return replace(row, ms=1e3 * statistics.median(times), memory=memory, waits=waits, cosine=found["cosine"])


def wait(device: torch.device) -> None:
    """Until the device has computed what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_gpu(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """What a step allocates at most, MiB, and how often it makes the host wait."""
    wait(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    wait(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return peak / 2**20, float(sum("synchroniz" in str(one.message) for one in caught))


def table(rows: list[Row], nets: dict[str, Net], device: torch.device, until: float) -> list[Row]:
    """The rows measured while there is time; those after it are left out."""
    found = []
    for row in rows:
        try:
            with limited(until - time.monotonic()):
                found.append(measured(row, nets[row.network], device))
        except TimeoutError:
            found.append(replace(row, why="no time left"))
        except ebm.EBMError as error:
            found.append(replace(row, why=str(error).split(".")[0]))
        except torch.cuda.OutOfMemoryError:
            found.append(replace(row, why="out of memory"))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(found[-1], flush=True)
    return found


def tested(seconds: float) -> str:
    """The last line of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / "test_gpu.py")]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not over after {seconds:.0f} s"
    lines = done.stdout.strip().splitlines()
    print(done.stdout[-4000:], flush=True)
    return lines[-1].strip("= ") if lines else f"ended with code {done.returncode}"


HEAD = """# On a GPU

What a training step asks its device is counted [on any machine](benchmarks.md#what-a-step-asks-its-device).
`python scripts/gpu_check.py` runs the tests that need a GPU, then times backprop, an exact rule, predictive coding and
equilibrium propagation on five networks, eager and through `torch.compile`, in fp32, tf32 and bf16, and writes this
page. It takes at most 8 minutes on one GPU.
"""
NOTHING = """
**No figure exists yet.** This library has been developed on machines without a GPU. What is tested there: that no
tensor is made on another device than the user's or in another precision (`tests/test_made_on_the_device.py`), how
often a step asks its device (`tests/test_questions.py`), and this script, at reduced size on a CPU. Speed, memory, and
CUDA graphs on a GPU are not measured.
"""


def page(rows: list[Row], tests: str = "", machine: str = "", seconds: float = 0.0) -> str:
    """The page as Markdown."""
    if not rows:
        return HEAD + NOTHING
    text = f"\n*{machine}, torch {torch.__version__}, {seconds:.0f} s in all.* Tests that need a GPU: {tests}.\n"
    text += (
        "\nMilliseconds of a step with Adam, medians; what a step allocates beyond parameters and optimizer; how often"
    )
    text += " it makes\nthe host wait; cosine of its update and backprop's gradient, in the same precision.\n"
    for network in dict.fromkeys(row.network for row in rows):
        text += f"\n## {network}\n\n| algorithm | precision | way | ms | backprop steps | MiB | waits | cosine |\n"
        text += "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        mine = [row for row in rows if row.network == network and not row.why]
        base = {(r.precision, r.way): r.ms for r in mine if r.algorithm == "backprop"}
        for r in mine:
            ratio = r.ms / base.get((r.precision, "eager"), float("nan"))
            numbers = (f"{r.ms:.2f}", f"{ratio:.1f}", f"{r.memory:.0f}", f"{r.waits:.0f}", f"{r.cosine:.5f}")
            cells = ("" if number == "nan" else number for number in numbers)
            text += f"| {r.algorithm} | {r.precision} | {r.way} | {' | '.join(cells)} |\n"
    missing = [row for row in rows if row.why]
    if missing:
        text += "\n## Left out\n\n"
    for why in dict.fromkeys(row.why for row in missing):
        named = "; ".join(f"{r.network}, {r.algorithm}, {r.precision}, {r.way}" for r in missing if r.why == why)
        text += f"- {why}: {named}.\n"
    return HEAD + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=list(NETWORKS), default="full")
    parser.add_argument("--seconds", type=float, default=460.0, help="after which nothing more is begun")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS["full"]), default=list(NETWORKS["full"]))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--page", action="store_true", help="write the page that says that nothing was measured")
    options = parser.parse_args()
    if options.page:
        options.out.write_text(page([]))
        return
    start = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here. --device cpu --size tiny tries the script; it writes nothing worth keeping.")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, no GPU"
    tests = tested(0.35 * options.seconds)
    rows = settings(options.networks, options.ways, options.precisions)
    found = table(rows, NETWORKS[options.size], device, start + options.seconds)
    options.out.write_text(page(found, tests, machine, time.monotonic() - start))


if __name__ == "__main__":
    main()
