"""Predictive coding, step by step, against plain autograd over explicit states.

Nothing is fitted or loosened here: a finite number of steps from the feed-forward pass is a deterministic
computation, so the library must give the oracle's numbers to round-off.
"""

from __future__ import annotations

import pytest
import torch
from oracles import (
    LOSSES,
    Chain,
    Gradients,
    Output,
    Place,
    Problem,
    backprop,
    centred_update,
    make_net,
    make_problem,
    relax_errors,
    relax_euler,
    relax_optimizer,
    update,
    worst_relative_error,
)
from torch import nn

import lightning_ebm as ebm

torch.set_num_threads(1)

LAYERS: dict[Place, type[nn.Module] | None] = {"after": None, "before": nn.Linear}
KINDS = pytest.mark.parametrize(
    ("place", "output"),
    [("after", "readout"), ("after", "state"), ("before", "readout"), ("before", "state")],
)
DEEP = (4, 6, 6, 6, 5, 3)


def euler(lam: float = 1.0, *, lr: float = 0.1, steps: int = 20, precision: float = 1.0) -> ebm.Algorithm:
    return ebm.algorithm(
        "predictive-coding",
        energy=ebm.PredictiveCoding(precision=precision),
        nudge=ebm.OneSided(lam),
        relaxer=ebm.GradientDescent(lr=lr, max_steps=steps),
    )


def make_learner(
    net: nn.Module,
    problem: Problem,
    algorithm: ebm.Algorithm,
    place: Place = "after",
    output: str = "readout",
) -> ebm.Learner:
    return ebm.Learner(net, algorithm, layers=LAYERS[place], output=output, loss_reduction=problem.reduction)


def library_gradients(
    net: nn.Module,
    problem: Problem,
    algorithm: ebm.Algorithm,
    place: Place = "after",
    output: str = "readout",
) -> Gradients:
    learner = make_learner(net, problem, algorithm, place, output)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y))


def oracle_gradients(chain: Chain, problem: Problem, lam: float = 1.0, steps: int = 20) -> Gradients:
    return update(chain, problem, relax_euler(chain, problem, lam, 0.1, steps), lam)


# ---------------------------------------------------------------------------------------- twenty Euler steps


@KINDS
@pytest.mark.parametrize("loss", list(LOSSES))
def test_twenty_euler_steps(place: Place, output: Output, loss: str) -> None:
    """Catches a dropped half in the energy, a sequential sweep sold as simultaneous steps, an update read
    before the last step, a lambda divided by the batch size, and a state on the wrong side of its
    activation.
    """
    net, problem = make_net(), make_problem(loss)
    expected = oracle_gradients(Chain.copy_of(net, place, output), problem)
    assert worst_relative_error(library_gradients(net, problem, euler(), place, output), expected) < 1e-12


@KINDS
@pytest.mark.parametrize("precision", [0.25, 3.0])
@pytest.mark.parametrize("lam", [1.0, 0.3, -0.02])
def test_precision_and_lambda(place: Place, output: Output, precision: float, lam: float) -> None:
    """Catches a precision that weights the relaxation but not the update, or the loss as well as the energy;
    a negative lambda catches an absolute value in the division.
    """
    net, problem = make_net(), make_problem()
    expected = oracle_gradients(Chain.copy_of(net, place, output, precision), problem, lam)
    found = library_gradients(net, problem, euler(lam, precision=precision), place, output)
    assert worst_relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.GELU])
@KINDS
def test_other_activations(place: Place, output: Output, activation: type[nn.Module]) -> None:
    """Catches a derivative that is right for tanh only; 20 steps are exact for kinked ReLU too."""
    net, problem = make_net(activation=activation), make_problem()
    expected = oracle_gradients(Chain.copy_of(net, place, output), problem)
    assert worst_relative_error(library_gradients(net, problem, euler(), place, output), expected) < 1e-12


@pytest.mark.parametrize("output", ["auto", "readout"])
def test_the_last_linear_of_a_chain_is_a_readout(output: str) -> None:
    """Catches "auto" quietly giving the output a state: the two energies differ at finite lambda."""
    net, problem = make_net(), make_problem()
    for place in LAYERS:
        expected = oracle_gradients(Chain.copy_of(net, place, "readout"), problem)
        assert worst_relative_error(library_gradients(net, problem, euler(), place, output), expected) < 1e-12


