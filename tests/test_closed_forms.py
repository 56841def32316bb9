"""Numbers that sabotage once got past: each against a formula written out, or a numerical definition."""

import pytest
import torch
from torch import Tensor, nn

import lightning_ebm as ebm
from lightning_ebm.energies.conjugates import CONJUGATES, conjugate_of
from lightning_ebm.step.state_memory import StateMemory

DOUBLE = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def off(found, true):
    return ebm.metrics.alignment(found, true)["relative_error"]


# G* of every activation: sup_x <a, x> - G(x)

ELEMENTWISE = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "hardtanh": nn.Hardtanh(-0.5, 2.0),
    "hardsigmoid": nn.Hardsigmoid(),
    "leaky": nn.LeakyReLU(0.01),
    "leakier": nn.LeakyReLU(0.3),
    "not leaky": nn.LeakyReLU(0.0),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}


def test_every_activation_is_looked_at():
    assert {type(module) for module in ELEMENTWISE.values()} | {nn.Softmax} == set(CONJUGATES)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_dual_is_the_legendre_transform_of_the_potential(name):
    """On a grid of states: the largest <a, x> - G(x) is G*(a), and it is attained at rho(a)."""
    module = ELEMENTWISE[name]
    pair = conjugate_of(module, name)
    states = torch.linspace(max(pair.lower, -4.0), min(pair.upper, 4.0), 200_001, dtype=DOUBLE)
    potential = pair.potential(states)
    for a in torch.linspace(-3.2, 3.3, 27, dtype=DOUBLE):
        best, where = (a * states - potential).max(0)
        assert float(pair.dual(a)) == pytest.approx(float(best), abs=1e-6)
        assert float(states[where]) == pytest.approx(float(module(a)), abs=1e-3)
        assert float(pair.rho(a)) == pytest.approx(float(module(a)), abs=1e-7)


def test_an_activation_that_falls_is_the_slope_of_no_convex_function():
    with pytest.raises(ebm.UnsupportedModuleError, match=r"LeakyReLU.*falls and then rises"):
        conjugate_of(nn.LeakyReLU(-0.2), "net.1")


def test_the_dual_of_softmax_is_the_legendre_transform_of_negative_entropy():
    """Over the simplex, reached from free logits by ascent."""
    pair = conjugate_of(nn.Softmax(dim=-1), "softmax")
    for seed in range(4):
        a = 2 * drawn(5, seed=seed)
        logits = torch.zeros(5, dtype=DOUBLE, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")

        def descended(a: Tensor = a, logits: Tensor = logits) -> Tensor:
            logits.grad = None
            x = logits.softmax(0)
            value = pair.potential(x).sum() - (a * x).sum()
            value.backward()
            return value.detach()

        optimizer.step(descended)
        assert float(pair.dual(a).sum()) == pytest.approx(-float(descended()), abs=1e-7)
        assert torch.allclose(logits.softmax(0), pair.rho(a), atol=1e-3)


# The rate of learned precisions


@pytest.mark.parametrize("per", ["layer", "unit"])
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_a_learned_precision_takes_steps_of_its_rate(rate, per):
    """log Pi <- log Pi + rate / 2 (1 - Pi <e^2>), by hand."""
    precision = ebm.LearnedPrecision(rate=rate, per=per)
    pi = torch.ones(4 if per == "unit" else (), dtype=DOUBLE)
    for k in range(5):
        errors = 0.3 * drawn(7, 4, seed=k)
        precision.observe("1", errors)
        squares = errors.square().mean(0) if per == "unit" else errors.square().mean()
        pi = (pi.log() + rate / 2 * (1 - pi * squares)).exp()
        assert torch.allclose(precision.of("1", errors), pi, rtol=1e-13)


# Incremental updates at other nudges


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("strength", [0.2, 1.0, 3.0])
def test_incremental_updates_at_any_nudge(strength, capture):
    """x <- x - lr dE/dx and theta <- theta - eta / (lambda B) dE/dtheta at once; autograd over explicit states."""
    x, y, lr, eta, steps = drawn(6, 4, seed=1), drawn(6, 3, seed=2), 0.1, 0.2, 4
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]

    def energy(states: list[Tensor]) -> Tensor:
        w1, b1, w2, b2, w3, b3 = weights
        mu1, mu2 = torch.tanh(x @ w1.T + b1), torch.tanh(states[0] @ w2.T + b2)
        loss = 0.5 * (states[1] @ w3.T + b3 - y).square().sum()
        return 0.5 * (states[0] - mu1).square().sum() + 0.5 * (states[1] - mu2).square().sum() + strength * loss

    batches = 3  # the later ones run as code
    algorithm = ebm.algorithm(
        "incremental-pc", nudge=ebm.OneSided(strength), relaxer=ebm.GradientDescent(lr=lr, max_steps=steps)
    )
    learner = ebm.Learner(net, algorithm, capture=capture)
    optimizer = torch.optim.SGD(net.parameters(), lr=eta)
    for _ in range(batches):
        learner.step(lambda: 0.5 * (net(x) - y).square().sum(1).mean(), optimizer)
        with torch.no_grad():
            w1, b1, w2, b2, _, _ = weights
            first = torch.tanh(x @ w1.T + b1)
            states = [first, torch.tanh(first @ w2.T + b2)]
        for _ in range(steps):
            leaves = [s.detach().requires_grad_() for s in states]
            slopes = torch.autograd.grad(energy(leaves), [*leaves, *weights])
            states = [s.detach() - lr * g for s, g in zip(leaves, slopes[:2], strict=True)]
            with torch.no_grad():
                for w, g in zip(weights, slopes[2:], strict=True):
                    w -= eta / (strength * len(x)) * g
    for p, w in zip(net.parameters(), weights, strict=True):
        assert torch.allclose(p, w, rtol=1e-10, atol=1e-12)


