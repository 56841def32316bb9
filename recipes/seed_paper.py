"""The experiments of the paper this library starts from, redrawn: Millidge et al., ICLR 2023 (arXiv 2206.02629).

    python recipes/seed_paper.py --data_dir data/mnist
    python recipes/seed_paper.py --data_dir data/mnist --part curves

Predictive coding on MNIST: inputs in [-1, 1], 784-128-64-10, ReLU, ReLU, linear, loss 1/2 |output - one-hot label|^2.
Each curve stands twice: with the published settings, and with the relaxation run to convergence, as the published
number of steps is short of equilibrium at small nudges, and at the smallest float32 states add round-off.
"""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.evaluations import Around
from lightning_ebm.recipes.data import MNIST
from lightning_ebm.recipes.modules import Classifier
from lightning_ebm.recipes.nets import MLP

mpl.use("Agg")
Curves = dict[str, Any]
NUDGES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Watched(ebm.Relaxer):
    """Another relaxer, observed: the energies of every point it evaluates, where it started and where it ended.

    Attributes:
        internal: I of the batch at each evaluation.
        loss: L of the batch, likewise.
        start: the free states.
        end: the relaxed ones.
    """

    def __init__(self, inner: ebm.Relaxer) -> None:
        self.inner = inner
        self.internal: list[float] = []
        self.loss: list[float] = []
        self.start: Sequence[Tensor] = ()
        self.end: Sequence[Tensor] = ()

    def relax(self, landscape: Any, start: Sequence[Tensor], strength: float) -> ebm.Relaxation:
        relaxer = self

        class Observed(Around):
            def answer(self, what: Any, point: Sequence[Tensor], strength: complex) -> Any:
                found = super().answer(what, point, strength)
                slope = what.slope(found)
                relaxer.internal.append(float(slope.internal.sum()))
                relaxer.loss.append(float(slope.loss))
                return found

        found = self.inner.relax(Observed(landscape), start, strength)
        self.start, self.end = start, found.point
        return found


def published(steps: int = 50, lr: float = 0.1) -> ebm.Relaxer:
    """Euler steps of the states, as published."""
    return ebm.GradientDescent(lr=lr, max_steps=steps)


