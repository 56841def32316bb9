"""Accelerated sweeps on chains written out by hand, against dense solves, closed forms and plain sweeps."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from landscapes import ByHand
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.network.network import Network

RHO = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "hard": lambda a: a.clamp(0, 1),
    "relu": lambda a: a.clamp_min(0),
}
DOUBLE = torch.float64


class Chain(ByHand):
    """x_l = rho(W_l x_{l-1} + W_{l+1}' x_{l+1}), the top one pulled by lambda (y - V x): no autograd, no network."""

    def __init__(self, weights: list[Tensor], bias: list[Tensor], rho: str, read: Tensor, target: Tensor) -> None:
        self.weights, self.bias, self.rho, self.kind = weights, bias, RHO[rho], rho
        self.read, self.target = read, target
        self.depths = list(range(1, len(bias) + 1))
        self.names = [f"layer {k}" for k in self.depths]
        self.batch_size, self.rounding = len(bias[0]), 2.0**-52
        self.asked = 0

    def start(self) -> list[Tensor]:
        """The forward pass."""
        states: list[Tensor] = []
        for k, b in enumerate(self.bias):
            states.append(self.rho(b + states[-1] @ self.weights[k - 1].T if k else b))
        return states

    def answers(self, states, strength, layers):
        self.asked += len(layers)
        return [self.answer(states, strength, k) for k in layers]

    def answer(self, states, strength, k: int) -> Tensor:
        drive = self.bias[k]
        if k:
            drive = drive + states[k - 1] @ self.weights[k - 1].T.to(states[0].dtype)
        if k < len(states) - 1:
            drive = drive + states[k + 1] @ self.weights[k].to(states[0].dtype)
        else:
            read = self.read.to(states[0].dtype)
            drive = drive + strength * ((self.target - states[k] @ read.T) @ read)
        return self.rho(drive)

    def energy_of(self, states, strength):
        """sum G(x) - <b, x> - <x_{l+1}, W x_l> + lambda/2 |y - V x|^2."""
        total = sum(
            ((s * s.atanh() + 0.5 * torch.log1p(-s * s)) if self.kind == "tanh" else 0.5 * s * s).sum() for s in states
        )
        total = total - sum((b * s).sum() for b, s in zip(self.bias, states, strict=True))
        pairs = zip(self.weights, itertools.pairwise(states), strict=True)
        total = total - sum((high * (low @ w.T.to(low.dtype))).sum() for w, (low, high) in pairs)
        total = total + 0.5 * strength * ((self.target - states[-1] @ self.read.T.to(states[-1].dtype)) ** 2).sum()
        return total.real

    def per_sample(self, tensors):
        return torch.stack([t.sum(1) for t in tensors]).sum(0)

    def norms(self, tensors):
        return self.per_sample([t.abs().square() for t in tensors]).sqrt()

    def products(self, left, right, layers):
        assert len(left) == len(right) == len(layers)
        return torch.stack([(a.conj() * b).real.sum(1) for a, b in zip(left, right, strict=True)]).sum(0)

    def spread(self, values, like):
        return [values[:, None] for _ in like]

    def feasible(self, states):
        if states[0].is_complex() or self.kind in ("identity", "relu"):
            return states
        return [s.clamp(-1, 1) if self.kind == "tanh" else s.clamp(0, 1) for s in states]

    def only(self, sample: int) -> "Chain":
        """The chain of one sample."""
        bias = [b[sample : sample + 1] for b in self.bias]
        return Chain(self.weights, bias, self.kind, self.read, self.target[sample : sample + 1])


def random_chain(seed: int, rho: str, gain: float, widths=(7, 6, 5), batch: int = 4) -> Chain:
    """Of `widths`, with weights of spectral norm `gain` each."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)  # noqa: E731
    weights = [draw(b, a) for a, b in itertools.pairwise(widths)]
    weights = [gain * w / torch.linalg.matrix_norm(w, 2) for w in weights]
    bias = [0.7 * draw(batch, w) for w in widths]
    return Chain(weights, bias, rho, 0.3 * draw(3, widths[-1]), draw(batch, 3))


def with_spectrum(values: list[float], batch: int = 3, seed: int = 0) -> Chain:
    """Two linear layers, whose sweep has exactly these eigenvalues: W = U diag(sqrt) V'."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE)).Q for _ in range(2))
    weight = u @ torch.diag(torch.tensor(values, dtype=DOUBLE).sqrt()) @ v.T
    bias = [torch.randn(batch, n, generator=generator, dtype=DOUBLE) for _ in range(2)]
    return Chain([weight], bias, "identity", torch.zeros(1, n, dtype=DOUBLE), torch.zeros(batch, 1, dtype=DOUBLE))


def plainly(chain: Chain, strength: complex = 0.0, tol: float = 1e-3, steps: int = 20_000):
    return ebm.FixedPoint(steps, tol=tol).relax(chain, chain.start(), strength)


def quickly(chain: Chain, strength: complex = 0.0, tol: float = 1e-3, steps: int = 20_000):
    return ebm.AcceleratedFixedPoint(steps, tol=tol).relax(chain, chain.start(), strength)


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("strength", [0.0, 0.5, -0.5])
@pytest.mark.parametrize("widths", [(7, 6), (7, 6, 5), (6, 6, 6, 6, 6)])
def test_a_linear_chain_ends_at_the_dense_solution(widths, strength):
    chain = random_chain(1, "identity", 0.55, widths)
    sizes = list(widths)
    edges = [0, *itertools.accumulate(sizes)]
    at = [slice(a, b) for a, b in itertools.pairwise(edges)]
    matrix = torch.eye(edges[-1], dtype=DOUBLE)
    for k, weight in enumerate(chain.weights):
        matrix[at[k + 1], at[k]], matrix[at[k], at[k + 1]] = -weight, -weight.T
    matrix[at[-1], at[-1]] += strength * chain.read.T @ chain.read
    right = torch.cat([*chain.bias[:-1], chain.bias[-1] + strength * chain.target @ chain.read], 1)
    expected = torch.linalg.solve(matrix, right.T).T
    found = quickly(chain, strength, tol=1e-14)
    assert found.status == "converged"
    assert float((torch.cat(found.point, 1) - expected).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("values", "sweeps"),
    [([0.9], 3), ([0.9] * 5, 3), ([0.9, 0.4], 4), ([0.95, 0.1] * 4, 4), ([0.97, 0.9, 0.5, 0.3, 0.1], 7)],
)
def test_a_sweep_for_every_eigenvalue_and_two_more(values, sweeps):
    """Hestenes and Stiefel 1952: an eigenvalue a step. The first sweep has no past; the last finds nothing to do."""
    chain = with_spectrum(values)
    found = quickly(chain, tol=1e-11)
    assert (found.status, found.steps) == ("converged", sweeps)
    assert plainly(chain, tol=1e-11).steps > 10 * sweeps


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("tol", [1e-3, 1e-8])
def test_the_count_is_that_of_optimal_over_relaxation_not_of_the_plain_rate(rate, tol):
    """Young 1954: sweeps contract by rho, over-relaxed ones by omega - 1 at best, omega = 2 / (1 + sqrt(1 - rho))."""
    chain = with_spectrum(torch.linspace(0, rate, 30).tolist())
    plain = plainly(chain, tol=tol).steps
    assert 0.4 * math.log(tol) / math.log(rate) < plain < 1.2 * math.log(tol) / math.log(rate) + 2
    best = 2 / (1 + math.sqrt(1 - rate)) - 1
    assert quickly(chain, tol=tol).steps <= math.log(tol) / math.log(best) + 4


# ------------------------------------------------------------------------------------------- against plain sweeps


@given(
    seed=st.integers(0, 10_000),
    rho=st.sampled_from(["tanh", "hard", "relu"]),
    gain=st.floats(0.1, 1.4),
    strength=st.sampled_from([0.0, 0.25, -0.25]),
    depth=st.integers(1, 5),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_never_much_later_than_plain_sweeps_nor_higher(seed, rho, gain, strength, depth):
    """At gains above 1 there may be several equilibria; it may not end at one of higher energy."""
    gain = min(gain, 0.5) if rho == "relu" else gain  # unbounded: beyond, no equilibrium need exist
    chain = random_chain(seed, rho, gain, (6,) * depth)
    plain = plainly(chain, strength, steps=300)
    found = quickly(chain, strength, steps=300)
    if plain.status != "converged":
        return
    assert found.status == "converged"
    assert found.steps <= 1.5 * plain.steps + 16  # found at random: 18 where plain sweeps, at a rate of .1, take 5
    room = 1e-4 * abs(float(plain.energies[0] - plain.energies[-1])) + 1e-9
    if strength >= 0:
        assert float(found.energies[-1]) <= float(plain.energies[-1]) + room
    if gain <= 0.8:  # one equilibrium
        assert worst(quickly(chain, strength, 1e-12).point, plainly(chain, strength, 1e-12).point) < 1e-9


def test_it_does_not_go_round_between_kinks():
    """Found at random: long steps from one flat piece to another and back, for ever, at the same residuals."""
    chain = random_chain(550, "hard", 1.0697722349975787, (6, 6, 6))
    assert plainly(chain).steps == 30
    assert quickly(chain, steps=60).status == "converged"


@pytest.mark.parametrize("rho", ["tanh", "hard"])
@pytest.mark.parametrize("strength", [0.0, 0.25, -0.25])
def test_half_the_sweeps_where_they_are_many(rho, strength):
    chains = [random_chain(seed, rho, 1.1, (30, 30, 30)) for seed in range(6)]
    for chain in chains:  # a curvature of the loss of 1: plain answers of the top layer hold up to 1 / nudge
        chain.read = chain.read / torch.linalg.matrix_norm(chain.read, 2)
    plain = sum(plainly(chain, strength).steps for chain in chains)
    assert sum(quickly(chain, strength).steps for chain in chains) < 0.6 * plain


def test_it_leaves_a_saddle_as_plain_sweeps_do():
    """x = tanh(2 y), y = tanh(2 x): 0 is a saddle, next to which least squares on the residual would stay."""
    one = torch.ones(1, 1, dtype=DOUBLE)
    chain = Chain([2 * one], [0 * one, 0 * one], "tanh", 0 * one, 0 * one)
    start = [1e-2 * one, 1e-2 * one]
    found = ebm.AcceleratedFixedPoint(100, tol=1e-9).relax(chain, start, 0.0)
    x = 1.0
    for _ in range(200):
        x = math.tanh(2 * x)
    assert found.status == "converged"
    assert worst(found.point, [x * one, x * one]) < 1e-8


def test_complex_states_are_followed():
    chain = random_chain(3, "tanh", 0.9, (8, 8, 8))
    strength = 0.2 * complex(math.cos(1), math.sin(1))
    found, plain = (relax(chain, strength, 1e-12) for relax in (quickly, plainly))
    assert found.point[0].is_complex()
    assert worst(found.point, plain.point) < 1e-10
    assert found.steps < 0.7 * plain.steps


# ------------------------------------------------------------------------------------------- promises of a relaxer


def test_a_sample_alone_ends_where_it_does_in_a_batch():
    chain = random_chain(5, "hard", 0.95, (9, 9, 9))
    together = quickly(chain, 0.25, tol=1e-9)
    for sample in range(chain.batch_size):
        alone = quickly(chain.only(sample), 0.25, tol=1e-9)
        assert worst(alone.point, [x[sample : sample + 1] for x in together.point]) < 1e-8
        assert alone.steps <= together.steps
    assert max(quickly(chain.only(k), 0.25, tol=1e-9).steps for k in range(chain.batch_size)) == together.steps


def test_the_residual_is_what_the_last_plain_sweep_moved_relative_to_the_first():
    chain = random_chain(2, "tanh", 0.9)
    seen: list[list[Tensor]] = []
    answers = chain.answers

    def noting(states, strength, layers):
        seen.append([x.clone() for x in states])
        return answers(states, strength, layers)

    chain.answers = noting  # type: ignore[method-assign]
    found = quickly(chain, 0.25)
    assert len(seen) == 2 * found.steps

    def moved(before: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        after = list(before)
        for layers in ([0, 2], [1]):
            for k, answer in zip(layers, answers(after, 0.25, layers), strict=True):
                after[k] = answer
        return after, chain.norms([y - x for x, y in zip(before, after, strict=True)])

    (_, first), (last, left) = moved(seen[0]), moved(seen[-2])
    assert worst(found.point, last) == 0  # read after a sweep to which nothing was added
    assert torch.allclose(found.residual, left / first, rtol=1e-12)
    assert bool((found.residual <= 1e-3).all())
    assert len(found.energies) == 2


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_without_tolerance_exactly_as_many_sweeps_as_asked_for(steps):
    chain = random_chain(0, "tanh", 0.9)
    found = ebm.AcceleratedFixedPoint(steps, tol=0.0).relax(chain, chain.start(), 0.0)
    assert (found.status, found.steps, chain.asked) == ("fixed", steps, 3 * steps)
    if steps < 3:  # two sweeps without a past, and one from where plain ones led
        assert worst(found.point, ebm.FixedPoint(steps).relax(chain, chain.start(), 0.0).point) == 0


def test_what_is_still_moving_says_so():
    chain = random_chain(0, "tanh", 1.2, (20, 20, 20))
    assert quickly(chain, tol=1e-12, steps=4).status == "max_steps"


class Fenced(Chain):
    """Answers with nan wherever the last sweep did not end, as beyond the edge of a domain."""

    def answers(self, states, strength, layers):
        if 0 in layers:
            ended = getattr(self, "ended", states)
            off = torch.stack([(a != b).any(1) for a, b in zip(states, ended, strict=True)]).any(0)
            self.left = getattr(self, "left", 0) + int(off.sum())
            self.base = [torch.where(off[:, None], torch.nan, s) for s in states]
        found = super().answers([b + 0 * s for b, s in zip(self.base, states, strict=True)], strength, layers)
        if 0 in layers:
            self.half = dict(zip(layers, found, strict=True))
            self.base = [self.half.get(k, x) for k, x in enumerate(self.base)]
        if 1 in layers:
            swept = [*self.base]
            for k, x in zip(layers, found, strict=True):
                swept[k] = x
            before = getattr(self, "ended", swept)
            self.ended = [torch.where(x.isnan(), y, x) for x, y in zip(swept, before, strict=True)]
        return found


def test_where_every_extrapolation_fails_it_is_the_plain_iteration():
    free = random_chain(4, "tanh", 1.0, (8, 8))
    fenced = Fenced(free.weights, free.bias, "tanh", free.read, free.target)
    found, plain = quickly(fenced, tol=1e-6), plainly(free, tol=1e-6)
    assert fenced.left >= 4
    assert found.status == "converged"
    assert found.steps <= 2 * plain.steps
    assert worst(found.point, plain.point) < 1e-5


def test_states_that_run_away_are_an_error_that_names_the_layer():
    chain = with_spectrum([1.3, 0.2])
    with pytest.raises(ebm.RelaxationDivergedError, match=r"AcceleratedFixedPoint ran away .*layer [12]"):
        quickly(chain, tol=1e-6)
    with pytest.raises(ebm.RelaxationDivergedError):
        quickly(random_chain(0, "relu", 3.0), tol=1e-6)


@pytest.mark.parametrize(("arguments", "said"), [({"max_steps": 0}, "max_steps"), ({"tol": 1.0}, "tol")])
def test_arguments_that_cannot_be_meant_are_refused(arguments, said):
    with pytest.raises(ebm.ConfigurationError, match=said):
        ebm.AcceleratedFixedPoint(**arguments)


# ------------------------------------------------------------------------------------------- on networks


class Skipping(nn.Module):
    """A link within the odd layers and one within the even ones: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(a, 12) for a in (6, 12, 12, 12)])
        self.activations = nn.ModuleList([nn.Tanh() for _ in range(4)])
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = [self.activations[0](self.linears[0](x))]
        for linear, activation in zip(self.linears[1:], self.activations[1:], strict=True):  # type: ignore[arg-type]
            skipped = states[-2] if len(states) > 1 else 0.0
            states.append(activation(linear(states[-1]) + 0.3 * skipped))
        return self.head(states[-1])


def convolutional() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(4, 6, 3, padding=1), nn.Hardtanh(0, 1), nn.Flatten(), nn.Linear(96, 3)]
    return nn.Sequential(*layers)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Skipping, convolutional])
@pytest.mark.parametrize("nudge", [ebm.Centered(0.25), ebm.OneSided(0.25), ebm.Coupled(0.1)])
def test_the_gradients_are_those_of_plain_sweeps_in_fewer(make, nudge):
    """With links within a half the sweep is no longer symmetric, and little is gained; nothing is lost either."""
    torch.manual_seed(0)
    net = make().double()
    x = torch.randn(5, 6, dtype=DOUBLE) if make is Skipping else torch.randn(5, 1, 8, 8, dtype=DOUBLE)
    y = torch.randint(0, 3, (5,))
    found, steps = [], []
    for relaxer in (ebm.FixedPoint(3000, tol=1e-12), ebm.AcceleratedFixedPoint(3000, tol=1e-12)):
        learner = ebm.Learner(net, ebm.algorithm("equilibrium-propagation", nudge=nudge, relaxer=relaxer))
        found.append(learner.gradients(lambda: F.cross_entropy(net(x), y)))
        assert learner.report["result"] == "converged"
        steps.append(learner.report["steps"])
    scale = max(float(g.abs().max()) for g in found[0].values())
    assert all(float((found[0][name] - found[1][name]).abs().max()) < 1e-8 * scale for name in found[0])
    assert steps[1] < (0.95 if make is Skipping else 0.8) * steps[0]


def test_a_held_output_stays_where_it_is_held_to_the_last_bit():
    held: list[Tensor] = []

    class Watching(ebm.AcceleratedFixedPoint):
        def relax(self, landscape, start, strength):
            found = super().relax(landscape, start, strength)
            held.append(start[-1] - found.point[-1])
            return found

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3), nn.Tanh()).double()
    algorithm = ebm.algorithm("coupled-learning", relaxer=Watching(200, 1e-9), free_relaxer=ebm.FixedPoint(50))
    ebm.Learner(net, algorithm).gradients(lambda: net(torch.ones(4, 6, dtype=DOUBLE)).square().mean())
    assert len(held) == 2
    assert all(bool((moved == 0).all()) for moved in held)


def test_products_are_sums_over_the_layers_asked_for(monkeypatch):
    torch.manual_seed(0)
    seen: list[Network] = []
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, 2))
    relaxer = ebm.FixedPoint(1)
    relax = ebm.FixedPoint.relax
    monkeypatch.setattr(ebm.FixedPoint, "relax", lambda s, at, *a: seen.append(at) or relax(s, at, *a))
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=relaxer)
    ebm.Learner(net, algorithm).gradients(lambda: net(torch.randn(3, 1, 5, 5)).sum())
    left = [torch.randn(3, 2, 3, 3, dtype=torch.complex64), torch.randn(3, 4, dtype=torch.complex64)]
    right = [torch.randn_like(x) for x in left]
    for layers in ([0, 1], [1], [0]):
        found = seen[0].products([left[k] for k in layers], [right[k] for k in layers], layers)
        for b in range(3):
            parts = [(left[k][b].conj() * right[k][b]).sum().real for k in layers]
            assert float(found[b]) == pytest.approx(float(sum(parts)), rel=1e-5)
        real = seen[0].products([left[k].real for k in layers], [right[k].real for k in layers], layers)
        expected = sum((left[k].real * right[k].real).flatten(1).sum(1) for k in layers)
        assert torch.allclose(real, expected)


@pytest.mark.slow
def test_an_exported_equilibrium_takes_plain_sweeps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(4, 6)
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.AcceleratedFixedPoint(60, 1e-6))
    whole = ebm.Equilibrium(net, algorithm)
    assert torch.allclose(whole.exported(x).module()(x), whole(x), atol=1e-5)


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "plain"])
def test_states_that_belong_to_no_sample_move_under_complex_nudges(capture: bool) -> None:
    """Three of five samples are picked within the network, as the hardest are: the states above lie in no rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y, picked = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,)), torch.tensor([0, 2, 3])

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(net[2:](net[:2](x)[picked]), y[picked])

    gradients = [
        ebm.Learner(net, ebm.algorithm("holomorphic-ep", relaxer=relaxer), capture=capture).gradients(loss)
        for relaxer in (ebm.AcceleratedFixedPoint(100, tol=1e-7), ebm.FixedPoint(100, tol=1e-7))
    ]
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=0, atol=1e-5)
