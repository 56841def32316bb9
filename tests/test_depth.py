"""What the initial weights by depth guarantee, by dense Hessians; and the spectrum against dense eigenvalues."""

import pytest
import torch
from test_clamp import X, Y, chain, energy, forward_states
from torch import nn

import lightning_ebm as ebm


class Block(nn.Module):
    """x + W rho(x)."""

    def __init__(self, width):
        super().__init__()
        self.act, self.linear = nn.Tanh(), nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.act(x))


def residual(width, depth, inputs=6, outputs=3):
    """L = depth weighted layers."""
    blocks = [Block(width) for _ in range(depth - 2)]
    return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.Linear(width, outputs)).double()


def hessian(net, x):
    """d2I/dx2 of a residual chain at its forward pass, written out: the states are the outputs of all but the last."""
    layers = list(net[:-1])
    with torch.no_grad():
        states, h = [], x
        for layer in layers:
            h = layer(h)
            states.append(h[0])

    def of(flat):
        parts = flat.split(len(states[0]))
        total, below = 0, x[0]
        for k, layer in enumerate(layers):
            total = total + 0.5 * (parts[k] - layer(below[None])[0]).square().sum()
            below = parts[k]
        return total

    return torch.func.hessian(of)(torch.cat(states)), states


def test_the_size_of_states_and_the_largest_curvature_do_not_grow_with_depth_or_width():
    """From 3 to 48 layers; branches that are not scaled by it grow. The smallest falls as 1/L^2."""
    torch.manual_seed(0)
    x = torch.randn(1, 6, dtype=torch.float64)
    sizes, largest, conditions, plain = [], [], [], []
    for depth, width in ((3, 12), (12, 12), (48, 12), (12, 48)):
        net = residual(width, depth)
        ebm.depth.initialize(net)
        found, states = hessian(net, x)
        values = torch.linalg.eigvalsh(found)
        sizes.append(float(states[-1].square().mean().sqrt()))
        largest.append(float(values[-1]))
        conditions.append(float(values[-1] / values[0]))
        other = residual(width, depth)
        with torch.no_grad():
            for m in other.modules():
                if isinstance(m, nn.Linear):
                    m.weight.normal_(0, m.in_features**-0.5)
        plain.append(float(torch.linalg.eigvalsh(hessian(other, x)[0])[-1]))
    assert max(sizes) < 3 * min(sizes)
    assert max(largest) < 8  # |1 + W rho'| stays near 1, so that (1 + |1 + W rho'|)^2 is near 4
    assert max(largest) < 1.8 * min(largest)
    assert max(plain) > 1.5 * max(largest)
    # What no initial weights change: a chain's slowest mode, sin^2(pi / 4L). From 12 to 48 layers a factor of 16.
    assert 5 < conditions[2] / conditions[1] < 40


def test_without_skips_hidden_weights_do_not_shrink_with_depth_and_the_table_says_which_is_which():
    net = residual(10, 5)
    rows = ebm.depth.table(net)
    assert [row.role for row in rows] == ["input", "hidden", "hidden", "hidden", "output"]
    assert [row.name for row in rows] == ["0", "1.linear", "2.linear", "3.linear", "4"]
    assert rows[0].scale == pytest.approx(6**-0.5)
    assert rows[1].scale == pytest.approx((10 * 5) ** -0.5)
    assert rows[-1].scale == pytest.approx(0.1)
    assert ebm.depth.table(net, residual=False)[1].scale == pytest.approx(10**-0.5)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(2, 50, 3), nn.Conv2d(50, 50, 3), nn.Flatten(), nn.Linear(100, 4))
    ebm.depth.initialize(wide)
    assert float(wide[1].weight.std()) == pytest.approx((50 * 9 * 3) ** -0.5, rel=0.05)
    assert not wide[1].bias.any()
    with pytest.raises(ebm.ConfigurationError, match="2 linear"):
        ebm.depth.initialize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ebm.ConfigurationError, match="positive"):
        ebm.depth.parameter_groups(net, -1.0, base_width=1, base_depth=1)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.003), ("sgd", 0.1)])
