"""Where an update was read: against closed forms, against layers that nothing can have reached, and in words."""

import math

import pytest
import torch
from test_recording import chain, problem
from torch import nn

import lightning_ebm as ebm
from lightning_ebm import regime


def closed_form(net, x, y):
    """Linear network x1 = W1 x + b1, readout W2 x1 + b2: backprop, equilibrium and lowest energy, no iteration."""
    w1, b1, w2, b2 = (p.detach() for p in net.parameters())
    mu = x @ w1.T + b1
    r = mu @ w2.T + b2 - y
    e = -r @ torch.linalg.inv(torch.eye(len(b2)).double() + w2 @ w2.T) @ w2  # x1* = mu + e
    r_star = r + e @ w2.T
    size = len(x)
    true = {"0.weight": (r @ w2).T @ x, "0.bias": (r @ w2).sum(0), "2.weight": r.T @ mu, "2.bias": r.sum(0)}
    settled = {
        "0.weight": -e.T @ x, "0.bias": -e.sum(0), "2.weight": r_star.T @ (mu + e), "2.bias": r_star.sum(0),
    }  # fmt: skip
    start, lowest = 0.5 * r.square().sum(), 0.5 * (e.square().sum() + r_star.square().sum())
    scaled = ({name: g / size for name, g in side.items()} for side in (true, settled))
    return (*scaled, float(start), float(lowest), e)


def linear():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3)).double()
    x, y = torch.randn(9, 4).double(), torch.randn(9, 3).double()
    return net, x, y, lambda: 0.5 * (net(x) - y).square().sum(1).mean()


@pytest.mark.parametrize(("lr", "steps"), [(0.05, 3), (0.1, 40)])
def test_every_number_of_a_linear_network_in_closed_form(lr, steps):
    net, x, y, closure = linear()
    true, settled, start, lowest, e_star = closed_form(net, x, y)
    # Euler on x1 = mu + e, by itself: e <- e - lr (e + (r + e W2') W2)
    w1, b1, w2, b2 = (p.detach() for p in net.parameters())
    mu = x @ w1.T + b1
    r = mu @ w2.T + b2 - y
    e = torch.zeros_like(mu)
    for _ in range(steps):
        e = e - lr * (e + (r + e @ w2.T) @ w2)
    r_stop = r + e @ w2.T
    energy = 0.5 * (e.square().sum() + r_stop.square().sum())
    stop = {"0.weight": -e.T @ x, "0.bias": -e.sum(0), "2.weight": r_stop.T @ (mu + e), "2.bias": r_stop.sum(0)}
    stop = {name: g / len(x) for name, g in stop.items()}

    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr, steps))
    found = regime.of(net, closure, algorithm, layers=nn.Identity)
    assert found.relaxed == pytest.approx((start - float(energy)) / (start - lowest), rel=1e-6)
    assert found.steps == steps
    assert found.settled
    names = [("1", ("0.weight", "0.bias")), ("readout", ("2.weight", "2.bias"))]
    for layer, (name, parameters) in zip(found.layers, names, strict=True):
        g, s, b = ({p: side[p] for p in parameters} for side in (stop, settled, true))
        at_stop, at_equilibrium = ebm.metrics.alignment(g, b), ebm.metrics.alignment(s, b)
        between = ebm.metrics.alignment(g, s)["angle_deg"]
        assert (layer.name, layer.parameters) == (name, parameters)
        assert layer.cosine_stop == pytest.approx(at_stop["cosine"], abs=1e-7)
        assert layer.norm_ratio_stop == pytest.approx(at_stop["norm_ratio"], rel=1e-6)
        assert layer.cosine_equilibrium == pytest.approx(at_equilibrium["cosine"], abs=1e-6)
        assert layer.norm_ratio_equilibrium == pytest.approx(at_equilibrium["norm_ratio"], rel=1e-4)
        if not math.isnan(layer.toward_equilibrium):
            assert layer.toward_equilibrium == pytest.approx(
                at_stop["angle_deg"] / (at_stop["angle_deg"] + between), abs=2e-3
            )
    assert found.layers[0].error_ratio == pytest.approx(float(e.norm() / e_star.norm()), rel=1e-4)


