"""What parts of one's own are handed, and hand over: mistakes are refused by name, and never read into an update."""

import pytest
import torch
from torch import nn

import lightning_ebm as ebm
from lightning_ebm import updates

torch.manual_seed(0)
X, Y = torch.randn(6, 3).double(), torch.randn(6, 2).double()


def learner(**parts):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    made = ebm.Learner(net, ebm.Algorithm(**parts))
    return made, lambda: (net(X) - Y).square().mean()


def relaxer(returned):
    class Mine(ebm.Relaxer):
        def relax(self, landscape, start, strength):
            return returned(list(start), torch.zeros(landscape.batch_size))

    return Mine()


WRONG_RELAXATIONS = {
    "states alone": (lambda x, left: x, "an ebm.Relaxation"),
    "nothing": (lambda x, left: None, "an ebm.Relaxation"),
    "unknown status": (lambda x, left: ebm.Relaxation(x, "states", "done", 1, left), "status='done'"),
    "unknown coordinates": (lambda x, left: ebm.Relaxation(x, "speeds", "fixed", 1, left), "coordinates='speeds'"),
    "no whole steps": (lambda x, left: ebm.Relaxation(x, "states", "fixed", 1.5, left), "steps=1.5"),
    # These broadcast: the update was read off the first sample's states, for all.
    "one sample of all": (lambda x, left: ebm.Relaxation([s[:1] for s in x], "states", "fixed", 1, left), "(1, 5)"),
    "a layer left out": (lambda x, left: ebm.Relaxation(x[:1], "states", "fixed", 1, left), "(6, 5)"),
    "one residual for all": (lambda x, left: ebm.Relaxation(x, "states", "fixed", 1, left.sum()), "each of 6 samples"),
    "a number as residual": (lambda x, left: ebm.Relaxation(x, "states", "fixed", 1, 0.0), "residual=0.0"),
}


@pytest.mark.parametrize("kind", WRONG_RELAXATIONS)
def test_what_is_no_relaxation_of_these_states_is_refused(kind):
    returned, words = WRONG_RELAXATIONS[kind]
    made, closure = learner(relaxer=relaxer(returned))
    with pytest.raises(ebm.ConfigurationError) as refused:
        made.gradients(closure)
    assert "Mine.relax" in str(refused.value)
    assert words in str(refused.value)


class Plain(ebm.Relaxer):
    """Descends without a look at how it goes."""

    def __init__(self, lr, in_place=False):
        self.lr, self.in_place = lr, in_place

    def relax(self, landscape, start, strength):
        states = list(start)
        for _ in range(60):
            gradients = landscape.evaluate(ebm.Forces(), states, strength).gradients
            if self.in_place:
                for state, gradient in zip(states, gradients, strict=True):
                    state -= self.lr * gradient
            else:
                states = [x - self.lr * g for x, g in zip(states, gradients, strict=True)]
        left = landscape.norms(landscape.evaluate(ebm.Forces(), states, strength).gradients)
        return ebm.Relaxation(states, "states", "fixed", 60, left)


@pytest.mark.parametrize("relaxed", [False, True])
def test_states_that_ran_away_are_an_error(relaxed):
    made, closure = learner(relaxer=Plain(1e9), energy=ebm.PredictiveCoding(50.0))
    with pytest.raises(ebm.RelaxationDivergedError, match="Plain ran away"):
        made.relax(closure, nudge=1.0, relaxer=Plain(1e9)) if relaxed else made.backward(closure)
    assert all(p.grad is None for p in made.module.parameters())


def test_a_batch_that_runs_away_may_be_skipped():
    made, closure = learner(relaxer=Plain(1e9), energy=ebm.PredictiveCoding(50.0))
    made = ebm.Learner(made.module, made.algorithm, on_divergence="skip")
    made.backward(closure)
    assert made.report["skipped"] == 1
    assert all(p.grad is None for p in made.module.parameters())


@pytest.mark.parametrize("energy", [ebm.PredictiveCoding(), ebm.Hopfield()])
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.5), ebm.Centered(0.1)])
def test_a_relaxer_that_moves_the_free_states_in_place_is_refused(energy, nudge):
    """The free phase, the other phase and the update read them too: updates were 19 to 50 % off, in silence."""
    made, closure = learner(energy=energy, nudge=nudge, relaxer=Plain(0.1, in_place=True))
    for _ in range(3):
        with pytest.raises(ebm.ConfigurationError, match=r"Plain\.relax wrote in place"):
            made.gradients(closure)


