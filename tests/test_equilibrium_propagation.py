"""Equilibrium propagation against the published fixed-point maps, and its bias against the implicit gradient.

The maps are written out in `oracles_hopfield` with explicit weights and transposes: a finite number of sweeps
is a deterministic computation, so the library must give the same numbers to round-off. The true gradient is
the implicit one, dL(x_bar(theta))/dtheta, by dense linear algebra on the energy's Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracles import (
    Chain,
    Gradients,
    Output,
    Problem,
    backprop,
    fitted_slope,
    make_problem,
    relative_error,
    worst_relative_error,
)
from oracles_activations import IDENTITY, UNIT_CLAMP
from oracles_hopfield import (
    Hopfield,
    Order,
    centred,
    contrast,
    differentiable_step,
    energy,
    forward_states,
    holomorphic,
    loss,
    make_hopfield_net,
    output_of,
    relax,
    settle,
    zero_states,
)
from oracles_implicit import States, implicit_gradient, implicit_gradient_of_a_map, newton
from torch import Tensor, nn

import lightning_ebm as ebm

torch.set_num_threads(1)

ORDERS = pytest.mark.parametrize("order", ["odd-even", "synchronous"])
OUTPUTS = pytest.mark.parametrize("output", ["state", "readout"])
LOSSES = pytest.mark.parametrize("loss_name", ["half-mse-mean", "half-mse-sum", "cross-entropy-mean"])
SETTLED = 60  # odd-even sweeps from the forward pass leave 1e-15 of the states of every net below
GAIN, BIAS = 0.6, 0.4


def hard_sigmoid() -> nn.Module:
    """The literature's: rho(a) = min(max(a, 0), 1)."""
    return nn.Hardtanh(0.0, 1.0)


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float, float]] = {  # factory, gain, hidden bias
    "hard sigmoid": (hard_sigmoid, GAIN, BIAS),
    "torch's hardsigmoid": (nn.Hardsigmoid, 0.8, 0.0),
    "tanh": (nn.Tanh, 0.8, 0.0),
    "sigmoid": (nn.Sigmoid, 0.8, 0.0),
    "relu": (nn.ReLU, 0.35, 0.0),
}
SMOOTH = pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
ANY = pytest.mark.parametrize("activation", list(ACTIVATIONS))


def make(activation: str = "tanh", sizes: tuple[int, ...] = (4, 6, 5, 3), *, ends: bool = False) -> nn.Sequential:
    factory, gain, bias = ACTIVATIONS[activation]
    return make_hopfield_net(sizes, factory, gain=gain, bias=bias, ends_in_activation=ends)


def ep(
    nudge: ebm.Nudge,
    *,
    free: int = SETTLED,
    nudged: int = SETTLED,
    order: Order = "odd-even",
    start: str = "forward",
    damping: float = 0.0,
) -> ebm.Algorithm:
    return ebm.Algorithm(
        energy=ebm.Hopfield(),
        nudge=nudge,
        relaxer=ebm.FixedPoint(nudged, order=order, damping=damping),
        free_relaxer=ebm.FixedPoint(free, order=order, damping=damping),
        initial_state=start,
    )


def library_gradients(
    net: nn.Module, problem: Problem, algorithm: ebm.Algorithm | str, output: str = "state", layers: object = None
) -> Gradients:
    learner = ebm.Learner(net, algorithm, layers=layers, output=output, loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y))


def true_gradient(net: nn.Sequential, problem: Problem, output: Output = "state") -> Gradients:
    """The implicit gradient through the map, so that clamped units do no harm."""
    chain = Hopfield.copy_of(net, output)
    return implicit_gradient_of_a_map(
        lambda s: differentiable_step(chain, problem, s),
        lambda s: loss(chain, problem, s),
        settle(chain, problem),
        chain.parameters,
    )


# ------------------------------------------------------------------- the published maps, sweep for sweep


def phases(
    chain: Hopfield,
    problem: Problem,
    betas: tuple[float, float],
    sweeps: tuple[int, int],
    order: Order,
    damping: float = 0.0,
    start: States | None = None,
) -> Gradients:
    """Free sweeps from `start` (zeros), then `sweeps[1]` under each beta from the free state; their contrast."""
    free = relax(
        chain, problem, zero_states(chain, problem) if start is None else start, 0.0, sweeps[0], order, damping
    )
    first, second = (
        (beta, relax(chain, problem, free, beta, sweeps[1], order, damping) if beta else free) for beta in betas
    )
    return contrast(chain, problem, second, first)


