"""Alignment and accuracy against the bits and the noise of a device, and against feedback that is not the transpose.

    python recipes/hardware.py
    python recipes/hardware.py --page docs/hardware.md

Digits, 64-64-64-10, by predictive coding (descent on the states, one nudged phase and centered) and by equilibrium
propagation (hard sigmoids, centered). Weights of few bits are a parametrization of torch's with a straight-through
slope, which the library trains as any module. Each run is kept in runs.json, so that what was interrupted goes on.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import lightning_ebm as ebm
from lightning_ebm import reference
from lightning_ebm.recipes.data import Digits

mpl.use("Agg")


class FewBits(nn.Module):
    """A weight on the grid of `ebm.Quantized`, up to twice what it was first; its slope is passed straight through."""

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__()
        self.levels = 2 ** (bits - 1) - 1
        self.step = 2 * float(weight.abs().max()) / self.levels

    def forward(self, weight: Tensor) -> Tensor:
        on_grid = (weight / self.step).round().clamp(-self.levels, self.levels) * self.step
        through: Tensor = weight + (on_grid - weight).detach()
        return through


Wrap = Callable[[ebm.Relaxer], ebm.Relaxer]


class Rule(NamedTuple):
    """A row: an algorithm around a relaxer that may be wrapped.

    Attributes:
        algorithm: from what the relaxers are put into.
        bounded: whether activations are hard sigmoids, else tanh.
    """

    algorithm: Callable[[Wrap], ebm.Algorithm]
    bounded: bool = False


def predictive_coding(nudge: ebm.Nudge) -> Callable[[Wrap], ebm.Algorithm]:
    """Twenty steps of descent on the states."""
    return lambda wrap: ebm.Algorithm(ebm.PredictiveCoding(), nudge, wrap(ebm.GradientDescent(0.2, 20)))


def propagation(wrap: Wrap) -> ebm.Algorithm:
    """Twenty free sweeps and ten nudged ones, of which every one is on the device."""
    return ebm.Algorithm(ebm.Hopfield(), ebm.Centered(0.5), wrap(ebm.FixedPoint(10)), wrap(ebm.FixedPoint(20)))


RULES = {
    "PC": Rule(predictive_coding(ebm.OneSided(1.0))),
    "PC, centered": Rule(predictive_coding(ebm.Centered(1.0))),
    "EP, centered": Rule(propagation, True),
}
LEVELS: dict[str, list[float]] = {
    "bits of the states": [4, 6, 8, 12],
    "bits of the weights": [2, 3, 4, 6],
    "noise of the states": [0.001, 0.01, 0.03, 0.1],
    "mismatch of the feedback": [0.1, 0.3, 1.0],
}
FEEDBACK: dict[str, Callable[[], ebm.FeedbackRule]] = {
    "random": ebm.RandomFeedback,
    "signs": ebm.SignSymmetry,
    "Kolen-Pollack": lambda: ebm.KolenPollack(decay=1e-3),
}


def wrapped(kind: str, level: float | str) -> Wrap:
    """What a relaxer is put into."""
    if kind == "bits of the states":
        return lambda relaxer: ebm.Quantized(relaxer, states=int(level), states_range=2.0)
    if kind == "noise of the states":
        return lambda relaxer: ebm.Noisy(relaxer, states=float(level), seed=0)
    if kind == "mismatch of the feedback":
        return lambda relaxer: ebm.Feedback(relaxer, ebm.Mismatch(float(level)))
    if kind == "feedback":
        return lambda relaxer: ebm.Feedback(relaxer, FEEDBACK[str(level)]())
    return lambda relaxer: relaxer


def run(rule: Rule, kind: str, level: float | str, seed: int, updates: int) -> dict[str, float]:
    """Trains one network; the cosine is that of the update with the exact gradient, over the last half of them."""
    torch.manual_seed(seed)
    act = (lambda: nn.Hardtanh(0.0, 1.0)) if rule.bounded else nn.Tanh
    net = nn.Sequential(nn.Linear(64, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10))
    if kind == "bits of the weights":
        for k in (0, 2, 4):
            layer: Any = net[k]
            parametrize.register_parametrization(layer, "weight", FewBits(int(level), layer.weight.detach()))
    algorithm = rule.algorithm(wrapped(kind, level))
    learner = ebm.Learner(net, algorithm)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.5)  # decays weights by 1e-3 a step
    data = Digits()
    data.setup("fit")
    (x, y), (test_x, test_y) = arrays(data, "train"), arrays(data, "test")
    cosines = []
    for update in range(updates):
        rows = torch.randint(len(x), (64,))
        closure = lambda rows=rows: F.cross_entropy(net(x[rows]), y[rows])  # noqa: E731
        try:
            learner.step(closure, optimizer)
        except ebm.RelaxationDivergedError:
            return {"accuracy": 0.1, "cosine": float("nan"), "diverged": float(update)}
        # Where feedback is not the transpose, the equilibrium of EP is no energy's, and has no such gradient.
        if update % 20 == 19 and update >= updates // 2 and not (rule.bounded and "feedback" in kind):
            try:
                exact = (
                    reference.equilibrium(net, closure, algorithm) if rule.bounded else reference.backprop(net, closure)
                )
            except ebm.RelaxationDivergedError:
                continue  # where its states rest is no minimum, and has no gradient to compare with
            cosines.append(ebm.metrics.alignment(learner.gradients(closure), exact)["cosine"])
    with learner.free_phase(lambda: net(test_x)), torch.no_grad():
        accuracy = float((net(test_x).argmax(1) == test_y).float().mean())
    return {"accuracy": accuracy, "cosine": sum(cosines) / len(cosines) if cosines else float("nan")}


def arrays(data: Digits, part: str) -> tuple[Tensor, Tensor]:
    """Inputs in rows, and labels."""
    rows = data.parts[part]
    return rows.__getitems__(list(range(len(rows))))[0].flatten(1), rows.y


def picture(runs: dict[str, dict[str, float]], path: Path) -> None:
    """One column a kind, accuracy above cosine, one line a rule; at the right end what an exact device gives."""
    figure, axes = plt.subplots(2, len(LEVELS), figsize=(2.7 * len(LEVELS), 4.6), sharey="row")
    for column, (kind, levels) in enumerate(LEVELS.items()):
        for row, what in enumerate(("accuracy", "cosine")):
            axis = axes[row, column]
            for color, name in enumerate(RULES):
                points = [mean(runs, f"{name}|{kind}|{level}", what) for level in levels]
                axis.plot(range(len(levels)), points, marker="o", markersize=3, color=f"C{color}", label=name)
                axis.axhline(mean(runs, f"{name}|exact|0", what), color=f"C{color}", linewidth=0.7, linestyle=":")
            axis.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
            axis.spines[["top", "right"]].set_visible(False)
            if row:
                axis.set_xlabel(kind)
    axes[0, 0].set_ylabel("test accuracy")
    axes[1, 0].set_ylabel("cosine with the gradient")
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def mean(runs: dict[str, dict[str, float]], start: str, what: str) -> float:
    """Over the seeds."""
    found = [row[what] for key, row in runs.items() if key.startswith(f"{start}|")]
    return sum(found) / len(found) if found else float("nan")


def table(runs: dict[str, dict[str, float]]) -> str:
    """Accuracy and cosine of every kind and level, as Markdown."""
    lines = ["| | " + " | ".join(RULES) + " |", "| --- |" + " --- |" * len(RULES)]
    rows: list[tuple[str, list[Any]]] = [("exact", [0]), *LEVELS.items(), ("feedback", list(FEEDBACK))]
    for kind, levels in rows:
        for level in levels:
            keys = [f"{name}|{kind}|{level}" for name in RULES]
            cells = [f"{100 * mean(runs, key, 'accuracy'):.1f} %, {mean(runs, key, 'cosine'):.2f}" for key in keys]
            first = kind if kind == "exact" else f"{kind}: {level}"
            lines.append(f"| {first} | " + " | ".join(cells).replace(", nan", "") + " |")
    return "\n".join(lines)


def main(out: Path = Path("runs/hardware"), updates: int = 200, seeds: int = 2, page: Path | None = None) -> None:
    """Runs what is missing, and draws hardware.png.

    Args:
        out: for runs.json and the figure.
        updates: of the weights, in each run.
        seeds: runs of each kind and level.
        page: a Markdown file whose table, between its markers, is put anew.
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "runs.json"
    runs: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    kinds: list[tuple[str, list[Any]]] = [("exact", [0]), *LEVELS.items(), ("feedback", list(FEEDBACK))]
    for seed in range(seeds):
        for kind, levels in kinds:
            for level in levels:
                for name, rule in RULES.items():
                    key = f"{name}|{kind}|{level}|{seed}"
                    if key not in runs:
                        runs[key] = run(rule, kind, level, seed, updates)
                        kept.write_text(json.dumps(runs, indent=1))
                        print(key, json.dumps(runs[key]), flush=True)
    picture(runs, out / "hardware.png")
    print(table(runs))
    if page is not None:
        text = page.read_text()
        begin, end = "<!-- table -->\n", "<!-- end of table -->"
        head, rest = text.split(begin)
        page.write_text(head + begin + "\n" + table(runs) + "\n\n" + end + rest.split(end)[1])


if __name__ == "__main__":
    auto_cli(main)
