"""What a training step costs on more and more devices: measured here on a few, and by a written-down model on many.

    python recipes/scaling.py --page docs/multi-gpu.md

Starts 1, 2 and 4 processes over gloo on this machine, and puts the tables between the page's markers. Three minutes on
two CPU cores. Bytes are counted twice: what a communication hook of DDP is given to reduce, and what the machine's
loopback interface sent meanwhile. Times are the wall's, of the fastest step, and the processor's, of the median step:
the latter tell the same on a machine that others use too. Model of the processor's time of one of P processes:

    processor(P) = k c + added(P)

c: a step of backprop on one device; k: the algorithm's cost in such steps; added(P): what P processes add to a step of
backprop, which is communication; the same for every algorithm, as they all reduce the same gradients.

On a cluster, without measuring: a ring all-reduce of n bytes over P devices takes

    ring(P) = 2 (P - 1) / P * n / bandwidth + 2 (P - 1) * latency

of which DDP hides what fits behind the last backward pass, two thirds of c.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

ALGORITHMS: dict[str, ebm.Algorithm] = {
    "backprop": ebm.algorithm("backprop"),
    "zero-divergence": ebm.algorithm("zero-divergence"),
    "pc-nudge": ebm.algorithm("pc-nudge"),
    "PC, 20 steps": ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=0.1, max_steps=20)),
}


class Measured(TypedDict):
    """Seconds of a rank's step, the wall's and the processor's; bytes it reduced, and that the machine sent for all."""

    seconds: float
    processor: float
    reduced: float
    sent: float


