"""What a LightningModule costs under the Trainer: steps, validation, batches of many lengths, instruments."""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from common_networks import GPT, flat, next_letter, text
from contenders import euler
from networks import mlp
from page import Lines, Settings, line, table
from sweeping import Sigmoid
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_ebm as ebm

Strategy = str | L.pytorch.strategies.Strategy
Fit = Callable[[], tuple[float, float]]
BATCHES, SETTLED_IN, BATCH = 120, 20, 64
LENGTHS, LETTERS = 31, 40
HEAD = f"""## Under the Trainer

CPU time at 1 thread, medians of {{turns}} fits in turn. A step of a fit of {BATCHES} batches of {BATCH} images on
784-256x3-10, after the first {SETTLED_IN}, which find layers and make code and are told apart. "default" is
`EBMStrategy()`.
"EP" is the preset "equilibrium-propagation", on min(max(a, 0), 1), beside stock on the same network."""


class Digits(L.LightningModule):
    """As its author wrote it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, logged."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy, logged."""
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Letters(Digits):
    """A character model."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next letter."""
        return next_letter(self.net(batch[0]), batch[1])


class Clock(L.Callback):
    """CPU time of the first batches, and of one of the others, milliseconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *of: Any, **more: Any) -> None:
        """Begins."""
        self.times.append(time.process_time())

    def on_train_end(self, *of: Any, **more: Any) -> None:
        """Ends."""
        self.times.append(time.process_time())

    def on_validation_batch_start(self, *of: Any, **more: Any) -> None:
        """Begins."""
        self.times.append(time.process_time())

    def on_validation_end(self, *of: Any, **more: Any) -> None:
        """Ends."""
        self.times.append(time.process_time())

    def read(self, first: int) -> tuple[float, float]:
        """What the first batches took, and a later one."""
        times = [1e3 * (moment - self.times[0]) for moment in self.times]
        return times[first], (times[-1] - times[first]) / max(len(times) - 1 - first, 1)


def trainer(strategy: Strategy, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """One that only trains."""
    settings: dict[str, Any] = {"logger": False, "limit_val_batches": 0, **options}
    return L.Trainer(
        strategy=strategy, max_epochs=1, accelerator="cpu", devices=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **settings,
    )  # fmt: skip


def under_the_trainer(given: Settings) -> Lines:
    """A LightningModule under the Trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    turns = max(1, given.repeats // 4)
    yield HEAD.format(turns=turns)
    yield table("activation", "strategy", "ms a step", "stock steps", f"first {SETTLED_IN} steps, s")
    yield from _training(turns)
    yield "\nValidation of batches of 64: EP at its free equilibrium, beside a forward pass and the metric."
    yield table("strategy", "ms a batch", "stock batches")
    yield from _validating(turns)
    yield (
        f"\n{LENGTHS} lengths of text, 33 to 63 letters, in {LETTERS} batches of 8, the whole fit: a character model of"
        " 2 blocks of 64."
    )
    yield table("strategy", "s a fit", "stock fits")
    yield from _lengths(turns)
    yield (
        "\nAn epoch of 200 batches with a logger: `GradientAlignment(50)` and `RelaxationMonitor(50)` look at every"
        " 50th."
    )
    yield table("strategy", "s an epoch", "stock epochs")
    yield from _watched(turns)


STEPS: dict[str, Callable[[], Strategy]] = {
    "stock": lambda: "auto",
    "zero-divergence": lambda: ebm.EBMStrategy("zero-divergence"),
    "pc-nudge": lambda: ebm.EBMStrategy("pc-nudge"),
    "default": lambda: ebm.EBMStrategy(),
    "predictive-coding": lambda: ebm.EBMStrategy("predictive-coding"),
    "PC, 20 Euler steps": lambda: ebm.EBMStrategy(euler(20)),
    "PC, 20 Euler steps, capture=False": lambda: ebm.EBMStrategy(euler(20), capture=False),
}
SETTLED: dict[str, Callable[[], Strategy]] = {
    "stock": lambda: "auto",
    "EP": lambda: ebm.EBMStrategy("equilibrium-propagation"),
}


def _digits(count: int) -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(*flat(count * BATCH)), BATCH)


def _net(activation: type[nn.Module]) -> Digits:
    torch.manual_seed(0)
    return Digits(mlp(784, 256, 256, 256, 10, activation=activation))


