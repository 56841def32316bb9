"""Random modules, and steps that change from one to the next, against four oracles that know nothing of each other.

    python scripts/fuzz_programs.py --programs 200 --steps 5 --seed 0
    python scripts/fuzz_programs.py --each --only Drawn --steps 5

Each step runs on copies of one module. Traced code must give what the plain interpreter gives; "zero-divergence" what
autograd gives on an untouched copy; and, where the user's code may be run again at other states, descent on the states
what descent on ordinary leaves gives, written here without the library; a nudge of almost nothing nearly what autograd
gives. What a step keeps, and what is drawn next, must be that of one run of it.
An `EBMError` counts as refused, if both ways say it; whatever else differs or raises is wrong.
"""

import argparse
import copy
import json
import logging
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fuzz_blocks import KINDS, WIDTH, Block
from fuzz_odd import ODD
from fuzz_uses import MORE
from fuzz_ways import FIRST, Ways
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm

Gradients = dict[str, Tensor]
DESCENT = ebm.Algorithm(
    energy=ebm.PredictiveCoding(), nudge=ebm.OneSided(0.3), relaxer=ebm.GradientDescent(0.1, max_steps=4)
)
ALGORITHMS: dict[str, Any] = {
    "predictive-coding": "predictive-coding",
    "error-pc": "error-pc",
    "pc-nudge": "pc-nudge",
    "descent": DESCENT,
    "equilibrium-propagation": "equilibrium-propagation",
    "dual-propagation": "dual-propagation",
    "small nudge": ebm.algorithm("pc-nudge", nudge=ebm.Centered(1e-4)),
}
TWICE = {"equilibrium-propagation"}
"""They run a step twice, and what it keeps is of other states."""
WAYS: list[type[Ways]] = [*FIRST, *MORE, *ODD]
LOSSES = [
    "mse", "cross entropy", "huber", "focal", "sum of two", "logsumexp", "weighted", "binary", "divergence", "margin",
    "nll", "rows", "listed", "squared sum",
]  # fmt: skip
TERMS = [
    "weights", "activity", "auxiliary", "penalty", "attack", "smooth", "metric", "skip", "frozen copy", "nonzero",
    "annealed", "later", "ignored", "own target", "queue", "counted", "uncertain", "sampled", "running",
    "siamese", "distilled", "masked out", "written", "measured", "static",
    "autocast", "mixed", "cut", "standardized", "noised", "float32", "leaf", "inside", "none at first",
]  # fmt: skip


class Replay:
    """What a step computes once: at other states the same again, and the same draws after it."""

    def __init__(self) -> None:
        self._results: list[tuple[Any, Tensor]] = []
        self._at = 0

    def again(self) -> None:
        self._at = 0

    def of(self, compute: Callable[[], Any]) -> Any:
        if self._at == len(self._results):
            self._results.append((cloned(compute()), torch.get_rng_state()))
        result, state = self._results[self._at]
        self._at += 1
        torch.set_rng_state(state)
        return cloned(result)


def cloned(result: Any) -> Any:
    return result.detach().clone() if isinstance(result, Tensor) else result


class Net(nn.Module):
    """A chain of blocks with skips, a head, and a loss whose terms come and go.

    Attributes:
        at: is given every block's output; the oracle that is written without the library puts states in their places.
        replay: what it has computed once, see `once`.
        turn: which ways blocks take, see `Ways`.
        k: how many steps there were before.
    """

    def __init__(self, rng: random.Random, kinds: Sequence[type[Block]] = ()) -> None:
        super().__init__()
        kinds = kinds or [rng.choice(KINDS if rng.random() < 0.4 else WAYS) for _ in range(rng.randint(2, 4))]
        self.blocks = nn.ModuleList([kind(rng) for kind in kinds])
        self.head = nn.Linear(WIDTH, 3)
        self.side = nn.Linear(WIDTH, 2)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("running", torch.ones(()))
        self.kept: dict[str, Any] = {}
        self.leaf: Tensor | None = None
        self.number = 1.0
        self.turn = self.k = 0
        self.replay: Replay | None = None
        self.flags: frozenset[str] = frozenset()
        self.at: Callable[[Tensor], Tensor] | None = None
        self.mask = self.index = torch.zeros(())
        self.edges: tuple[Tensor, Tensor] = (self.mask, self.mask)

    def flag(self, name: str) -> bool:
        return name in self.flags

    def once(self, compute: Callable[[], Any]) -> Any:
        """What a step computes once, and is constant at all states."""
        return compute() if self.replay is None else self.replay.of(compute)

    def quiet(self, x: Tensor) -> Tensor:
        """What it gives without gradients, and without states."""
        at, self.at, replay, self.replay = self.at, None, self.replay, None
        try:
            with torch.no_grad():
                return rows(self(x))
        finally:
            self.at, self.replay = at, replay

    def hidden(self, x: Tensor) -> list[Tensor]:
        hs = [x]
        for k, block in enumerate(self.blocks):
            h = hs[-1]
            if self.flag("skip") and k == 2:
                h = h + hs[1]
            h = block(h, self)
            hs.append(h if self.at is None else self.at(h))
        return hs

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)[-1])  # type: ignore[no-any-return]


