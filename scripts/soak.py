"""Many steps of small networks, and what they leave behind: nothing.

    bash scripts/with-venv python scripts/soak.py --steps 100000

Lives follow each other in one process. In each a network is made, trained for some steps (`--life`) by an algorithm
drawn by lot, and dropped; a few others live as long as the process. From step to step the batch changes its shape, the
mode of the module, what is frozen, and what is asked: an update, a whole step, gradients, an equilibrium, a free
phase, a batch that cannot be trained on, a fit by the Trainer. Memory is what the operating system counts (RSS), the
blocks that Python's allocator has given out and, with `--trace`, which is three times slower, their bytes
(tracemalloc); sampled between lives: flat means that the last fifth takes what the second does. Modules, learners and
strategies that were dropped must be gone, and no hook, thread, file or patch may be left.
"""

import argparse
import gc
import json
import logging
import os
import random
import statistics
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

WIDTH, CLASSES = 6, 3
PAGE = os.sysconf("SC_PAGE_SIZE")


class Recurrent(nn.Module):
    """An LSTM over a few times, read at the last."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x[:, None].expand(-1, 3, -1))[0][:, -1])
        return out


class Attending(nn.Module):
    """One block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(x[:, None].expand(-1, 3, -1)).mean(1))
        return out


def perceptron(*between: Callable[[], nn.Module]) -> nn.Sequential:
    made = [layer for make in between for layer in (nn.Linear(WIDTH, WIDTH), make())]
    return nn.Sequential(*made, nn.Linear(WIDTH, CLASSES))


def convolutional() -> nn.Sequential:
    shape = nn.Unflatten(1, (1, WIDTH))
    return nn.Sequential(
        shape, nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.LazyLinear(3)
    )


def normed() -> nn.Sequential:
    net = perceptron(nn.Tanh, nn.Tanh)
    return nn.Sequential(net[0], nn.BatchNorm1d(WIDTH), *net[1:])


NETS: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: perceptron(nn.Tanh, nn.Tanh),
    "relu": lambda: perceptron(nn.ReLU, nn.ReLU),
    "dropout": lambda: perceptron(lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.2)), nn.GELU),
    "batch norm": normed,
    "convolutional": convolutional,
    "recurrent": Recurrent,
    "attending": Attending,
}
ALGORITHMS = [name for name in ebm.algorithms() if name != "backprop"]
SLOW = {"equilibrium-propagation", "equilibrium-propagation-one-sided", "holomorphic-ep", "recurrent-backprop",
        "contrastive-hebbian", "coupled-learning", "dual-propagation", "infinitesimal"}  # fmt: skip
"""They settle in hundreds of evaluations; the networks that take long to evaluate are left to the others."""


def drawn(rng: random.Random) -> tuple[str, str]:
    """A network and an algorithm."""
    name, algorithm = rng.choice(list(NETS)), rng.choice(ALGORITHMS)
    return ("tanh" if algorithm in SLOW else name), algorithm


MODES = ("backward", "step", "gradients", "relax", "free phase", "broken", "eval", "frozen")
BREAKS = 1e8
"""What a broken batch is multiplied by besides holding a nan."""


class Fitted(L.LightningModule):
    """A module for the Trainer."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(4 * self.steps, WIDTH), torch.arange(4 * self.steps) % CLASSES), 4)


@dataclass
class Left:
    """What may be left behind.

    Attributes:
        dropped: what has to be gone at the end of its life, by its name.
        gone: how many of these were.
        faults: what was left, in words.
    """

    dropped: list[tuple[str, "weakref.ref[Any]"]] = field(default_factory=list)
    gone: int = 0
    faults: list[str] = field(default_factory=list)

    def drop(self, **held: Any) -> None:
        self.dropped += [(name, weakref.ref(thing)) for name, thing in held.items()]

    def check(self) -> None:
        gc.collect()
        for name, ref in self.dropped:
            if ref() is None:
                self.gone += 1
            else:
                self.faults.append(f"{name} is still held")
        self.dropped = []


def patches() -> dict[str, Any]:
    """What of torch the library replaces while it records, as it stands."""
    hooks = torch.utils.hooks.BackwardHook
    return {
        "backward": torch.autograd.backward,
        "apply": torch.autograd.Function.__dict__.get("apply"),
        "hooks on saved tensors": torch.autograd.graph.saved_tensors_hooks.__enter__,
        "hooks on inputs": hooks.setup_input_hook,
        "hooks on outputs": hooks.setup_output_hook,
    }


def hooks_of(module: nn.Module) -> int:
    """Hooks on it, its parts and its parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)
    return own + sum(len(p._backward_hooks or ()) for p in module.parameters())