def test_a_step_moves_the_function_as_far_at_any_width_and_depth(optimizer, lr):
    """The change of the output after one step of predictive coding, from width 16 and 8 layers to 64 and 32."""
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)

    def moved(width, depth, scaled=True):
        changes = []
        for seed in range(4):
            torch.manual_seed(seed)
            net = residual(width, depth)
            ebm.depth.initialize(net)
            groups = ebm.depth.parameter_groups(net, lr, optimizer=optimizer, base_width=16, base_depth=8)
            assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in net.parameters()}
            given = groups if scaled else [{"params": list(net.parameters())}]
            make = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
            steps = make(given, lr=lr)
            before = net(x).detach()
            learner = ebm.Learner(net, "zero-divergence", layers=Block)
            for _ in range(3):  # the first steps of hidden weights wait for the output's
                steps.zero_grad()
                learner.backward(lambda net=net: 0.5 * (net(x) - y).square().sum(1).mean())
                steps.step()
            changes.append(float((net(x) - before).norm()))
        return sum(changes) / 4

    base = moved(16, 8)
    scaled = [moved(64, 8) / base, moved(16, 32) / base, moved(48, 24) / base]
    assert all(0.5 < ratio < 2 for ratio in scaled)
    plain = moved(64, 32, scaled=False) / base
    assert abs(plain - 1) > 2 * max(abs(ratio - 1) for ratio in scaled)


def test_the_groups_of_the_base_network_have_the_learning_rate_itself():
    net = residual(16, 8)
    for optimizer in ("adam", "sgd"):
        groups = ebm.depth.parameter_groups(net, 0.5, optimizer=optimizer, base_width=16, base_depth=8)
        assert {group["lr"] for group in groups} == {0.5}


# The spectrum


@pytest.mark.parametrize("nudge", [None, 0.7])
def test_lanczos_finds_the_eigenvalues_of_the_dense_hessian(nudge):
    net, x, y = chain(nn.Tanh, gain=1.0), X[:1], Y[:1]
    learner = ebm.Learner(net, layers=["2", "4"])
    closure = lambda: 0.5 * (net(x) - y).square().sum(1).mean()  # noqa: E731
    found = learner.spectrum(closure, nudge=nudge, relaxer=ebm.QuasiNewton(tol=1e-12))
    rest = learner.relax(closure, nudge=nudge, relaxer=ebm.QuasiNewton(tol=1e-12))

    def of(flat):
        one, two = flat[:5][None], flat[5:][None]
        out = net[5](two)
        held = energy(net, [x, one, two, out], x)
        return held + (0 if nudge is None else nudge * 0.5 * (out - y).square().sum())

    dense = torch.linalg.eigvalsh(torch.func.hessian(of)(torch.cat([rest.states["2"], rest.states["4"]], 1)[0]))
    torch.testing.assert_close(found.eigenvalues, dense, rtol=0, atol=1e-9)
    assert float(found.weights.sum()) == pytest.approx(1)
    assert found.condition == pytest.approx(float(dense[-1] / dense[0]))


def test_of_held_units_nothing_is_counted_and_few_steps_find_the_ends():
    net = chain(nn.Tanh, gain=1.0)
    learner = ebm.Learner(net, layers=["2", "4"])
    mask = torch.tensor([True, False, True, False, False])
    clamp = {"5": Y, "2": (torch.zeros(5), mask)}
    relaxer = ebm.QuasiNewton(tol=1e-12)
    found = learner.spectrum(lambda: net(X), clamp=clamp, relaxer=relaxer, steps=200)
    rest = learner.relax(lambda: net(X), clamp=clamp, relaxer=relaxer)
    states = [X, rest.states["2"], rest.states["4"], Y]
    free = torch.cat([~mask, torch.ones(5, dtype=torch.bool)])
    values = []
    for k in range(len(X)):

        def of(flat, k=k):
            return energy(net, [X[k : k + 1], flat[None, :5], flat[None, 5:], Y[k : k + 1]], X[k : k + 1])

        dense = torch.func.hessian(of)(torch.cat([states[1][k], states[2][k]]))
        values.append(torch.linalg.eigvalsh(dense[free][:, free]))
    every = torch.cat(values).sort().values
    torch.testing.assert_close(found.eigenvalues, every, rtol=0, atol=1e-8)
    few = learner.spectrum(lambda: net(X), clamp=clamp, relaxer=relaxer, steps=15)
    assert len(few.eigenvalues) == 15
    assert few.largest == pytest.approx(found.largest, rel=1e-3)
    assert few.smallest == pytest.approx(found.smallest, rel=0.05)
    assert float((few.weights * few.eigenvalues).sum()) == pytest.approx(float(every.mean()), rel=0.3)
    assert forward_states(net, X)[1].shape == rest.states["2"].shape