@pytest.mark.parametrize("lr", [0.02, 0.1, 0.3])
def test_effective_steps_of_a_single_curvature_in_closed_form(lr):
    """One state a sample of curvature k = 1 + w^2: the energy to go falls by (1 - lr k)^2 a step."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 1)).double()
    net[2].weight.data.fill_(0.8)
    x, y = torch.linspace(-1, 1, 5).reshape(5, 1).double(), torch.ones(5, 1).double()
    steps, rate = 60, (1 - lr * (1 + 0.8**2)) ** 2

    def closure():
        return 0.5 * (net(x) - y).square().sum(1).mean()

    def wanted(share):
        return math.ceil(math.log(1 - share * (1 - rate**steps)) / math.log(rate))

    relaxer = ebm.GradientDescent(lr, steps)
    algorithm = ebm.algorithm("predictive-coding", relaxer=relaxer)
    relaxed = ebm.Learner(net, algorithm, layers=nn.Identity).relax(closure, nudge=1.0)
    assert relaxed.effective_steps == wanted(0.99)
    for share in (0.5, 0.9, 0.999):
        assert regime.effective_steps(relaxed.trace, share) == wanted(share)
    assert regime.of(net, closure, algorithm, layers=nn.Identity).effective_steps == wanted(0.99)
    silent = ebm.Learner(net, algorithm, layers=nn.Identity).relax(closure, nudge=1.0, relaxer=ebm.FixedPoint(20))
    assert silent.effective_steps is None  # it tells the first energy and the last


def test_effective_steps_of_what_does_not_fall():
    assert regime.effective_steps([1.0]) == regime.effective_steps([1.0, 1.0, 1.0]) == 0
    assert regime.effective_steps([1.0, 2.0, 1.5]) == 0
    assert regime.effective_steps([5.0, 0.0, 2.0, 1.0]) == 1  # a relaxer with momentum may pass by
    for energies, share in (([], 0.99), ([1.0], 0.0), ([1.0], 1.5)):
        with pytest.raises(ebm.ConfigurationError, match="effective_steps"):
            regime.effective_steps(energies, share)


def test_from_backprop_to_equilibrium_in_words():
    net = chain()
    for p in net.parameters():  # enough weight for equilibrium to differ from backprop
        p.data *= 2
    closure, *_ = problem(net)

    def verdict(relaxer, nudge=1.0):
        return regime.of(net, closure, ebm.Algorithm(nudge=ebm.OneSided(nudge), relaxer=relaxer))

    begun = verdict(ebm.ErrorCoordinates(3, lr=1e-3, tol=0.0))
    assert begun.verdict == "backprop's direction"
    assert begun.relaxed < 0.05
    assert all(layer.norm_ratio_stop < 0.01 for layer in begun.layers[:-1])
    ended = verdict(ebm.ErrorCoordinates(200, tol=1e-6))
    assert ended.verdict == "equilibrium"
    assert ended.relaxed == pytest.approx(1, abs=1e-6)
    between = verdict(ebm.ErrorCoordinates(4, lr=0.2, tol=0.0))
    assert begun.toward_equilibrium < between.toward_equilibrium < ended.toward_equilibrium
    assert between.verdict == "in between"
    weak = verdict(ebm.ErrorCoordinates(100, tol=1e-6), 1e-6)
    assert weak.verdict == "both: they coincide"
    assert all(layer.cosine_equilibrium > 1 - 1e-8 for layer in weak.layers)


def test_layers_that_no_signal_has_reached_have_an_error_of_exactly_zero():
    """Thirty layers, five steps: 25 layers cannot have heard of the loss, and are told from those that have."""
    torch.manual_seed(0)
    layers = [module for _ in range(30) for module in (nn.Linear(8, 8), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(8, 3))
    x, y = torch.randn(6, 8), torch.randn(6, 3)
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.3, 5))

    def closure():
        return 0.5 * (net(x) - y).square().sum(1).mean()

    found = regime.of(net, closure, algorithm)
    assert [layer.reach for layer in found.layers] == ["none"] * 25 + ["signal"] * 5 + ["read-out"]
    assert all(layer.error_ratio == 0 and layer.norm_ratio_stop == 0 for layer in found.layers[:25])
    assert len(found.unreached) == 25
    update = ebm.Learner(net, algorithm).gradients(closure)
    assert not any(bool(update[f"{2 * k}.{p}"].any()) for k in range(25) for p in ("weight", "bias"))
    assert all(bool(update[f"{2 * k}.weight"].any()) for k in range(25, 31))


def test_a_signal_below_the_rounding_of_the_states_is_called_noise():
    """A small step shrinks the signal at every layer, and ReLU units at zero still hold what their peers round off."""
    torch.manual_seed(0)
    layers = [module for _ in range(8) for module in (nn.Linear(16, 16), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(16, 3))
    x, y = torch.randn(6, 16), torch.randn(6, 3)
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(3e-3, 8))
    found = regime.of(net, lambda: 0.5 * (net(x) - y).square().sum(1).mean(), algorithm)
    reach = [layer.reach for layer in found.layers]
    assert reach[-3:] == ["signal", "signal", "read-out"]
    assert "rounding" in reach
    assert reach[0] in ("none", "rounding")
    double = regime.of(net.double(), lambda: 0.5 * (net(x.double()) - y.double()).square().sum(1).mean(), algorithm)
    assert [layer.reach for layer in double.layers][4:] == ["signal"] * 4 + ["read-out"]


def test_measuring_leaves_no_trace():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    x, y = torch.randn(16, 4), torch.randint(2, (16,))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    regime.of(net, lambda: nn.functional.cross_entropy(net(x), y), "error-pc")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_the_control_has_no_regime():
    net, *_, closure = linear()
    with pytest.raises(ebm.ConfigurationError, match="relaxes nothing"):
        regime.of(net, closure, "backprop", layers=nn.Identity)


def test_text_and_plain_numbers():
    import json

    net, *_, closure = linear()
    found = regime.of(net, closure, "zero-divergence", layers=nn.Identity)
    assert found.verdict == "backprop's direction"
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["relaxed"] is None  # it read a displacement; no state went down the energy
    assert [layer["name"] for layer in plain["layers"]] == ["1", "readout"]
    assert "backprop's direction" in str(found)


def test_what_is_read_on_the_way_may_be_neither():
    """A tiny nudge: the first arrival is backprop's gradient, and so is the equilibrium; nine steps of .1 are not."""
    torch.manual_seed(0)
    layers = [module for _ in range(4) for module in (nn.Linear(6, 6), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(6, 3)).double()
    for p in net.parameters():
        p.data *= 2.5
    x, y = torch.randn(9, 6).double(), torch.randn(9, 3).double()

    def found(steps):
        euler = ebm.GradientDescent(0.1, steps)
        algorithm = ebm.algorithm("pc-nudge", nudge=ebm.OneSided(1e-6), relaxer=euler)
        return regime.of(net, lambda: 0.5 * (net(x) - y).square().sum(1).mean(), algorithm)

    early, late = found(9), found(3000)
    assert late.verdict == "both: they coincide"
    assert all(layer.cosine_equilibrium > 1 - 1e-6 for layer in early.layers)
    first = early.layers[0]
    assert first.cosine_stop < 0.98
    assert first.detour > 20
    assert first.verdict == "neither: a direction of its own"