# Samples folded into rows


class Steps(nn.Module):
    """The same layers on each of T steps of a sample: on (B, T, D), or folded into rows, (B T, D)."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.folded = folded

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.folded else self.net(x)


@pytest.mark.parametrize(
    "relaxer",
    [
        ebm.GradientDescent(0.3, 8, tol=1e-9),
        ebm.ErrorCoordinates(4, tol=1e-9),
        ebm.Anderson(4, 2, tol=1e-9, coordinates="errors"),
        ebm.AcceleratedFixedPoint(6, tol=1e-9),
    ],
    ids=str,
)
def test_samples_folded_into_rows_take_their_own_steps(relaxer):
    """Losses of very different weight: each sample needs another step, and rows of one must not take another's."""
    x, y = drawn(5, 4, 3, seed=1), drawn(5, 4, 2, seed=2)
    weight = torch.tensor([0.05, 4.0, 0.3, 9.0, 1.0], dtype=DOUBLE)
    found = []
    for folded in (True, False):
        module = Steps(folded)

        def loss(module: Steps = module) -> Tensor:
            return (weight * (module(x) - y).square().sum((1, 2))).mean()

        learner = ebm.Learner(module, ebm.algorithm("predictive-coding", relaxer=relaxer), batch_size=5)
        found.append(learner.gradients(loss))
        assert learner.report["result"] == "max_steps"  # on the way, where a wrong step shows
    assert off(*found) < 1e-10


# States that samples were left in, under weights that move


def test_a_sample_goes_on_from_where_it_was_left_under_the_weights_of_now():
    """Three sweeps a visit, of a chain written out; the batch comes back in another order, the weights have moved."""
    x, y, order = drawn(5, 4, seed=1), drawn(5, 2, seed=2), torch.tensor([3, 0, 4, 1, 2])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    relaxer = ebm.FixedPoint(3)
    algorithm = ebm.Algorithm(ebm.Hopfield(), ebm.OneSided(0.1), relaxer, initial_state="last-visit")
    learner = ebm.Learner(net, algorithm)

    def visit(inputs: Tensor, targets: Tensor) -> float:
        net.zero_grad()
        learner.backward(lambda: 0.5 * (net(inputs) - targets).square().sum(1).mean())
        return float(learner.report["phases"][0]["energies"][-1])

    @torch.no_grad()
    def swept(inputs: Tensor, states: list[Tensor] | None) -> tuple[list[Tensor], float]:
        first, second = net[0], net[2]
        if states is None:
            low = torch.tanh(first(inputs))
            states = [low, torch.tanh(second(low))]
        low, high = states
        for _ in range(3):
            low = torch.tanh(first(inputs) + high @ second.weight)
            high = torch.tanh(second(low))
        potential = sum((s * s.atanh() + 0.5 * torch.log1p(-s * s)).sum() for s in (low, high))
        return [low, high], float(potential - (low * first(inputs)).sum() - (high * second(low)).sum())

    states, energy = swept(x, None)
    assert visit(x, y) == pytest.approx(energy, rel=1e-12)
    for step in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1 * drawn(*p.shape, seed=10 + step)
        x, y, states = x[order], y[order], [s[order] for s in states]
        states, energy = swept(x, states)
        assert visit(x, y) == pytest.approx(energy, rel=1e-12)
        assert abs(energy - swept(x, None)[1]) > 1e-6 * abs(energy)  # else it would not matter where it begins


def test_memory_gives_back_what_was_kept_sample_by_sample():
    memory, x = StateMemory(), drawn(4, 3)
    names = memory.names([x], 4)
    memory.keep(names[:3], [x[:3] + 1, x[:3] - 1])
    again = memory.recall(memory.names([x.flip(0)], 4), [torch.zeros(4, 3, dtype=DOUBLE)] * 2)
    assert torch.equal(again[0], torch.cat([torch.zeros(1, 3, dtype=DOUBLE), x[:3].flip(0) + 1]))
    assert torch.equal(again[1], torch.cat([torch.zeros(1, 3, dtype=DOUBLE), x[:3].flip(0) - 1]))


def test_memory_is_bounded_and_lets_go_of_the_samples_that_were_seen_longest_ago():
    """Samples that are augmented differently at every visit are new each time."""
    memory, x = StateMemory(most=5 * 2 * 3 * 8), drawn(8, 3)
    names = memory.names([x], 8)
    for i in (0, 1, 2, 3, 4, 0, 5, 6):
        memory.keep([names[i]], [x[i : i + 1], x[i : i + 1]])
    held = [bool((memory.recall([name], [torch.zeros(1, 3, dtype=DOUBLE)])[0] != 0).any()) for name in names]
    assert held == [True, False, False, True, True, True, True, False]
    again = StateMemory(most=5 * 2 * 3 * 8)
    again.load_state_dict(memory.state_dict())
    again.keep([names[7]], [x[7:], x[7:]])
    assert len(again.state_dict()) == 5