def test_the_published_maps_are_these_lines() -> None:
    """Anchors the oracle itself: two hidden hard-sigmoid layers and a linear output, written out once more."""
    net, problem, beta = make("hard sigmoid"), make_problem("half-mse-sum"), 0.25
    w1, b1, w2, b2, w3, b3 = (p.detach() for p in net.parameters())

    def sweep(x1: Tensor, x2: Tensor, x3: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        x1 = (problem.x @ w1.T + b1 + x2 @ w2).clamp(0, 1)
        x3 = x2 @ w3.T + b3 - beta * (x3 - problem.y)
        x2 = (x1 @ w2.T + b2 + x3 @ w3).clamp(0, 1)
        return x1, x2, x3

    free = tuple(torch.zeros(5, n, dtype=torch.float64) for n in (6, 5, 3))
    for _ in range(20):
        free = sweep(*free, beta=0.0)
    plus, minus = free, free
    for _ in range(10):
        plus, minus = sweep(*plus, beta=beta), sweep(*minus, beta=-beta)
    expected: Gradients = {}
    for layer, name in enumerate(("0", "2", "4")):
        below = [problem.x if layer == 0 else phase[layer - 1] for phase in (plus, minus)]
        expected[f"{name}.weight"] = -(plus[layer].T @ below[0] - minus[layer].T @ below[1]) / (2 * beta)
        expected[f"{name}.bias"] = -(plus[layer] - minus[layer]).sum(0) / (2 * beta)
    chain = Hopfield.copy_of(net)
    assert chain.activations == [UNIT_CLAMP, UNIT_CLAMP, IDENTITY]
    assert worst_relative_error(phases(chain, problem, (-beta, beta), (20, 10), "odd-even"), expected) < 1e-13
    assert worst_relative_error(library_gradients(net, problem, ep(
        ebm.Centered(beta), free=20, nudged=10, start="zeros")), expected) < 1e-9  # fmt: skip


@ORDERS
@OUTPUTS
@LOSSES
@pytest.mark.parametrize("sweeps", [(20, 10), (4, 3), (60, 20)])
def test_centred_hard_sigmoid_net(order: Order, output: Output, loss_name: str, sweeps: tuple[int, int]) -> None:
    """Centred, beta 1/4, from zeros. Catches odd and even swapped or counted as two steps, the negative phase
    started from the positive one, a nudge divided by the batch, and states read one sweep early.
    """
    net, problem = make("hard sigmoid"), make_problem(loss_name)
    expected = phases(Hopfield.copy_of(net, output), problem, (-0.25, 0.25), sweeps, order)
    algorithm = ep(ebm.Centered(0.25), free=sweeps[0], nudged=sweeps[1], order=order, start="zeros")
    assert worst_relative_error(library_gradients(net, problem, algorithm, output), expected) < 1e-9


@ORDERS
@pytest.mark.parametrize("sizes", [(4, 6, 3), (4, 6, 6, 5, 3), (4, 5, 5, 5, 5, 3)])
@pytest.mark.parametrize("ends", [False, True])
def test_centred_at_every_depth(order: Order, sizes: tuple[int, ...], ends: bool) -> None:
    """One to four hidden layers, linear or hard-sigmoid output state: the parity of the output layer changes."""
    net, problem = make("hard sigmoid", sizes, ends=ends), make_problem()
    expected = phases(Hopfield.copy_of(net), problem, (-0.25, 0.25), (20, 10), order)
    algorithm = ep(ebm.Centered(0.25), free=20, nudged=10, order=order, start="zeros")
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


@ORDERS
@ANY
@pytest.mark.parametrize("beta", [0.25, -0.1])
def test_one_sided_of_either_sign(order: Order, activation: str, beta: float) -> None:
    """Contrast with the free state itself; catches an absolute value in the division."""
    net, problem = make(activation), make_problem()
    expected = phases(Hopfield.copy_of(net), problem, (0.0, beta), (12, 4), order)
    algorithm = ep(ebm.OneSided(beta), free=12, nudged=4, order=order, start="zeros")
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


@ORDERS
@pytest.mark.parametrize("damping", [0.2, 0.5])
def test_damped_sweeps(order: Order, damping: float) -> None:
    """x <- (1 - d) rho(...) + d x."""
    net, problem = make("hard sigmoid"), make_problem()
    expected = phases(Hopfield.copy_of(net), problem, (-0.25, 0.25), (15, 8), order, damping)
    algorithm = ep(ebm.Centered(0.25), free=15, nudged=8, order=order, start="zeros", damping=damping)
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


@ORDERS
@ANY
def test_from_the_forward_pass(order: Order, activation: str) -> None:
    """initial_state="forward" is the pass without feedback, and not the free equilibrium."""
    net, problem = make(activation), make_problem()
    chain = Hopfield.copy_of(net)
    start = forward_states(chain, problem)
    expected = phases(chain, problem, (-0.25, 0.25), (4, 3), order, start=start)
    algorithm = ep(ebm.Centered(0.25), free=4, nudged=3, order=order)
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


def test_without_a_free_relaxer_both_phases_take_as_many_sweeps() -> None:
    """free_relaxer=None means the relaxer itself."""
    net, problem = make("hard sigmoid"), make_problem()
    expected = phases(Hopfield.copy_of(net), problem, (-0.25, 0.25), (7, 7), "odd-even")
    algorithm = ebm.Algorithm(
        energy=ebm.Hopfield(), nudge=ebm.Centered(0.25), relaxer=ebm.FixedPoint(7), initial_state="zeros"
    )
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


@pytest.mark.parametrize(
    ("name", "nudge", "betas"),
    [
        ("equilibrium-propagation", ebm.Centered(0.25), (-0.25, 0.25)),
        ("equilibrium-propagation-one-sided", ebm.OneSided(0.25), (0.0, 0.25)),
    ],
)
def test_the_presets_with_published_sweeps(name: str, nudge: ebm.Nudge, betas: tuple[float, float]) -> None:
    """A preset with parts replaced is the same point of the family as the parts put together by hand."""
    net, problem = make("hard sigmoid"), make_problem()
    algorithm = ebm.algorithm(
        name, nudge=nudge, relaxer=ebm.FixedPoint(10), free_relaxer=ebm.FixedPoint(20), initial_state="zeros"
    )
    expected = phases(Hopfield.copy_of(net), problem, betas, (20, 10), "odd-even")
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


def test_random_sign_is_one_of_the_two_one_sided_updates_and_both_occur() -> None:
    """One sign a batch: every update is that of +beta or that of -beta, whole."""
    net, problem, beta = make("hard sigmoid"), make_problem(), 0.25
    chain = Hopfield.copy_of(net)
    both = [phases(chain, problem, (0.0, s * beta), (20, 10), "odd-even") for s in (1, -1)]
    algorithm = ep(ebm.RandomSign(beta), free=20, nudged=10, start="zeros")
    learner = ebm.Learner(net, algorithm, output="state", loss_reduction=problem.reduction)
    seen = []
    for seed in range(16):
        torch.manual_seed(seed)
        found = learner.gradients(lambda: problem.loss(net(problem.x), problem.y))
        errors = [worst_relative_error(found, side) for side in both]
        assert min(errors) < 1e-9 < max(errors)
        seen.append(errors[0] < errors[1])
    assert len(set(seen)) == 2


def test_a_convolution_feeds_back_through_its_transpose() -> None:
    """conv - hard sigmoid - flatten - linear: the feedback into the feature map is conv_transpose2d's."""
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), hard_sigmoid(), nn.Conv2d(2, 2, 3, stride=2), hard_sigmoid(),
        nn.Flatten(), nn.Linear(8, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.25 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.rand(4, 1, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    k1, b1, k2, b2, w3, b3 = (p.detach() for p in net.parameters())
    conv, back = nn.functional.conv2d, nn.functional.conv_transpose2d

    def sweep(s: States, beta: float) -> States:
        x1, x2, x3 = s
        x1 = (conv(x, k1, b1, padding=1) + back(x2, k2, stride=2)).clamp(0, 1)
        x3 = x2.flatten(1) @ w3.T + b3 - beta * (x3 - y)
        x2 = (conv(x1, k2, b2, stride=2) + (x3 @ w3).reshape(x2.shape)).clamp(0, 1)
        return [x1, x2, x3]

    def run(s: States, beta: float, sweeps: int) -> States:
        for _ in range(sweeps):
            s = sweep(s, beta)
        return s

    free = run([x.new_zeros(4, 2, 5, 5), x.new_zeros(4, 2, 2, 2), x.new_zeros(4, 3)], 0.0, 20)
    total = torch.zeros((), dtype=torch.float64)
    for beta in (0.25, -0.25):
        x1, x2, x3 = run(free, beta, 10)
        overlap = (x1 * net[0](x)).sum() + (x2 * net[2](x1)).sum() + (x3 * net[5](x2.flatten(1))).sum()
        total = total - overlap / (2 * beta * len(x))
    names = [name for name, _ in net.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(total, list(net.parameters())), strict=True))
    problem = Problem(x, y, make_problem().loss, "mean")
    algorithm = ep(ebm.Centered(0.25), free=20, nudged=10, start="zeros")
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


# -------------------------------------------------------------------------------- the true, implicit gradient


@OUTPUTS
@LOSSES
@SMOOTH
def test_reference_equilibrium_solves_the_hessian(output: Output, loss_name: str, activation: str) -> None:
    """reference.equilibrium against -(d2I/dtheta dx) H^-1 dL/dx with H the dense Hessian of the closed-form
    potentials. Catches a transposed solve, a G'' in the wrong place, and a free phase that is merely forward.
    """
    net, problem = make(activation), make_problem(loss_name)
    chain = Hopfield.copy_of(net, output)
    expected = implicit_gradient(
        lambda s: energy(chain, problem, s),
        lambda s: loss(chain, problem, s),
        settle(chain, problem),
        chain.parameters,
    )
    found = reference_equilibrium(net, problem, output)
    assert worst_relative_error(found, expected) < 1e-9
    # and it is not the feed-forward gradient
    assert relative_error(expected, backprop(Chain.copy_of(net), problem)[0]) > 0.02


def reference_equilibrium(net: nn.Module, problem: Problem, output: str, layers: object = None) -> Gradients:
    """The call, in one place: where the output has a state, and how the loss reduces, are the learner's words."""
    return ebm.reference.equilibrium(
        net,
        lambda: problem.loss(net(problem.x), problem.y),
        ep(ebm.Infinitesimal()),
        layers=layers,
        output=output,
        loss_reduction=problem.reduction,
    )


@ANY
def test_reference_equilibrium_with_clamped_units(activation: str) -> None:
    """Units cut off at 0 or 1 have no slope and no finite Hessian; the map's derivative settles them."""
    net, problem = make(activation), make_problem()
    assert worst_relative_error(reference_equilibrium(net, problem, "state"), true_gradient(net, problem)) < 1e-9


@OUTPUTS
@LOSSES
@ANY
def test_infinitesimal_is_the_implicit_gradient(output: Output, loss_name: str, activation: str) -> None:
    """lambda -> 0 exactly: no bias of order lambda and no round-off over lambda."""
    net, problem = make(activation), make_problem(loss_name)
    found = library_gradients(net, problem, ep(ebm.Infinitesimal()), output)
    assert worst_relative_error(found, true_gradient(net, problem, output)) < 1e-8


@OUTPUTS
def test_recurrent_backprop_is_the_implicit_gradient(output: Output) -> None:
    """Almeida-Pineda: H p = dL/dx and -(d2I/dtheta dx) p, at the free equilibrium."""
    net, problem = make("tanh"), make_problem("cross-entropy-mean")
    algorithm = ebm.algorithm("recurrent-backprop", free_relaxer=ebm.FixedPoint(SETTLED))
    found = library_gradients(net, problem, algorithm, output)
    assert worst_relative_error(found, true_gradient(net, problem, output)) < 1e-8


# ------------------------------------------------------------------------------------------- orders of the bias


@OUTPUTS
@pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])
def test_one_sided_bias_is_first_order(output: Output, loss_name: str) -> None:
    """Claim Q5. Slope 0 is a wrong limit; slope -1 a free phase that was not settled or not subtracted."""
    net, problem, betas = make(), make_problem(loss_name), [1e-4, 1e-3, 1e-2]
    true = true_gradient(net, problem, output)
    errors = [relative_error(library_gradients(net, problem, ep(ebm.OneSided(b)), output), true) for b in betas]
    assert fitted_slope(betas, errors) == pytest.approx(1.0, abs=0.05), errors
    assert errors[0] < 5e-4


