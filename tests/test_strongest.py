"""nudge="auto": the largest strength under which the states settle."""

import logging
import pickle

import lightning as L
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


def linear_task(curvature: float, kind: torch.dtype = torch.float64):
    """x -> w x -> o with one state, L = 1/2 c (o - y)^2 in the mean: everything is known in closed form."""
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Identity(), nn.Linear(2, 1, bias=False)).to(kind)
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[0.6, 0.8]]))
    torch.manual_seed(1)
    x, y = torch.randn(8, 3, dtype=kind), torch.randn(8, 1, dtype=kind)
    return net, lambda: 0.5 * curvature * (net(x) - y).square().sum(1).mean()


@pytest.mark.parametrize("curvature", [0.3, 0.36, 1.0, 3.0, 70.0])
def test_states_absorb_no_more_than_a_quarter_of_the_loss(curvature):
    """With |w| = 1 the state feels the curvature lambda c, absorbs lambda c / (1 + lambda c) of lambda L, and sends on
    the error divided by 1 + lambda c: the strength is the largest power of 1/2 with lambda c <= 1/3.
    """
    net, closure = linear_task(curvature)
    relaxer = ebm.ErrorCoordinates(max_steps=60, tol=1e-8)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", nudge="auto", relaxer=relaxer), layers=["1"])
    found = learner.gradients(closure)
    strength = learner.algorithm.nudge.strength
    assert strength == max(2.0**-k for k in range(10) if 2.0**-k * curvature <= 1 / 3)
    backprop = ebm.reference.backprop(net, closure)
    ratio = found["0.weight"] / backprop["0.weight"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / (1 + strength * curvature)), rtol=1e-6, atol=0.0)


def test_when_training_makes_states_absorb_more_the_strength_is_halved():
    net, closure = linear_task(0.3)
    relaxer = ebm.ErrorCoordinates(max_steps=60, tol=1e-8)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", nudge="auto", relaxer=relaxer), layers=["1"])
    learner.gradients(closure)
    assert learner.algorithm.nudge.strength == 1.0
    with torch.no_grad():
        net[2].weight.mul_(1.2)  # lambda c |w|^2 = 0.432
    learner.gradients(closure)
    assert learner.algorithm.nudge.strength == 0.5


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("gain", [30.0, 200.0, 1000.0])
def test_weights_that_grow_never_leave_states_more_than_a_quarter_of_the_loss(gain, kind):
    """The state feels lambda c |w|^2, at last 3e5 lambda: only a strength of 2^-20 leaves the gradient what it is."""
    net, closure = linear_task(0.3, kind)
    relaxer = ebm.ErrorCoordinates(max_steps=60, tol=1e-6)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", nudge="auto", relaxer=relaxer), layers=["1"])
    for step in range(41):
        with torch.no_grad():
            net[2].weight.copy_(torch.tensor([[0.6, 0.8]]) * gain ** (min(step, 20) / 20))
        found = learner.gradients(closure)
    strength = learner.algorithm.nudge.strength
    assert strength == max(2.0**-k for k in range(30) if 2.0**-k * 0.3 * gain**2 <= 1 / 3)
    ratio = found["0.weight"] / ebm.reference.backprop(net, closure)["0.weight"]
    wanted = torch.full_like(ratio, 1 / (1 + strength * 0.3 * gain**2))
    torch.testing.assert_close(ratio, wanted, rtol=1e-5 if kind == torch.float64 else 1e-2, atol=0.0)


@pytest.mark.parametrize("constant", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("curvature", [0.2, 1.5])
def test_a_constant_in_the_loss_changes_no_choice(curvature, constant):
    net, closure = linear_task(curvature)
    relaxer = ebm.ErrorCoordinates(max_steps=60, tol=1e-8)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", nudge="auto", relaxer=relaxer), layers=["1"])
    learner.gradients(lambda: closure() + constant)
    assert learner.algorithm.nudge.strength == max(2.0**-k for k in range(10) if 2.0**-k * curvature <= 1 / 3)


class Linear(L.LightningModule):
    """`linear_task` as a module that is trained."""

    def __init__(self, curvature: float):
        super().__init__()
        self.net, self.loss = linear_task(curvature)

    def training_step(self, batch, index):
        return self.loss()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


@pytest.mark.parametrize(("algorithm", "strength"), [(None, 0.0625), ("predictive-coding", 1.0)])
def test_where_no_algorithm_is_named_the_strength_is_chosen_and_by_name_it_is_one(algorithm, strength, tmp_path):
    """At curvature 3 the update of the first layer is backprop's divided by 1 + 3 lambda."""
    given = () if algorithm is None else (algorithm,)
    module = Linear(3.0)
    before, backprop = module.net[0].weight.detach().clone(), ebm.reference.backprop(module.net, module.loss)
    learner = ebm.Learner(module.net, *given, layers=["1"])
    assert (learner.algorithm.relaxer.max_steps == 12) == bool(given)
    update = learner.gradients(module.loss)["0.weight"]
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(*given, layers=["net.1"]), max_steps=1, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(range(8), batch_size=8))
    for found in (update, before - module.net[0].weight.detach()):
        expected = backprop["0.weight"] / (1 + 3.0 * strength)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.0)


def test_where_nothing_settles_it_is_the_largest_at_which_no_energy_is_left_to_gain():
    def ends(phase) -> str:
        return "level" if phase.strength <= 0.25 else "max_steps"

    nudge = ebm.Strongest()
    nudge.adapt(ends)
    assert nudge.strength == 0.25
    nudge.note(["level"])
    assert nudge.strength == 0.25  # as it was chosen
    again = ebm.Strongest()
    again.load_state_dict(pickle.loads(pickle.dumps(nudge)).state_dict())
    for one in (nudge, again):
        one.note(["level"])
        one.note(["max_steps"])
        one.note(["level"])
        assert one.strength == 0.125
    settles = ebm.Strongest()
    settles.adapt(lambda phase: "converged" if phase.strength <= 2.0**-9 else ends(phase))
    assert settles.strength == 2.0**-9  # what settles comes first
    settles.note(["level"])
    assert settles.strength == 2.0**-9  # no energy is left to gain, and at kinks a weaker one would settle no better
    settles.note(["max_steps"])
    assert settles.strength == 2.0**-10
    neither = ebm.Strongest()
    neither.adapt(lambda phase: "max_steps")
    assert neither.strength == 2.0**-13


class Pooled(nn.Module):
    """A pooling that is no module: states stand before it, at a kink wherever a window holds several zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x):
        return self.second(F.max_pool2d(self.first(x), 2))


def test_a_net_that_settles_nowhere_relaxes_at_a_strength_that_is_not_the_weakest():
    """What is left to gain there is asked of a relaxation of 400 steps."""
    net = Pooled().double()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randn(6, 1, 4, 4, dtype=torch.float64)
    closure = lambda: F.mse_loss(net(x), y)  # noqa: E731
    learner = ebm.Learner(net)
    for _ in range(2):
        learner.gradients(closure)
        assert learner.report["result"] == "max_steps"
        assert learner.algorithm.nudge.strength >= 2.0**-6
    strength = learner.algorithm.nudge.strength
    start, *_, end = learner.report["phases"][0]["energies"]
    long = ebm.Learner(net, tight(ebm.OneSided(strength), steps=400))
    long.gradients(closure)
    assert end - long.report["phases"][0]["energies"][-1] < 5e-3 * (start - end)