@dataclass
class Settings:
    """Of one step."""

    loss: str = "mse"
    terms: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()
    number: float = 1.0
    batch: int = 4
    time: int = 0
    training: bool = True
    frozen: frozenset[str] = frozenset()
    seed: int = 0
    turn: int = 0
    k: int = 0
    hook: str = ""
    also: int = 0
    """Of how many samples another batch is, whose gradient is added to this one's."""

    def says(self) -> str:
        return (
            f"{self.loss} {sorted(self.terms)} flags {sorted(self.flags)} number {self.number} batch {self.batch} time"
            f" {self.time} training {self.training} frozen {sorted(self.frozen)} seed {self.seed}"
            f" turn {self.turn} hook {self.hook} also {self.also}"
        )


CHANGES = [
    "loss", "term", "term", "flag", "flag", "number", "batch", "time", "training", "freeze", "turn", "hook", "also",
]  # fmt: skip
FLAGS = [
    "add", "again", "branch", "call", "checkpoint", "chunk", "custom", "cut", "diagonal", "fill", "flat", "flip",
    "hook", "leaky", "longer", "mean", "noise", "norm", "normal", "order", "other", "pool", "put", "quiet",
    "scatter", "skip", "through", "transpose", "transposed", "weights", "write",
]  # fmt: skip


@dataclass
class Batch:
    """What a step is given."""

    x: Tensor
    y: Tensor
    mask: Tensor
    index: Tensor
    edges: tuple[Tensor, Tensor]


def batch_of(net: Net, s: Settings) -> Batch:
    dtype = torch.float32 if "float32" in s.terms else net.head.weight.dtype
    x = torch.randn(s.batch, *[s.time] * bool(s.time), WIDTH, dtype=dtype)
    y = torch.randint(3, (s.batch,))
    mask = torch.rand(s.batch) > 0.4
    mask[0] = True
    index = torch.randint(5, (s.batch,))
    count = int(torch.randint(3, 7, ()))
    return Batch(x, y, mask, index, (torch.randint(s.batch, (count,)), torch.randint(s.batch, (count,))))


def step_of(net: Net, s: Settings) -> Callable[[], Tensor]:
    """The user's step, on a batch of its own; what it draws is the same whenever it is made anew."""
    torch.manual_seed(s.seed)
    batch = None if "inside" in s.terms else batch_of(net, s)
    return lambda: loss_of(net, s, batch or batch_of(net, s))


def input_of(net: Net, s: Settings, batch: Batch) -> Tensor:
    """What the network is given: the batch as the step has changed it, mostly in place."""
    x = batch.x
    if "static" in s.terms:  # the same memory in every step
        x = net.kept.setdefault(f"static {tuple(x.shape)} {x.dtype}", torch.zeros_like(x)).copy_(x)
    if "standardized" in s.terms:
        x.sub_(x.mean()).div_(x.std() + 1e-3)
    if "noised" in s.terms:
        noise = torch.randn_like(x)
        noise.mul_(0.1)
        x += noise
    if "cut" in s.terms:
        order = torch.randperm(s.batch)
        x[..., :2] = x[order][..., :2]
    if "mixed" in s.terms:
        by = float(torch.distributions.Beta(1.0, 1.0).sample())
        x = by * x + (1 - by) * x[torch.randperm(s.batch)]
    x = x.to(net.head.weight.dtype)
    if "leaf" in s.terms:
        net.leaf = x = x.detach().requires_grad_()
    if "attack" in s.terms:
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(rows(net(z)), batch.y), z)
        x = x + 0.05 * slope.sign()
    if "penalty" in s.terms:
        x = x.clone().requires_grad_()
    return x


