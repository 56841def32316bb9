"""A user's own nudge is asked for what its table says, never for its class."""

import cmath
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.nudges.base import Phase

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
SWEEPS = ebm.FixedPoint(200, tol=1e-12)


@dataclass(frozen=True)
class Rows(ebm.Nudge):
    """Whatever rows it is given."""

    rows: tuple = ()

    def phases(self):
        return self.rows


class Held(ebm.Nudge):
    """Coupled learning, written anew and without a word on what it needs."""

    def phases(self):
        return ebm.Phase(0.1, 5.0, True), ebm.Phase(-0.1, -5.0, True)


class AtTheTarget(ebm.Nudge):
    """Holds the output at Y. How far that is from the free output, no strength says."""

    def __init__(self, strength):
        self.strength = strength

    def phases(self):
        return ebm.Phase(self.strength, 1.0, True), ebm.Phase(0.0, -1.0)

    def held_output(self, free, loss_slope, strength, batch):
        return Y


def net(act=nn.Hardsigmoid):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), act(), nn.Linear(8, 5), act(), nn.Linear(5, 3)).double()


def squared(module):
    return lambda: 0.5 * (module(X) - Y).square().sum(1).mean()


def update(nudge, energy=None, relaxer=SWEEPS, act=nn.Hardsigmoid, loss=squared, capture=True, **options):
    module = net(act)
    algorithm = ebm.Algorithm(energy or ebm.Hopfield(), nudge, relaxer, **options)
    return ebm.Learner(module, algorithm, capture=capture).gradients(loss(module))


def off(found, true):
    assert sorted(found) == sorted(true)
    return ebm.metrics.alignment(found, true)["relative_error"]


@pytest.mark.parametrize("energy", [ebm.Hopfield(), ebm.PredictiveCoding(), ebm.FenchelYoung()], ids=str)
@pytest.mark.parametrize("capture", [True, False])
def test_held_rows_do_what_coupled_learning_does(energy, capture):
    own, shipped = (update(nudge, energy, capture=capture) for nudge in (Held(), ebm.Coupled(0.1)))
    assert all(torch.equal(own[name], shipped[name]) for name in shipped)
    assert max(float(gradient.abs().max()) for gradient in own.values()) > 1e-3


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_a_held_output_may_lie_anywhere_and_at_strength_zero_too(strength):
    """Rows with `held` are never taken for the free phase."""
    own, shipped = update(AtTheTarget(strength)), update(ebm.Clamped(target=lambda batch: Y))
    assert all(torch.equal(own[name], shipped[name]) for name in shipped)


@pytest.mark.parametrize("points", [3, 4])
def test_complex_rows_do_what_a_holomorphic_nudge_does(points):
    rows = []
    for k in range(points):  # all of them, without the saving that conjugates allow
        root = cmath.exp(2j * math.pi * k / points)
        rows.append(ebm.Phase(0.2 * root, 1 / (points * 0.2 * root)))
    relaxer = ebm.FixedPoint(300, tol=1e-13)
    own = update(Rows(tuple(rows)), relaxer=relaxer, act=nn.Tanh)
    shipped = update(ebm.Holomorphic(0.2, points), relaxer=relaxer, act=nn.Tanh)
    assert off(own, shipped) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("read", ["auto", "cross-derivative"])
def test_complex_rows_tend_to_backprop_with_the_order_of_their_table(read):
    """Theory: O(l^4) for four points, from plain autograd's gradient."""
    module = net(nn.Tanh)
    true = ebm.reference.backprop(module, squared(module))

    def error(strength):
        rows = tuple(ebm.Phase(strength * 1j**k, 1 / (4 * strength * 1j**k)) for k in range(4))
        relaxer = ebm.ErrorCoordinates(max_steps=200, lr=0.5, tol=0)
        return off(update(Rows(rows), ebm.PredictiveCoding(), relaxer, nn.Tanh, update=read), true)

    assert error(0.4) / error(0.2) == pytest.approx(16, rel=0.2)


@pytest.mark.parametrize("declared", [True, False])
def test_a_linear_response_is_read_off_an_empty_table_or_declared(declared):
    class Limit(Rows):
        linear_response = True

    nudge = Limit((ebm.Phase(1.0, 1.0),)) if declared else Rows()
    module = net(nn.Tanh)
    assert (
        off(update(nudge, ebm.PredictiveCoding(), act=nn.Tanh), ebm.reference.backprop(module, squared(module))) < 1e-9
    )
    with pytest.raises(ebm.ConfigurationError, match="moves no state"):
        ebm.Algorithm(nudge=nudge, update="contrast")


def test_a_penalty_on_the_weights_keeps_its_gradient_under_a_held_output():
    def penalised(module):
        return lambda: squared(module)() + 0.1 * sum(p.square().sum() for p in module.parameters())

    module = net()
    penalty = {name: 0.2 * p.detach() for name, p in module.named_parameters()}
    for nudge in (Held(), AtTheTarget(1.0), ebm.Coupled(0.2, "negative")):
        for capture in (True, False):
            plain, both = (update(nudge, loss=loss, capture=capture) for loss in (squared, penalised))
            assert off({name: both[name] - plain[name] for name in penalty}, penalty) < 1e-9


