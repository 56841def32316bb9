"""nudge="auto": the largest strength under which the states settle."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm


def task(gain: float = 1.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(gain)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    return net, lambda: F.cross_entropy(net(x), y)


def tight(nudge, steps=3):
    return ebm.algorithm("predictive-coding", nudge=nudge, relaxer=ebm.ErrorCoordinates(max_steps=steps, tol=1e-3))


def result_at(strength: float, gain: float, steps: int = 3) -> str:
    net, closure = task(gain)
    learner = ebm.Learner(net, tight(ebm.OneSided(strength), steps))
    learner.gradients(closure)
    return learner.report["result"]


@pytest.mark.parametrize("gain", [0.5, 2.0, 4.0, 8.0])
def test_the_choice_is_the_largest_power_of_a_half_that_settles_and_the_update_is_the_one_there(gain):
    net, closure = task(gain)
    learner = ebm.Learner(net, tight("auto"))
    update = learner.gradients(closure)
    found = learner.algorithm.nudge.strength
    tried = [2.0**-k for k in range(14)]
    expected = next(s for s in tried if result_at(s, gain) in ("converged", "kink"))
    assert found == expected
    other = ebm.Learner(net, tight(ebm.OneSided(found))).gradients(closure)
    assert all(torch.equal(update[name], other[name]) for name in other)
    assert f"OneSided(strength={found})" in learner.report["algorithm"]["nudge"]


def test_different_gains_do_lead_to_different_strengths():
    found = set()
    for gain in (0.5, 4.0, 8.0):
        net, closure = task(gain)
        learner = ebm.Learner(net, tight("auto"))
        learner.gradients(closure)
        found.add(learner.algorithm.nudge.strength)
    assert len(found) > 1


def test_the_choice_is_made_once_and_goes_into_checkpoints(caplog):
    net, closure = task(4.0)
    learner = ebm.Learner(net, tight("auto"))
    with caplog.at_level(logging.INFO, "lightning_ebm"):
        for _ in range(3):
            learner.gradients(closure)
    assert sum("Strength of the nudge" in r.getMessage() for r in caplog.records) == 1
    resumed = ebm.Learner(net, tight("auto"))
    resumed.load_state_dict(learner.state_dict())
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning_ebm"):
        resumed.gradients(closure)
    assert resumed.algorithm.nudge.strength == learner.algorithm.nudge.strength
    assert not [r for r in caplog.records if "Strength of the nudge" in r.getMessage()]


def test_batches_that_no_longer_settle_halve_it_at_the_first_second_and_fourth():
    nudge = ebm.Strongest()
    nudge.adapt(lambda phase: "converged")
    strengths = []
    for _ in range(5):
        nudge.note(["max_steps"])
        strengths.append(nudge.strength)
        nudge.note(["converged"])
    assert strengths == [0.5, 0.25, 0.25, 0.125, 0.125]


def test_centered_nudges_settle_at_both_signs_or_are_weaker():
    nudge = ebm.algorithm("equilibrium-propagation", nudge="auto").nudge
    nudge.adapt(lambda phase: "converged" if phase.strength > -0.3 else "diverged")
    assert nudge.strength == 0.25
    assert nudge.phases() == ebm.Centered(0.25).phases()


def test_ranks_take_the_weakest():
    nudge = ebm.Strongest()
    nudge.adapt(lambda phase: "converged")
    assert nudge.tried == [1.0]
    nudge.agree([[1.0], [], [0.125]])
    assert (nudge.strength, nudge.tried) == (0.125, [])


@pytest.mark.parametrize("preset", ["holomorphic-ep", "coupled-learning", "infinitesimal"])
def test_nudges_without_one_real_strength_are_refused(preset):
    with pytest.raises(ebm.ConfigurationError, match='nudge="auto"'):
        ebm.algorithm(preset, nudge="auto")
