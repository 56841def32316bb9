"""Custom autograd functions are applied at every state of a relaxation: what they do besides computing is done once.

The oracle is a plain loop of backprop on a copy: weights, buffers and generators are as it leaves them.
"""

import copy
import re
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm

STEPS, EXACT = 5, "zero-divergence"
X = torch.randn(STEPS, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randint(2, (STEPS, 8), generator=torch.Generator().manual_seed(2))


class Normalized(torch.autograd.Function):
    """Batch normalization by hand, with running statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, running: Tensor) -> Tensor:
        mean, deviation = x.mean(0), x.std(0, unbiased=False) + 1e-3
        running.mul_(0.9).add_(mean, alpha=0.1)
        ctx.save_for_backward((x - mean) / deviation, deviation)
        return (x - mean) / deviation

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        z, deviation = ctx.saved_tensors
        share = deviation / (deviation - 1e-3)  # of the deviation's own slope
        return (slope - slope.mean(0) - z * (slope * z).mean(0) * share) / deviation, None


class Ranged(torch.autograd.Function):
    """Scales by the largest number that it has seen so far, and goes straight through on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor) -> Tensor:
        largest.copy_(torch.maximum(largest, x.abs().max()))
        ctx.save_for_backward(largest.clone())
        return x / largest

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope / ctx.saved_tensors[0], None


class Banked(torch.autograd.Function):
    """Writes a row of a memory, through a view, and reads all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bank: Tensor, row: int) -> Tensor:
        bank[row].copy_(x.mean(0))
        return x - bank.mean(0)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return slope, None, None


class Binary(torch.autograd.Function):
    """Stochastic units, straight through."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, generator: torch.Generator | None) -> Tensor:
        return (torch.rand(p.shape, dtype=p.dtype, generator=generator) < p).to(p)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


class Dropped(torch.autograd.Function):
    """A mask that is drawn in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.empty_like(x).bernoulli_(0.7)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * ctx.saved_tensors[0]


class Recomputed(torch.autograd.Function):
    """A checkpoint by hand, which keeps the generator's state itself; parameters are looked for on the way back."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.random = run, torch.get_rng_state()
        ctx.save_for_backward(x, *parameters)
        return run(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.random)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            result = ctx.run(x)
        torch.set_rng_state(now)
        return None, *torch.autograd.grad(result, (x, *parameters), slope)


class Configured(torch.autograd.Function):
    """Is given an array and a mapping that holds a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: dict[str, Tensor], array: Any) -> Tensor:
        ctx.factor = settings["factor"] * float(array.sum())
        return x * ctx.factor

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return slope * ctx.factor, None, None


class Outdated(torch.autograd.Function):
    """Gives sizes to empty tensors and writes to them, as code of old does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result, scale = x.new(), x.new()
        scale.resize_as_(x).fill_(2.0).add_(x.abs())
        result.resize_as_(x).copy_(x).div_(scale)
        ctx.save_for_backward(x, scale)
        return result

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2.0 * slope / ctx.saved_tensors[1].square()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 10), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.0), nn.Tanh())
        self.last = nn.Linear(10, 2)
        self.register_buffer("seen", torch.zeros(10))
        self.register_buffer("largest", torch.ones(()))
        self.register_buffer("bank", torch.zeros(STEPS, 10))
        self.generator = torch.Generator().manual_seed(7)


def _statistics_in_the_loss(net: Any, h: Tensor, k: int) -> Tensor:
    h = Normalized.apply(h, net.seen)
    return h + 0.1 * net.seen


def _by_hand(net: Any, h: Tensor, k: int) -> Tensor:
    net.second[1].p = 0.3
    return Recomputed.apply(net.second, h, *net.second.parameters())


BETWEEN = {
    "running statistics": lambda net, h, k: Normalized.apply(h, net.seen),
    "running statistics that are read": _statistics_in_the_loss,
    "an observer of ranges": lambda net, h, k: Ranged.apply(h, net.largest),
    "a row of a memory": lambda net, h, k: Banked.apply(h, net.bank, k),
    "draws": lambda net, h, k: Binary.apply(h.sigmoid(), None),
    "draws of its own generator": lambda net, h, k: Binary.apply(h.sigmoid(), net.generator),
    "draws in place": lambda net, h, k: Dropped.apply(h),
    "a checkpoint by hand": _by_hand,
    "tensors that are given a size": lambda net, h, k: Outdated.apply(h),
    "a layer of torch's own": lambda net, h, k: nn.CrossMapLRN2d(3)(h.view(8, 5, 2, 1)).view(8, 10),
    "arrays and mappings": lambda net, h, k: Configured.apply(h, {"factor": torch.full((10,), 1.0 + k)}, np.ones(3)),
}


