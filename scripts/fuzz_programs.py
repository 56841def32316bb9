"""Random modules, and steps that change from one to the next, against four oracles that know nothing of each other.

    python scripts/fuzz_programs.py --programs 200 --steps 5 --seed 0

Each step runs on copies of one module. Traced code must give what the plain interpreter gives; "zero-divergence" what
autograd gives on an untouched copy; and, where the user's code may be run again at other states, descent on the states
what descent on ordinary leaves gives, written here without the library. Buffers must be those of one run of the step.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
}
WIDTH = 4


# ------------------------------------------------------------------------------------------------- parts of programs


class Scaled(torch.autograd.Function):
    """x times a number, with a backward of its own: half the slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        ctx.save_for_backward(x)
        return x * by

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradients[0] * ctx.by * (0.5 + 0.1 * torch.tanh(x)), None


class Block(nn.Module):
    """One layer of a program: how it computes hangs on its kind and on flags that may change between steps."""

    exact = True
    """Whether its code may be run again at other states to get what the record gives."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.act: nn.Module = rng.choice([nn.Tanh, nn.GELU, nn.Softplus, nn.SiLU, nn.Sigmoid])()

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        return self.act(self.linear(h))  # type: ignore[no-any-return]


class Inplace(Block):
    def forward(self, h: Tensor, net: "Net") -> Tensor:
        h = self.linear(h)
        if net.flag("leaky"):
            return F.leaky_relu_(h, 0.1)
        return h.tanh_() if net.flag("other") else h.sigmoid_()


class Sliced(Block):
    """Writes into views, and reads what shares their memory."""

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        h = self.linear(h).clone()
        part = h[..., : WIDTH // 2]
        if net.flag("order"):
            part.mul_(2.0)
            h[..., 1:].add_(part[..., :1])
        else:
            h[..., 0] = h[..., 1] * 0.5
            part.add_(0.1)
        if net.flag("transposed"):
            h.transpose(0, -1).mul_(1.5)
        return self.act(h) + part.sum(-1, keepdim=True)  # type: ignore[no-any-return]


class Residual(Block):
    def forward(self, h: Tensor, net: "Net") -> Tensor:
        out = h + self.act(self.linear(h)) * net.number
        if net.flag("again"):
            out = out + self.act(self.linear(out))
        return out  # type: ignore[no-any-return]


class Normed(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        return self.act(self.norm(self.linear(h)) if net.flag("norm") else self.linear(h))  # type: ignore[no-any-return]


class BatchNormed(Block):
    exact = False  # a second run would move the statistics

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.norm = nn.BatchNorm1d(WIDTH, momentum=rng.choice([0.1, None]))

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        return self.act(self.norm(self.linear(h).flatten(0, -2)).view_as(h))  # type: ignore[no-any-return]


class Dropped(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.drop = rng.choice([nn.Dropout(0.3), nn.Dropout(0.3, inplace=True), nn.AlphaDropout(0.2)])

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        return self.act(self.drop(self.linear(h)))  # type: ignore[no-any-return]


class Noisy(Block):
    def forward(self, h: Tensor, net: "Net") -> Tensor:
        noise = torch.randn_like(h) if net.flag("noise") else torch.rand(h.shape, dtype=h.dtype)
        return self.act(self.linear(h) + 0.1 * noise)  # type: ignore[no-any-return]


class Masked(Block):
    """Picks by a mask of the batch, of another count at every step."""

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        mask = net.mask
        a = self.act(self.linear(h))
        if net.flag("put"):
            out = torch.zeros_like(a)
            out[mask] = a[mask] * 2
            return out + 0.5 * h
        if net.flag("fill"):
            return a.masked_fill(mask.view(-1, *[1] * (a.ndim - 1)), 0.3)  # type: ignore[no-any-return]
        return a + a[mask].mean()  # type: ignore[no-any-return]


class MaskedByValue(Block):
    """Picks by a mask of what it computes: how many, and which, belongs to the recorded pass."""

    exact = False

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        a = self.act(self.linear(h))
        if net.flag("cut"):
            return a + a[a > 0.1].sum() * 0.1  # type: ignore[no-any-return]
        if net.flag("branch"):
            return a * 2 if float(a.detach().sum()) > 0.5 else a - 0.1 * h
        return torch.where(a > 0.1, a, 0.5 * h)


class Detached(Block):
    exact = False

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        a = self.act(self.linear(h))
        if net.flag("through"):
            return h + (a.round() - h).detach() + 0.5 * a  # type: ignore[no-any-return]
        with torch.no_grad():
            gate = torch.sigmoid(a) if net.flag("quiet") else a.mean()
        return a * gate + a.detach() * 0.1  # type: ignore[no-any-return]


class Hooked(Block):
    exact = False  # what a hook makes of a gradient is no slope of any energy

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        a = self.act(self.linear(h))
        if net.flag("hook"):
            by = net.number
            a.register_hook(lambda g: g * by)
        return a * 1.5  # type: ignore[no-any-return]


class Custom(Block):
    def forward(self, h: Tensor, net: "Net") -> Tensor:
        a = self.act(self.linear(h))
        return Scaled.apply(a, net.number) if net.flag("custom") else a * 0.7  # type: ignore[no-any-return, no-untyped-call]


class Checkpointed(Block):
    def forward(self, h: Tensor, net: "Net") -> Tensor:
        run = lambda h: self.act(self.linear(h))  # noqa: E731
        return checkpoint(run, h, use_reentrant=False) if net.flag("checkpoint") else run(h)  # type: ignore[no-any-return]


class Recurrent(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.cell = rng.choice([nn.GRUCell, nn.RNNCell])(WIDTH, WIDTH)

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        flat = h.reshape(-1, WIDTH)
        s = torch.zeros_like(flat)
        for _ in range(3 if net.flag("longer") else 2):
            s = self.cell(flat, s)
        return s.view_as(h)


class Lstm(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.lstm = rng.choice([nn.LSTM, nn.GRU])(WIDTH, WIDTH, batch_first=True)

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        out: Tensor = self.lstm(h if h.ndim == 3 else h[:, None])[0]
        return out.view_as(h)


class Attention(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        q = h if h.ndim == 3 else h[:, None]
        out: Tensor = self.attention(q, q, q, need_weights=net.flag("weights"))[0]
        return out.view_as(h) + h


class Convolved(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        x = h.reshape(-1, 1, WIDTH)
        x = self.conv(x)
        if net.flag("pool"):
            x = F.avg_pool1d(x, 3, 1, 1)
        return self.act(self.linear(x.reshape(h.shape)))  # type: ignore[no-any-return]


class Embedded(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.embedding = nn.Embedding(5, WIDTH, padding_idx=rng.choice([None, 0]))

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        e = self.embedding(net.index)
        e = e if h.ndim == 2 else e[:, None]
        return self.act(self.linear(h) + e) if net.flag("add") else self.act(self.linear(h) * e)  # type: ignore[no-any-return]


class Graph(Block):
    """Sends messages along edges of the batch."""

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        source, target = net.edges
        message = self.linear(h)[source]
        if net.flag("scatter"):
            index = target.view(-1, *[1] * (h.ndim - 1)).expand_as(message)
            out = torch.zeros_like(h).scatter_add(0, index, message)
        else:
            out = torch.zeros_like(h).index_add_(0, target, message)
        return self.act(out) + 0.3 * h  # type: ignore[no-any-return]


class Split(Block):
    def forward(self, h: Tensor, net: "Net") -> Tensor:
        a = self.linear(h)
        left, right = a.chunk(2, -1) if net.flag("chunk") else a.split([WIDTH // 2, WIDTH // 2], -1)
        if net.flag("write"):
            left = left.clone()
            left += right
        out = torch.cat([left * torch.sigmoid(right), self.act(right)], -1)
        return out.flip(-1) if net.flag("flip") else torch.einsum("...i,...i->...i", out, h)


class Functional(Block):
    """Weights computed from weights."""

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        w = self.linear.weight
        if net.flag("normal"):
            w = w / w.norm(dim=1, keepdim=True)
        if net.flag("call"):
            given = {"weight": w * net.number, "bias": self.linear.bias}
            return self.act(torch.func.functional_call(self.linear, given, (h,)))  # type: ignore[no-any-return]
        return self.act(F.linear(h, w, self.linear.bias))  # type: ignore[no-any-return]


class Tied(Block):
    def forward(self, h: Tensor, net: "Net") -> Tensor:
        first = net.blocks[0].linear
        return self.act(F.linear(self.act(self.linear(h)), first.weight.t() if net.flag("transpose") else first.weight))  # type: ignore[no-any-return, operator, arg-type, union-attr]


class Remembering(Block):
    """A buffer, and a plain tensor, that every step writes to."""

    exact = False

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.bank = torch.zeros(WIDTH)

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        a = self.act(self.linear(h))
        if net.flag("mean"):
            self.mean.mul_(0.9).add_(0.1 * a.detach().reshape(-1, WIDTH).mean(0))
        self.bank = self.bank.to(a) * 0.5 + a.detach().reshape(-1, WIDTH).amax(0)
        return a - self.mean + 0.1 * self.bank  # type: ignore[no-any-return]


class Views(Block):
    """Reads one memory through many shapes, before and after it is written to."""

    def forward(self, h: Tensor, net: "Net") -> Tensor:
        a = self.linear(h)
        flat = a.view(-1)
        before = flat[:WIDTH].clone()
        if net.flag("flat"):
            flat.mul_(net.number)
        elif net.flag("diagonal"):
            a.reshape(-1, WIDTH)[0].unsqueeze(0).add_(0.5)
        a.unsqueeze(0).squeeze(0).add_(0.05)
        return self.act(flat.view_as(h)) + before + a.select(-1, 0).unsqueeze(-1)  # type: ignore[no-any-return]


KINDS: list[type[Block]] = [
    Block, Inplace, Sliced, Residual, Normed, BatchNormed, Dropped, Noisy, Masked, MaskedByValue, Detached, Hooked,
    Custom, Checkpointed, Recurrent, Lstm, Attention, Convolved, Embedded, Graph, Split, Functional, Tied, Remembering,
    Views,
]  # fmt: skip
LOSSES = ["mse", "cross entropy", "huber", "focal", "sum of two", "logsumexp"]
TERMS = ["weights", "activity", "auxiliary", "penalty", "attack", "smooth", "metric", "skip", "frozen copy", "nonzero"]


class Net(nn.Module):
    """A chain of blocks with skips, a head, and a loss whose terms come and go.

    Attributes:
        at: is given every block's output; the oracle that is written without the library puts states in their places.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        kinds = [rng.choice(KINDS) for _ in range(rng.randint(2, 4))]
        self.blocks = nn.ModuleList([kind(rng) for kind in kinds])
        self.head = nn.Linear(WIDTH, 3)
        self.side = nn.Linear(WIDTH, 2)
        self.number = 1.0
        self.flags: frozenset[str] = frozenset()
        self.at: Callable[[Tensor], Tensor] | None = None
        self.mask = self.index = torch.zeros(())
        self.edges: tuple[Tensor, Tensor] = (self.mask, self.mask)

    def flag(self, name: str) -> bool:
        return name in self.flags

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

    def says(self) -> str:
        return (
            f"{self.loss} {sorted(self.terms)} flags {sorted(self.flags)} number {self.number} batch {self.batch} time"
            f" {self.time} training {self.training} frozen {sorted(self.frozen)} seed {self.seed}"
        )