def loss_of(net: Net, s: Settings, batch: Batch) -> Tensor:
    """The user's step."""
    net.flags, net.number, net.turn, net.k = s.flags, s.number, s.turn, s.k
    net.mask, net.index, net.edges = batch.mask, batch.index, batch.edges
    x, y, dtype = input_of(net, s, batch), batch.y, net.head.weight.dtype
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in s.terms):
        hs = net.hidden(x)
        out = rows(net.head(hs[-1])).to(dtype)
    if "masked out" in s.terms:
        out.masked_fill_(torch.rand(out.shape) < 0.2, -5.0)
    loss = first_loss(out, y, s.loss)
    if "weights" in s.terms:
        loss = loss + 1e-2 * s.number * sum((p.square().sum() for p in net.parameters()), torch.zeros((), dtype=dtype))
    if "activity" in s.terms:
        loss = loss + 0.1 * hs[1].square().mean()
    if "auxiliary" in s.terms:
        loss = loss + 0.2 * F.cross_entropy(rows(net.side(hs[-2])), y % 2)
    if "penalty" in s.terms:
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = loss + 0.1 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    if "smooth" in s.terms:
        loss = loss + 0.1 * F.cross_entropy(out, y, label_smoothing=0.1 * min(s.number, 2.0))
    if "metric" in s.terms:
        hits = out.detach().argmax(-1).eq(y).float().mean()
        loss = loss * (1.0 + 0.1 * float(hits))
    if "frozen copy" in s.terms:
        with torch.no_grad():
            aim = rows(copy.deepcopy(net.head)(hs[-1]))
        loss = loss + 0.1 * F.mse_loss(out, aim + 0.1)
    if "nonzero" in s.terms:
        wrong = (y > 0).nonzero()[:, 0]
        loss = loss + (out[wrong].square().sum() * 0.01)
    return with_more_terms(net, s, loss, hs, out, y)


def with_more_terms(net: Net, s: Settings, loss: Tensor, hs: list[Tensor], out: Tensor, y: Tensor) -> Tensor:
    """Terms that change from step to step, or remember what there was before."""
    if "annealed" in s.terms:
        mean, log_var = hs[-1].chunk(2, -1)
        loss = loss + min(1.0, s.k / 4) * 0.1 * (mean.square() + log_var.exp() - log_var - 1).mean()
    if "later" in s.terms:
        loss = loss + (0 if s.k < 2 else 0.3) * rows(net.side(hs[-1])).square().mean()
    if "ignored" in s.terms:
        loss = loss + 0.3 * F.cross_entropy(out, y.masked_fill(~net.mask, -100), ignore_index=-100)
    if "own target" in s.terms:
        aim = net.once(lambda: F.normalize(net.side(hs[-2].detach()).detach(), dim=-1))
        loss = loss + 0.2 * (2 - 2 * (F.normalize(net.side(hs[-1]), dim=-1) * aim).sum(-1)).mean()
    if "queue" in s.terms:

        def push() -> Tensor:
            net.kept["queue"] = torch.cat([net.kept.get("queue", out.new_zeros(0, 3)), out.detach()])[-4:]
            return net.kept["queue"]

        loss = loss + 0.1 * (out @ net.once(push).t()).logsumexp(1).mean()
    if "counted" in s.terms:
        loss = loss + 0.1 * out[net.mask].square().sum() / net.mask.sum()
    if "uncertain" in s.terms:
        loss = torch.exp(-net.log_scale) * loss + net.log_scale
    if "sampled" in s.terms:
        q = torch.distributions.Normal(out, F.softplus(out) + 0.1)
        z = q.rsample()
        loss = loss + 0.05 * (q.log_prob(z) + z.square()).mean()
    if "running" in s.terms:
        loss = loss / net.once(lambda: net.running.mul_(0.9).add_(0.1 * loss.detach().abs()) + 0.0)
    if "siamese" in s.terms:
        other = rows(net.head(net.hidden(hs[0].detach().flip(0))[-1]))
        loss = loss + 0.1 * (out - other).square().mean()
    if "distilled" in s.terms:
        aim = net.once(lambda: net.quiet(hs[0].detach() * 0.9).softmax(-1))
        loss = loss + 0.2 * F.cross_entropy(out, aim)
    if "written" in s.terms:
        loss = loss * 1.0
        loss += 0.1 * out.square().mean()
        loss /= 2
    if "measured" in s.terms:
        before = net.once(lambda: net.kept.get("last", 1.0))
        net.once(lambda: net.kept.update(last=loss.item(), total=net.kept.get("total", 0.0) + loss.detach()))
        loss = loss * (0.5 + before)
    return loss * min(s.k, 2) if "none at first" in s.terms else loss


