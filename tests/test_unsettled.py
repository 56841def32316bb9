"""Networks without an equilibrium are told from those that want more steps: against dense eigenvalues, and by name."""

import logging
import re

import pytest
import torch
from torch import nn

import lightning_ebm as ebm
from lightning_ebm.step import unsettled
from lightning_ebm.step.outcome import further


def chain(rate: float, seed: int = 0) -> nn.Sequential:
    """Three linear layers whose odd-even sweep brings states nearer by `rate`, by the dense matrix of the sweep."""
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((3, 6), (6, 5), (5, 4), (4, 2)))).double()
    low, high = 0.0, 10.0
    with torch.no_grad():
        start = [layer.weight.clone() for layer in net]
        for _ in range(60):  # the radius grows with the scale of the weights between states
            middle = (low + high) / 2
            for layer, weight in zip(list(net)[1:3], start[1:3], strict=True):
                layer.weight.copy_(middle * weight)
            low, high = (middle, high) if radius(net) < rate else (low, middle)
    return net


def sweep_matrix(net: nn.Sequential) -> torch.Tensor:
    """States 0 and 2 from what they read, then state 1 from those: as one matrix, column by column."""
    one, two = net[1].weight, net[2].weight

    def swept(x):
        a, b, _ = x.split([6, 5, 4])
        a, c = one.T @ b, two @ b
        return torch.cat([a, one @ a + two.T @ c, c])

    return torch.stack([swept(unit) for unit in torch.eye(15, dtype=torch.float64)], 1).detach()


def radius(net: nn.Sequential) -> float:
    return float(torch.linalg.eigvals(sweep_matrix(net)).abs().max())


def hessian(net: nn.Sequential) -> torch.Tensor:
    """I - W, of I = sum 1/2 |x_l|^2 - <x_l, W_l x_{l-1}>."""
    one, two = net[1].weight.detach(), net[2].weight.detach()
    whole = torch.eye(15, dtype=torch.float64)
    whole[6:11, :6], whole[11:, 6:11] = -one, -two
    return whole + whole.T - torch.eye(15, dtype=torch.float64)


def step(net: nn.Module, relaxer: ebm.Relaxer, layers=None, start: str = "forward") -> ebm.Learner:
    torch.manual_seed(1)
    x, y = torch.randn(8, 3).to(next(net.parameters())), torch.randint(0, 2, (8,))
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=relaxer, initial_state=start)
    learner = ebm.Learner(net, algorithm, layers=layers)
    learner.backward(lambda: nn.functional.cross_entropy(net(x), y))
    return learner


@pytest.mark.parametrize("rate", [1.8, 2.0, 2.2, 3.0, 8.0])
def test_sweeps_that_run_away_at_once_are_told_by_how_much(rate):
    """Whatever the number of sweeps until numbers are too large, which may be that of the two stretches compared."""
    with pytest.raises(ebm.RelaxationDivergedError, match="times as far with every sweep") as caught:
        step(chain(rate), ebm.FixedPoint(3, tol=1e-8), ["0", "1", "2"])
    told = float(re.search(r"([\d.]+) times as far", str(caught.value))[1])
    assert abs(told - rate) < 0.2 * rate


RELAXERS = [ebm.FixedPoint(20, tol=1e-8), ebm.AcceleratedFixedPoint(8, tol=1e-12)]


@pytest.mark.slow
@pytest.mark.parametrize("relaxer", RELAXERS, ids=lambda relaxer: type(relaxer).__name__)
def test_a_gain_above_one_is_refused_and_one_below_is_only_slow(relaxer, caplog):
    """The dense sweep decides: at 0.98 more steps settle it, at 1.02 none do. H is positive definite just as often."""
    slow, without = chain(0.98), chain(1.02)
    assert torch.linalg.eigvalsh(hessian(slow))[0] > 0
    assert torch.linalg.eigvalsh(hessian(without))[0] < 0
    layers = ["0", "1", "2"]
    with caplog.at_level(logging.WARNING):
        learner = step(slow, relaxer, layers)
    assert learner.report["result"] == "max_steps"
    assert "Raise max_steps" in caplog.text
    assert learner.unsettled.told is None
    with pytest.raises(ebm.RelaxationDivergedError, match="no equilibrium") as caught:
        step(without, relaxer, layers)
    text = str(caught.value)
    assert "8 of 8 samples" in text
    assert "Raise max_steps" not in text
    assert "bounded activations" in text
    assert "layer '1'" in text or "layer '0'" in text or "layer '2'" in text
    # The number that is told is the largest eigenvalue of the sweep.
    told = float(re.search(r"([\d.]+) times as far", text)[1])
    assert told == pytest.approx(radius(without), abs=0.006)


def test_a_rectified_network_is_judged_by_the_units_that_fire(caplog):
    """The weights alone would have it settle nowhere; with most units below zero it does, and is not refused."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        net[2].weight.fill_(0.5)  # its largest singular value is 3
        net[0].bias.fill_(-20.0)
        net[2].bias.fill_(-20.0)
    assert torch.linalg.matrix_norm(net[2].weight, 2) > 1
    learner = step(net, ebm.FixedPoint(50, tol=1e-8))
    assert learner.report["result"] == "converged"
    with torch.no_grad():
        net[0].bias.fill_(20.0)
        net[2].bias.fill_(20.0)
    with pytest.raises(ebm.RelaxationDivergedError, match=r"(no equilibrium|ran away).*bounded activations"):
        step(net, ebm.FixedPoint(10, tol=1e-8))


def cycling() -> nn.Sequential:
    """Two tanh layers that hold each other up or down, one begun upwards and one downwards: all at once, they swap."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(0.4)
        net[2].weight.copy_(3.0 * torch.eye(4))
        net[2].bias.fill_(-0.3)
    return net