def files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def resident() -> int:
    """Bytes of this process in memory."""
    if not os.path.exists("/proc/self/statm"):
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Life:
    """One network and its learner.

    Args:
        rng: draws what happens.
        name: of the network, see `NETS`.
        algorithm: how it learns.
    """

    def __init__(self, rng: random.Random, name: str, algorithm: str) -> None:
        self.rng, self.name, self.algorithm = rng, name, algorithm
        self.module = NETS[name]()
        self.module(torch.zeros(2, WIDTH))
        self.learner = ebm.Learner(
            self.module, algorithm, capture=rng.random() < 0.8,
            on_divergence="raise" if algorithm == "incremental-pc" else rng.choice(["raise", "skip", "pc-nudge"]),
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(self.module.parameters(), 1e-3, weight_decay=0.1)
        self.hooks = hooks_of(self.module)

    def step(self) -> str:
        """Does one thing; which, or that it was refused."""
        mode = self.rng.choice(MODES)
        size = self.rng.choice([2, 3, 4, 5, 8])
        x, y = torch.randn(size, WIDTH), torch.randint(CLASSES, (size,))
        if mode == "broken":
            x = x * BREAKS
            x[0, 0] = float("nan")
        self.module.train(mode != "eval")
        frozen = next(self.module.parameters())
        frozen.requires_grad_(mode != "frozen")
        power = self.rng.choice([1, 1, 1, 2])

        def closure() -> Tensor:
            loss = F.cross_entropy(self.module(x), y)
            return loss if power == 1 else loss * loss

        try:
            if mode == "gradients":
                self.learner.gradients(closure)
            elif mode == "relax":
                self.learner.relax(closure)
            elif mode == "free phase":
                with self.learner.free_phase(lambda: self.module(x)):
                    self.module(x)
            elif mode in ("step", "broken") or self.algorithm == "incremental-pc":
                self.learner.step(closure, self.optimizer)
            else:
                self.optimizer.zero_grad()
                self.learner.backward(closure)
                self.optimizer.step()
        except ebm.EBMError as error:
            self.module.zero_grad()
            return f"refused: {type(error).__name__}"
        finally:
            frozen.requires_grad_(True)
        return mode


def fit(rng: random.Random, steps: int, left: Left) -> None:
    """A short fit by the Trainer, and its end."""
    name, algorithm = drawn(rng)
    module = Fitted(NETS["relu" if name == "convolutional" else name](), steps)  # a lazy layer has no optimizer yet
    strategy = ebm.EBMStrategy(algorithm)
    monitor = ebm.RelaxationMonitor(5)
    trainer = L.Trainer(
        strategy=strategy, callbacks=[monitor], max_epochs=1, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(module)
    except ebm.EBMError:
        """A step that cannot relax, or is not supported: what is left behind counts all the same."""
    left.drop(module=module, strategy=strategy, learner=strategy.learner, monitor=monitor, trainer=trainer)


@dataclass
class Sample:
    """What the process holds between two lives."""

    step: int
    rss: int
    blocks: int
    traced: int


def soaked(
    steps: int, seconds: float, seed: int, trace: bool = False, tell: Callable[[str], None] = lambda text: None,
    length: int = 20,
) -> dict[str, Any]:  # fmt: skip
    """Runs it; the figures, and what was left behind under "faults"."""
    rng, left, did = random.Random(seed), Left(), Counter[str]()
    torch.manual_seed(seed)
    plain, threads, began = patches(), threading.active_count(), time.monotonic()
    lasting = [Life(rng, name, algorithm) for name in NETS for algorithm in ("predictive-coding", "zero-divergence")]
    lasting.append(Life(rng, "tanh", "equilibrium-propagation"))
    samples: list[Sample] = []
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through after every life
    done, opened, most_known = 0, 0, 0
    if trace:
        tracemalloc.start(1)
    while done < steps and time.monotonic() - began < seconds:
        life = Life(rng, *drawn(rng))
        for _ in range(min(length, steps - done)):
            did[life.step()] += 1
        for _ in range(length // 2):
            did[rng.choice(lasting).step()] += 1
        if rng.random() < 0.1:
            fit(rng, 5, left)
            did["fit"] += 5
        if hooks_of(life.module) != life.hooks:
            left.faults.append(f"{life.name} by {life.algorithm} has hooks left")
        left.drop(module=life.module, learner=life.learner, life=life)
        del life
        left.check()
        changed = [name for name, what in patches().items() if what is not plain[name]]
        left.faults += [f"torch's {name} is still replaced" for name in changed]
        done = sum(did.values())
        most_known = max([most_known, *(len(one.learner._programs._known) for one in lasting)])
        samples.append(Sample(done, resident(), sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]))
        opened = opened or files()
        if len(samples) % 20 == 0:
            tell(f"{done} steps, {samples[-1].rss / 2**20:.0f} MiB, {samples[-1].blocks} blocks, {left.faults[:3]}")
    tracemalloc.stop()
    gc.unfreeze()
    if threading.active_count() > threads:
        left.faults.append(f"{threading.active_count() - threads} threads are left")
    if files() > opened:
        left.faults.append(f"{files() - opened} files are left open")
    left.faults += [f"{one.name} has hooks left" for one in lasting if hooks_of(one.module) != one.hooks]
    return {
        "steps": done, "seconds": round(time.monotonic() - began), "lives": len(samples), "gone": left.gone,
        "did": dict(did), "most_programs": most_known, **drift(samples), "faults": sorted(set(left.faults)),
    }  # fmt: skip


def drift(samples: list[Sample]) -> dict[str, float]:
    """Medians of the second fifth and of the last: MiB, and thousands of blocks."""
    fifth = max(1, len(samples) // 5)
    second, last = samples[fifth : 2 * fifth] or samples, samples[-fifth:]

    units = {"rss": 2**20, "blocks": 1000, "traced": 2**20}
    found = {}
    for when, of in (("early", second), ("late", last)):
        for name, unit in units.items():
            found[f"{name}_{when}"] = round(statistics.median(getattr(one, name) for one in of) / unit, 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="ends there, whatever the steps")
    parser.add_argument("--life", type=int, default=20, help="steps of a network that is made and dropped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="counts bytes by tracemalloc as well")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning_ebm", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tell = lambda text: print(text, flush=True)  # noqa: E731
    result = soaked(options.steps, options.seconds, options.seed, options.trace, tell, options.life)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