FLAGS = [
    "add", "again", "branch", "call", "checkpoint", "chunk", "custom", "cut", "diagonal", "fill", "flat", "flip",
    "hook", "leaky", "longer", "mean", "noise", "norm", "normal", "order", "other", "pool", "put", "quiet",
    "scatter", "skip", "through", "transpose", "transposed", "weights", "write",
]  # fmt: skip


def loss_of(net: Net, s: Settings) -> Tensor:
    """The user's step."""
    torch.manual_seed(s.seed)
    dtype = net.head.weight.dtype
    x = torch.randn(s.batch, *[s.time] * bool(s.time), WIDTH, dtype=dtype)
    y = torch.randint(3, (s.batch,))
    net.mask = torch.rand(s.batch) > 0.4
    net.mask[0] = True
    net.index = torch.randint(5, (s.batch,))
    count = int(torch.randint(3, 7, ()))
    net.edges = torch.randint(s.batch, (count,)), torch.randint(s.batch, (count,))
    net.flags, net.number = s.flags, s.number
    if "attack" in s.terms:
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(rows(net(z)), y), z)
        x = x + 0.05 * slope.sign()
    if "penalty" in s.terms:
        x = x.clone().requires_grad_()
    hs = net.hidden(x)
    out = rows(net.head(hs[-1]))
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
    return loss


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
    return (out.logsumexp(-1) - out[:, 0]).mean()