@pytest.mark.parametrize("output", ["auto", "state"])
def test_a_network_that_ends_in_an_activation_has_an_output_state(output: str) -> None:
    """Catches an output nonlinearity counted as part of a read-out."""
    net, problem = make_net(ends_in_activation=True), make_problem()
    expected = oracle_gradients(Chain.copy_of(net, "after", "state"), problem)
    assert worst_relative_error(library_gradients(net, problem, euler(), "after", output), expected) < 1e-12


def test_a_final_activation_can_be_read_out() -> None:
    """With output="readout" the loss sees the prediction rho(a_L) and no state stands between."""
    net, problem = make_net(ends_in_activation=True), make_problem()
    expected = oracle_gradients(Chain.copy_of(net, "after", "readout"), problem)
    assert worst_relative_error(library_gradients(net, problem, euler(), "after", "readout"), expected) < 1e-12


def test_a_shared_activation_module_is_a_layer_at_each_call() -> None:
    """Catches one state per module object: three calls of one nn.Tanh are three layers."""
    shared = nn.Tanh()
    net, problem = make_net(activation=lambda: shared), make_problem()
    expected = oracle_gradients(Chain.copy_of(net), problem)
    assert worst_relative_error(library_gradients(net, problem, euler()), expected) < 1e-12


@pytest.mark.parametrize(
    "layers", [["1", "3", "5"], nn.Tanh, (nn.Tanh, nn.ReLU), lambda module: isinstance(module, nn.Tanh)]
)
def test_four_ways_to_name_the_same_layers(layers: object) -> None:
    """Catches a spelling of `layers` that finds another set of states."""
    net, problem = make_net(), make_problem()
    learner = ebm.Learner(net, euler(), layers=layers, output="readout", loss_reduction="mean")
    found = learner.gradients(lambda: problem.loss(net(problem.x), problem.y))
    assert worst_relative_error(found, oracle_gradients(Chain.copy_of(net), problem)) < 1e-12


@KINDS
@pytest.mark.parametrize("loss", ["half-mse-mean", "cross-entropy-sum"])
def test_centred_nudge(place: Place, output: Output, loss: str) -> None:
    """Catches a negative phase started from the positive phase's states, and a weight of 1/lambda for 1/(2
    lambda).
    """
    net, problem, lam = make_net(), make_problem(loss), 0.1
    chain = Chain.copy_of(net, place, output)
    expected = centred_update(lambda s: relax_euler(chain, problem, s, 0.1, 20), chain, problem, lam)
    algorithm = ebm.algorithm(
        "predictive-coding", nudge=ebm.Centered(lam), relaxer=ebm.GradientDescent(lr=0.1, max_steps=20)
    )
    assert worst_relative_error(library_gradients(net, problem, algorithm, place, output), expected) < 1e-12


@KINDS
def test_torch_optimizer_over_the_states(place: Place, output: Output) -> None:
    """Catches an optimizer whose moments leak between phases or calls, and rounding noise below the front
    that Adam would turn into full steps. Two calls in a row must agree to the last bit.
    """
    net, problem = make_net(), make_problem()
    chain = Chain.copy_of(net, place, output)
    states = relax_optimizer(chain, problem, 1.0, torch.optim.Adam, 20, lr=0.05)
    algorithm = ebm.algorithm(
        "predictive-coding",
        nudge=ebm.OneSided(1.0),
        relaxer=ebm.StateOptimizer(torch.optim.Adam, max_steps=20, lr=0.05),
    )
    learner = make_learner(net, problem, algorithm, place, output)
    first, second = (learner.gradients(lambda: problem.loss(net(problem.x), problem.y)) for _ in range(2))
    assert worst_relative_error(first, update(chain, problem, states, 1.0)) < 1e-10
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("optimizer", "options"), [(torch.optim.SGD, {"lr": 0.1}),
                                                    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
                                                    (torch.optim.RMSprop, {"lr": 0.01})])  # fmt: skip
def test_any_torch_optimizer(optimizer: type[torch.optim.Optimizer], options: dict[str, float]) -> None:
    """Catches options that do not reach the optimizer; plain SGD must be simultaneous Euler steps."""
    net, problem = make_net(), make_problem()
    chain = Chain.copy_of(net)
    expected = update(chain, problem, relax_optimizer(chain, problem, 1.0, optimizer, 20, **options), 1.0)
    algorithm = ebm.algorithm(
        "predictive-coding",
        nudge=ebm.OneSided(1.0),
        relaxer=ebm.StateOptimizer(optimizer, max_steps=20, **options),
    )
    assert worst_relative_error(library_gradients(net, problem, algorithm), expected) < 1e-10


