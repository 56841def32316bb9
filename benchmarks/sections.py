"""The parts of the page, each a few tables of Markdown."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import lightning as L
import torch
from contenders import HeavyBall, euler, rows, settled, sweeps
from footprint import TITLE, growth_elsewhere
from networks import NETS, Net, chain, conv_net, mlp
from peers import peers
from timing import Contest, medians, timed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

Lines = Iterator[str]
SMALL, LARGE, DEEP = list(NETS)[:3]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, and with whom."""

    repeats: int
    compile: bool
    pythons: Sequence[str]


def table(*columns: str) -> str:
    """The head of a table."""
    return f"\n| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|"


def line(*cells: object) -> str:
    """A row; numbers to one digit."""
    return f"| {' | '.join(f'{cell:.1f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def steps(given: Settings) -> Lines:
    """A training step."""
    yield "## A training step\n\nMilliseconds, and steps of backprop on the same network in the same run."
    yield table("network", "algorithm", "ms a step", "backprop steps")
    for title, net in NETS.items():
        contest = Contest(net)
        for name, (algorithm, options) in rows(net, given.compile).items():
            contest.add(name, algorithm, **options)
        if net.widths is not None:
            contest.add_by_hand("the same by hand, autograd at every step")
        found = contest.medians(given.repeats)
        yield from (line(title, name, value, value / found["backprop"]) for name, value in found.items())


def equilibrium_propagation(given: Settings) -> Lines:
    """Centered EP."""
    yield (
        "## Equilibrium propagation, centered\n\nFree sweeps + nudged ones at each sign, odd layers then even; or to"
        " a tolerance, by such sweeps or by as few as `AcceleratedFixedPoint` takes. Activations min(max(a, 0), 1) in"
        " the MLPs, tanh in the convolutional net."
    )
    yield table("network", "algorithm", "ms a step", "backprop steps", "how it ended")
    conv = "conv 32-64-128-128, batch 16"
    nets = {
        "784-512-10, batch 128": (Net(lambda: mlp(784, 512, 10, activation=Sigmoid), (128, 784)), 20, 10),
        "784-512-512-10, batch 128": (Net(lambda: mlp(784, 512, 512, 10, activation=Sigmoid), (128, 784)), 20, 10),
        conv: (NETS[conv], 60, 15),
    }
    for title, (net, free, nudged) in nets.items():
        contest = Contest(net)
        published = f"{free} + {nudged} + {nudged} sweeps"
        contest.add(published, sweeps(free, nudged))
        settles = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(200, tol=1e-3))
        contest.add("to 1e-3, plain sweeps", settles)
        accelerated = ebm.AcceleratedFixedPoint(200, tol=1e-3)
        contest.add("to 1e-3, accelerated", ebm.algorithm(settles, relaxer=accelerated))
        contest.add('to 1e-3, relaxer="auto"', ebm.algorithm(settles, relaxer="auto"))
        if given.compile:
            contest.add(f"{published}, compile=True", sweeps(free, nudged), compile=True)
            contest.add("to 1e-3, accelerated, compile=True", ebm.algorithm(settles, relaxer=accelerated), compile=True)
        found = contest.medians(min(given.repeats, 5) if title == conv else given.repeats)
        for name, value in found.items():
            report = contest.learners[name].report if name in contest.learners else None
            ended = (
                "" if report is None else f"{report['result']}, {' + '.join(str(p['steps']) for p in report['phases'])}"
            )
            yield line(title, name, value, value / found["backprop"], ended)