RERUN = {"weights", "activity", "auxiliary", "smooth", "skip", "nonzero"}
"""Terms that may be computed again at other states."""


def may_rerun(net: Net, s: Settings) -> bool:
    """Whether the user's code, run at other states, computes what the record does."""
    return all(block.exact for block in net.blocks) and s.terms <= RERUN  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------------------------- the oracles


def autograd(net: Net, s: Settings) -> Gradients:
    net.zero_grad()
    loss_of(net, s).backward()  # type: ignore[no-untyped-call]
    return collected(net)


def collected(net: nn.Module) -> Gradients:
    return {name: p.grad.detach().clone() for name, p in net.named_parameters() if p.grad is not None}


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
        loss = loss_of(net, s)
        return torch.stack(errors).sum() + strength * s.batch * loss

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
        net.at = None


# ---------------------------------------------------------------------------------------------------------- the fuzz


@dataclass
class Counts:
    """Of comparisons."""

    equal: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    examples: dict[str, str] = field(default_factory=dict)
    """Of what was refused."""
    skipped: int = 0


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
    """

    def __init__(self, seed: int, counts: Counts) -> None:
        self.rng = random.Random(seed)
        self.name, self.counts = f"program {seed}", counts
        torch.manual_seed(seed)
        self.stock = Net(self.rng).double()
        others = self.rng.sample([name for name in ALGORITHMS if name != "descent"], 1)
        self.twins: dict[str, tuple[tuple[Net, ebm.Learner], tuple[Net, ebm.Learner]]] = {}
        eager = self.rng.random() < 0.5
        for name in ["zero-divergence", "descent", *others]:
            self.twins[name] = self._learner(name, True, eager), self._learner(name, False, False)
        self.settings = [self._settings(seed)]

    def _learner(self, name: str, capture: bool, eager: bool) -> tuple[Net, ebm.Learner]:
        net = copy.deepcopy(self.stock)
        algorithm = ALGORITHMS.get(name, name)
        learner = ebm.Learner(net, algorithm, layers=Block, output="readout", capture=capture)
        if eager:  # code from the first step on
            learner._programs.repeats = lambda known: True  # type: ignore[method-assign]
        return net, learner

    def _settings(self, seed: int) -> Settings:
        r = self.rng
        return Settings(
            loss=r.choice(LOSSES),
            terms=frozenset(t for t in TERMS if r.random() < 0.12),
            flags=frozenset(f for f in FLAGS if r.random() < 0.5),
            number=r.choice([0.5, 1.0, 1.5]),
            batch=r.randint(2, 5),
            time=r.choice([0, 0, 3]),
            training=r.random() < 0.8,
            seed=seed * 1000,
        )

    def _next(self) -> Settings:
        """The same program on other data, an earlier one, or another one."""
        r = self.rng
        s = copy.copy(r.choice(self.settings) if r.random() < 0.5 else self.settings[-1])
        s.seed += 1 + len(self.settings)
        for _ in range(r.choice([0, 0, 1, 1, 2])):
            what = r.choice(["loss", "term", "flag", "flag", "number", "batch", "time", "training", "freeze"])
            if what == "loss":
                s.loss = r.choice(LOSSES)
            elif what == "term":
                s.terms = s.terms ^ {r.choice(TERMS)}
            elif what == "flag":
                s.flags = s.flags ^ set(r.sample(FLAGS, 4))
            elif what == "number":
                s.number = r.choice([0.5, 1.0, 1.5, 2.0, 1])
            elif what == "batch":
                s.batch = r.randint(2, 5)
            elif what == "time":
                s.time = r.choice([0, 2, 3])
            elif what == "training":
                s.training = not s.training
            else:
                s.frozen = s.frozen ^ {r.choice([name for name, _ in self.stock.named_parameters()])}
        return s

    def _nets(self) -> list[Net]:
        return [self.stock, *(net for twins in self.twins.values() for net, _ in twins)]

    def _set(self, s: Settings) -> None:
        replaced = self.rng.choice([n for n, _ in self.stock.named_parameters()]) if self.rng.random() < 0.1 else None
        for net in self._nets():
            net.train(s.training)
            for name, p in net.named_parameters():
                p.requires_grad_(name not in s.frozen)
            if replaced is not None:
                owner, _, last = replaced.rpartition(".")
                module = net.get_submodule(owner)
                old = getattr(module, last)
                setattr(module, last, nn.Parameter(old.detach().clone() * 0.9, requires_grad=old.requires_grad))

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
        except Exception:  # the user's own fault: BatchNorm on one sample, say
            self.counts.skipped += 1
            self.stock.load_state_dict(before.state_dict())
            self._follow(before, {})
            return
        plain: Gradients | str
        for name, (fast, slow) in self.twins.items():
            found = [self._one(*twin, s) for twin in (fast, slow)]
            label = f"{self.name} step {k} {name}: {[type(b).__name__ for b in self.stock.blocks]} {s.says()}"
            quick, plain = found
            if isinstance(quick, str) or isinstance(plain, str):
                if quick == plain and quick.startswith("refused"):  # type: ignore[union-attr]
                    self.counts.refused[str(quick)] += 1
                    self.counts.examples.setdefault(str(quick), label)
                else:
                    self._wrong(label, f"fast: {short(quick)}; plain: {short(plain)}")
                continue
            room = 1e-10 if name in ("zero-divergence", "descent") else 1e-8
            self._compare(label, "fast against plain", quick, plain, room)
            if name == "zero-divergence":
                self._compare(label, "against autograd", plain, truth, 1e-9)
                self._compare(label, "buffers", dict(slow[0].named_buffers()), dict(self.stock.named_buffers()), 1e-9)
                self._compare(
                    label, "fast buffers", dict(fast[0].named_buffers()), dict(self.stock.named_buffers()), 1e-9
                )
            if name == "descent" and may_rerun(before, s):
                self._compare(label, "against explicit states", plain, descended(copy.deepcopy(before), s), 1e-9)
        self._follow(self.stock, truth)

    def _one(self, net: Net, learner: ebm.Learner, s: Settings) -> Gradients | str:
        net.zero_grad()
        try:
            learner.backward(lambda: loss_of(net, s))
            return collected(net)
        except ebm.EBMError as error:
            return f"refused: {type(error).__name__}: {reason(str(error))}"
        except Exception as error:
            return f"raised: {type(error).__name__}: {error} ({where_in_library(error)})"

    def _follow(self, stock: Net, gradients: Gradients) -> None:
        """All copies go on from where the untouched one is."""
        with torch.no_grad():
            for name, p in self.stock.named_parameters():
                if name in gradients:
                    p -= 0.05 * gradients[name].clamp(-1, 1)
        for net in self._nets()[1:]:
            net.load_state_dict(self.stock.state_dict())
            for mine, other in zip(net.blocks, self.stock.blocks, strict=True):
                if isinstance(mine, Remembering):
                    mine.bank = other.bank.clone()  # type: ignore[operator, union-attr]

    def _compare(self, label: str, what: str, one: Gradients, other: Gradients, room: float) -> None:
        off, where = difference(one, other)
        if off <= room:
            self.counts.equal[what] += 1
        else:
            self._wrong(label, f"{what}: {off:.2e} at {where}")

    def _wrong(self, label: str, what: str) -> None:
        self.counts.wrong.append(f"{label}\n    {what}")


def where_in_library(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "lightning_ebm" in f.filename]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "outside"


def short(found: Gradients | str) -> str:
    return found if isinstance(found, str) else "gradients"


def reason(text: str) -> str:
    return re.sub(r"[\d.]+(e-?\d+)?", "N", text)[:110]


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
            size = max(float(b.nan_to_num().abs().max()) if b.numel() else 0.0, 1e-2 * largest, 1e-12)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--json", type=Path, help="writes the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    counts, done = fuzzed(options.programs, options.steps, options.seed, options.seconds)
    print(
        f"{done} programs of {options.steps} steps in {time.monotonic() - began:.0f} s; {counts.skipped} steps skipped"
    )
    print("equal:", dict(counts.equal))
    print("refused:")
    for why, count in counts.refused.most_common():
        print(f"  {count:5d} {why}\n        such as {counts.examples[why]}")
    print("wrong:", len(counts.wrong))
    for why, count in Counter(reason(text.splitlines()[-1].strip()) for text in counts.wrong).most_common():
        print(f"  {count:5d} {why}")
    for text in counts.wrong[: options.show]:
        print("  " + text)
    if options.json is not None:
        figures = {
            "programs": done, "steps": done * options.steps, "seed": options.seed, "skipped": counts.skipped,
            "equal": dict(counts.equal), "refused": sum(counts.refused.values()), "wrong": len(counts.wrong),
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=1))
    return 1 if counts.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