@KINDS
def test_first_step_in_error_coordinates(place: Place, output: Output) -> None:
    """One step from e = 0 gives e_l = -lambda delta_l in every layer at once (theory Q9); the update is then
    read with the parents moved. Catches errors propagated one layer a step, and states held back at the
    forward pass.
    """
    net, problem, lam = make_net(), make_problem(), 0.1
    chain = Chain.copy_of(net, place, output)
    expected = update(chain, problem, relax_errors(chain, problem, lam, lr=1.0, steps=1), lam)
    algorithm = ebm.algorithm(
        "predictive-coding",
        nudge=ebm.OneSided(lam),
        relaxer=ebm.ErrorCoordinates(max_steps=1, lr=1.0, tol=0.0),
    )
    assert worst_relative_error(library_gradients(net, problem, algorithm, place, output), expected) < 1e-12


# ---------------------------------------------------------------------------------------- ten training steps


@KINDS
@pytest.mark.parametrize("relaxer", ["euler", "adam"])
@pytest.mark.parametrize("loss", ["half-mse-mean", "cross-entropy-mean", "half-mse-sum"])
def test_ten_training_steps_with_adam(place: Place, output: Output, relaxer: str, loss: str) -> None:
    """Catches state carried from one batch to the next (stale states, optimizer moments, accumulated .grad),
    and a `backward` that disagrees with `gradients`. The loss handed back is the free-phase loss, the plain
    one.
    """
    net = make_net()
    chain = Chain.copy_of(net, place, output)
    mine = torch.optim.Adam(list(chain.parameters.values()), lr=1e-2)
    theirs = torch.optim.Adam(net.parameters(), lr=1e-2)
    algorithm = euler()
    if relaxer == "adam":
        algorithm = ebm.algorithm(
            "predictive-coding",
            nudge=ebm.OneSided(1.0),
            relaxer=ebm.StateOptimizer(torch.optim.Adam, max_steps=20, lr=0.05),
        )
    learner = make_learner(net, make_problem(loss), algorithm, place, output)
    for step in range(10):
        problem = make_problem(loss, batch=6 if step == 9 else 8, seed=100 + step)  # the last batch is smaller
        if relaxer == "euler":
            states = relax_euler(chain, problem, 1.0, 0.1, 20)
        else:
            states = relax_optimizer(chain, problem, 1.0, torch.optim.Adam, 20, lr=0.05)
        plain_loss = problem.loss(chain.run(problem.x)[2], problem.y)
        for name, slope in update(chain, problem, states, 1.0).items():
            chain.parameters[name].grad = slope
        mine.step()

        theirs.zero_grad()
        handed_back = learner.backward(lambda problem=problem: problem.loss(net(problem.x), problem.y))
        theirs.step()
        assert not handed_back.requires_grad
        assert handed_back.item() == pytest.approx(plain_loss.item(), rel=1e-10)
    assert worst_relative_error(dict(net.named_parameters()), chain.parameters) < 1e-10


def test_backward_accumulates_and_gradients_does_not() -> None:
    """Catches `.grad` overwritten (gradient accumulation would train on the last micro-batch only) or touched
    by a mere look at the gradients.
    """
    net, problem = make_net(), make_problem()
    learner = make_learner(net, problem, euler())
    once = learner.gradients(lambda: problem.loss(net(problem.x), problem.y))
    assert all(p.grad is None for p in net.parameters())
    for _ in range(2):
        learner.backward(lambda: problem.loss(net(problem.x), problem.y))
    twice = {name: p.grad for name, p in net.named_parameters()}
    assert worst_relative_error(twice, {name: 2 * value for name, value in once.items()}) < 1e-14


# --------------------------------------------------------------------------------------------- first arrival


