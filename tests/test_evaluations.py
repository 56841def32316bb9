"""What may be asked of the network: the same by code as plainly, and through whoever stands in between."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lightning_ebm as ebm
from lightning_ebm.evaluations import (
    Around,
    BestResponses,
    DescentStep,
    DyadicStates,
    Energy,
    ErrorForces,
    Forces,
    FrozenForces,
    ResponseForces,
    Swept,
)
from lightning_ebm.network.clamped_states import ClampedStates, Hold
from lightning_ebm.relaxers.counting import Counting

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class LossAlone(ebm.Evaluation):
    """A stranger's: L of the batch, times a factor."""

    factor: float = 1.0

    def at(self, network, point, strength):
        return self.factor * network.loss(network.at_states(point)).detach()

    def cost(self, layers):
        return 0.5

    def flat(self, found):
        return [found]

    def built(self, tensors, layers):
        return tensors[0]


KINDS = {
    "forces": Forces(),
    "error forces": ErrorForces(),
    "frozen forces": FrozenForces(),
    "responses of all": BestResponses((0, 1)),
    "responses of one": BestResponses((1,)),
    "response forces": ResponseForces(),
    "pairs": DyadicStates(),
    "energy": Energy(),
    "step of states": DescentStep("states", 0.1),
    "step of errors": DescentStep("errors", 0.1, measures=False),
    "what is left": DescentStep("errors"),
    "sweep": Swept(((0,), (1,)), 0.25),
    "somebody's": LossAlone(),
    "somebody else's": LossAlone(2.0),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Asking(ebm.Relaxer):
    """Asks one question at a point off the start, and leaves the states there."""

    def __init__(self, what, around=lambda landscape, point: landscape):
        self.what, self.around, self.found = what, around, None

    def relax(self, landscape, start, strength):
        generator = torch.Generator().manual_seed(3)
        off = [0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in start]
        point = [x + o for x, o in zip(start, off, strict=True)] if self.what.coordinates == "states" else off
        self.point, self.landscape = point, self.around(landscape, point)
        self.found = self.what.flat(self.landscape.evaluate(self.what, point, strength))
        return ebm.Relaxation(list(start), "states", "fixed", 1, torch.zeros(len(X)).double())


def asked(what, capture=False, energy=None, steps=3, **options):
    """What the last of some steps is answered; the later ones run as code."""
    relaxer = Asking(what, **options)
    module = net()
    algorithm = ebm.Algorithm(energy or ebm.PredictiveCoding(), ebm.OneSided(0.7), relaxer)
    learner = ebm.Learner(module, algorithm, capture=capture)
    for _ in range(steps):
        learner.gradients(lambda: 0.5 * (module(X) - Y).square().sum(1).mean())
    return relaxer, learner


def same(one, other):
    return len(one) == len(other) and all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", KINDS)
def test_code_answers_what_the_formula_does(name):
    (plain, _), (coded, learner) = asked(KINDS[name]), asked(KINDS[name], capture=True)
    assert learner.report["kernels"].startswith("traced")
    assert same(plain.found, coded.found)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.coordinates == "states"])
def test_code_answers_what_the_formula_does_of_bounded_states(name):
    energy = ebm.FenchelYoung()
    assert same(asked(KINDS[name], energy=energy)[0].found, asked(KINDS[name], capture=True, energy=energy)[0].found)


def test_a_relaxer_need_not_tell_energies():
    report = asked(Forces())[1].report
    assert report["result"] == "fixed"
    assert report["energy_nudged"] != report["energy_nudged"]  # nan


def test_kinds_are_values():
    assert Forces() == Forces()
    assert len({BestResponses((0,)), BestResponses((0,)), BestResponses((1,)), LossAlone(2.0), LossAlone(2.0)}) == 3


@pytest.mark.parametrize("name", KINDS)
def test_whoever_hands_on_changes_nothing_and_sees_what_is_no_composition(name):
    seen = []

    class Watching(Around):
        def answer(self, what, point, strength):
            seen.append(type(what))
            return super().answer(what, point, strength)

    kind = KINDS[name]
    assert same(asked(kind)[0].found, asked(kind, around=lambda landscape, point: Watching(landscape))[0].found)
    parts = {DescentStep: {Forces, ErrorForces}, Swept: {BestResponses}}.get(type(kind), {type(kind)})
    assert seen
    assert set(seen) <= parts


def test_held_states_feel_nothing_and_answer_with_themselves():
    hold = lambda landscape, point: ClampedStates(landscape, {1: Hold(point[1])})  # noqa: E731
    free, held = (asked(Forces(), **options)[0].found for options in ({}, {"around": hold}))
    assert torch.equal(free[2], held[2])
    assert bool(free[3].any())
    assert not bool(held[3].any())
    for what in (DescentStep("states", 0.1), Swept(((0,), (1,))), BestResponses((0, 1))):
        relaxer, _ = asked(what, around=hold)
        *_, low, high = relaxer.found
        assert torch.equal(high, relaxer.point[1])
        assert not torch.equal(low, relaxer.point[0])


@pytest.mark.parametrize(
    ("name", "cost"),
    {
        "forces": 1.5, "error forces": 1.0, "frozen forces": 1.0, "responses of all": 1.0, "responses of one": 0.5,
        "response forces": 1.5, "pairs": 1.0, "energy": 0.5, "step of states": 1.5, "step of errors": 1.0, "sweep": 1.0,
        "somebody's": 0.5,
    }.items(),
)  # fmt: skip
def test_what_is_asked_costs_passes(name, cost):
    relaxer, _ = asked(KINDS[name], around=lambda landscape, point: Counting(landscape, float("inf")), steps=1)
    assert relaxer.landscape.cost == cost