def other_libraries(given: Settings) -> Lines:
    """The same update by others."""
    yield (
        "## Other libraries\n\nThe same update everywhere: lambda = 1, 20 Euler steps of 0.1 on states of all hidden"
        " layers from the forward pass, cross-entropy, Adam in one kernel. Each library compiled by its own means, on"
        " one thread, in a process of its own that takes its turn; its ratio is to its own backprop. JAX by hand is"
        " one jitted function a step, with no library on top."
    )
    yield table("network", "by", "ms a step", "backprop, ms", "ratio")
    absent: list[str] = []
    versions: dict[str, str] = {}
    for title in (SMALL, LARGE):
        net = NETS[title]
        name = f"PC, {net.steps} Euler steps"
        contest = Contest(net, fused=True)
        contest.add(name, euler(net.steps, net.lr))
        if given.compile:
            contest.add(f"{name}, compile=True", euler(net.steps, net.lr), compile=True)
        contest.add_by_hand("by hand")
        with peers(net, given.pythons) as (others, missing):
            absent = missing
            contenders = dict(contest.steps)
            for peer_name, peer in others.items():
                versions[peer_name] = peer.versions
                contenders |= {f"{peer_name}: {step}": take for step, take in peer.steps.items()}
            found = medians(contenders, given.repeats)
        stock = found["backprop"]
        ours = {"this library": name, "this library, compile=True": f"{name}, compile=True"}
        ours["torch by hand"] = "by hand"
        for shown, key in ours.items():
            if key in found:
                yield line(title, shown, found[key], stock, found[key] / stock)
        for peer_name in others:
            value, own = found[f"{peer_name}: {name}"], found[f"{peer_name}: backprop"]
            yield line(title, "JAX by hand" if peer_name == "jax" else peer_name, value, own, value / own)
    if versions:
        yield f"\nVersions: {'; '.join(versions.values())}."
    if absent:
        yield f"\nNot installed here, and so not measured: {', '.join(absent)}."


def automatic(given: Settings) -> Lines:
    """The relaxer that chooses itself, against the best of those it chooses from."""
    yield (
        '## `relaxer="auto"`\n\nAgainst each of its candidates alone, all in one run on the same weights. "Weights'
        ' x 2" stands for a trained network, where relaxations are longer.'
    )
    yield table("network", "chosen", "auto, ms", "best fixed", "ms", "auto / best")
    sigmoid = ebm.algorithm("equilibrium-propagation")
    hopfield = Net(lambda: mlp(784, 512, 512, 10, activation=Sigmoid), (128, 784))
    shallow = Net(lambda: mlp(784, 512, 10, activation=Sigmoid), (128, 784))
    cases = {
        f"{SMALL}, lambda 1": (NETS[SMALL], 1.0, settled(1e-3)),
        f"{SMALL}, weights x 2, lambda 1": (NETS[SMALL], 2.0, settled(1e-3)),
        f"{LARGE}, lambda 1": (NETS[LARGE], 1.0, settled(1e-3)),
        f"{DEEP}, lambda 1": (NETS[DEEP], 1.0, settled(1e-3)),
        f"{DEEP}, weights x 2, lambda 0.1": (NETS[DEEP], 2.0, settled(1e-3, 0.1)),
        "784-256x3-10 with ReLU, batch 64, lambda 1": (_relu(), 1.0, settled(1e-3)),
        "conv 32-64-128-128, batch 16, lambda 1": (NETS["conv 32-64-128-128, batch 16"], 1.0, settled(1e-3)),
        "EP, 784-512-10, batch 128": (shallow, 1.0, sigmoid),
        "EP, 784-512-512-10, batch 128": (hopfield, 1.0, sigmoid),
    }
    for title, (net, gain, algorithm) in cases.items():
        contest = Contest(net, gain, lr=0.0)
        free = ebm.algorithm(algorithm, relaxer="auto")
        assert isinstance(free.relaxer, ebm.Cheapest)
        names = {repr(candidate): candidate for candidate in free.relaxer.candidates}
        contest.add("auto", free)
        contest.steps["auto"]()
        affordable = [[sum(costs) for costs in zip(*rows, strict=True)] for rows in free.relaxer.tried.values()]
        least = [min(costs) for costs in affordable]
        repeats = given.repeats if contest.steps["auto"]() < 200 else 3
        for index, (name, candidate) in enumerate(names.items()):
            # Those that did not arrive, or were given up as far too dear, cannot be the best, and would take minutes.
            if all(costs[index] <= 1.5 * low for costs, low in zip(affordable, least, strict=True)):
                # Alone in a `Cheapest` of one, so that the same engine runs it.
                contest.add(name, ebm.algorithm(algorithm, relaxer=ebm.Cheapest(candidate)))
        found = contest.medians(repeats)
        fixed = {name: value for name, value in found.items() if name in names}
        best = min(fixed, key=lambda name: fixed[name])
        by_kind = {kind: _short(relaxer) for kind, relaxer in free.relaxer.chosen.items()}
        alike = len(set(by_kind.values())) == 1
        chosen = (
            next(iter(by_kind.values())) if alike else ", ".join(f"{kind} {name}" for kind, name in by_kind.items())
        )
        ratio = f"{found['auto'] / fixed[best]:.2f}"
        yield line(title, chosen, found["auto"], _short(names[best]), fixed[best], ratio)


