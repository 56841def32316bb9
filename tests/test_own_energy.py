"""A user's own energy, in a few lines, through every phase: also one whose free equilibrium is not the forward pass."""

import json

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class LinearHopfield(ebm.Energy):
    """e = 1/2 |x|^2 - <x, a>: symmetric connections, so that layers above pull on those below in the free phase too."""

    def layer_energy(self, state, layer):
        return 0.5 * state.square() - state * layer.drive


class Cosh(ebm.Energy):
    """A divergence that is no quadratic: e = log cosh(x - rho(a))."""

    divergence = True

    def layer_energy(self, state, layer):
        return torch.log(torch.cosh(state - layer.prediction))


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    for p in net.parameters():
        p.data *= 0.6
    return net


def implicit_gradient(net: nn.Sequential) -> dict[str, torch.Tensor]:
    """d loss(x_bar(theta)) / d theta, with x_bar the minimum of the quadratic energy, by solving the linear system."""
    w1, b1, w2, b2, w3, b3 = net.parameters()
    # dE/dx1 = x1 - a1 - W2' x2 = 0;  dE/dx2 = x2 - W2 x1 - b2 = 0
    a1 = X @ w1.T + b1
    matrix = torch.eye(6, dtype=torch.float64) - w2.T @ w2
    x1 = torch.linalg.solve(matrix, (a1 + (b2 @ w2)).T).T
    x2 = x1 @ w2.T + b2
    loss = 0.5 * (x2 @ w3.T + b3 - Y).square().sum(1).mean()
    names = [name for name, _ in net.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, [w1, b1, w2, b2, w3, b3]), strict=True))


def test_a_hopfield_energy_learns_by_the_contrast_of_two_relaxed_phases():
    """EP theorem (theory P2): one-sided off by O(lambda), centred by O(lambda^2), from the *implicit* gradient."""
    net = make_net()
    # the loss is of the read-out at the free equilibrium, which forward passes never see
    closure = lambda: 0.5 * (net(X) - Y).square().sum(1).mean()  # noqa: E731
    true = implicit_gradient(net)
    relaxer = ebm.GradientDescent(lr=0.3, max_steps=600)

    def error(nudge):
        algorithm = ebm.Algorithm(LinearHopfield(), nudge, relaxer)
        learner = ebm.Learner(net, algorithm, layers=nn.Linear)
        found = learner.gradients(closure)
        assert learner.report["phases"][0]["nudge"] == 0.0
        return ebm.metrics.alignment(found, true)["relative_error"]

    assert error(ebm.OneSided(1e-2)) / error(ebm.OneSided(1e-3)) == pytest.approx(10, rel=0.05)
    assert error(ebm.Centered(1e-1)) / error(ebm.Centered(1e-2)) == pytest.approx(100, rel=0.1)
    assert error(ebm.Centered(1e-3)) < 1e-6
    # and it is not the feed-forward gradient
    forward = ebm.reference.backprop(net, closure)
    assert ebm.metrics.alignment(true, forward)["relative_error"] > 0.05


def test_starting_the_free_phase_from_zeros_reaches_the_same_equilibrium():
    net = make_net()
    closure = lambda: 0.5 * (net(X) - Y).square().sum(1).mean()  # noqa: E731
    parts = {"nudge": ebm.Centered(1e-2), "relaxer": ebm.GradientDescent(lr=0.3, max_steps=600)}
    starts = [ebm.Algorithm(LinearHopfield(), initial_state=start, **parts) for start in ("forward", "zeros")]
    found = [ebm.Learner(net, algorithm, layers=nn.Linear).gradients(closure) for algorithm in starts]
    assert ebm.metrics.alignment(*found)["relative_error"] < 1e-9


