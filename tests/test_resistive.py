"""The network of resistors of docs/resistive.md against Kirchhoff's equations, solved densely."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

SETTLED = ebm.GradientDescent(0.2, 5000, tol=1e-11)
NEWTON = ebm.QuasiNewton(tol=1e-11, coordinates="states")
PAGE = Path(__file__).parents[1] / "docs" / "resistive.md"


@pytest.fixture(scope="module")
def parts():
    space = {"__name__": "docs"}
    exec(compile(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0], str(PAGE), "exec"), space)
    return space


def circuit(parts, lower=-float("inf"), seed=0):
    torch.manual_seed(seed)
    crossbar, nodes = parts["Crossbar"], parts["Nodes"]
    return nn.Sequential(
        crossbar(4, 5), nodes(lower), crossbar(5, 4), nodes(lower), crossbar(4, 2), nodes()
    ).double()  # fmt: skip


def kirchhoff(net, x, y, beta, held=()):
    """Voltages of the inner nodes: Laplacian v = currents, a current beta (y - v) into the outputs; (B, N).

    Nodes in `held`, pairs of sample and node, are kept at 0 by their diodes.
    """
    gs = [net[k].log_g.exp() for k in (0, 2, 4)]
    sizes = [4, *(len(g) for g in gs)]
    starts = [sum(sizes[:k]) for k in range(5)]
    total = sum(sizes)
    laplacian = torch.zeros(total, total, dtype=torch.float64)
    for k, g in enumerate(gs):
        below, here = slice(starts[k], starts[k + 1]), slice(starts[k + 1], starts[k + 2])
        block = torch.zeros_like(laplacian)
        block[here, below], block[below, here] = -g, -g.T
        laplacian = laplacian + block + torch.diag(-block.sum(1))
    inner = laplacian[4:, 4:].clone()
    currents = -(x @ laplacian[4:, :4].T)
    inner[-2:, -2:] = inner[-2:, -2:] + beta * torch.eye(2, dtype=torch.float64)
    currents = torch.cat([currents[:, :-2], currents[:, -2:] + beta * y], 1)
    rows = []
    for b in range(len(x)):
        free = [n for n in range(total - 4) if (b, n) not in held]
        v = torch.zeros(total - 4, dtype=torch.float64)
        rows.append(v.index_put((torch.tensor(free),), torch.linalg.solve(inner[free][:, free], currents[b, free])))
    return torch.stack(rows), inner, currents


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=g).double(), torch.randn(6, 2, generator=g).double() / 5


def learner_of(parts, net, nudge, relaxer=None):
    algorithm = ebm.Algorithm(parts["Power"](), nudge, SETTLED if relaxer is None else relaxer)
    return ebm.Learner(net, algorithm, layers=parts["Nodes"], output="state")


def states_of(found):
    return torch.cat([found.states[name] for name in ("1", "3", "5")], 1)


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("relaxer", [NEWTON, SETTLED])
def test_voltages_solve_kirchhoffs_equations(parts, beta, relaxer):
    net, (x, y) = circuit(parts), batch()
    learner = learner_of(parts, net, ebm.OneSided(0.1))
    found = learner.relax(lambda: 0.5 * (net(x) - y).square().sum(1).mean(), nudge=beta, relaxer=relaxer)
    torch.testing.assert_close(states_of(found), kirchhoff(net, x, y, beta)[0].detach(), rtol=0, atol=1e-8)
    # and the energy is the power lost in all resistors, Tellegen's: sum of g (v - v')^2 / 2
    lost, below = 0.0, x
    for k, name in ((0, "1"), (2, "3"), (4, "5")):
        g, here = net[k].log_g.exp().detach(), found.states[name]
        lost = lost + 0.5 * (g * (here[:, :, None] - below[:, None]).square()).sum((1, 2))
        below = here
    torch.testing.assert_close(found.energy, lost, rtol=1e-10, atol=0)


def test_diodes_hold_nodes_at_their_bound_as_the_complementary_conditions_say(parts):
    net, (x, y) = circuit(parts, lower=0.0), batch()
    found = learner_of(parts, net, ebm.OneSided(0.1)).relax(
        lambda: 0.5 * (net(x) - y).square().sum(1).mean(), nudge=0.7, relaxer=SETTLED
    )
    states = states_of(found)
    held = {(b, n) for b in range(len(x)) for n in range(9) if float(states[b, n]) == 0.0}
    assert 5 < len(held) < 6 * 9
    expected, inner, currents = kirchhoff(net, x, y, 0.7, held)
    torch.testing.assert_close(states, expected.detach(), rtol=0, atol=1e-9)
    assert float(states[:, :9].min()) >= 0
    through = (states @ inner.T - currents).detach()  # into each node through its diode
    for b in range(len(x)):
        for n in range(11):
            assert float(through[b, n]) > -1e-9 if (b, n) in held else abs(float(through[b, n])) < 1e-9


def test_the_update_is_the_gradient_of_the_loss_at_kirchhoffs_solution(parts):
    """By autograd through the dense solve; centered, so that the error falls as the square of the nudge."""
    net, (x, y) = circuit(parts), batch()
    voltages = kirchhoff(net, x, y, 0.0)[0]
    loss = 0.5 * (voltages[:, -2:] - y).square().sum(1).mean()
    true = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    misses = []
    for beta in (0.1, 0.05, 0.025):
        learner = learner_of(parts, net, ebm.Centered(beta), NEWTON)
        found = learner.gradients(lambda: 0.5 * (net(x) - y).square().sum(1).mean())
        flat = torch.cat([found[name].flatten() for name, _ in net.named_parameters()])
        misses.append(float((flat - true).norm() / true.norm()))
    assert misses[2] < 0.01
    assert misses[0] / misses[1] == pytest.approx(4, rel=0.1)
    assert misses[1] / misses[2] == pytest.approx(4, rel=0.1)


def test_conductances_stay_positive_and_each_learns_from_its_own_two_ends(parts):
    net, (x, y) = circuit(parts), batch()
    learner = learner_of(parts, net, ebm.Centered(0.2), NEWTON)
    found = learner.gradients(lambda: 0.5 * (net(x) - y).square().sum(1).mean())
    plus, minus = (kirchhoff(net, x, y, b)[0].detach() for b in (0.2, -0.2))

    def drops(v):
        below, here = v[:, 5:9], v[:, 9:]
        return 0.5 * (here[:, :, None] - below[:, None]).square().mean(0)

    expected = (drops(plus) - drops(minus)) / 0.4 * net[4].log_g.exp().detach()
    torch.testing.assert_close(found["4.log_g"], expected, rtol=1e-6, atol=1e-10)
    optimizer = torch.optim.SGD(net.parameters(), 50.0)
    for _ in range(5):
        learner.step(lambda: 0.5 * (net(x) - y).square().sum(1).mean(), optimizer)
    assert all(float(p.detach().exp().min()) > 0 for p in net.parameters())