class Together(ebm.FixedPoint):
    """Is given all phases at once, and gives them back as it likes."""

    decides_together = True
    keeps = slice(None)

    def relax_all(self, landscape, start, strengths):
        return [self.relax(landscape, start, strength) for strength in strengths][self.keeps]


class LeavesOneOut(Together):
    keeps = slice(1)


def test_a_relaxer_that_is_given_all_phases_at_once_is_right_and_has_to_give_all_back():
    parts = {"energy": ebm.Hopfield(0.3), "nudge": ebm.Centered(0.1)}
    alone, closure = learner(**parts, relaxer=ebm.FixedPoint(50, tol=1e-8))
    expected = alone.gradients(closure)
    together, closure = learner(**parts, relaxer=Together(50, tol=1e-8))
    for name, slope in together.gradients(closure).items():
        assert torch.equal(slope, expected[name]), name
    wrong, closure = learner(**parts, relaxer=LeavesOneOut(50, tol=1e-8))
    with pytest.raises(ebm.ConfigurationError, match=r"LeavesOneOut\.relax_all .*a list of 2, one for each strength"):
        wrong.gradients(closure)


def test_a_relaxer_that_moves_copies_in_place_is_right():
    class Copying(Plain):
        def relax(self, landscape, start, strength):
            return super().relax(landscape, [x.clone() for x in start], strength)

    ours, closure = learner(relaxer=Copying(0.1, in_place=True))
    theirs, _ = learner(relaxer=ebm.GradientDescent(0.1, 60))
    other = lambda: (theirs.module(X) - Y).square().mean()  # noqa: E731
    found = [ours.gradients(closure), theirs.gradients(other)]
    assert ebm.metrics.alignment(*found)["relative_error"] < 1e-12


def test_a_held_output_that_is_written_in_place_is_refused():
    class InPlace(ebm.Coupled):
        def held_output(self, free, loss_slope, strength, batch):
            return free.sub_(strength * loss_slope)

    made, closure = learner(energy=ebm.Hopfield(), nudge=InPlace(0.1), relaxer=ebm.FixedPoint(50))
    with pytest.raises(ebm.ConfigurationError, match=r"InPlace.held_output wrote in place"):
        made.gradients(closure)


@pytest.mark.parametrize("returned", [None, 3.0, [], [(1, 2)], [(torch.ones(2), torch.ones(3))], torch.ones(2)])
def test_what_is_no_term_of_an_update_is_refused(returned):
    class Mine(ebm.Update):
        def read(self, network, ends):
            return returned

    made, closure = learner(update=Mine())
    for _ in range(2):
        with pytest.raises(ebm.ConfigurationError, match=r"Mine.read returned .*; expected a list of terms"):
            made.gradients(closure)


@pytest.mark.parametrize("returned", [None, 3, ["end"]])
def test_what_is_no_end_of_a_phase_is_refused(returned):
    class Mine(updates.Contrast):
        def hold(self, network, ends):
            return returned

    made, closure = learner(update=Mine())
    with pytest.raises(ebm.ConfigurationError, match=r"Mine\.hold returned"):
        made.gradients(closure)


COSTS = {
    "summed over the batch": lambda x, mu: (x - mu).square().sum(),
    "summed over samples": lambda x, mu: (x - mu).square().sum(0),
    "a number": lambda x, mu: 3.0,
    "nothing": lambda x, mu: None,
}


@pytest.mark.parametrize("kind", COSTS)
def test_an_energy_that_does_not_tell_samples_apart_is_refused(kind):
    class Mine(ebm.Energy):
        def layer_energy(self, state, layer):
            return COSTS[kind](state, layer.prediction)

    made, closure = learner(energy=Mine(), relaxer=ebm.GradientDescent(0.1, 5))
    with pytest.raises(ebm.ConfigurationError, match=r"Mine.layer_energy returned .* for layer '1'; expected one"):
        made.gradients(closure)


def test_a_nudge_without_a_table_is_refused():
    class Mine(ebm.Nudge):
        def phases(self):
            return None

    with pytest.raises(ebm.ConfigurationError, match=r"Mine.phases\(\) gave None; expected the rows"):
        learner(nudge=Mine())