def passes(given: Settings) -> Lines:
    """Acceleration and momentum in error coordinates, counted."""
    yield (
        "## Passes to equilibrium\n\nEvaluations of the network, forward and back, until the slowest sample's residual"
        " is below the tolerance; a count is the same on every machine. * stopped at a kink, where no residual"
        " vanishes; - not there after 100. Momentum: the better of lr 0.8, momentum 0.2 and lr 0.5, momentum 0.3."
    )
    yield table("network", "lambda", "to", "ErrorCoordinates", "Anderson, memory 1", "4", "8", "momentum", "lr = 1")
    nets = {
        "784-256x3-10, tanh": NETS[SMALL],
        "20 layers of 128, tanh": NETS[DEEP],
        "784-256x3-10, ReLU": _relu(),
        "20 layers of 128, ReLU": Net(lambda: mlp(784, *[128] * 20, 10, activation=nn.ReLU), (64, 784)),
        "conv, tanh": NETS["conv 32-64-128-128, batch 16"],
        "conv, ReLU": Net(lambda: conv_net(nn.ReLU), (16, 3, 32, 32)),
    }
    for (title, net), gain in itertools.product(nets.items(), (1.0, 2.0)):
        for strength, tol in itertools.product((1.0, 0.1), (1e-3, 1e-4)):
            heavy = [HeavyBall(lr, momentum, tol) for lr, momentum in ((0.8, 0.2), (0.5, 0.3))]
            columns: list[list[ebm.Relaxer]] = [[ebm.ErrorCoordinates(100, tol=tol)]]
            columns += [[ebm.Anderson(100, memory, tol, coordinates="errors")] for memory in (1, 4, 8)]
            columns += [list[ebm.Relaxer](heavy), [HeavyBall(1.0, 0.0, tol)]]
            counted = [min(map(_key, (_passes(net, gain, strength, r) for r in group))) for group in columns]
            shown = title if gain == 1 else f"{title}, weights x 2"
            yield line(shown, f"{strength:g}", f"{tol:g}", *(text for *_, text in counted))


def _key(found: tuple[int, str]) -> tuple[bool, int, str]:
    count, status = found
    return status == "max_steps", count, "-" if status == "max_steps" else f"{count}{'*' * (status == 'stalled')}"


def _passes(net: Net, gain: float, strength: float, relaxer: ebm.Relaxer) -> tuple[int, str]:
    contest = Contest(net, gain)
    contest.add("counted", ebm.algorithm("predictive-coding", nudge=ebm.OneSided(strength), relaxer=relaxer))
    try:
        contest.steps["counted"]()
    except ebm.RelaxationDivergedError:
        return 0, "max_steps"
    report = contest.learners["counted"].report
    return report["steps"] + 1, report["result"]