class MLP(L.LightningModule):
    """784, hidden layers, 10, on noise; the same batch size on every device."""

    def __init__(self, batch: int, hidden: Sequence[int], steps: int) -> None:
        super().__init__()
        widths = [784, *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
        self.batch, self.steps = batch, steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        size = self.batch * self.steps
        return DataLoader(TensorDataset(torch.randn(size, 784), torch.randint(10, (size,))), self.batch)


class Meter(L.Callback):
    """Wall time and bytes of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.reduced: list[int] = []
        self.sent: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def hook(state: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            self.reduced[-1] += bucket.buffer().numel() * bucket.buffer().element_size()
            return allreduce_hook(state, bucket)

        trainer.strategy.model.register_comm_hook(dist.group.WORLD, hook)  # type: ignore[union-attr, operator]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        trainer.strategy.barrier()
        self.reduced.append(0)
        self.sent.append(-loopback())
        self.seconds.append(-time.perf_counter())
        self.processor.append(-time.process_time())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds[-1] += time.perf_counter()
        self.processor[-1] += time.process_time()
        trainer.strategy.barrier()
        self.sent[-1] += loopback()

    def measured(self) -> Measured:
        """Without the first steps, which find layers and build buckets."""
        return {
            "seconds": min(self.seconds[3:]),
            "processor": statistics.median(self.processor[3:]),
            "reduced": statistics.median(self.reduced[3:]),
            "sent": statistics.median(self.sent[3:]),
        }


def loopback() -> int:
    """Bytes that this machine has sent to itself; 0 where the system does not tell."""
    table = Path("/proc/net/dev")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)


def measure(out: Path, batch: int, hidden: tuple[int, ...], steps: int) -> None:
    """Runs on every rank; the first writes what the slowest took."""
    torch.set_num_threads(1)
    results: dict[str, Measured] = {}
    for name, algorithm in ALGORITHMS.items():
        L.seed_everything(0, verbose=False)
        meter = Meter()
        trainer = L.Trainer(
            strategy=ebm.EBMDDPStrategy(algorithm), accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]),
            max_epochs=1, callbacks=[meter], logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(MLP(batch, hidden, steps * int(os.environ["WORLD_SIZE"])))
        everyone: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everyone, meter.measured())
        results[name] = max(everyone, key=lambda found: found["seconds"])
    if int(os.environ["RANK"]) == 0:
        out.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def launch(processes: int, batch: int, hidden: tuple[int, ...], steps: int) -> dict[str, Measured]:
    """Measures with so many processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        out = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", str(port), __file__, "--worker", str(out), "--batch", str(batch)]
        command += ["--hidden", json.dumps(hidden), "--steps", str(steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        results: dict[str, Measured] = json.loads(out.read_text())
        return results


def ring(devices: int, size: float, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes at `bandwidth` bytes a second, `latency` seconds a message."""
    return 2 * (devices - 1) / devices * size / bandwidth + 2 * (devices - 1) * latency


def exposed(devices: int, compute: float, size: float, bandwidth: float, latency: float) -> float:
    """What of it is not hidden behind the last backward pass, two thirds of a step of backprop."""
    return max(0.0, ring(devices, size, bandwidth, latency) - 2 / 3 * compute)


def efficiency(devices: int, k: float, compute: float, size: float, bandwidth: float, latency: float) -> float:
    """Share of a step that is computation, for an algorithm of k steps of backprop."""
    return k * compute / (k * compute + exposed(devices, compute, size, bandwidth, latency))


def measured_table(runs: dict[int, dict[str, Measured]]) -> list[str]:
    """Measured steps beside the model's, which knows one process, and backprop on all numbers of processes."""
    unit = runs[1]["backprop"]["processor"]
    heads = ["processes", "algorithm", "k", "wall, ms", "processor, ms", "model, ms", "reduced, MB"]
    heads += ["sent, MB a process", "2(P-1)/P of reduced"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for processes, results in runs.items():
        added = results["backprop"]["processor"] - unit
        for name, found in results.items():
            k = runs[1][name]["processor"] / unit
            model = "" if processes == 1 or name == "backprop" else f"{1e3 * (k * unit + added):.1f}"
            cells = [str(processes), name, f"{k:.1f}", f"{1e3 * found['seconds']:.1f}"]
            cells += [f"{1e3 * found['processor']:.1f}", model, f"{found['reduced'] / 1e6:.2f}"]
            cells += [f"{found['sent'] / processes / 1e6:.2f}"]
            cells += [f"{2 * (processes - 1) / processes * found['reduced'] / 1e6:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def cluster_tables(
    runs: dict[int, dict[str, Measured]], size: float, seconds: float, link: float, hop: float
) -> list[str]:
    """Efficiency when every device keeps its batch, and when a batch is divided among more and more devices."""
    costs = {name: found["processor"] / runs[1]["backprop"]["processor"] for name, found in runs[1].items()}
    counts = (8, 16, 32, 64, 128, 256, 512, 1024)
    lines: list[str] = []
    for title, share in {
        "the same batch on every device": 0,
        "one batch divided among them, that of 8 devices": 1,
    }.items():
        lines += ["", f"Efficiency, {title}:", "", f"| algorithm | k | {' | '.join(map(str, counts))} | 50 % up to |"]
        lines += ["| --- " * (len(counts) + 3) + "|"]
        for name, k in costs.items():

            def at(devices: int, k: float = k, share: int = share) -> float:
                compute = seconds * (8 / devices) ** share
                return efficiency(devices, k, compute, size, link, hop)

            half = max((2**power for power in range(17) if at(2**power) >= 0.5), default=0)
            cells = [f"{100 * at(devices):.0f} %" for devices in counts]
            lines.append(f"| {name} | {k:.1f} | {' | '.join(cells)} | {half if half < 2**16 else 'beyond 65536'} |")
    return lines


def main(
    processes: tuple[int, ...] = (1, 2, 4),
    batch: int = 64,
    hidden: tuple[int, ...] = (512, 512, 512),
    steps: int = 40,
    page: Path | None = None,
    parameters: float = 350e6,
    step_seconds: float = 0.15,
    bandwidth: float = 25e9,
    latency: float = 5e-6,
    worker: Path | None = None,
) -> None:
    """Measures, and writes the tables.

    Args:
        processes: how many to start, one after the other; 1 must be among them.
        batch: samples a process.
        hidden: widths of the measured network.
        steps: measured steps a process.
        page: where to put the tables; none prints them.
        parameters: of the network on the cluster; the default is a medium-sized language model's.
        step_seconds: what a step of backprop takes one of its devices.
        bandwidth: bytes a second between its devices.
        latency: seconds a message.
        worker: for the processes that this starts: where to write what they measured.
    """
    if worker is not None:
        measure(worker, batch, hidden, steps)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runs = {count: launch(count, batch, hidden, steps) for count in processes}
    size = 4 * parameters
    text = [
        f"Measured with `python recipes/scaling.py` on {cores} CPU cores, torch {torch.__version__}, gloo over"
        f" loopback, one thread a process, MLP 784-{'-'.join(map(str, hidden))}-10, batch {batch} a process,"
        f" {steps} steps (wall: the fastest; processor: the median); the machine had other work too:",
        "",
        *measured_table(runs),
        "",
        f"Assumed, not measured: {parameters / 1e6:.0f} million float32 parameters, {1e3 * step_seconds:.0f} ms a"
        f" step of backprop, {bandwidth / 1e9:.0f} GB/s and {1e6 * latency:.0f} microseconds a message between devices."
        " k as measured above.",
        *cluster_tables(runs, size, step_seconds, bandwidth, latency),
    ]
    if page is None:
        print("\n".join(text))
        return
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n\n" + "\n".join(text) + f"\n\n{END}{after}")


START, END = "<!-- recipes/scaling.py -->", "<!-- end -->"

if __name__ == "__main__":
    auto_cli(main, as_positional=False)