def rows(out: Tensor) -> Tensor:
    return out if out.ndim == 2 else out.mean(1)


def first_loss(out: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "mse":
        return F.mse_loss(out, F.one_hot(y, 3).to(out))
    if kind == "cross entropy":
        return F.cross_entropy(out, y)
    if kind == "huber":
        return F.huber_loss(out, F.one_hot(y, 3).to(out))
    if kind == "focal":
        p = F.log_softmax(out, -1).gather(1, y[:, None])[:, 0]
        return -((1 - p.exp()) ** 2 * p).mean()
    if kind == "sum of two":
        return F.cross_entropy(out, y) + 0.3 * F.mse_loss(out.tanh(), F.one_hot(y, 3).to(out))
    if kind in MORE_LOSSES:
        return MORE_LOSSES[kind](out, y)
    return (out.logsumexp(-1) - out[:, 0]).mean()


def listed(out: Tensor, y: Tensor) -> Tensor:
    losses: list[Tensor] = []
    for row, target in zip(out, y, strict=True):
        losses.append(F.cross_entropy(row[None], target[None]))
    return torch.stack(losses).mean()


MORE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted": lambda out, y: F.cross_entropy(out, y, weight=torch.tensor([1.0, 0.5, 2.0]).to(out)),
    "binary": lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 3).to(out)),
    "divergence": lambda out, y: F.kl_div(
        out.log_softmax(-1), F.one_hot(y, 3).to(out) * 0.7 + 0.1, reduction="batchmean"
    ),
    "margin": lambda out, y: F.multi_margin_loss(out, y),
    "nll": lambda out, y: F.gaussian_nll_loss(out, F.one_hot(y, 3).to(out), out.exp() + 0.1),
    "rows": lambda out, y: F.cross_entropy(out, y, reduction="none").mul_(torch.rand(len(y)).to(out)).sum() / len(y),
    "listed": listed,
    "squared sum": lambda out, y: (out - F.one_hot(y, 3).to(out)).pow_(2).sum(),
}


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "halves": lambda module: module.register_forward_hook(lambda m, args, out: out * 0.5),
    "writes": lambda module: module.register_forward_hook(lambda m, args, out: out.mul_(0.5)),
    "before": lambda module: module.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,)),
    "looks": lambda module: module.register_forward_hook(lambda m, args, out: None),
}
"""Of the user's, on the first layer of a program, added and removed between steps."""

CAUSES = (
    "Diverged", "for which no convex function", "the step runs twice", "Clipped", "mark_dirty",
    "while gradients are off", "calls backward() itself", "where autograd does not look",
    "Hooks on saved tensors", "reads grad_fn",
)  # fmt: skip
"""Refusals that say what the step does, which it does."""

RERUN = {*TERMS} - {"penalty", "attack", "metric", "frozen copy"}
"""Terms that may be computed again at other states."""


def may_rerun(net: Net, s: Settings) -> bool:
    """Whether the user's code, run at other states, computes what the record does."""
    exact = [b.exact_in(s.turn) if isinstance(b, Ways) else b.exact for b in net.blocks]
    return all(exact) and s.terms <= RERUN


# -------------------------------------------------------------------------------------------------------- the oracles


def batches(s: Settings) -> list[Settings]:
    """The step's, and that whose gradient is added to it."""
    return [s, replace(s, batch=s.also, seed=s.seed + 7, also=0)] if s.also else [s]


def autograd(net: Net, s: Settings) -> Gradients:
    net.zero_grad()
    for one in batches(s):
        step_of(net, one)().backward()
    return collected(net)