@KINDS
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("relaxer", ["euler", "adam", "centred"])
def test_nothing_below_the_front(place: Place, output: Output, steps: int, relaxer: str) -> None:
    """Theory P6/Q6: after k steps the signal has reached k layers and the parameters below have a gradient of
    exactly 0.0. Catches x - f(recomputed), whose 1e-17 of noise Adam turns into full updates, and
    Gauss-Seidel order.
    """
    net, problem = make_net(DEEP), make_problem()
    solver = ebm.GradientDescent(lr=0.1, max_steps=steps)
    if relaxer == "adam":
        solver = ebm.StateOptimizer(torch.optim.Adam, max_steps=steps, lr=0.05)
    nudge = ebm.Centered(0.05) if relaxer == "centred" else ebm.OneSided(1.0)
    algorithm = ebm.algorithm("predictive-coding", nudge=nudge, relaxer=solver)
    found = library_gradients(net, problem, algorithm, place, output)

    linears = [name for name, module in net.named_children() if isinstance(module, nn.Linear)]
    with_states = linears if output == "state" else linears[:-1]
    for position, name in enumerate(with_states):
        reached = position >= len(with_states) - steps
        for parameter in (f"{name}.weight", f"{name}.bias"):
            nonzero = torch.count_nonzero(found[parameter]).item()
            assert (nonzero > 0) == reached, f"{parameter} after {steps} steps: {nonzero} elements are not 0.0"


@KINDS
@pytest.mark.parametrize("precision", [1.0, 2.5])
@pytest.mark.parametrize("lam", [1.0, 0.05])
def test_the_arriving_gradient_is_backprop_scaled(place: Place, output: Output, precision: float, lam: float) -> None:
    """Theory P6: at the step of its arrival the k-th layer from the top has (lr precision)^(k+1) times
    backprop's gradient, at any lambda. Catches Jacobians taken at moved states and an update read one step
    late.
    """
    net, problem, lr = make_net(DEEP), make_problem(), 0.1
    gradient, deltas = backprop(Chain.copy_of(net, place, output), problem)
    linears = [name for name, module in net.named_children() if isinstance(module, nn.Linear)]
    for k in range(len(deltas)):
        name = linears[len(deltas) - 1 - k]
        algorithm = euler(lam, lr=lr, steps=k + 1, precision=precision)
        found = library_gradients(net, problem, algorithm, place, output)
        for parameter in (f"{name}.weight", f"{name}.bias"):
            expected = (lr * precision) ** (k + 1) * gradient[parameter]
            # the arriving displacement is about lr^(k+1), and its subtraction costs digits accordingly
            torch.testing.assert_close(found[parameter], expected, rtol=1e-7, atol=1e-14 / lam)


# ------------------------------------------------------------------------------------ batches and reductions


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_sample_is_alone_in_its_batch(loss: str) -> None:
    """Catches inference that depends on the batch size: a sample in a batch of 1 and of 7 must relax
    alike.
    """
    net, problem = make_net(), make_problem(loss, batch=7)
    whole = library_gradients(net, problem, euler())
    singles = [library_gradients(net, problem.rows(slice(row, row + 1)), euler()) for row in range(7)]
    combined = {name: sum(single[name] for single in singles) / problem.scale for name in whole}
    assert worst_relative_error(whole, combined) < 1e-12


@pytest.mark.parametrize(
    "sum_and_mean", [("half-mse-sum", "half-mse-mean"), ("cross-entropy-sum", "cross-entropy-mean")]
)
@KINDS
def test_sum_is_batch_times_mean(place: Place, output: Output, sum_and_mean: tuple[str, str]) -> None:
    """Catches a lambda that means something else under the other reduction."""
    net = make_net()
    total, mean = (library_gradients(net, make_problem(loss, batch=7), euler(), place, output) for loss in sum_and_mean)
    assert worst_relative_error(total, {name: 7 * value for name, value in mean.items()}) < 1e-13


def test_at_lambda_one_a_sum_loss_gives_the_energy_gradient_itself() -> None:
    """The interface's own anchor for the scale: no hidden factor at lambda = 1."""
    net, problem = make_net(), make_problem("half-mse-sum")
    chain = Chain.copy_of(net)
    predictions, _, output = chain.run(problem.x, relax_euler(chain, problem, 1.0, 0.1, 20))
    states = relax_euler(chain, problem, 1.0, 0.1, 20)
    energy = sum(0.5 * (x - mu).square().sum() for x, mu in zip(states, predictions, strict=True))
    energy = energy + 0.5 * (output - problem.y).square().sum()
    energy.backward()
    expected = {name: parameter.grad for name, parameter in chain.parameters.items()}
    assert worst_relative_error(library_gradients(net, problem, euler()), expected) < 1e-12