@OUTPUTS
@pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])
def test_centred_bias_is_second_order(output: Output, loss_name: str) -> None:
    """Claim Q5. Slope 1 is a weight 1/beta on phases that are no mirror images."""
    net, problem, betas = make(), make_problem(loss_name), [1e-3, 1e-2, 5e-2]
    true = true_gradient(net, problem, output)
    errors = [relative_error(library_gradients(net, problem, ep(ebm.Centered(b)), output), true) for b in betas]
    assert fitted_slope(betas, errors) == pytest.approx(2.0, abs=0.05), errors
    assert errors[0] < 5e-6


@OUTPUTS
@pytest.mark.parametrize("points", [3, 4, 6])
def test_holomorphic_bias_is_of_order_n(output: Output, points: int) -> None:
    """Claim Q4'. Catches roots of unity that do not reach the states, a conjugated autograd gradient (its
    error does not vanish) and complex parts dropped on the way.
    """
    net, problem, betas = make(), make_problem(), [0.04, 0.08]
    true = true_gradient(net, problem, output)
    errors = [
        relative_error(library_gradients(net, problem, ep(ebm.Holomorphic(b, points=points)), output), true)
        for b in betas
    ]
    assert fitted_slope(betas, errors) == pytest.approx(points, abs=0.1), errors