def collected(net: Net) -> Gradients:
    """Of parameters and of other leaves."""
    found = {name: p.grad.detach().clone() for name, p in net.named_parameters() if p.grad is not None}
    if net.leaf is not None and net.leaf.grad is not None:
        found["the batch"] = net.leaf.grad.detach().clone()
    for name, block in net.blocks.named_children():
        for k, leaf in enumerate(getattr(block, "kept", {}).get("leaves", ())):
            if leaf.grad is not None:
                found[f"{name}.leaf.{k}"] = leaf.grad.clone()
                leaf.grad = None
    net.leaf = None
    return found


def descended(net: Net, s: Settings, strength: float = 0.3, lr: float = 0.1, steps: int = 4) -> Gradients:
    """dE/dtheta where descent on E(x) = sum 1/2 |x - mu|^2 + lambda B loss ends, over lambda B; by the user's code."""
    states: list[Tensor] = []
    errors: list[Tensor] = []
    number = 0

    def at(mu: Tensor) -> Tensor:
        nonlocal number
        if number == len(states):
            states.append(mu.detach().clone().requires_grad_())
        x = states[number]
        number += 1
        errors.append(0.5 * (x - mu).square().sum())
        return x

    def energy() -> Tensor:
        nonlocal number
        number = 0
        errors.clear()
        replay.again()
        loss = step_of(net, s)()
        return torch.stack(errors).sum() + strength * s.batch * loss

    replay = net.replay = Replay()
    net.at = at
    try:
        for _ in range(steps):
            total = energy()
            slopes = torch.autograd.grad(total, states, allow_unused=True)
            for k, slope in enumerate(slopes):
                if slope is not None:
                    states[k] = (states[k] - lr * slope).detach().requires_grad_()
        net.zero_grad()
        total = energy()
        wanted = {name: p for name, p in net.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        return {name: g / (strength * s.batch) for name, g in zip(wanted, found, strict=True) if g is not None}
    finally:
        net.at = net.replay = None


def held(net: nn.Module) -> Gradients:
    """All that a net keeps: parameters, buffers, and tensors besides."""
    found = {name: t.detach().double() for name, t in net.state_dict().items()}
    for owner, module in net.named_modules():
        for name, t in getattr(module, "kept", {}).items():
            for k, one in enumerate(t if isinstance(t, list) else [t]):
                found[f"{owner}.{name}.{k}"] = torch.as_tensor(one).double()
    return found | {"the generator": torch.get_rng_state().double()}


# ---------------------------------------------------------------------------------------------------------- the fuzz


@dataclass
class Counts:
    """Of comparisons."""

    equal: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unsettled: int = 0
    """Steps of the small nudge that say themselves that they did not settle: their updates are as far as they got."""
    examples: dict[str, str] = field(default_factory=dict)
    """Of what was refused."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Steps that autograd itself does not take."""

    def baseless(self) -> int:
        """How many refusals there were for no cause that is known here."""
        return sum(count for why, count in self.refused.items() if not any(cause in why for cause in CAUSES))


@contextmanager
def silent() -> Iterator[None]:
    """Warnings and logs are no part of this."""
    logger = logging.getLogger("lightning_ebm")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


class Fuzz:
    """One random module and its steps.

    Args:
        seed: of everything.
        counts: what is found out.
        one: a kind of layers and its way, between two plain ones, where that alone is looked at.
    """

    def __init__(self, seed: int, counts: Counts, one: tuple[type[Ways], str] | None = None) -> None:
        self.rng = random.Random(f"{seed} {'' if one is None else one[1]}")
        self.name, self.counts, self.one = f"program {seed}", counts, one
        torch.manual_seed(seed)
        single = self.rng.random() < (0.2 if one is None else 0.0)
        self.stock = Net(self.rng, () if one is None else (Block, one[0], Block)).to(
            torch.float32 if single else torch.float64
        )
        if one is not None:
            self.name = f"{one[0].__name__}.{one[1]} {seed}"
            self.stock.blocks[1].first = self.stock.blocks[1].ways.index(one[1])
        self.held: dict[int, Gradients] = {}
        others = self.rng.sample([name for name in ALGORITHMS if name != "descent"], 1 if one is None else 2)
        self.twins: dict[str, tuple[tuple[Net, ebm.Learner], tuple[Net, ebm.Learner]]] = {}
        eager = self.rng.random() < 0.5
        for name in ["zero-divergence", "descent", *others]:
            layers = Block if name in {"descent", *TWICE} or self.rng.random() < 0.75 else None
            self.twins[name] = self._learner(name, True, eager, layers), self._learner(name, False, False, layers)
        self.hooks: list[Any] = []
        self.settings = [self._settings(seed) if one is None else Settings(loss="cross entropy", seed=seed * 1000)]

    def _learner(self, name: str, capture: bool, eager: bool, layers: Any) -> tuple[Net, ebm.Learner]:
        net = copy.deepcopy(self.stock)
        algorithm = ALGORITHMS.get(name, name)
        learner = ebm.Learner(net, algorithm, layers=layers, output="readout", capture=capture)
        if eager:  # code from the first step on
            learner._programs.repeats = lambda known: True  # type: ignore[method-assign]
        return net, learner

    def _settings(self, seed: int) -> Settings:
        r = self.rng
        return Settings(
            loss=r.choice(LOSSES),
            terms=frozenset(t for t in TERMS if r.random() < 0.12),
            flags=frozenset(f for f in FLAGS if r.random() < 0.5),
            number=r.choice([0.5, 1.0, 1.5, 0, 0.0, -1, 2]),
            batch=r.randint(2, 5),
            time=r.choice([0, 0, 3]),
            training=r.random() < 0.8,
            seed=seed * 1000,
            hook=r.choice(["", "", "", *HOOKS]),
        )

    def _next(self) -> Settings:
        """The same program on other data, an earlier one, or another one."""
        r = self.rng
        s = copy.copy(r.choice(self.settings) if r.random() < 0.5 else self.settings[-1])
        s.seed += 1 + len(self.settings)
        s.k = len(self.settings)
        if self.one is not None:
            s.batch, s.training = 4 if s.k < 3 else 3, s.k != 5
            return s
        for _ in range(r.choice([0, 0, 1, 1, 2])):
            what = r.choice(
                [
                    "loss",
                    "term",
                    "term",
                    "flag",
                    "flag",
                    "number",
                    "batch",
                    "time",
                    "training",
                    "freeze",
                    "turn",
                    "hook",
                ]
            )
            if what == "loss":
                s.loss = r.choice(LOSSES)
            elif what == "term":
                s.terms = s.terms ^ {r.choice(TERMS)}
            elif what == "flag":
                s.flags = s.flags ^ set(r.sample(FLAGS, 4))
            elif what == "number":
                s.number = r.choice([0.5, 1.0, 1.5, 2.0, 1, 0, -1, 0.0, -0.0])
            elif what == "batch":
                s.batch = r.randint(2, 5)
            elif what == "time":
                s.time = r.choice([0, 2, 3])
            elif what == "also":
                s.also = r.choice([0, s.batch, 3])
            elif what == "turn":
                s.turn += 1
            elif what == "hook":
                s.hook = r.choice(["", *HOOKS])
            elif what == "training":
                s.training = not s.training
            else:
                s.frozen = s.frozen ^ {r.choice([name for name, _ in self.stock.named_parameters()])}
        return s

    def _nets(self) -> list[Net]:
        return [self.stock, *(net for twins in self.twins.values() for net, _ in twins)]

    def _set(self, s: Settings) -> None:
        """What people do between steps, to all copies alike."""
        names = [name for name, _ in self.stock.named_parameters()]
        replaced = self.rng.choice(names) if self.one is None and self.rng.random() < 0.1 else None
        zeroed = self.rng.choice(names) if self.one is None and self.rng.random() < 0.1 else None
        moved = self.rng.choice(names) if self.one is None and self.rng.random() < 0.1 else None
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        for net in self._nets():
            net.train(s.training)
            for name, p in net.named_parameters():
                p.requires_grad_(name not in s.frozen and ".slow." not in name)
                if name == zeroed:
                    nn.init.zeros_(p)
            if moved is not None and ".parametrizations." not in moved:
                p = net.get_parameter(moved)
                p.data = p.data.clone() if s.k % 2 else p.data.mT.contiguous().mT if p.ndim > 1 else p.data + 0.0
            if replaced is not None and ".parametrizations." not in replaced:
                owner, _, last = replaced.rpartition(".")
                module = net.get_submodule(owner)
                old = getattr(module, last)
                setattr(module, last, nn.Parameter(old.detach().clone() * 0.9, requires_grad=old.requires_grad))
            if s.hook:
                self.hooks.append(HOOKS[s.hook](net.blocks[0].linear))

    def run(self, steps: int) -> None:
        for k in range(steps):
            s = self.settings[-1] if k == 0 else self._next()
            if k:
                self.settings.append(s)
            self._set(s)
            self._step(k, s)

    def _step(self, k: int, s: Settings) -> None:
        before = copy.deepcopy(self.stock)
        try:
            truth = autograd(self.stock, s)
        except Exception as error:  # the user's own fault: BatchNorm on one sample, say
            why = f"{type(error).__name__}: {reason(str(error))}"
            self.counts.skipped[why] += 1
            self.counts.examples.setdefault(why, f"{self.name} {[said(b, s) for b in self.stock.blocks]} {s.says()}")
            self._follow(before, {})
            return
        kept = held(self.stock)
        plain: Gradients | str
        for name, (fast, slow) in self.twins.items():
            found = [self._one(*twin, s) for twin in (fast, slow)]
            label = f"{self.name} step {k} {name}: {[said(b, s) for b in self.stock.blocks]} {s.says()}"
            quick, plain = found
            if isinstance(quick, str) or isinstance(plain, str):
                if quick == plain and quick.startswith("refused"):  # type: ignore[union-attr]
                    self.counts.refused[str(quick)] += 1
                    self.counts.examples.setdefault(str(quick), label)
                else:
                    self._wrong(label, f"fast: {short(quick)}; plain: {short(plain)}")
                continue
            room = 1e-5 if name in TWICE else 1e-10 if name in ("zero-divergence", "descent") else 1e-8
            self._compare(label, "fast against plain", quick, plain, room)
            for net, what in ((slow[0], "what it keeps"), (fast[0], "what traced code keeps")):
                if name not in TWICE:
                    self._compare(label, what, self.held[id(net)], kept, 1e-9)
            self._compare(label, "what both keep", self.held[id(fast[0])], self.held[id(slow[0])], room)
            if name == "small nudge" and slow[1].report["result"] == "max_steps":
                self.counts.unsettled += 1
            elif name == "small nudge":
                self._compare(label, "small nudge against autograd", plain, truth, 1e-2)
            if name == "zero-divergence":
                self._compare(label, "against autograd", plain, truth, 1e-9)
            if name == "descent" and self._room(s) < 0.1 and not s.also and may_rerun(before, s):
                named = dict(before.named_parameters())  # leaves besides are not looked at there
                plain = {name: g for name, g in plain.items() if name in named}
                self._compare(label, "against explicit states", plain, descended(copy.deepcopy(before), s), 1e-9)
        self._follow(self.stock, truth)

    def _one(self, net: Net, learner: ebm.Learner, s: Settings) -> Gradients | str:
        net.zero_grad()
        try:
            for one in batches(s):
                learner.backward(step_of(net, one))
            self.held[id(net)] = held(net)
            return collected(net)
        except ebm.EBMError as error:
            return f"refused: {type(error).__name__}: {reason(str(error))}"
        except Exception as error:
            return f"raised: {type(error).__name__}: {error} ({where_in_library(error)})"

    def _follow(self, stock: Net, gradients: Gradients) -> None:
        """All copies go on from where one is."""
        state = copy.deepcopy((stock.state_dict(), kept_by(stock)))
        with torch.no_grad():
            for net in self._nets():
                net.load_state_dict(state[0])
                for module, kept in zip(net.modules(), copy.deepcopy(state[1]), strict=True):
                    if kept is not None:
                        module.kept = kept
                for name, p in net.named_parameters():
                    if name in gradients:
                        p -= 0.05 * gradients[name].clamp(-1, 1)

    def _room(self, s: Settings) -> float:
        """How much rounding may differ by at least."""
        if self.stock.head.weight.dtype == torch.float64:
            return 0.0
        return 0.2 if "autocast" in s.terms or "by_autocast" in str([said(b, s) for b in self.stock.blocks]) else 5e-3

    def _compare(self, label: str, what: str, one: Gradients, other: Gradients, room: float) -> None:
        off, where = difference(one, other)
        room = max(room, self._room(self.settings[-1]))
        if off <= room:
            self.counts.equal[what] += 1
        else:
            self._wrong(label, f"{what}: {off:.2e} at {where}")

    def _wrong(self, label: str, what: str) -> None:
        self.counts.wrong.append(f"{label}\n    {what}")


def kept_by(net: nn.Module) -> list[dict[str, Any] | None]:
    return [getattr(module, "kept", None) for module in net.modules()]


def said(block: nn.Module, s: Settings) -> str:
    return block.says(s.turn) if isinstance(block, Ways) else type(block).__name__


def where_in_library(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "lightning_ebm" in f.filename]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "outside"


def short(found: Gradients | str) -> str:
    return found if isinstance(found, str) else "gradients"


def reason(text: str) -> str:
    return re.sub(r"[\d.]+(e-?\d+)?", "N", text)[:420]


def difference(one: Gradients, other: Gradients) -> tuple[float, str | None]:
    """The largest, relative to the largest of all gradients and to a thousandth of it at least."""
    largest = max((float(g.abs().max()) for g in other.values() if g.numel()), default=0.0)
    worst, where = 0.0, None
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        if a is None or b is None:
            there = b if a is None else a
            off = float(there.abs().max()) / max(largest, 1e-30)  # type: ignore[union-attr]
        else:
            if not torch.equal(a.isnan(), b.isnan()):
                return float("inf"), name
            size = max(float(b.nan_to_num().abs().max()) if b.numel() else 0.0, 1e-2 * largest, 1e-6)
            off = float((a - b).nan_to_num().abs().max()) / size if a.numel() else 0.0
        if off > worst:
            worst, where = off, name
    return worst, where


def fuzzed(programs: int, steps: int, seed: int, seconds: float = float("inf")) -> tuple[Counts, int]:
    """Runs as many programs as the time allows; the counts, and how many there were."""
    counts, began, done = Counts(), time.monotonic(), 0
    with silent():
        for k in range(programs):
            if time.monotonic() - began > seconds:
                break
            Fuzz(seed + k, counts).run(steps)
            done += 1
    return counts, done


def each(steps: int, seed: int, seconds: float = float("inf"), only: str = "") -> tuple[Counts, int]:
    """Runs every way of every kind once, between two plain layers."""
    counts, began, done = Counts(), time.monotonic(), 0
    with silent():
        for kind in WAYS:
            for way in kind.names():
                if only in f"{kind.__name__}.{way}" and time.monotonic() - began < seconds:
                    Fuzz(seed, counts, (kind, way)).run(steps)
                    done += 1
    return counts, done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--json", type=Path, help="writes the figures there")
    parser.add_argument("--each", action="store_true", help="every way of every kind once, in place of random programs")
    parser.add_argument("--only", default="", help="with --each, those whose names hold this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    if options.each:
        counts, done = each(options.steps, options.seed, options.seconds, options.only)
    else:
        counts, done = fuzzed(options.programs, options.steps, options.seed, options.seconds)
    print(f"{done} programs of {options.steps} steps in {time.monotonic() - began:.0f} s")
    print("steps that autograd does not take:")
    for why, count in counts.skipped.most_common():
        print(f"  {count:5d} {why}\n        such as {counts.examples[why]}")
    print("equal:", dict(counts.equal))
    print(f"refused, {counts.baseless()} for no known cause:")
    for why, count in counts.refused.most_common():
        print(f"  {count:5d} {why}\n        such as {counts.examples[why]}")
    print("not settled, and said so:", counts.unsettled)
    print("wrong:", len(counts.wrong))
    for why, count in Counter(reason(text.splitlines()[-1].strip()) for text in counts.wrong).most_common():
        print(f"  {count:5d} {why}")
    for text in counts.wrong[: options.show]:
        print("  " + text)
    if options.json is not None:
        figures = {
            "programs": done, "steps": done * options.steps, "seed": options.seed,
            "skipped": sum(counts.skipped.values()),
            "equal": dict(counts.equal), "refused": sum(counts.refused.values()), "unsettled": counts.unsettled,
            "wrong": len(counts.wrong),
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=1))
    return 1 if counts.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
