"""What a training step asks its device, counted on the CPU; asked rarely or always, it ends the same."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from questions import RARELY, questions

SWEEPS = ebm.FixedPoint(200, tol=1e-4)
FIXED = {
    # questions of one step; with a free phase of its own, one before the user's pass and one after
    "zero-divergence": ("zero-divergence", 1),
    "error-pc": ("error-pc", 1),
    "20 Euler steps": (ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 20)), 1),
    "centered Euler steps": (
        ebm.algorithm("predictive-coding", nudge=ebm.Centered(0.01), relaxer=ebm.GradientDescent(0.1, 20)), 1,
    ),
    "momentum": (
        ebm.algorithm("predictive-coding", relaxer=ebm.StateOptimizer(torch.optim.SGD, max_steps=9, lr=0.1)), 1,
    ),
    "20 + 10 + 10 sweeps": (
        ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(10), free_relaxer=ebm.FixedPoint(20)), 2,
    ),
}  # fmt: skip
TO_A_TOLERANCE = {
    "predictive-coding": "predictive-coding",
    "pc-nudge": "pc-nudge",
    "to 1e-6": ebm.algorithm("predictive-coding", relaxer=ebm.ErrorCoordinates(64, tol=1e-6)),
    "states": ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.5, 200, tol=1e-4)),
    # 100 sweeps, as in the preset, are enough on some processors, and others are asked about what was cut off.
    "accelerated": ebm.algorithm("equilibrium-propagation", relaxer=ebm.AcceleratedFixedPoint(400)),
    "frozen predictions": "fixed-prediction",
    "pairs": "dual-propagation",
    "sweeps": ebm.algorithm("equilibrium-propagation", relaxer=SWEEPS),
}
SLOW = dict.fromkeys(("accelerated", "sweeps"), pytest.mark.slow)


def trained(algorithm, activation, steps=4):
    """The weights after some steps, the reports, and the questions of the last step."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 32), activation(),
        nn.Linear(32, 10),
    )  # fmt: skip
    x, y = torch.randn(64, 20), torch.arange(64) % 10
    learner, optimizer = ebm.Learner(net, algorithm), torch.optim.SGD(net.parameters(), 0.05)
    reports = []
    for _ in range(steps):
        with questions() as asked:
            learner.step(lambda: F.cross_entropy(net(x), y), optimizer)
        reports.append(learner.report)
    return [p.detach() for p in net.parameters()], reports, asked


def rarely(monkeypatch):
    monkeypatch.setattr(*RARELY)


@pytest.mark.parametrize("case", FIXED)
def test_a_number_of_steps_is_asked_about_once(case, monkeypatch):
    algorithm, most = FIXED[case]
    activation = nn.Hardtanh if "sweeps" in case else nn.Tanh
    rarely(monkeypatch)
    _, _, asked = trained(algorithm, activation)
    assert asked.count <= most, asked.places


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("case", [pytest.param(c, marks=SLOW.get(c, ())) for c in TO_A_TOLERANCE])
def test_a_relaxation_by_tolerance_is_asked_at_most_every_eighth_step(case, activation, monkeypatch):
    """2 + steps/8 of each relaxation; a free phase besides, and one look of advice at what did not settle."""
    if case in ("sweeps", "accelerated") and activation is nn.ReLU:
        activation = nn.Hardtanh  # bounded
    rarely(monkeypatch)
    _, reports, asked = trained(TO_A_TOLERANCE[case], activation)
    looks = sum(count for place, count in asked.places.items() if "report" in place)
    assert looks <= 1
    assert asked.count - looks <= sum(2 + phase["steps"] / 8 for phase in reports[-1]["phases"]), asked.places


@pytest.mark.crossed(3)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Hardtanh])
@pytest.mark.parametrize("case", [pytest.param(c, marks=SLOW.get(c, ())) for c in (*FIXED, *TO_A_TOLERANCE)])
def test_asked_rarely_or_always_it_ends_the_same(case, activation, monkeypatch):
    if ("sweeps" in case or case == "accelerated") and activation is nn.ReLU:
        pytest.skip("runs away")
    algorithm = {**{k: v for k, (v, _) in FIXED.items()}, **TO_A_TOLERANCE}[case]
    always, told, _ = trained(algorithm, activation)
    rarely(monkeypatch)
    seldom, told_seldom, _ = trained(algorithm, activation)
    for one, other in zip(always, seldom, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    for one, other in zip(told, told_seldom, strict=True):
        for p, q in zip(one["phases"], other["phases"], strict=True):
            assert (p["status"], p["steps"]) == (q["status"], q["steps"])
            assert p["energies"] == pytest.approx(q["energies"], rel=1e-4, abs=1e-4)
            assert p["residual"] == pytest.approx(q["residual"], rel=0.05, abs=1e-6)


SPOILED = {
    "nan in the batch": ("error-pc", lambda x, loss: loss, float("nan")),
    "infinite loss": ("zero-divergence", lambda x, loss: loss * float("inf"), 0.0),
    "nan loss, by tolerance": ("predictive-coding", lambda x, loss: loss * float("nan"), 0.0),
    "nan, sweeps": (TO_A_TOLERANCE["sweeps"], lambda x, loss: loss, float("nan")),
    "diverges": (
        ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(50.0, 20)), lambda x, loss: loss, 0.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("often", [True, False])
@pytest.mark.parametrize("case", SPOILED)
def test_what_cannot_be_trained_on_is_refused_alike(case, often, monkeypatch):
    algorithm, change, spoil = SPOILED[case]
    errors = []
    for seldom in (False, True):
        if seldom:
            rarely(monkeypatch)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Hardtanh(), nn.Linear(8, 8), nn.Hardtanh(), nn.Linear(8, 2))
        x, y = torch.randn(6, 4), torch.arange(6) % 2
        learner = ebm.Learner(net, algorithm, capture=often)
        if case != "diverges":
            for _ in range(3):
                learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        x[2, 1] += spoil
        with pytest.raises(ebm.RelaxationDivergedError) as caught:
            learner.backward(lambda net=net, x=x, y=y: change(x, F.cross_entropy(net(x), y)))
        errors.append(str(caught.value))
        assert all(p.grad is None for p in net.parameters())
    assert errors[0] == errors[1]


def test_nan_that_no_gradient_meets_is_let_through(monkeypatch):
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            return self.net(x.nan_to_num())

    rarely(monkeypatch)
    net, x = Masks(), torch.randn(6, 4)
    x[2, 1] = float("nan")
    learner = ebm.Learner(net, "error-pc")
    for _ in range(3):
        learner.backward(lambda: (net(x) - 1).square().mean())
        assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