@OUTPUTS
@pytest.mark.parametrize("points", [3, 5])
def test_holomorphic_is_the_contour_sum(output: Output, points: int) -> None:
    """At finite radius, number for number: states in the complex plane relaxed by the map written by hand."""
    net, problem = make(), make_problem()
    chain = Hopfield.copy_of(net, output)
    found = library_gradients(net, problem, ep(ebm.Holomorphic(0.1, points=points)), output)
    assert worst_relative_error(found, holomorphic(chain, problem, 0.1, points)) < 1e-9


def test_the_contour_is_in_the_report_point_by_point() -> None:
    """Where states end at each root of unity; a fourth of the way round is i itself."""
    net, problem = make(), make_problem()
    learner = ebm.Learner(net, ep(ebm.Holomorphic(0.2, points=4)))
    learner.gradients(lambda: problem.loss(net(problem.x), problem.y))
    free, *contour = learner.report["phases"]
    assert free["nudge"] == 0
    assert [complex(phase["nudge"]) for phase in contour] == [0.2, -0.2, 0.2j]
    assert all(phase["energies"] and max(phase["residual"]) < 1e-6 for phase in contour)


@OUTPUTS
@SMOOTH
def test_two_point_holomorphic_is_centred(output: Output, activation: str) -> None:
    """The roots of unity of order 2 are +1 and -1."""
    net, problem = make(activation), make_problem()
    two = library_gradients(net, problem, ep(ebm.Holomorphic(0.1, points=2)), output)
    assert worst_relative_error(two, library_gradients(net, problem, ep(ebm.Centered(0.1)), output)) < 1e-12
    assert worst_relative_error(two, centred(Hopfield.copy_of(net, output), problem, 0.1)) < 1e-9


