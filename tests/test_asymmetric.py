"""Equilibrium propagation through feedback that is no transpose, corrected for it, against implicit differentiation."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

SIZES = (5, 7, 6, 3)


def network(act, last=True):
    torch.manual_seed(3)
    parts = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        parts += [nn.Linear(fan_in, fan_out), act()]
    return nn.Sequential(*(parts if last else parts[:-1])).double()


def batch():
    torch.manual_seed(4)
    return torch.randn(6, SIZES[0], dtype=torch.float64), torch.randn(6, SIZES[-1], dtype=torch.float64)


def learned(net, x, y, strength, corrected=True, relaxer=None, rule=None, output="state"):
    feedback = ebm.Feedback(
        relaxer or ebm.FixedPoint(400, tol=1e-13), rule or ebm.RandomFeedback(0.7, seed=2), corrected=corrected
    )
    learner = ebm.Learner(net, ebm.Algorithm(ebm.Hopfield(), ebm.Centered(strength), feedback), output=output)
    found = learner.gradients(lambda: 0.5 * (net(x) - y).square().sum(1).mean())
    return found, feedback


def implicit(net, x, y, back, read_out=False):
    """The gradient of the loss where x_l = rho(W_l x_{l-1} + b_l + B_{l+1} x_{l+1}), by a dense solve."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    acts = [m for m in net if not isinstance(m, nn.Linear)]
    parameters = dict(net.named_parameters())
    count = len(acts)
    sizes = [m.out_features for m in linears[:count]]

    def swept(flat, held):
        states = list(flat.split(sizes, 1))
        drives = [F.linear(h, m.weight, m.bias) for h, m in zip([held, *states], linears[:count], strict=False)]
        pulls = [states[k + 1] @ back[k] for k in range(count - 1)] + [0.0]
        return torch.cat([act(d + p) for act, d, p in zip(acts, drives, pulls, strict=True)], 1)

    def loss(flat):
        top = flat.split(sizes, 1)[-1]
        return 0.5 * ((linears[-1](top) if read_out else top) - y).square().sum(1).mean()

    rest = torch.zeros(len(x), sum(sizes), dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3000):
            rest = 0.5 * rest + 0.5 * swept(rest, x)
    rest.requires_grad_()
    (pull,) = torch.autograd.grad(loss(rest), rest)
    adjoint = []
    for b in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda row, b=b: swept(row[None], x[b : b + 1])[0], rest[b].detach()
        )
        adjoint.append(torch.linalg.solve(torch.eye(len(jacobian), dtype=torch.float64) - jacobian.T, pull[b]))
    total = (swept(rest.detach(), x) * torch.stack(adjoint)).sum() + loss(rest.detach())
    names = list(parameters)
    found = torch.autograd.grad(total, [parameters[name] for name in names], allow_unused=True)
    return dict(zip(names, found, strict=True))


def error(found, expected):
    return ebm.metrics.alignment(found, expected)["relative_error"]


@pytest.mark.parametrize(
    "relaxer", [ebm.FixedPoint(400, tol=1e-13), ebm.FixedPoint(800, "synchronous", 1e-13, damping=0.5)], ids=str
)
def test_the_update_is_the_gradient_at_the_equilibrium_and_its_error_falls_as_lambda_squared(relaxer):
    net, (x, y) = network(nn.Tanh), batch()
    coarse, feedback = learned(net, x, y, 0.02, relaxer=relaxer)
    fine, _ = learned(net, x, y, 0.01, relaxer=relaxer)
    expected = implicit(net, x, y, [feedback.operators[name].T for name in ("3", "5")])
    assert error(fine, expected) < 1e-3
    assert 3.8 < error(coarse, expected) / error(fine, expected) < 4.2
    assert error(learned(net, x, y, 0.01, corrected=False, relaxer=relaxer)[0], expected) > 0.1


@pytest.mark.parametrize("capture", [True, False])
def test_a_read_out_sends_its_slope_back_through_its_own_weight(capture):
    net, (x, y) = network(nn.Tanh, last=False), batch()
    feedback = ebm.Feedback(ebm.FixedPoint(400, tol=1e-13), ebm.RandomFeedback(0.7, seed=2), corrected=True)
    algorithm = ebm.Algorithm(ebm.Hopfield(), ebm.Centered(1e-3), feedback)
    learner = ebm.Learner(net, algorithm, output="readout", capture=capture)
    for _ in range(2):  # found by the plain way, then by code
        found = learner.gradients(lambda: 0.5 * (net(x) - y).square().sum(1).mean())
    expected = implicit(net, x, y, [feedback.operators["3"].T], read_out=True)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("relaxer", [ebm.FixedPoint(400, tol=1e-13), ebm.GradientDescent(0.5, 300)], ids=str)