def to_a_residual(given: Settings) -> Lines:
    """How long equilibrium takes."""
    yield "## To a given residual\n\nWhole training steps at lambda = 1, in backprop steps; - not there after 500."
    yield table("network", "relaxer", "to 1e-2", "to 1e-3", "to 1e-4")
    for title in (SMALL, DEEP):
        kinds: dict[str, Callable[[float], ebm.Relaxer]] = {
            "GradientDescent(lr=0.5), states": lambda tol: ebm.GradientDescent(0.5, 500, tol),
            "FixedPoint, states": lambda tol: ebm.FixedPoint(500, tol=tol),
            "ErrorCoordinates": lambda tol: ebm.ErrorCoordinates(500, tol=tol),
            "Anderson, errors": lambda tol: ebm.Anderson(500, tol=tol, coordinates="errors"),
        }
        contest = Contest(NETS[title])
        tolerances = (1e-2, 1e-3, 1e-4)
        for (name, make), tol in itertools.product(kinds.items(), tolerances):
            contest.add(f"{name} {tol}", ebm.algorithm("predictive-coding", relaxer=make(tol)))
        found = contest.medians(max(3, given.repeats // 2))
        there = {name: learner.report["result"] == "converged" for name, learner in contest.learners.items()}
        for name in kinds:
            cells = [(f"{name} {tol}", found[f"{name} {tol}"] / found["backprop"]) for tol in tolerances]
            yield line(title, name, *(f"{ratio:.1f}" if there[key] else "-" for key, ratio in cells))


def to_a_cosine(given: Settings) -> Lines:
    """How long backprop's direction takes."""
    yield (
        "## To a given cosine\n\nThe cheapest setting of each rule whose update has that cosine with the true gradient,"
        " over all parameters, in backprop steps; - none of those tried: 5 to 320 Euler steps at lambda 0.01, or"
        " equilibria at lambda 1 to 0.001."
    )
    targets = (0.9, 0.99, 0.999)
    yield table("network", "rule", *(f"cosine {target}" for target in targets))
    weak = ebm.OneSided(0.01)
    families: dict[str, list[ebm.Algorithm]] = {
        "PC by Euler steps on states": [ebm.algorithm(euler(5 * 2**k), nudge=weak) for k in range(7)],
        "PC at equilibrium": [settled(1e-3, strength) for strength in (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)],
        "zero-divergence": [ebm.algorithm("zero-divergence")],
    }
    for title in (SMALL, DEEP):
        contest = Contest(NETS[title])
        chosen: dict[tuple[str, float], str] = {}
        for family, members in families.items():
            for index, algorithm in enumerate(members):
                name = f"{family} {index}"
                cosine = _cosine(NETS[title], algorithm)
                for target in targets:
                    if cosine >= target and (family, target) not in chosen:
                        chosen[family, target] = name
                        if name not in contest.steps:
                            contest.add(name, algorithm)
        found = contest.medians(max(3, given.repeats // 2))
        for family in families:
            names = [chosen.get((family, target)) for target in targets]
            cells = ["-" if name is None else f"{found[name] / found['backprop']:.1f}" for name in names]
            yield line(title, family, *cells)


def _cosine(net: Net, algorithm: ebm.Algorithm) -> float:
    torch.manual_seed(0)
    module = net.make()
    x, y = net.batch()
    closure = lambda: F.cross_entropy(module(x), y)  # noqa: E731
    update, true = ebm.Learner(module, algorithm).gradients(closure), ebm.reference.backprop(module, closure)
    a, b = (torch.cat([gradients[name].flatten() for name in true]) for gradients in (update, true))
    return float(F.cosine_similarity(a, b, dim=0))


def scaling(given: Settings) -> Lines:
    """Depth, width, batch, number of steps."""
    yield "## Depth, width, batch, steps\n\nIn backprop steps of the same network; tanh MLPs on 784 inputs."
    yield table("varied", "to", "backprop, ms", "PC, Euler steps", "predictive-coding", "zero-divergence")
    varied: dict[str, dict[int, Net]] = {
        "depth (128 wide, batch 64)": {d: chain(64, 784, *[128] * d, 10) for d in (2, 5, 10, 20, 40)},
        "width (3 layers, batch 64)": {w: chain(64, 784, w, w, w, 10) for w in (64, 128, 256, 512, 1024)},
        "batch (3 layers of 256)": {b: chain(b, 784, 256, 256, 256, 10) for b in (1, 16, 64, 256, 1024)},
        "Euler steps (3 layers of 256, batch 64)": {
            t: chain(64, 784, 256, 256, 256, 10, steps=t) for t in (1, 5, 20, 80)
        },
    }
    for title, nets in varied.items():
        for value, net in nets.items():
            contest = Contest(net)
            contest.add("euler", euler(net.steps, net.lr))
            contest.add("equilibrium", ebm.algorithm("predictive-coding"))
            contest.add("exact", ebm.algorithm("zero-divergence"))
            found = contest.medians(given.repeats)
            stock = found["backprop"]
            yield line(title, value, stock, *(found[name] / stock for name in ("euler", "equilibrium", "exact")))


def under_the_trainer(given: Settings) -> Lines:
    """An epoch of a LightningModule."""
    yield "## An epoch under the Trainer\n\n784-256x3-10, 60 steps of batch 64, with what it takes to set them up."
    yield table("strategy", "ms an epoch", "stock epochs")
    strategies: dict[str, Callable[[], str | L.pytorch.strategies.Strategy]] = {
        "stock": lambda: "auto",
        "zero-divergence": lambda: ebm.EBMStrategy("zero-divergence"),
        "predictive-coding": lambda: ebm.EBMStrategy("predictive-coding"),
        "PC, 20 Euler steps": lambda: ebm.EBMStrategy(euler(20)),
        "PC, 20 Euler steps, capture=False": lambda: ebm.EBMStrategy(euler(20), capture=False),
    }
    found = medians({name: timed(_epoch(make)) for name, make in strategies.items()}, max(3, given.repeats // 3))
    yield from (line(name, value, f"{value / found['stock']:.2f}") for name, value in found.items())


class Digits(L.LightningModule):
    """As its author wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(784, 256, 256, 256, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, logged."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def _epoch(strategy: Callable[[], str | L.pytorch.strategies.Strategy]) -> Callable[[], object]:
    data = TensorDataset(torch.randn(60 * 64, 784), torch.randint(0, 10, (60 * 64,)))

    def run() -> None:
        torch.manual_seed(0)
        trainer = L.Trainer(
            strategy=strategy(), max_epochs=1, accelerator="cpu", devices=1, enable_checkpointing=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Digits(), DataLoader(data, 64))

    return run


def memory(given: Settings) -> Lines:
    """Peak memory."""
    yield (
        f"## Peak memory\n\n{TITLE}: what a process grows by at its peak over three steps, each measured in a process"
        " of its own, with the code that is loaded, the tracing of the first steps and what the allocator keeps; and,"
        " exactly, what is allocated at the peak of a fourth step, alone and with weights, Adam's moments, the batch."
    )
    yield table("algorithm", "process, MiB", "of backprop's", "a later step, MiB", "in all, MiB", "of backprop's")
    kinds = {
        "backprop": ("backprop", 1),
        "predictive-coding": ("equilibrium", 1),
        "PC, 5 Euler steps": ("traced", 5),
        "PC, 200 Euler steps": ("traced", 200),
        "PC, 5 Euler steps, capture=False": ("plain", 5),
        "PC, 200 Euler steps, capture=False": ("plain", 200),
    }
    found = {name: growth_elsewhere(*kind) for name, kind in kinds.items()}
    stock, _, least = found["backprop"]
    for name, (grown, step, whole) in found.items():
        yield line(name, f"{grown:.0f}", f"{grown / stock:.2f}", step, whole, f"{whole / least:.2f}")


class Sigmoid(nn.Hardtanh):
    """min(max(a, 0), 1), as equilibrium propagation has it."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)


def _relu() -> Net:
    return Net(lambda: mlp(784, 256, 256, 256, 10, activation=nn.ReLU), (64, 784))


def _short(relaxer: ebm.Relaxer) -> str:
    options = {"Anderson": "memory", "FixedPoint": "order", "GradientDescent": "lr"}
    name = type(relaxer).__name__
    return f"{name}({options[name]}={getattr(relaxer, options[name])!r})" if name in options else name


SECTIONS: dict[str, Callable[[Settings], Lines]] = {
    "steps": steps,
    "ep": equilibrium_propagation,
    "peers": other_libraries,
    "auto": automatic,
    "passes": passes,
    "residual": to_a_residual,
    "cosine": to_a_cosine,
    "scaling": scaling,
    "trainer": under_the_trainer,
    "memory": memory,
}