def test_the_holomorphic_preset() -> None:
    """The preset with its parts replaced is the contour sum."""
    net, problem = make(), make_problem()
    algorithm = ebm.algorithm(
        "holomorphic-ep", nudge=ebm.Holomorphic(0.1, points=4), relaxer=ebm.FixedPoint(SETTLED), free_relaxer=None
    )
    expected = holomorphic(Hopfield.copy_of(net), problem, 0.1, 4)
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


def test_the_holomorphic_preset_settles_where_plain_sweeps_do() -> None:
    """Complex states, accelerated: the contour sum to the preset's own tolerance."""
    net, problem = make(), make_problem()
    found = library_gradients(net, problem, "holomorphic-ep")
    expected = holomorphic(Hopfield.copy_of(net), problem, 0.2, 4)
    assert worst_relative_error(found, expected) < 1e-2
    algorithm = ebm.algorithm("holomorphic-ep", relaxer=ebm.AcceleratedFixedPoint(300, tol=1e-12))
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-9


def test_a_module_that_is_not_holomorphic_is_refused_by_name() -> None:
    """A kink has no complex derivative: ReLU "1" must be named, not silently continued."""
    net, problem = make("relu"), make_problem()
    with pytest.raises(ebm.EBMError, match=r"ReLU"):
        library_gradients(net, problem, ep(ebm.Holomorphic(0.1, points=4)))


@OUTPUTS
def test_random_sign_is_unbiased_to_second_order(output: Output) -> None:
    """The mean of its two outcomes is the centred update exactly, by linearity."""
    net, problem = make(), make_problem()
    plus, minus = (library_gradients(net, problem, ep(ebm.OneSided(s * 0.05)), output) for s in (1, -1))
    mean = {name: 0.5 * (plus[name] + minus[name]) for name in plus}
    assert worst_relative_error(mean, library_gradients(net, problem, ep(ebm.Centered(0.05)), output)) < 1e-12