def test_any_divergence_gives_backprop_in_the_limit():
    """Theory P3, P4: a single phase, whatever the shape of the divergence."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    closure = lambda: (net(X) - Y).square().mean()  # noqa: E731
    true = ebm.reference.backprop(net, closure)

    def error(strength):
        algorithm = ebm.Algorithm(Cosh(), ebm.OneSided(strength), ebm.GradientDescent(lr=0.3, max_steps=400))
        return ebm.metrics.alignment(ebm.Learner(net, algorithm).gradients(closure), true)["relative_error"]

    assert error(1e-2) / error(1e-3) == pytest.approx(10, rel=0.1)
    assert error(1e-4) < 1e-3


def test_the_report_is_plain_json_and_its_energies_are_those_of_the_phases():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    closure = lambda: 0.5 * (net(X) - Y).square().sum()  # noqa: E731
    learner = ebm.Learner(net, "predictive-coding", loss_reduction="sum")
    learner.backward(closure)
    report = json.loads(json.dumps(learner.report))
    # one hidden layer and a linear read-out: E* = min_e 1/2 |e|^2 + 1/2 |r - W e|^2 = 1/2 r' (1 + W W')^-1 r
    with torch.no_grad():
        r = Y - net(X)
        w = net[2].weight
        expected = 0.5 * torch.einsum("bi,ij,bj->", r, torch.linalg.inv(torch.eye(3).double() + w @ w.T), r)
    assert report["energy_nudged"] == pytest.approx(float(expected), rel=1e-5)
    assert report["energy_free"] == 0
    assert report["loss"] == pytest.approx(float(closure()))
    assert report["result"] == "converged"
    assert len(report["residual"]) == 5
    energies = report["phases"][0]["energies"]
    assert energies[0] == pytest.approx(report["loss"])
    assert energies == sorted(energies, reverse=True)


# What a subclass inherits and what it only seems to: promises of a parent are about the parent's own energy.


class StudentT(ebm.PredictiveCoding):
    """Heavy tails, so that large errors weigh less."""

    def layer_energy(self, state, layer):
        return 5 * torch.log1p((state - layer.prediction).square() / 0.01)


class Stiff(ebm.Hopfield):
    """A Hopfield energy and a term of its own: its best response is no more that of its parent."""

    def layer_energy(self, state, layer):
        return super().layer_energy(state, layer) + 0.5 * state.square()


class Heavy(ebm.FenchelYoung):
    """Three times the gap, which is a divergence too, but does not say so."""

    def layer_energy(self, state, layer):
        return 3 * super().layer_energy(state, layer)


class PrecisionOfTheDrive(ebm.PredictiveCoding):
    """Units whose drive is large are trusted less. Overrides the precision and nothing else."""

    def layer_precision(self, layer):
        return 1 / (1 + layer.drive.detach().square())


def tanh_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def at_equilibrium(net, energy_of, strength, steps=4000, lr=0.05):
    """Predictions, states, and the update dE/dtheta / (strength B), by autograd over explicit states alone.

    `energy_of(state, drive)` is summed over both layers; the read-out goes into the loss.
    """
    first, second, readout = net[0], net[2], net[4]

    def total(states, weight):
        x1, x2 = states
        loss = 0.5 * (readout(x2) - Y).square().sum()
        return energy_of(x1, first(X)) + energy_of(x2, second(x1)) + weight * loss

    def relaxed(states, weight):
        for _ in range(steps):
            states = [x.detach().requires_grad_() for x in states]
            slopes = torch.autograd.grad(total(states, weight), states)
            states = [x - lr * g for x, g in zip(states, slopes, strict=True)]
        return [x.detach() for x in states]

    x1 = first(X).tanh()
    free = relaxed([x1, second(x1).tanh()], 0.0)
    nudged = relaxed(free, strength)
    contrast = (total(nudged, strength) - total(free, 0.0)) / (strength * len(X))
    names = [name for name, _ in net.named_parameters()]
    return dict(zip(names, torch.autograd.grad(contrast, list(net.parameters())), strict=True))


def off(found, true):
    assert sorted(found) == sorted(true)
    return ebm.metrics.alignment(found, true)["relative_error"]


def gradients(net, algorithm, **options):
    closure = lambda: 0.5 * (net(X) - Y).square().sum(1).mean()  # noqa: E731
    return ebm.Learner(net, algorithm, **options).gradients(closure)


@pytest.mark.slow
@pytest.mark.parametrize("capture", [True, False])
def test_an_overridden_energy_is_relaxed_and_read_as_it_is_written(capture):
    descent, net = ebm.GradientDescent(0.0005, 3000), tanh_net()
    true = at_equilibrium(
        net, lambda x, a: 5 * torch.log1p((x - a.tanh()).square() / 0.01).sum(), 1.0, steps=3000, lr=0.0005
    )
    found = gradients(net, ebm.Algorithm(StudentT(), ebm.OneSided(1.0), descent), capture=capture)
    assert off(found, true) < 1e-6
    plain = gradients(net, ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(1.0), descent), capture=capture)
    assert off(plain, true) > 1e-2


@pytest.mark.parametrize("capture", [True, False])
def test_a_precision_that_is_overridden_sees_the_drive(capture):
    """Its parent promises that nobody looks at drives, of a precision that did not."""
    net = tanh_net()
    true = at_equilibrium(
        net, lambda x, a: (0.5 * (x - a.tanh()).square() / (1 + a.detach().square())).sum(), 1.0, 2000, 0.1
    )
    for relaxer in (ebm.GradientDescent(0.1, 2000), ebm.ErrorCoordinates(500, lr=0.2, tol=0)):
        algorithm = ebm.Algorithm(PrecisionOfTheDrive(), ebm.OneSided(1.0), relaxer)
        assert off(gradients(net, algorithm, capture=capture), true) < 1e-6


@pytest.mark.parametrize(
    "relaxer",
    [
        ebm.ErrorCoordinates(),
        ebm.Sweep(),
        ebm.FixedPrediction(),
        ebm.AugmentedLagrangian(),
        ebm.Anderson(coordinates="errors"),
    ],
    ids=lambda relaxer: type(relaxer).__name__,
)
def test_relaxers_of_errors_refuse_an_overridden_energy(relaxer):
    with pytest.raises(ebm.ConfigurationError, match="StudentT overrides layer_energy"):
        ebm.Algorithm(StudentT(), ebm.OneSided(1.0), relaxer)
    with pytest.raises(ebm.ConfigurationError, match="Stiff is no function"):
        ebm.Algorithm(Stiff(), ebm.Centered(0.1), SWEEPS, free_relaxer=ebm.ErrorCoordinates())


SWEEPS = ebm.FixedPoint(60, tol=1e-8)


@pytest.mark.parametrize("energy", [StudentT(), Stiff(), Heavy()], ids=lambda energy: type(energy).__name__)
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    "relaxer", [SWEEPS, ebm.AcceleratedFixedPoint(60), ebm.Anderson(60)], ids=lambda relaxer: type(relaxer).__name__
)
def test_relaxers_of_best_responses_refuse_the_response_of_another_energy(energy, relaxer, capture):
    with pytest.raises(
        ebm.ConfigurationError, match=f"{type(energy).__name__} overrides layer_energy and inherits best"
    ):
        gradients(tanh_net(), ebm.Algorithm(energy, ebm.Centered(0.1), relaxer), capture=capture)


def test_pairs_of_states_refuse_it_too():
    class Silent(Heavy):
        divergence = True

    for energy in (Silent(), Heavy()):
        with pytest.raises(ebm.ConfigurationError):
            gradients(tanh_net(), ebm.Algorithm(energy, ebm.OneSided(0.1), ebm.Dyadic()))


@pytest.mark.slow
def test_descent_honours_a_subclass_of_the_other_energies():
    descent, net = ebm.GradientDescent(0.05, 3000), tanh_net()

    def potential(x):
        return 0.5 * (torch.xlogy(1 + x, 1 + x) + torch.xlogy(1 - x, 1 - x))

    true = at_equilibrium(net, lambda x, a: (potential(x) - x * a + 0.5 * x.square()).sum(), 0.1, 3000)
    assert off(gradients(net, ebm.Algorithm(Stiff(), ebm.OneSided(0.1), descent)), true) < 1e-6
    gap = lambda x, a: 3 * (potential(x) + a.cosh().log() - x * a).sum()  # noqa: E731
    true = at_equilibrium(net, gap, 0.1, 3000, 0.01)
    gentle = ebm.GradientDescent(0.01, 3000)
    assert off(gradients(net, ebm.Algorithm(Heavy(), ebm.OneSided(0.1), gentle)), true) < 1e-6


@pytest.mark.slow
def test_what_settles_by_itself_asks_for_no_response_that_is_not_there():
    """`relaxer="auto"` and the exact references descend where there is no best response to iterate."""
    chosen = ebm.Algorithm(Stiff(), ebm.Centered(0.1), "auto").relaxer
    assert {type(candidate) for candidate in chosen.candidates} == {ebm.GradientDescent}
    net = tanh_net()
    closure = lambda: 0.5 * (net(X) - Y).square().sum(1).mean()  # noqa: E731
    algorithm = ebm.Algorithm(Stiff(), ebm.Centered(1e-3), ebm.GradientDescent(0.1, 3000))
    assert off(gradients(net, algorithm), ebm.reference.equilibrium(net, closure, algorithm)) < 1e-4


def test_promises_are_kept_by_subclasses_that_leave_the_energy_alone():
    from lightning_ebm.energies.base import (
        has_best_response,
        is_divergence,
        is_quadratic,
        reads_drive,
        rests_at_prediction,
    )

    class Named(ebm.PredictiveCoding):
        colour = "red"

    class Gain(ebm.Hopfield):
        colour = "blue"

    class Again(StudentT):
        divergence = True
        reads_drive = False

    asked = (is_divergence, is_quadratic, reads_drive, rests_at_prediction, has_best_response)
    kept = {
        Named(): (True, True, False, False, True),
        Gain(): (False, False, True, True, True),
        StudentT(): (False, False, True, False, False),
        Stiff(): (False, False, True, False, False),
        Again(): (True, False, False, False, False),
        PrecisionOfTheDrive(): (True, True, True, False, True),
    }
    for energy, expected in kept.items():
        assert tuple(ask(energy) for ask in asked) == expected, energy


def test_a_precision_with_a_gradient_is_refused_by_name():
    class Trained(ebm.PredictiveCoding):
        def layer_precision(self, layer):
            return 1 + layer.prediction.square()

    for relaxer in (ebm.ErrorCoordinates(), ebm.GradientDescent(0.1, 20), ebm.Sweep()):
        for capture in (True, False):
            with pytest.raises(ebm.ConfigurationError, match=r"Trained\.layer_precision of layer '1' has a gradient"):
                gradients(tanh_net(), ebm.Algorithm(Trained(), ebm.OneSided(1.0), relaxer), capture=capture)


def test_learned_precisions_of_a_subclass_learn_from_its_own_relaxation():
    class Tails(StudentT):
        def layer_energy(self, state, layer):
            return torch.log1p(0.5 * self.layer_precision(layer) * (state - layer.prediction).square())

    precision = ebm.LearnedPrecision(rate=0.1)
    net = tanh_net()
    learner = ebm.Learner(net, ebm.Algorithm(Tails(precision), ebm.OneSided(1.0), ebm.GradientDescent(0.1, 500)))
    learner.backward(lambda: 0.5 * (net(X) - Y).square().sum(1).mean())
    assert precision.state_dict().keys() == {"1", "3"}
    assert all(1 < float(value) < 1.06 for value in precision.state_dict().values())  # errors below 1
