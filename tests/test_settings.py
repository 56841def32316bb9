"""Code of formulas of one's own is reused as long as all that they read is what it was, wherever it stands."""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import nn

import lightning_ebm as ebm
from lightning_ebm import updates
from lightning_ebm.network.settings import is_own, settings_of

FACTOR = 1.0
HELD = {"factor": 1.0}


def helper(error):
    return 0.5 * FACTOR * error.square()


class Global(ebm.Energy):
    divergence = True

    def layer_energy(self, state, layer):
        return 0.5 * FACTOR * (state - layer.prediction).square()


class Called(Global):
    divergence = True

    def layer_energy(self, state, layer):
        return helper(state - layer.prediction)


class Inside(Global):
    divergence = True

    def layer_energy(self, state, layer):
        return sum((lambda error=error: 0.5 * FACTOR * error.square())() for error in [state - layer.prediction])


class OfClass(Global):
    divergence = True
    factor = 1.0

    def layer_energy(self, state, layer):
        return 0.5 * self.factor * (state - layer.prediction).square()


class OfMapping(Global):
    divergence = True

    def layer_energy(self, state, layer):
        return 0.5 * HELD["factor"] * (state - layer.prediction).square()


class OfProperty(Global):
    divergence = True

    @property
    def factor(self):
        return FACTOR

    def layer_energy(self, state, layer):
        return 0.5 * self.factor * (state - layer.prediction).square()


elsewhere = ModuleType("elsewhere")
elsewhere.factor = 1.0


class OfModule(Global):
    divergence = True

    def layer_energy(self, state, layer):
        return 0.5 * elsewhere.factor * (state - layer.prediction).square()


class Options:
    factor = 1.0


class OfAnotherClass(Global):
    divergence = True

    def layer_energy(self, state, layer):
        return 0.5 * Options.factor * (state - layer.prediction).square()


class OfFunctionThatItHolds(Global):
    divergence = True

    def __init__(self):
        self.factor = lambda: FACTOR

    def layer_energy(self, state, layer):
        return 0.5 * self.factor() * (state - layer.prediction).square()


def caught():
    factor = 1.0

    class Caught(Global):
        divergence = True

        def layer_energy(self, state, layer):
            return 0.5 * factor * (state - layer.prediction).square()

    def change(value):
        nonlocal factor
        factor = value

    return Caught, change


def learner(**parts):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    return ebm.Learner(net, ebm.Algorithm(**parts)), lambda: (net(x) - y).square().mean()


NOT_COMPARED = OfModule, OfAnotherClass, OfFunctionThatItHolds
KINDS = [Global, Called, Inside, OfClass, OfMapping, OfProperty, "caught", *NOT_COMPARED]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_energy_goes_on_with_what_its_names_stand_for_now(kind, monkeypatch):
    change = None
    if kind == "caught":
        kind, change = caught()
    relaxer = ebm.GradientDescent(0.2, 40)
    made, closure = learner(energy=kind(), relaxer=relaxer)
    for _ in range(3):
        made.gradients(closure)
    assert made.report["kernels"].startswith("plain" if kind in NOT_COMPARED else "traced")
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    monkeypatch.setattr(elsewhere, "factor", 3.0)
    monkeypatch.setattr(Options, "factor", 3.0)
    monkeypatch.setitem(HELD, "factor", 3.0)
    monkeypatch.setattr(OfClass, "factor", 3.0)
    if change is not None:
        change(3.0)
    plain, same = learner(energy=ebm.PredictiveCoding(3.0), relaxer=relaxer)
    assert ebm.metrics.alignment(made.gradients(closure), plain.gradients(same))["relative_error"] < 1e-12


