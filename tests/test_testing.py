"""The checkers that users are offered: they pass what is right and catch what is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def make(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()] if norm else [nn.Linear(5, 8), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "algorithm",
    [
        "predictive-coding",
        "pc-nudge",
        "zero-divergence",
        "error-pc",
        ebm.algorithm("pc-nudge", nudge=ebm.Centered(1e-3), relaxer=ebm.GradientDescent(0.1, 30)),
    ],
    ids=str,
)
def test_every_update_is_local(algorithm, norm):
    """Moving one layer's parameters, states held, changes the update of that layer and of no other."""
    net = make(norm)
    weights = {name: p.clone() for name, p in net.named_parameters()}
    changed = ebm.testing.check_locality(net, lambda: F.cross_entropy(net(X), Y), algorithm)
    assert all(torch.equal(weights[name], p) for name, p in net.named_parameters())
    last = str(len(net) - 1)
    assert set(changed["(loss)"]) == {f"{last}.weight", f"{last}.bias"}
    first = {name for name in weights if name.startswith(("0.", "1."))} if norm else {"0.weight", "0.bias"}
    hidden = next(iter(changed))
    assert set(changed[hidden]) <= first
    if algorithm != "zero-divergence":  # whose update is the held displacement itself times a slope
        assert changed[hidden]


def test_backprop_is_not_local():
    """The control of the checker: the true gradient of a layer depends on the weights of all the others."""
    net = make()
    with pytest.raises(AssertionError, match=r"2\.weight.*drive of '1'"):
        ebm.testing.check_locality(net, lambda: F.cross_entropy(net(X), Y), "backprop")


@pytest.mark.parametrize("name", [name for name in ebm.algorithms() if name != "backprop"])
def test_what_is_offered_to_users_proves_every_preset(name):
    figures = ebm.testing.check_algorithm(name)
    exact = {"zero-divergence", "fixed-prediction", "infinitesimal", "recurrent-backprop"}
    assert figures["relative_error"] < 1e-5 if name in exact else figures["cosine"] > 0.5


class Doubled(ebm.Nudge):
    """Forgets a half: every update is twice what it should be."""

    def phases(self):
        return ebm.Phase(0.1, 10.0), ebm.Phase(-0.1, -10.0)


class Coupling(ebm.PredictiveCoding):
    """Samples that see each other through their mean."""

    def layer_energy(self, state, layer):
        return super().layer_energy(state, layer) + 0.5 * (state.mean(0) - layer.prediction.mean(0)).square()


class NoDivergence(ebm.PredictiveCoding):
    """Says that its free equilibrium is the forward pass, where it has a force."""

    def layer_energy(self, state, layer):
        return super().layer_energy(state, layer) + 0.1 * state.square()


class Softer(ebm.Hopfield):
    """A best response of its own, of another energy than its own."""

    def layer_energy(self, state, layer):
        return super().layer_energy(state, layer) + 0.2 * state.square()

    def best_response(self, pull, layer):
        return super().best_response(pull, layer)


class Inherited(ebm.FenchelYoung):
    divergence = True

    def layer_energy(self, state, layer):
        return 2 * super().layer_energy(state, layer)


class Asleep(ebm.GradientDescent):
    """Says that it has arrived where it started."""

    def relax(self, landscape, start, strength):
        zero = landscape.per_sample([torch.zeros_like(x) for x in start])
        moved = [x + 1e-3 for x in start]
        return ebm.Relaxation(moved, "states", "converged", 1, zero, [zero.sum(), zero.sum()])


class Uphill(ebm.Nudge):
    """A table whose signs are swapped."""

    def phases(self):
        return ebm.Phase(0.1, -10.0), ebm.Phase(0.0, 10.0)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (ebm.algorithm("pc-nudge", nudge=Doubled()), "sum"),
        (ebm.algorithm("pc-nudge", nudge=Uphill()), "sum"),
        (ebm.Algorithm(Coupling(), ebm.OneSided(1.0), ebm.GradientDescent(0.1, 20)), "samples"),
        (ebm.Algorithm(NoDivergence(), ebm.OneSided(1.0), ebm.GradientDescent(0.1, 20)), "divergence"),
        ("backprop", "not present at its own layer"),
        (ebm.Algorithm(Softer(), ebm.Centered(0.1), ebm.FixedPoint(100, tol=1e-8)), "Softer.best_response of layer"),
        (ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(1.0), Asleep()), "says .converged."),
    ],
    ids=["twice", "uphill", "coupled samples", "no divergence", "not local", "another response", "asleep"],
)
def test_what_is_offered_to_users_catches_what_is_wrong(algorithm, message):
    with pytest.raises(AssertionError, match=message):
        ebm.testing.check_algorithm(algorithm)


@pytest.mark.parametrize("relaxer", [ebm.FixedPoint(100, tol=1e-8), ebm.Dyadic(), ebm.AcceleratedFixedPoint()])
def test_an_energy_that_a_relaxer_would_ignore_does_not_pass(relaxer):
    with pytest.raises(ebm.ConfigurationError, match="Inherited overrides layer_energy"):
        ebm.testing.check_algorithm(ebm.Algorithm(Inherited(), ebm.OneSided(0.1), relaxer))


@pytest.mark.parametrize(
    "algorithm",
    [
        "incremental-pc",
        ebm.Algorithm(ebm.Hopfield(), ebm.OneSided(0.1), ebm.FixedPoint(9, order="synchronous"), update="continual"),
    ],
    ids=["incremental", "continual"],
)
def test_an_update_without_a_limit_in_the_nudge_is_refused_by_its_name(algorithm):
    """And not for the relaxer, which nobody has chosen but the check itself."""
    with pytest.raises(ebm.ConfigurationError, match=r'check_limit.*no limit in the nudge alone.*"contrast"'):
        ebm.testing.check_limit(algorithm)
    assert ebm.testing.check_limit(ebm.algorithm(algorithm, update="contrast"))
