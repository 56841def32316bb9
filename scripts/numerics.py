"""What numbers of 32 and 16 bits cost an update, and which negative nudges have a minimum; writes docs/numerics.md.

    bash scripts/with-venv python scripts/numerics.py
    bash scripts/with-venv python scripts/reliability.py --only numerics  # the same, and its row in docs/reliability.md

A batch of scikit-learn's digits, networks that nobody trained, one core: some seconds. What is compared is the same
algorithm in other numbers, but for the table of nudges, where backprop in float64 is what the errors are told against.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "numerics.md"
KINDS = {"float32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SHARES = (0.5, 0.9, 0.99, 1.01, 1.1, 2.0)

Loss = Callable[[Tensor, Tensor], Tensor]


def network(*widths: int, gain: float = 1.0) -> nn.Sequential:
    """Tanh between, in float64: the same numbers whatever they are rounded to."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    net = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for weights in net.parameters():
            weights.mul_(gain)
    return net.double()


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Images of digits in float64, and their labels."""
    found = load_digits()
    return torch.tensor(found.data[:size] / 16), torch.tensor(found.target[:size])


def squared(output: Tensor, labels: Tensor) -> Tensor:
    """1/2 |o - y|^2, whose curvature is 1."""
    return 0.5 * (output - F.one_hot(labels, 10)).square().sum(1).mean()


def update(
    algorithm: str | ebm.Algorithm, dtype: torch.dtype, cast: torch.dtype | None = None, loss: Loss = F.cross_entropy
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of the digits, 64-128-128-10, and the report."""
    (x, y), net = batch(64), network(64, 128, 128, 10).to(dtype)
    learner = ebm.Learner(net, algorithm)
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        return learner.gradients(lambda: loss(net(x.to(dtype)), y)), learner.report


def precisions() -> dict[str, dict[str, dict[str, float]]]:
    """By algorithm and kind of numbers, how far the update is from that of the same algorithm in float64."""
    sweeps = ebm.FixedPoint(60)
    tried: dict[str, str | ebm.Algorithm] = {f'"{name}"': name for name in ebm.algorithms()}
    tried['"equilibrium-propagation", 60 sweeps a phase'] = ebm.algorithm(
        "equilibrium-propagation", relaxer=sweeps, free_relaxer=sweeps
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, rule in tried.items():
        exact, _ = update(rule, torch.float64)
        rows = {
            kind: ebm.metrics.alignment(update(rule, torch.float32, cast)[0], exact) for kind, cast in KINDS.items()
        }
        found[name] = {kind: {key: row[key] for key in ("cosine", "relative_error")} for kind, row in rows.items()}
    return found


def nudges() -> dict[str, dict[str, float]]:
    """By what moves and the nudge, the relative error of float32 to backprop."""
    exact, _ = update("backprop", torch.float64)
    moves: dict[str, ebm.Relaxer] = {
        "states": ebm.GradientDescent(0.5, 500, tol=1e-6), "errors": ebm.ErrorCoordinates(500, tol=1e-6),
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for name, relaxer in moves.items():
        found[name] = {}
        for strength in STRENGTHS:
            algorithm = ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(strength), relaxer)
            row = ebm.metrics.alignment(update(algorithm, torch.float32)[0], exact)
            found[name][f"{strength:g}"] = row["relative_error"]
    return found


def negative() -> dict[str, dict[str, str]]:
    """By loss and share of the bound, what becomes of a negative nudge on one hidden layer.

    With W the weights from the states to the output, E has the curvature 1 - |lambda| c along the states' worst
    direction, and c = |W|^2 for the squared error, and at most |W|^2 / 2 for cross-entropy: there is a minimum below
    |lambda| = 1 / c.
    """
    found: dict[str, dict[str, str]] = {}
    x, y = batch(64)
    for name, loss, factor in (("squared error", squared, 1.0), ("cross-entropy", F.cross_entropy, 0.5)):
        found[name] = {}
        for share in SHARES:
            net = network(64, 128, 10, gain=4.0)
            bound = 1 / (factor * float(torch.linalg.matrix_norm(net[2].weight.detach(), 2)) ** 2)
            relaxer = ebm.ErrorCoordinates(2000, tol=1e-3)
            learner = ebm.Learner(net, ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(-share * bound), relaxer))
            try:
                learner.gradients(lambda net=net, loss=loss: loss(net(x), y))
                report = learner.report
                found[name][f"{share:g}"] = f"{report['result']}, {report['steps']} steps"
            except ebm.RelaxationDivergedError:
                found[name][f"{share:g}"] = "refused"
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def shown(cosine: float) -> str:
    """With as many digits as tell it from 1, six at most."""
    return "1.000000" if cosine > 1 - 5e-7 else f"{cosine:.{min(6, max(2, math.ceil(1 - math.log10(1 - cosine))))}f}"


def with_tables(page: str, found: dict[str, Any]) -> str:
    """The page with the tables between their marks."""
    of_each = [
        [name, f"{row['float32']['relative_error']:.0e}", *(shown(row[k]["cosine"]) for k in list(KINDS)[1:])]
        for name, row in found["precisions"].items()
    ]
    tables = {
        "precisions": table(
            ["algorithm", "float32: relative error", "bf16-mixed: cosine", "16-mixed: cosine"], of_each
        ),
        "nudges": table(
            ["what moves", *(f"λ = {float(s):.0e}" for s in found["nudges"]["states"])],
            [[name, *(f"{error:.0e}" for error in row.values())] for name, row in found["nudges"].items()],
        ),
        "negative": table(
            ["loss", *(f"{share} of the bound" for share in found["negative"]["squared error"])],
            [[name, *row.values()] for name, row in found["negative"].items()],
        ),
    }
    for name, text in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        between = re.compile(f"{begin}.*{end}", re.DOTALL)
        assert between.search(page), name
        page = between.sub(lambda _, made=f"{begin}\n\n{text}\n\n{end}": made, page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "reliability" / "numerics.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"precisions": precisions(), "nudges": nudges(), "negative": negative()}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    options.page.write_text(with_tables(options.page.read_text(), found))


if __name__ == "__main__":
    main()