def trained(kind: str, algorithm: Any = None, capture: bool = True) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The state after a few steps, and what is drawn next."""
    torch.manual_seed(0)
    net = Net().double()
    learner = None if algorithm is None else ebm.Learner(net, copy.deepcopy(algorithm), capture=capture)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for k in range(STEPS):
        optimizer.zero_grad()

        def loss(k: int = k) -> Tensor:
            return F.cross_entropy(net.last(net.second(BETWEEN[kind](net, net.first(X[k]), k))), Y[k])

        if learner is None:
            loss().backward()
        else:
            learner.backward(loss)
        optimizer.step()
    return dict(net.state_dict()), [torch.rand(3), torch.rand(3, generator=net.generator)]


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[k] - other[k]).abs().max()) for k in one)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("kind", BETWEEN)
def test_it_is_done_once_a_step(kind: str, capture: bool) -> None:
    stock, drawn = trained(kind)
    ours, drawn_too = trained(kind, EXACT, capture)
    assert far(stock, ours) < 1e-12
    assert all(map(torch.equal, drawn, drawn_too))


@pytest.mark.parametrize("kind", BETWEEN)
def test_updates_of_a_weak_nudge_tend_to_the_gradient(kind: str) -> None:
    stock, drawn = trained(kind)
    errors = []
    for strength in (1e-3, 1e-5):
        ours, drawn_too = trained(kind, ebm.algorithm("pc-nudge", nudge=ebm.OneSided(strength)))
        errors.append(far(stock, ours))
        assert all(map(torch.equal, drawn, drawn_too))
    assert errors[1] < max(0.02 * errors[0], 1e-9)


@pytest.mark.parametrize("kind", ["running statistics", "a row of a memory", "draws", "draws of its own generator"])
def test_where_the_step_runs_twice_as_well(kind: str) -> None:
    """The quiet run and the real one: draws are those of one, and captured and plain relaxations are of one energy."""
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(20))
    _, drawn = trained(kind)
    ours, drawn_too = trained(kind, algorithm)
    plain, _ = trained(kind, algorithm, capture=False)
    assert far(ours, plain) < 1e-10
    assert all(map(torch.equal, drawn, drawn_too))


class Hidden(torch.autograd.Function):
    """Writes to what it finds in an object, as a module's running statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Any) -> Tensor:
        held["seen"].add_(x.mean(0))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


class Instances(torch.autograd.Function):
    """Scores of a memory that is written to on the way back, as in instance discrimination."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor) -> Tensor:
        ctx.save_for_backward(x, memory)
        return x @ memory.t()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        x, memory = ctx.saved_tensors
        result = slope @ memory
        memory.mul_(0.5).add_(x[: len(memory)], alpha=0.5)
        return result, None


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (lambda net, h: Hidden.apply(h, {"seen": net.seen}), r"Hidden writes to a tensor of shape \(10,\).*Hand the"),
        (lambda net, h: Recomputed.apply(net.second, h, *net.second.parameters()), "use_reentrant=False"),
        (lambda net, h: Instances.apply(h, net.bank).repeat(1, 2), r"backward code.*Instances.*\(5, 10\).*on_after"),
    ],
    ids=["what it finds in an object", "a module that it calls", "on the way back"],
)
@pytest.mark.parametrize("algorithm", [EXACT, "predictive-coding"])
def test_writes_that_cannot_be_done_once_are_refused_by_name(between: Any, words: str, algorithm: str) -> None:
    net = Net()
    net.second[1] = nn.BatchNorm1d(10)
    net.double()
    learner = ebm.Learner(net, algorithm)
    with pytest.raises(ebm.UnsupportedModuleError, match=words):
        learner.gradients(lambda: F.cross_entropy(net.last(between(net, net.first(X[0]))), Y[0]))


class Reversed(torch.autograd.Function):
    """Runs a module without a graph, and again on the way back, where `backward` fills the gradients of what it has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(slope)
        return x.grad, None


@pytest.mark.parametrize("algorithm", [EXACT, "pc-nudge", "predictive-coding"])
def test_backward_code_that_fills_gradients_itself_is_refused_by_name(algorithm: str) -> None:
    """It would once an evaluation: of autograd's own gradient when the step is checked, and of errors at any scale."""
    net = Net().double()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    learner = ebm.Learner(net, algorithm)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"Reversed.*backward\(\).*second\.0\.weight.*use_reentrant"):
        learner.backward(lambda: F.cross_entropy(net.last(Reversed.apply(net.first(X[0]), net.second)), Y[0]))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())