def _medians(fits: Mapping[str, Fit], turns: int) -> dict[str, tuple[float, float]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in fits}
    for _ in range(turns):
        for name, fit in fits.items():
            found[name].append(fit())
    return {
        name: (statistics.median(a for a, _ in two), statistics.median(b for _, b in two))
        for name, two in found.items()
    }


def _training(turns: int) -> Lines:
    data = _digits(BATCHES)
    for activation, strategies in ((nn.Tanh, STEPS), (nn.ReLU, STEPS), (Sigmoid, SETTLED)):

        def fit(strategy: Callable[[], Strategy], activation: type[nn.Module] = activation) -> Fit:
            def run() -> tuple[float, float]:
                clock = Clock()
                trainer(strategy(), clock).fit(_net(activation), data)
                return clock.read(SETTLED_IN)

            return run

        shown = {nn.Tanh: "tanh", nn.ReLU: "ReLU"}.get(activation, "min(max(a, 0), 1)")
        found = _medians({name: fit(make) for name, make in strategies.items()}, turns)
        for name, (first, later) in found.items():
            yield line(shown, name, later, f"{later / found['stock'][1]:.2f}", f"{first / 1e3:.2f}")


def _validating(turns: int) -> Lines:
    data = _digits(40)

    def fit(strategy: Callable[[], Strategy]) -> Fit:
        def run() -> tuple[float, float]:
            clock = Clock()
            trainer(strategy(), clock, limit_val_batches=40).validate(_net(Sigmoid), data, verbose=False)
            return clock.read(8)

        return run

    found = _medians({name: fit(make) for name, make in SETTLED.items()}, turns)
    for name, (_, later) in found.items():
        yield line(name, later, f"{later / found['stock'][1]:.2f}")


class Sentences(Dataset[tuple[Tensor, Tensor]]):
    """Batches of text, each of a length of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.batches = [text(34 + 7 * k % LENGTHS)(8) for k in range(LETTERS)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batches[index]


def _lengths(turns: int) -> Lines:
    data = DataLoader(Sentences(), batch_size=None)
    strategies: dict[str, Callable[[], Strategy]] = {"stock": lambda: "auto"}
    for name in ("zero-divergence", "default", "PC, 5 Euler steps"):
        algorithm = {"default": None, "PC, 5 Euler steps": euler(5)}.get(name, name)
        for capture in (True, False):
            shown = name if capture else f"{name}, capture=False"
            strategies[shown] = lambda a=algorithm, c=capture: ebm.EBMStrategy(a, capture=c)  # type: ignore[misc]

    def fit(strategy: Callable[[], Strategy]) -> Fit:
        def run() -> tuple[float, float]:
            clock = Clock()
            torch.manual_seed(0)
            trainer(strategy(), clock).fit(Letters(GPT(2, length=64)), data)
            return clock.read(LETTERS)[0], 0.0

        return run

    found = _medians({name: fit(make) for name, make in strategies.items()}, turns)
    for name, (whole, _) in found.items():
        yield line(name, f"{whole / 1e3:.2f}", f"{whole / found['stock'][0]:.2f}")


def _watched(turns: int) -> Lines:
    data = _digits(200)
    watching: dict[str, tuple[Callable[[], Strategy], Callable[[], list[L.Callback]]]] = {
        "stock": (lambda: "auto", list),
    }
    for name in ("pc-nudge", "default"):
        make = STEPS[name]
        watching[name] = (make, list)
        watching[f"{name}, GradientAlignment"] = (make, lambda: [ebm.GradientAlignment(50)])
        watching[f"{name}, RelaxationMonitor"] = (make, lambda: [ebm.RelaxationMonitor(50)])
        watching[f"{name}, both"] = (make, lambda: [ebm.GradientAlignment(50), ebm.RelaxationMonitor(50)])

    def fit(make: Callable[[], Strategy], callbacks: Callable[[], list[L.Callback]]) -> Fit:
        def run() -> tuple[float, float]:
            clock = Clock()
            with tempfile.TemporaryDirectory() as folder:
                logger = L.pytorch.loggers.CSVLogger(folder)
                trainer(make(), clock, *callbacks(), logger=logger).fit(_net(nn.Tanh), data)
            return clock.read(200)[0], 0.0

        return run

    found = _medians({name: fit(*two) for name, two in watching.items()}, turns)
    for name, (whole, _) in found.items():
        yield line(name, f"{whole / 1e3:.2f}", f"{whole / found['stock'][0]:.2f}")