def converged() -> ebm.Relaxer:
    """The same steps, twenty times as many: a count and no tolerance, as forces never vanish at the kinks of ReLU."""
    return ebm.GradientDescent(lr=0.1, max_steps=1000)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Squared Euclidean distance of two sets of gradients."""
    return sum(float((a[name] - b[name]).square().sum()) for name in b)


def curves(net: torch.nn.Module, x: Tensor, y: Tensor) -> Curves:
    """(a) to (e): one batch, float64, the network as initialized.

    Distances of gradients are of the mean over the batch, distances of states the mean over the batch.
    """
    target = F.one_hot(y, 10).to(x.dtype)

    def loss() -> Tensor:
        value: Tensor = 0.5 * (net(x) - target).square().sum(1).mean()
        return value

    true = ebm.reference.backprop(net, loss)

    def estimate(nudge: float, relaxer: ebm.Relaxer) -> dict[str, Tensor]:
        algorithm = ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(nudge), relaxer)
        return ebm.Learner(net, algorithm).gradients(loss)

    found: Curves = {"nudges": NUDGES, "true_norm2": sum(float(g.square().sum()) for g in true.values())}
    watched = Watched(published())
    estimate(1.0, watched)
    found["energies"] = {"internal": watched.internal[:51], "loss": watched.loss[:51]}
    settings: dict[str, Callable[[], ebm.Relaxer]] = {"published": published, "converged": converged}
    for name, make in settings.items():
        moved, error = [], []
        for nudge in NUDGES:
            watched = Watched(make())
            gradient = estimate(nudge, watched)
            squares = [(a - b).square().sum() for a, b in zip(watched.end, watched.start, strict=True)]
            moved.append(float(torch.stack(squares).sum()) / len(x))
            error.append(distance(gradient, true))
        found[name] = {"state_distance": moved, "gradient_distance": error}
    steps = [1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 200, 500]
    found["steps"] = steps
    found["during"] = {
        str(nudge): [distance(estimate(nudge, published(step)), true) for step in steps] for nudge in (1.0, 0.1, 0.01)
    }
    return found


class Watch(L.Callback):
    """Training loss and accuracy of every epoch, and the cosine to backprop of every n-th step."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.accuracy: list[float] = []
        self.test: list[float] = []
        self.cosine: list[float] = []
        self.first_layer: list[float] = []
        self._sum, self._count = 0.0, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self._sum, self._count = self._sum + float(outputs["loss"]), self._count + 1

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for key, values in (("", self.cosine), ("/net/1/weight", self.first_layer)):
            name = f"alignment/cosine{key}"
            if name in trainer.callback_metrics and (trainer.global_step == 0 or (trainer.global_step + 1) % 10 == 0):
                values.append(float(trainer.callback_metrics[name]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.loss.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        self.accuracy.append(float(trainer.callback_metrics["train/accuracy"]))
        self.test.append(float(trainer.callback_metrics["val/accuracy"]))


RUNS: dict[str, ebm.Algorithm | None] = {
    "backprop": None,
    "PC-Nudge, as published": ebm.Algorithm(
        ebm.PredictiveCoding(), ebm.OneSided(1e-4), ebm.GradientDescent(lr=0.3, max_steps=50)
    ),
    "PC-Nudge, converged": ebm.algorithm("pc-nudge"),
}


def train(algorithm: ebm.Algorithm | None, data: MNIST, epochs: int, seed: int) -> Curves:
    """(f) and (g): SGD with momentum 0.9 and 1e-4 for the sum over a batch of 64, 6.4e-3 for the mean, float32."""
    L.seed_everything(seed, verbose=False)
    module = Classifier(
        MLP((784, 128, 64, 10)), "squared-error", lambda p: torch.optim.SGD(p, lr=64 * 1e-4, momentum=0.9)
    )
    watch = Watch()
    callbacks: list[L.Callback] = [watch]
    if algorithm is not None:  # before the watch, which reads what the comparison logs
        callbacks.insert(0, ebm.GradientAlignment(every_n_steps=10))
    trainer = L.Trainer(
        strategy="auto" if algorithm is None else ebm.EBMStrategy(algorithm), callbacks=callbacks, max_epochs=epochs,
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return {key: getattr(watch, key) for key in ("loss", "accuracy", "test", "cosine", "first_layer")}


def draw(found: Curves, path: Path) -> None:
    """The figure, eight panels."""
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.2), layout="constrained")
    (a, b, c, d), (e, f, g, h) = axes
    energies = found["energies"]
    for name in ("internal", "loss"):
        a.plot(energies[name], label={"internal": "internal energy", "loss": "loss"}[name])
    a.plot([sum(pair) for pair in zip(energies["internal"], energies["loss"], strict=True)], "k--", label="total")
    a.set(title="(a) energies during inference, λ = 1", xlabel="inference step", ylabel="energy of the batch")
    nudges = found["nudges"]
    styles = {"published": ("o--", "η = 0.1, 50 steps, as published"), "converged": ("s-", "1000 steps, converged")}
    for name, (style, label) in styles.items():
        moved, error = found[name]["state_distance"], found[name]["gradient_distance"]
        b.plot(nudges, moved, style, ms=4, label=label)
        c.plot(nudges, error, style, ms=4, label=label)
        d.plot(moved, error, style, ms=4, label=label)
    c.axhline(found["true_norm2"], color="gray", lw=1, ls=":", label="|backprop's gradient|²")
    b.set(title="(b) how far the states move", xlabel="nudge λ", ylabel="|x* - x̄|², per sample")
    c.set(title="(c) how far the update is from backprop", xlabel="nudge λ", ylabel="|g/λ - g_BP|²")
    d.set(title="(d) one against the other", xlabel="|x* - x̄|², per sample", ylabel="|g/λ - g_BP|²")
    for panel in (b, c, d):
        panel.set(xscale="log", yscale="log")
    for nudge, values in found["during"].items():
        e.loglog(found["steps"], values, ".-", label=f"λ = {nudge}")
    e.axvline(50, color="gray", lw=1, ls=":", label="published number of steps")
    e.set(title="(e) distance to backprop during inference", xlabel="inference steps, η = 0.1", ylabel="|g/λ - g_BP|²")
    for name, run in found.get("runs", {}).items():
        epochs = range(1, len(run["loss"]) + 1)
        line = "k:" if name == "backprop" else "-"
        if run["cosine"]:
            steps = [10 * i for i in range(len(run["cosine"]))]
            missing = {"": run["cosine"], ", first layer alone": run["first_layer"]}
            for (which, values), style in zip(missing.items(), ("-", ":"), strict=True):
                color = {"PC-Nudge, as published": "C0"}.get(name, "C1")
                f.semilogy(steps, [max(1 - v, 6e-8) for v in values], style, lw=0.8, color=color, label=name + which)
        g.plot(epochs, [100 * v for v in run["accuracy"]], line, marker=".", label=name)
        h.plot(epochs, run["loss"], line, marker=".", label=name)
    f.set(
        title="(f) 1 - cosine with backprop, λ = 1e-4, float32",
        xlabel="training step",
        ylabel="1 - cosine, at least float32's 6e-8",
    )
    g.set(title="(g) training accuracy, %", xlabel="epoch")
    h.set(title="(g) training loss", xlabel="epoch")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    data_dir: Path = Path("data/mnist"),
    epochs: int = 5,
    seed: int = 0,
    part: Literal["all", "curves"] = "all",
    limit: int | None = None,
    root: Path = Path("runs/seed-paper"),
) -> None:
    """Computes the curves, keeps them as JSON, and draws them.

    Args:
        data_dir: where MNIST is, or goes.
        epochs: of training for (f) and (g).
        seed: of weights and batches.
        part: all, or only what needs no training.
        limit: use only so many training images.
        root: where ``curves.json`` and ``seed_paper.png`` go.
    """
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning_ebm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = MNIST(dir=data_dir, batch_size=64, drop_last=True, limit=limit)
    data.prepare_data()
    data.setup("fit")
    L.seed_everything(seed, verbose=False)
    net = MLP((784, 128, 64, 10)).double()
    x, y = data.parts["train"].__getitems__(list(range(64)))
    found = curves(net, x.double(), y)
    if part == "all":
        found["runs"] = {}
        for name, algorithm in RUNS.items():
            found["runs"][name] = train(algorithm, data, epochs, seed)
            run = found["runs"][name]
            cosine = f", median cosine {torch.tensor(run['cosine']).median():.4f}" if run["cosine"] else ""
            print(f"{name}: train {100 * run['accuracy'][-1]:.2f} %, test {100 * run['test'][-1]:.2f} %{cosine}")
    root.mkdir(parents=True, exist_ok=True)
    (root / "curves.json").write_text(json.dumps(found, indent=1))
    draw(found, root / "seed_paper.png")
    for name in ("published", "converged"):
        print(
            f"{name}: |g/λ - g_BP|² at λ = 0.01: {found[name]['gradient_distance'][0]:.3g},"
            f" of {found['true_norm2']:.3g}"
        )
    print(f"written to {root / 'seed_paper.png'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