def test_a_cycle_is_told_from_growth_and_the_remedy_that_is_named_settles_it():
    """The classic two-cycle of synchronous updates; sweeps in turn, and damped ones, lower the energy and settle."""
    everyone = ebm.FixedPoint(50, order="synchronous", tol=1e-8)
    with pytest.raises(ebm.RelaxationDivergedError, match=r"as far with every sweep as before.*odd-even") as caught:
        step(cycling(), everyone, start="zeros")
    assert "damping=0.5" in str(caught.value)
    assert "bounded activations" not in str(caught.value)
    for remedy in (
        ebm.FixedPoint(200, tol=1e-8),
        ebm.FixedPoint(200, order="synchronous", tol=1e-8, damping=0.5),
    ):
        assert step(cycling(), remedy, start="zeros").report["result"] == "converged"


class Pooled(nn.Module):
    """A state, maximum pooling over it, and a state that pulls the largest unit down below the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 2)
        self.act, self.pool, self.last = nn.Hardtanh(), nn.MaxPool1d(2), nn.Linear(2, 2)
        with torch.no_grad():
            self.first.weight.mul_(0.01)
            self.first.bias.copy_(torch.tensor([0.3, 0.29, 0.3, 0.29]))
            self.second.weight.copy_(-0.9 * torch.eye(2))
            self.second.bias.fill_(0.5)

    def forward(self, x):
        h = self.act(self.first(x))
        return self.last(self.act(self.second(self.pool(h))))


def test_maximum_pooling_that_flips_is_named_with_its_remedy():
    """Feedback pushes the larger of two inputs below the other, which then is the larger: the sweep never rests."""
    net = Pooled()
    with pytest.raises(ebm.RelaxationDivergedError, match=r"maximum pooling.*average pooling"):
        step(net, ebm.FixedPoint(50, tol=1e-8))
    net.pool = nn.AvgPool1d(2)
    assert step(net, ebm.FixedPoint(50, tol=1e-8)).report["result"] == "converged"


@pytest.mark.slow
def test_softmax_attention_is_named_with_its_remedy():
    from lightning_ebm.recipes.nets import CharTransformer

    torch.manual_seed(0)
    net = CharTransformer(11, 8, 16, 2, 2)
    tokens = torch.randint(0, 11, (4, 9))

    def closure():
        return nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    with pytest.raises(ebm.RelaxationDivergedError, match=r"(no equilibrium|ran away).*predictive-coding"):
        ebm.Learner(net, "equilibrium-propagation").backward(closure)
    assert ebm.Learner(net, "pc-nudge").gradients(closure)


def test_what_is_found_goes_the_way_of_other_divergences():
    """Skipped where that was asked for; looked at the first, second, fourth and eighth time, not at every batch."""
    net = chain(1.02)
    torch.manual_seed(1)
    x = torch.randn(8, 3, dtype=torch.float64)
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(20, tol=1e-8))
    learner = ebm.Learner(net, algorithm, layers=["0", "1", "2"], on_divergence="skip")
    learner.backward(lambda: net(x).square().sum(1).mean())
    assert learner.report["skipped"] == 1


def test_steps_that_are_only_looked_at_have_no_say_in_when_those_that_are_taken_are(monkeypatch):
    """The phases that are cut off are looked into: the first, the second, the fourth and the eighth of steps taken."""
    looks = []
    still = unsettled.Motion(torch.zeros(8, dtype=torch.bool), 1.0, "0", 0)
    monkeypatch.setattr(unsettled, "motion", lambda *args: looks.append(args) or still)

    def taken(looks_on):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(1, tol=1e-12))
        learner, counts = ebm.Learner(net, algorithm), []
        closure = lambda: net(torch.ones(8, 3)).square().mean()  # noqa: E731
        for _ in range(6):
            looks.clear()
            learner.backward(closure)
            counts.append(len(looks))
            if looks_on:
                learner.gradients(closure)
        return counts

    alone = taken(looks_on=False)
    assert sum(alone) > 2
    assert taken(looks_on=True) == alone


@pytest.mark.parametrize("preset", [name for name in ebm.algorithms() if name != "backprop"])
@pytest.mark.parametrize("nudged", [True, False])
def test_what_is_advised_can_be_done(preset, nudged):
    """Relaxers of errors know nothing of Hopfield energies, and no nudge acts on the free phase."""
    algorithm = ebm.algorithm(preset)
    text = further(algorithm, nudged)
    named = {
        "Hopfield": {"energy": ebm.Hopfield(feedback=0.3)},
        "ErrorCoordinates": {"relaxer": ebm.ErrorCoordinates()},
    }
    for part, options in named.items():
        if part in text:
            ebm.algorithm(preset, **options)  # which refuses what does not fit
    assert ("Hopfield(feedback=0.3)" in text) == (not algorithm.rests_at_forward)
    assert "smaller nudge" in text if nudged else ("smaller nudge" in text) == algorithm.rests_at_forward


def test_a_free_phase_that_is_cut_off_is_told_of_its_feedback(caplog):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    short = ebm.AcceleratedFixedPoint(3, tol=1e-9)
    with caplog.at_level(logging.WARNING):
        learner = ebm.Learner(net, ebm.algorithm("equilibrium-propagation", relaxer=short))
        learner.gradients(lambda: net(torch.ones(4, 6)).square().mean())
    assert "energy=ebm.Hopfield(feedback=0.3)" in caplog.text
    assert "smaller nudge" not in caplog.text