def test_where_all_layers_are_within_a_custom_function_that_is_said() -> None:
    net = Net().double()
    inputs = X[0].clone().requires_grad_()  # as an embedding would give
    learner = ebm.Learner(net, EXACT)
    whole = nn.Sequential(net.first, net.second)
    with pytest.raises(ebm.LayerDiscoveryError, match=r"custom autograd function \(.*Reversed\).*use_reentrant"):
        learner.gradients(lambda: F.cross_entropy(net.last(Reversed.apply(inputs, whole)), Y[0]))


class Assigned(torch.autograd.Function):
    """Writes a value into a place of its first argument, unseen by autograd, and returns that, as solvers do."""

    @staticmethod
    def forward(ctx: Any, stages: Tensor, value: Tensor, place: int) -> Tensor:
        ctx.place = place
        stages.data[place] = value
        return stages

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        return slope, slope[ctx.place], None


def in_stages(net: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    """Three stages of an explicit solver, each of which reads those before; and what was returned of the first."""
    first = stages = Assigned.apply(torch.empty(4, *h.shape, dtype=h.dtype), h, 0)
    for stage in range(1, 4):
        stages = Assigned.apply(stages, net.second(h + 0.3 * stages[:stage].sum(0)), stage)
    return h + torch.tensordot(torch.arange(1.0, 5.0, dtype=h.dtype), stages, 1), first


@pytest.mark.parametrize("algorithm", [EXACT, "pc-nudge"])
def test_a_function_may_return_the_argument_that_it_has_written_to(algorithm: str) -> None:
    net = Net().double()
    learner = ebm.Learner(net, algorithm)
    for x, y in zip(X, Y, strict=True):
        found = learner.gradients(lambda x=x, y=y: F.cross_entropy(net.last(in_stages(net, net.first(x))[0]), y))
        h = net.first(x)
        stages = [h]
        for _ in range(3):
            stages.append(net.second(h + 0.3 * sum(stages)))
        ended = h + sum(n * stage for n, stage in enumerate(stages, 1))
        true = torch.autograd.grad(F.cross_entropy(net.last(ended), y), list(net.parameters()), allow_unused=True)
        pairs = {name: (g, t) for (name, g), t in zip(found.items(), true, strict=True) if t is not None}
        apart = [{name: pair[i] for name, pair in pairs.items()} for i in range(2)]
        off = ebm.metrics.alignment(*apart)["relative_error"]
        assert off < (1e-12 if algorithm == EXACT else 5e-3)


def test_what_it_returned_before_it_wrote_again_cannot_be_read_any_more() -> None:
    """To autograd that is what it was, with other numbers in it."""
    net = Net().double()
    with pytest.raises(ebm.UnsupportedModuleError, match="autograd does not see the write"):
        ebm.Learner(net, EXACT).gradients(
            lambda: F.cross_entropy(net.last(in_stages(net, net.first(X[0]))[1][0]), Y[0])
        )


class Remembering(torch.autograd.Function):
    """Computes with what a closure holds, and looks on its way back for the tensors that it was handed there."""

    @staticmethod
    def forward(ctx: Any, compute: Any, *handed: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*handed)
        return compute()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            again = ctx.compute()
        return None, *torch.autograd.grad(again, ctx.saved_tensors, slope, retain_graph=True)


def test_backward_code_that_fails_at_other_states_is_refused_with_the_cause() -> None:
    net = Net().double()

    def remembered() -> Tensor:
        h = net.first(X[0])
        return F.cross_entropy(net.last(Remembering.apply(lambda: h.sin(), h)), Y[0])

    with pytest.raises(ebm.UnsupportedModuleError, match=r"Remembering.*fails at other states.*\.apply"):
        ebm.Learner(net, EXACT).gradients(remembered)


class Solved(torch.autograd.Function):
    """As adjoint methods that solve to an absolute tolerance: what is below it does not come through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope - 1e-6 * slope.sign()


def test_an_adjoint_to_an_absolute_tolerance_is_refused_by_its_name_and_with_its_remedy() -> None:
    net = Net().double()
    with pytest.raises(ebm.UnsupportedModuleError, match=r"\(.*Solved\).*proportional.*adjoint.*fixed steps"):
        ebm.Learner(net, EXACT).gradients(lambda: F.cross_entropy(net.last(Solved.apply(net.first(X[0]))), Y[0]))


class Asserting(torch.autograd.Function):
    """A tangent that asserts that what comes in is finite, as solvers with steps of their own size do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all(), "underflow"
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * (1 - ctx.saved_tensors[0].square())


def test_a_function_may_assert_that_its_input_is_finite() -> None:
    """Whether samples see each other is tried with nan, which is no concern of the user's."""
    net = Net().double()
    learner = ebm.Learner(net, "pc-nudge")
    found = learner.gradients(lambda: F.cross_entropy(net.last(Asserting.apply(net.first(X[0]))), Y[0]))
    loss = F.cross_entropy(net.last(net.first(X[0]).tanh()), Y[0])
    true = torch.autograd.grad(loss, [*net.first.parameters(), *net.last.parameters()])
    pairs = {name: g for name, g in found.items() if not name.startswith("second")}
    assert ebm.metrics.alignment(pairs, dict(zip(pairs, true, strict=True)))["relative_error"] < 1e-2


class Clipped(torch.autograd.Function):
    """Clips what it is handed on the way back, as no relaxation can."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope.clamp(-1e-2, 1e-2)


class Faint(nn.Module):
    """Two branches, one of which has gradients 10,000 times as large as the other's, which something stands in."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.faint, self.head = nn.Linear(4, 2), nn.Linear(4, 6), nn.Linear(6, 2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.faint(x))
        h.register_hook(self.change)
        return 1000 * self.loud(x) + self.head(h)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clipped", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: 1e-3 * g.sign()], ids=["clip", "sign"])
def test_what_clips_small_gradients_is_refused_beside_large_ones(clipped: Any, kind: torch.dtype) -> None:
    net = Faint(clipped).to(kind if kind == torch.float64 else torch.float32)
    x = X[0].to(net.loud.weight.dtype)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16),
        pytest.raises(ebm.UnsupportedModuleError, match="not proportional"),
    ):
        ebm.Learner(net, "pc-nudge").gradients(lambda: F.cross_entropy(net(x), Y[0]))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_proportional_is_taken_in_any_precision(kind: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Powers and square roots round otherwise at other scales than products do, and that is no cause for a refusal."""
    net = Faint(lambda g: g.abs().pow(1 / 3).pow(3) * g.sign() / 3 + g / 3 + g.square().sqrt() * g.sign() / 3)
    net.to(kind if kind == torch.float64 else torch.float32)
    x = X[0].to(net.loud.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        found = ebm.Learner(net, EXACT).gradients(lambda: F.cross_entropy(net(x), Y[0]))
        expected = ebm.reference.backprop(net, lambda: F.cross_entropy(net(x), Y[0]))
    off = ebm.metrics.alignment(found, expected)["relative_error"]
    assert off < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[kind]
    assert "proportional" not in caplog.text


def test_what_is_nearly_proportional_is_said_and_as_far_off_as_it_says(caplog: pytest.LogCaptureFixture) -> None:
    """A solver with a tolerance: its error hangs on the scale of what it is given."""
    net = Faint(lambda g: g * (1 + 4e-3 * torch.tanh(g.norm()))).double()
    found = ebm.Learner(net, "pc-nudge").gradients(lambda: F.cross_entropy(net(X[0]), Y[0]))
    (said,) = re.findall(r"only roughly proportional .* updates come out (\S+) of their size off", caplog.text)
    expected = ebm.reference.backprop(net, lambda: F.cross_entropy(net(X[0]), Y[0]))
    off = (found["faint.weight"] - expected["faint.weight"]).norm() / expected["faint.weight"].norm()
    assert 1e-3 < off < 1.2 * float(said) < 6e-3


class Beginning(nn.Module):
    """In which nothing, or nothing finite, comes back through the function in the first step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 6).double(), nn.Linear(6, 2).double()
        self.gate = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.act, self.kind = nn.Tanh(), kind
        if kind == "weights of zero":
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        if self.kind == "a gate of zero":
            return self.head(h + self.gate * Clipped.apply(2 * h))
        if self.kind == "an infinite slope":
            h = h + self.gate.square().sqrt()
        return self.head(Clipped.apply(h))


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("kind", ["weights of zero", "a gate of zero", "an infinite slope"])
def test_code_that_was_handed_nothing_in_the_first_step_is_looked_at_again(kind: str, capture: bool) -> None:
    net = Beginning(kind)
    learner = ebm.Learner(net, "pc-nudge", capture=capture)
    optimizer = torch.optim.SGD(net.parameters(), 1.0)

    def train() -> None:
        for x, y in zip(X, Y, strict=True):
            optimizer.zero_grad()
            with suppress(ebm.RelaxationDivergedError):
                learner.backward(lambda x=x, y=y: F.cross_entropy(net(x), y))
            if kind == "an infinite slope":
                optimizer.zero_grad()
                nn.init.ones_(net.gate)
            optimizer.step()

    with pytest.raises(ebm.UnsupportedModuleError, match="not proportional"):
        train()
