"""Predictive coding, equilibrium propagation and contrastive Hebbian learning on one network: one figure.

    python recipes/one_theory.py --data_dir data/mnist
    python recipes/one_theory.py                           # scikit-learn's digits

One tanh network, one batch, one relaxer, float64: x <- x + 0.1 (response - x), all layers at once. Only energy and
phases differ. What is varied is what makes the perturbation small, the nudge lambda, the nudge beta or the feedback
gamma, and how many steps the perturbed phase gets; what is drawn is the cosine of the update to the true gradient.
"""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.recipes.data import MNIST, Digits
from lightning_ebm.recipes.nets import MLP

mpl.use("Agg")
Gradients = dict[str, Tensor]
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CENTERED_UP_TO = 0.3  # a negative nudge beyond one over the loss's curvature, as the states feel it, has no equilibrium


def relaxer(steps: int, tol: float = 0.0) -> ebm.Relaxer:
    """Damped sweeps: for predictive coding Euler steps of 0.1, for a Hopfield energy the usual leaky dynamics."""
    return ebm.FixedPoint(max_steps=steps, order="synchronous", damping=0.9, tol=tol)


SETTLED = relaxer(5000, tol=1e-8)
FREE = ebm.FixedPoint(max_steps=500, tol=1e-11)


@dataclass(frozen=True)
class Theory:
    """One of the three, as a function of what makes its perturbation small.

    Args:
        name: for the panels.
        knob: name of that, for the axes.
        algorithm: at a value of the knob, with a relaxer for the perturbed phase.
        centered: its centered version, where it has one.
        values: of the knob.
        shown: those whose course is drawn step by step.
    """

    name: str
    knob: str
    algorithm: Callable[[float, ebm.Relaxer], ebm.Algorithm]
    centered: Callable[[float, ebm.Relaxer], ebm.Algorithm] | None
    values: tuple[float, ...]
    shown: tuple[float, ...]


def _pc(nudge: ebm.Nudge, phase: ebm.Relaxer) -> ebm.Algorithm:
    return ebm.Algorithm(ebm.PredictiveCoding(), nudge, phase)


def _hopfield(nudge: ebm.Nudge, phase: ebm.Relaxer, feedback: float = 1.0) -> ebm.Algorithm:
    return ebm.Algorithm(ebm.Hopfield(feedback), nudge, phase, free_relaxer=FREE)


_NUDGES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
THEORIES = (
    Theory(
        "predictive coding", "nudge λ", lambda v, r: _pc(ebm.OneSided(v), r), lambda v, r: _pc(ebm.Centered(v), r),
        _NUDGES, (1e-4, 1e-2, 0.1, 1.0, 10.0),
    ),
    Theory(
        "equilibrium propagation", "nudge β", lambda v, r: _hopfield(ebm.OneSided(v), r),
        lambda v, r: _hopfield(ebm.Centered(v), r), _NUDGES, (1e-4, 1e-2, 0.1, 1.0, 10.0),
    ),
    Theory(
        "contrastive Hebbian learning", "feedback \N{GREEK SMALL LETTER GAMMA}",
        lambda v, r: _hopfield(ebm.Clamped(), r, v), None,
        (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0), (1e-4, 1e-2, 0.1, 0.3, 1.0),
    ),
)  # fmt: skip


def compared(estimate: Gradients, true: Gradients) -> dict[str, float]:
    """Cosine and relative error over all parameters."""
    found = ebm.metrics.alignment(estimate, true)
    return {name: found[name] for name in ("cosine", "relative_error")}


def measure(theory: Theory, net: torch.nn.Module, loss: Callable[[], Tensor], steps: Sequence[int]) -> dict[str, Any]:
    """All curves of one theory on one batch.

    "equilibrium": at each value of the knob, the update of the settled phase against the true gradient, and against
    backprop's; "centered", likewise; "course": cosine to the true gradient ``[value][steps]``. The true gradient is
    backprop's for predictive coding and for contrastive Hebbian learning, whose free equilibrium is the forward pass or
    tends to it; for equilibrium propagation it is that of the loss at the free equilibrium.
    """
    backprop = ebm.reference.backprop(net, loss)
    true = backprop
    if theory.name == "equilibrium propagation":
        true = ebm.reference.equilibrium(net, loss, theory.algorithm(0.1, SETTLED), output="state")

    def update(algorithm: ebm.Algorithm) -> Gradients:
        return ebm.Learner(net, algorithm, output="state").gradients(loss)

    found: dict[str, Any] = {"values": theory.values, "steps": steps, "equilibrium": [], "centered": [], "course": []}
    for value in theory.values:
        settled = update(theory.algorithm(value, SETTLED))
        entry = compared(settled, true) | {"to_backprop": compared(settled, backprop)["cosine"]}
        found["equilibrium"].append(entry)
        if theory.centered is not None and value <= CENTERED_UP_TO:
            found["centered"].append(compared(update(theory.centered(value, SETTLED)), true))
    found["course"] = [
        [compared(update(theory.algorithm(value, relaxer(n))), true)["cosine"] for n in steps]
        for value in theory.values
    ]
    return found


BACKPROP, BETWEEN, EQUILIBRIUM = "#1b7837", "#a6611a", "#762a83"  # the three regimes
LEAST = 1e-10  # of 1 - cosine that is drawn


@mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A column for each theory; above against what makes it small, below against the steps."""
    figure, axes = plt.subplots(2, len(found), figsize=(15, 9.5), layout="constrained", sharey=True)
    for column, (theory, entry) in enumerate(zip(THEORIES, found.values(), strict=True)):
        _against_knob(axes[0, column], theory, entry)
        _against_steps(axes[1, column], theory, entry)
    for panel in axes.flat:
        panel.set(yscale="log", ylim=(1, LEAST / 3))  # downwards, so that up is backprop
        nines = range(11)
        panel.set_yticks([10.0**-n for n in nines], [_cosine(n) for n in nines])
        panel.minorticks_off()
        panel.axhspan(1e-4, LEAST / 3, color=BACKPROP, alpha=0.07, lw=0)
        panel.grid(alpha=0.2)
    for panel in axes[:, 0]:
        panel.set_ylabel("cosine to the true gradient")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cosine(nines: int) -> str:
    return "0" if nines == 0 else "." + "9" * nines if nines < 5 else f"1 - $10^{{-{nines}}}$"


def _missing(cosines: Sequence[float]) -> list[float]:
    return [max(1 - value, LEAST / 3) for value in cosines]


def _named(panel: Any, x: float, y: float, text: str, color: str, side: str = "left") -> None:
    panel.text(x, y, text, color=color, transform=panel.transAxes, weight="bold", linespacing=1.3, ha=side)


def _against_knob(panel: Any, theory: Theory, entry: dict[str, Any]) -> None:
    values, steps = entry["values"], entry["steps"]
    for n, alpha in zip((4, 16, 64), (0.45, 0.7, 1.0), strict=True):
        if n in steps:
            cut_short = [row[steps.index(n)] for row in entry["course"]]
            missing, below = _missing(cut_short), n == 4
            panel.plot(values, missing, ".-", color=BETWEEN, alpha=alpha, lw=1.2)
            panel.annotate(
                f"{n} steps", (values[0], missing[0]), (2, -12 if below else 4), textcoords="offset points",
                color=BETWEEN, alpha=alpha, fontsize=9,
            )  # fmt: skip
    settled = [e["cosine"] for e in entry["equilibrium"]]
    panel.plot(values, _missing(settled), "o-", color=EQUILIBRIUM, lw=2, ms=5)
    if entry["centered"]:
        centered = _missing([e["cosine"] for e in entry["centered"]])
        panel.plot(values[: len(centered)], centered, "s:", color=EQUILIBRIUM, ms=4)
        panel.annotate(
            "centered", (values[2], centered[2]), (8, 0), textcoords="offset points", color=EQUILIBRIUM, fontsize=9.5
        )
    panel.set(xscale="log", title=theory.name, xlabel=f"{theory.knob}")
    _named(panel, 0.97, 0.93, "backprop's direction", BACKPROP, "right")
    _named(panel, 0.97, 0.62, "equilibrium of a\nfinite perturbation", EQUILIBRIUM, "right")
    _named(panel, 0.97, 0.02, "in between: cut short", BETWEEN, "right")


def _against_steps(panel: Any, theory: Theory, entry: dict[str, Any]) -> None:
    values, steps = entry["values"], entry["steps"]
    colors = mpl.colormaps["plasma"]
    letter = theory.knob[-1]
    for index, value in enumerate(theory.shown):
        color = colors(index / len(theory.shown))
        course = _missing(entry["course"][values.index(value)])
        panel.plot(steps, course, ".-", color=color, lw=1.8)
        panel.annotate(
            f"{letter} = {value:g}", (steps[-1], course[-1]), (6, -3), textcoords="offset points",
            color=color, fontsize=10, annotation_clip=False,
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_xticks(steps, [str(n) for n in steps])
    panel.set(xlabel="steps of the perturbed phase")
    _named(panel, 0.03, 0.93, "backprop's direction", BACKPROP)
    _named(panel, 0.03, 0.30, f"in between:\nthe same at any {letter}", BETWEEN)
    _named(panel, 0.98, 0.02, "equilibrium of a\nfinite perturbation", EQUILIBRIUM, "right")


def main(
    data_dir: Path | None = None,
    hidden: tuple[int, ...] = (128, 64),
    batch_size: int = 64,
    steps: tuple[int, ...] = STEPS,
    gain: float = 0.5,
    seed: int = 0,
    root: Path = Path("runs/one-theory"),
) -> dict[str, dict[str, Any]]:
    """Measures, keeps the curves as JSON, and draws them.

    Args:
        data_dir: where MNIST is, or goes; without it scikit-learn's digits.
        hidden: widths of the hidden layers.
        batch_size: how many training images, the first ones.
        steps: numbers of steps of the perturbed phase.
        gain: on torch's initial weights between layers; at 1 the loops of a Hopfield energy are close to bistable, and
            take ten thousand steps.
        seed: of the weights.
        root: where ``one_theory.json`` and ``one_theory.png`` go.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning_ebm").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = Digits() if data_dir is None else MNIST(dir=data_dir, mean=(0.0,), std=(1.0,))
    data.prepare_data()
    data.setup("fit")
    x, y = data.parts["train"].__getitems__(list(range(batch_size)))
    x, target = x.flatten(1).double(), F.one_hot(y, 10).double()
    torch.manual_seed(seed)
    net = MLP((x.shape[1], *hidden, 10), activation="tanh").double()
    for layer in list(net.modules())[-1:0:-1]:
        if isinstance(layer, torch.nn.Linear) and layer.in_features != x.shape[1]:
            layer.weight.data *= gain

    def loss() -> Tensor:
        value: Tensor = 0.5 * (net(x) - target).square().sum(1).mean()
        return value

    found = {theory.name: measure(theory, net, loss, steps) for theory in THEORIES}
    root.mkdir(parents=True, exist_ok=True)
    (root / "one_theory.json").write_text(json.dumps(found, indent=1))
    draw(found, root / "one_theory.png")
    print(f"written to {root / 'one_theory.png'}")
    return found


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