def test_the_replicated_batch_changes_nothing() -> None:
    """beta is per sample: a mean loss over a doubled batch has the same update, a sum loss twice it."""
    net = make()
    for name, factor in (("half-mse-mean", 1.0), ("half-mse-sum", 2.0)):
        problem = make_problem(name)
        doubled = Problem(torch.cat([problem.x] * 2), torch.cat([problem.y] * 2), problem.loss, problem.reduction)
        once, twice = (library_gradients(net, case, ep(ebm.Centered(0.25))) for case in (problem, doubled))
        assert worst_relative_error(twice, {k: factor * v for k, v in once.items()}) < 1e-12


# --------------------------------------------------------------------------------- equilibrium as a plain module


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_equilibrium_module_returns_the_free_output(ends: bool, mode: Callable) -> None:
    """After 7 sweeps from zeros, and settled; catches the feed-forward output sold as the equilibrium."""
    net, problem = make("hard sigmoid", ends=ends), make_problem()
    chain = Hopfield.copy_of(net, "state" if ends else "readout")
    for sweeps in (7, SETTLED):
        algorithm = ep(ebm.Centered(0.25), free=sweeps, nudged=1, start="zeros")
        expected = output_of(chain, relax(chain, problem, zero_states(chain, problem), 0.0, sweeps)).detach()
        with mode():
            found = ebm.Equilibrium(net, algorithm)(problem.x)
            forward = net(problem.x)
        torch.testing.assert_close(found.clone(), expected, rtol=0, atol=1e-12)
        assert (found - forward).abs().max() > 1e-3


def test_the_loss_handed_back_is_that_of_the_free_equilibrium() -> None:
    """`backward` returns the free-phase loss, which training curves show."""
    net, problem = make("hard sigmoid"), make_problem()
    chain = Hopfield.copy_of(net)
    learner = ebm.Learner(net, ep(ebm.Centered(0.25)), output="state", loss_reduction=problem.reduction)
    value = learner.backward(lambda: problem.loss(net(problem.x), problem.y))
    assert value.item() == pytest.approx(loss(chain, problem, settle(chain, problem)).item(), rel=1e-12)


# ------------------------------------------------------------------------------------ blocks as layers


class Residual(nn.Module):
    """x + W2 tanh(W1 x), written with functions: nothing inside it is a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 7), nn.Linear(7, width)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.down(torch.tanh(self.up(x)))


class SelfAttention(nn.Module):
    """One head over the tokens of each sample, by matrix products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / math.sqrt(x.shape[-1])
        return 0.4 * x + scores.softmax(-1) @ self.v(x)


class NormedInEval(nn.Module):
    """Linear and BatchNorm, in eval mode with statistics that are not 0 and 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.norm.running_mean.copy_(torch.linspace(-0.5, 0.5, width))
        self.norm.running_var.copy_(torch.linspace(0.8, 2.0, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x)))


@pytest.mark.parametrize("block", [Residual, SelfAttention, NormedInEval])
@pytest.mark.parametrize("output", ["readout", "state"])
def test_generic_blocks_as_layers(block: type[nn.Module], output: Output) -> None:
    """A block as a layer has G = 1/2 x^2 and whatever drive its forward computes; its transpose is its
    Jacobian's. Centred EP at beta 1e-3 within 1e-5 of the implicit gradient, found from the dense Hessian.
    """
    torch.manual_seed(0)
    net = nn.Sequential(block(4), block(4), nn.Flatten(), nn.LazyLinear(3)).double().eval()
    tokens = (3,) if block is SelfAttention else ()
    x = torch.randn(2, *tokens, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net(x)
    with torch.no_grad():
        for p in net.parameters():
            p *= 0.6
    y = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    problem = Problem(x, y, make_problem().loss, "mean")

    def internal(s: States) -> Tensor:
        drives = [net[0](x), net[1](s[0]), net[3](s[1].flatten(1))]
        return sum((0.5 * u * u - u * a).sum() for u, a in zip(s, drives, strict=False))

    def loss_of(s: States) -> Tensor:
        return problem.loss(s[2] if output == "state" else net[3](s[1].flatten(1)), y)

    start = [net[0](x), net[1](net[0](x)), net(x)][: 3 if output == "state" else 2]
    states = newton(internal, start)
    expected = implicit_gradient(internal, loss_of, states, dict(net.named_parameters()))
    algorithm = ep(ebm.Centered(1e-3), free=300, nudged=300)
    found = library_gradients(net, problem, algorithm, output, layers=["0", "1"])
    assert relative_error(found, expected) < 1e-5
    exact = library_gradients(net, problem, ep(ebm.Infinitesimal(), free=300), output, layers=["0", "1"])
    assert relative_error(exact, expected) < 1e-8