def test_an_update_and_a_question_do_too(monkeypatch):
    class Scaled(updates.Contrast):
        def read(self, network, ends):
            return [(output, FACTOR * seed) for output, seed in super().read(network, ends)]

    @dataclass(frozen=True)
    class Loss(ebm.Evaluation):
        def at(self, network, point, strength):
            return FACTOR * network.loss(network.at_states(point)).detach()

        def cost(self, layers):
            return 0.5

        def flat(self, found):
            return [found]

        def built(self, tensors, layers):
            return tensors[0]

    told = []

    class Asking(ebm.GradientDescent):
        def relax(self, landscape, start, strength):
            told.append(float(landscape.evaluate(Loss(), list(start), strength)))
            return super().relax(landscape, start, strength)

    made, closure = learner(update=Scaled(), relaxer=Asking(0.1, 5))
    before = [made.gradients(closure) for _ in range(3)][-1]
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    after = made.gradients(closure)
    assert ebm.metrics.alignment(after, {n: 2 * g for n, g in before.items()})["relative_error"] < 1e-12
    assert told[-1] == pytest.approx(2 * told[0])


def test_functions_that_no_module_has_are_looked_into_too(monkeypatch):
    made_of_text = {"factor": 1.0}
    exec("def scaled(error): return 0.5 * factor * error.square()", made_of_text)
    scaled = made_of_text["scaled"]
    assert scaled.__module__ is None

    class Calls(Global):
        divergence = True

        def layer_energy(self, state, layer):
            return scaled(state - layer.prediction)

    before = settings_of(Calls())
    assert before == settings_of(Calls())
    monkeypatch.setitem(made_of_text, "factor", 3.0)
    assert before != settings_of(Calls())


def test_what_cannot_be_compared_runs_the_plain_way():
    table = nn.Linear(1, 1)

    class Reads(Global):
        divergence = True

        def layer_energy(self, state, layer):
            return 0.5 * (1 + 0 * table.bias.sum().detach()) * (state - layer.prediction).square()

    assert settings_of(Reads()) is None
    made, closure = learner(energy=Reads(), relaxer=ebm.GradientDescent(0.2, 5))
    for _ in range(3):
        made.gradients(closure)
    assert made.report["kernels"].startswith("plain")


def test_parts_of_the_library_are_told_by_their_attributes_alone():
    for part in (ebm.PredictiveCoding(), ebm.Hopfield(), updates.Contrast(), ebm.Forces()):
        assert not is_own(part)
    assert settings_of(ebm.Hopfield(0.5)) != settings_of(ebm.Hopfield(0.25))


class Own(ebm.GradientDescent):
    def relax(self, landscape, start, strength):
        return super().relax(landscape, [x.clone() for x in start], strength)


@pytest.mark.parametrize("wrapped", [False, True])
def test_single_steps_of_a_parent_are_not_taken_for_those_of_a_relaxer_that_overrides_relax(wrapped):
    relaxer = ebm.Saturated(Own(0.1, 3)) if wrapped else Own(0.1, 3)

    def step():
        made, closure = learner(relaxer=relaxer, update="incremental")
        made.step(closure, torch.optim.SGD(made.module.parameters(), 0.1))

    with pytest.raises(ebm.ConfigurationError, match=r"Own overrides relax and inherits stepper"):
        step()


def test_single_steps_that_are_said_to_be_the_same_are_taken():
    class Same(Own):
        stepper = ebm.GradientDescent.stepper

    made, closure = learner(relaxer=Same(0.1, 3), update="incremental")
    made.step(closure, torch.optim.SGD(made.module.parameters(), 0.1))


def test_a_choice_whose_relax_is_another_is_asked_by_it():
    asked = []

    class Mine(ebm.Cheapest):
        def relax(self, landscape, start, strength):
            asked.append(strength)
            return super().relax(landscape, start, strength)

    relaxer = Mine(ebm.ErrorCoordinates(20), ebm.GradientDescent(0.3, 50, tol=1e-3))
    made, closure = learner(nudge=ebm.Centered(0.1), relaxer=relaxer)
    made.gradients(closure)
    assert asked == [0.1, -0.1]


def test_a_relaxer_of_ones_own_goes_into_a_graph():
    class Mine(ebm.FixedPoint):
        def relax(self, landscape, start, strength):
            return super().relax(landscape, [x.clone() for x in start], strength)

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2)), torch.randn(4, 3)
    found = ebm.Equilibrium(net, ebm.algorithm("equilibrium-propagation", relaxer=Mine(30)))
    torch.testing.assert_close(found.exported(x).module()(x), found(x))