def test_clipped_units_at_a_bound_stay_there(relaxer):
    net, (x, y) = network(lambda: nn.Hardtanh(0, 1)), batch()
    found, feedback = learned(net, x, y, 1e-4, relaxer=relaxer)
    expected = implicit(net, x, y, [feedback.operators[name].T for name in ("3", "5")])
    assert error(found, expected) < 1e-6


def test_under_the_transpose_the_contrast_is_the_same_but_for_what_weights_carry_back():
    """Biases and the first weight have no part in feedback; other weights are two synapses, of which it counts one."""
    net, (x, y) = network(nn.Tanh), batch()
    found, _ = learned(net, x, y, 1e-3, rule=ebm.Mismatch(0.0))
    algorithm = ebm.Algorithm(ebm.Hopfield(), ebm.Centered(1e-3), ebm.FixedPoint(400, tol=1e-13))
    plain = ebm.Learner(net, algorithm, output="state").gradients(lambda: 0.5 * (net(x) - y).square().sum(1).mean())
    one_way = ["0.weight", "0.bias", "2.bias", "4.bias"]
    assert error({name: found[name] for name in one_way}, {name: plain[name] for name in one_way}) < 1e-5
    assert error(found, plain) > 0.1


def test_operators_that_move_are_followed_from_step_to_step():
    """Code is made once, and given the operators of every step."""
    net, (x, y) = network(nn.Tanh), batch()
    feedback = ebm.Feedback(ebm.FixedPoint(400, tol=1e-13), ebm.KolenPollack(0.1, seed=2), corrected=True)
    learner = ebm.Learner(net, ebm.Algorithm(ebm.Hopfield(), ebm.Centered(1e-3), feedback), output="state")
    optimizer = torch.optim.SGD(net.parameters(), 0.2)
    loss = lambda: 0.5 * (net(x) - y).square().sum(1).mean()  # noqa: E731
    for _ in range(5):
        learner.step(loss, optimizer)
        found = learner.gradients(loss)
        expected = implicit(net, x, y, [feedback.operators[name].T for name in ("3", "5")])
        assert error(found, expected) < 1e-5


class Convolutions(nn.Sequential):
    def __init__(self, pool):
        super().__init__(
            nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), pool, nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(),
            nn.Linear(36, 2), nn.Tanh(),
        )  # fmt: skip


def test_convolutions_and_mean_pooling_are_linear_and_descend_the_loss_at_equilibrium():
    """The oracle is the slope of the loss at the free equilibrium, by differences along the update and at random."""
    torch.manual_seed(0)
    net, x, y = Convolutions(nn.AvgPool2d(2)).double(), torch.randn(3, 1, 6, 6).double(), torch.randn(3, 2).double()
    rule = ebm.RandomFeedback(0.5, seed=1)
    found, feedback = learned(net, x, y, 1e-3, rule=rule)
    algorithm = ebm.Algorithm(ebm.Hopfield(), ebm.Centered(1e-3), feedback)
    learner = ebm.Learner(net, algorithm, output="state")
    direction = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    losses = []
    for sign in (1, -1):
        moved = {name: p.detach() + sign * 1e-5 * direction[name] for name, p in net.named_parameters()}
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        net.load_state_dict(moved)
        with learner.free_phase(lambda: net(x)):
            losses.append(float(0.5 * (net(x) - y).square().sum(1).mean()))
        net.load_state_dict(before)
    slope = (losses[0] - losses[1]) / 2e-5
    assert slope == pytest.approx(sum(float((found[name] * d).sum()) for name, d in direction.items()), rel=1e-4)


def test_drives_that_are_not_linear_and_energies_of_errors_are_refused():
    torch.manual_seed(0)
    net, x, y = Convolutions(nn.MaxPool2d(2)).double(), torch.randn(3, 1, 6, 6).double(), torch.randn(3, 2).double()
    with pytest.raises(ebm.UnsupportedModuleError, match=r"(?s)not linear in the states below it.*pool by means"):
        learned(net, x, y, 1e-3)
    with pytest.raises(ebm.ConfigurationError, match=r"corrected=True.*energy=ebm.Hopfield"):
        ebm.Algorithm(relaxer=ebm.Feedback(ebm.GradientDescent(0.1, 5), corrected=True))
    with pytest.raises(ebm.ConfigurationError, match="True or False"):
        ebm.Feedback(ebm.FixedPoint(5), corrected="yes")