def test_a_loss_that_scales_by_a_parameter_keeps_that_gradient_under_a_held_output():
    """dL/ds at the free equilibrium, the output there fixed: by autograd on the output that `Equilibrium` gives."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.s = net(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, x):
            return self.net(x)

    def loss(module, output):
        return (0.5 * (output - Y).square().sum(1) * module.s.exp() - module.s).mean()

    module = Scaled()
    algorithm = ebm.Algorithm(ebm.Hopfield(), ebm.Coupled(0.1), SWEEPS)
    found = ebm.Learner(module, algorithm).gradients(lambda: loss(module, module(X)))
    free = ebm.Equilibrium(module, algorithm, output="state")(X)
    assert torch.allclose(found["s"], torch.autograd.grad(loss(module, free), module.s)[0], rtol=1e-9)


def test_what_rows_need_is_checked_where_the_algorithm_is_made():
    complex_row = Rows((ebm.Phase(0.1j, -10j),))
    with pytest.raises(ebm.ConfigurationError, match="Held holds the output"):
        ebm.Algorithm(nudge=Held())
    with pytest.raises(ebm.ConfigurationError, match="holds the output"):
        ebm.Algorithm(ebm.FenchelYoung(), Held(), ebm.Dyadic())
    with pytest.raises(ebm.ConfigurationError, match="holds the output"):
        ebm.Algorithm(ebm.PredictiveCoding(), Held(), SWEEPS, update="cross-derivative")
    with pytest.raises(ebm.ConfigurationError, match="complex states"):
        ebm.Algorithm(ebm.PredictiveCoding(), complex_row, ebm.Anderson())
    with pytest.raises(ebm.ConfigurationError, match="output must be a state"):
        ebm.Learner(net(), ebm.Algorithm(ebm.Hopfield(), Held(), SWEEPS), output="readout")
    chosen = ebm.Algorithm(nudge=Held(), relaxer="auto").relaxer
    assert not chosen.needs_error_coordinates
    assert all(one.complex_states for one in ebm.Algorithm(ebm.Hopfield(), complex_row, "auto").relaxer.candidates)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ebm.Phase(0.1j, 1.0, True), "must be real"),
        (ebm.Phase(0.0, math.inf), "must be finite"),
        ((0.1,), "expected ebm.Phase"),
        (0.5, "expected ebm.Phase"),
    ],
)
def test_rows_that_mean_nothing_are_refused(row, message):
    with pytest.raises(ebm.ConfigurationError, match=message):
        ebm.Algorithm(nudge=Rows((row,)))


def test_complex_numbers_on_the_real_axis_and_plain_pairs_are_a_one_sided_nudge():
    rows = ((0.5 + 0j, 2 + 0j), (0, -2))
    own, shipped = (
        update(nudge, ebm.PredictiveCoding(), ebm.ErrorCoordinates()) for nudge in (Rows(rows), ebm.OneSided(0.5))
    )
    assert all(torch.equal(own[name], shipped[name]) for name in shipped)


def test_a_held_output_of_another_shape_is_refused():
    class Wrong(Held):
        def held_output(self, free, loss_slope, strength, batch):
            return free[:1]

    with pytest.raises(ebm.ConfigurationError, match=r"Wrong: .*expected a tensor of shape \(6, 3\)"):
        update(Wrong())


def test_a_nudge_that_draws_is_not_drawn_from_by_looking_and_may_be_made_to_hold():
    class HeldBySign(ebm.RandomSign):
        def phases(self):
            (strength, weight, _), free = super().phases()
            return ebm.Phase(strength, weight, True), free

    drawn = ebm.RandomSign(0.1)
    before = drawn.state_dict()
    algorithm = ebm.Algorithm(nudge=drawn)
    assert (drawn.needs_output_state, drawn.complex_states, algorithm.rule.name) == (False, False, "contrast")
    assert drawn.state_dict() == before
    assert HeldBySign(0.1).needs_output_state


def test_precisions_learn_from_held_phases_too():
    """log Pi moves by rate/2 (1 - Pi <e^2>) from Pi = 1, with e of the first held phase."""
    precision = ebm.LearnedPrecision(rate=0.1)
    module = nn.Linear(4, 3).double()
    algorithm = ebm.Algorithm(ebm.PredictiveCoding(precision), ebm.Coupled(0.5, "positive"), SWEEPS)
    body = nn.Sequential(module)
    ebm.Learner(body, algorithm).backward(squared(body))
    errors = 0.5 * (Y - module(X).detach())  # the one layer is held at o - eta (o - Y)
    assert float(precision.state_dict()["0"].log()) == pytest.approx(0.05 * (1 - float(errors.square().mean())))


class Alternating(ebm.Nudge):
    """Two tables of the same strengths, in turn, whose weights differ by a factor of two."""

    def __init__(self) -> None:
        self.asked = 0

    def phases(self) -> tuple[Phase, ...]:
        self.asked += 1
        weight = 10.0 * (1 + self.asked % 2)
        return Phase(0.1, weight), Phase(0.0, -weight)


@pytest.mark.parametrize("capture", [True, False])
def test_weights_that_change_at_the_same_strengths_are_those_of_the_step(capture):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 3
    tight = ebm.ErrorCoordinates(max_steps=60, tol=1e-12)
    nudge = Alternating()
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", nudge=nudge, relaxer=tight), capture=capture)
    expected = ebm.Learner(
        net, ebm.algorithm("predictive-coding", nudge=ebm.OneSided(0.1), relaxer=tight), capture=False
    ).gradients(lambda: F.cross_entropy(net(x), y))
    ratios = set()
    for _ in range(8):
        found = learner.gradients(lambda: F.cross_entropy(net(x), y))
        ratio = float(found["0.weight"].norm() / expected["0.weight"].norm())
        ratios.add(round(ratio, 6))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], round(ratio) * gradient, rtol=1e-8, atol=1e-12)
    assert ratios == {1.0, 2.0}
