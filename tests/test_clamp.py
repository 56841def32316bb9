"""States out, clamps in: against dense solves, Newton's method on explicit states, and sweeps by hand."""

import copy
import itertools

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

torch.manual_seed(0)
X = torch.randn(6, 4, dtype=torch.float64)
Y = torch.randn(6, 3, dtype=torch.float64)
TIGHT = {
    "quasi-Newton": ebm.QuasiNewton(500, tol=1e-13),
    "quasi-Newton, states": ebm.QuasiNewton(500, tol=1e-13, coordinates="states"),
    "errors": ebm.ErrorCoordinates(5000, tol=1e-13),
    "errors, Anderson": ebm.Anderson(500, 5, tol=1e-12, coordinates="errors"),
    "states": ebm.GradientDescent(0.3, 4000),
    "momentum": ebm.StateOptimizer(torch.optim.SGD, max_steps=3000, lr=0.1, momentum=0.8),
    "sweeps": ebm.FixedPoint(2000, tol=1e-13),
    "sweeps, Anderson": ebm.Anderson(500, 5, tol=1e-12),
}


def chain(kind, widths=(4, 5, 5, 3), gain=0.5):
    """An input that is named, layers, and a last one without an activation: named "0", "2", "4", ... and the last."""
    torch.manual_seed(1)
    parts: list[nn.Module] = [nn.Identity()]
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), kind()]
    net = nn.Sequential(*parts[:-1]).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(gain / max(0.3, float(p.norm()) / p.shape[0] ** 0.5))
    return net


class Plain(nn.Module):
    """An activation that is linear, and a layer all the same."""

    def forward(self, x):
        return 1 * x


NAMES = ["0", "2", "4", "5"]
LAYERS = ["0", "2", "4", "5"]


def terms(net, states, data):
    """Errors of a chain on explicit states, written out."""
    x0, x1, x2, x3 = states
    return [x0 - data, x1 - net[2](net[1](x0)), x2 - net[4](net[3](x1)), x3 - net[5](x2)]


def energy(net, states, data, precisions=(1, 1, 1, 1)):
    errors = terms(net, states, data)
    return sum(0.5 * p * e.square().sum() for p, e in zip(precisions, errors, strict=True))


def newton(function, states, masks, values, steps=50):
    """argmin over the units that no mask holds, sample by sample at once, by Newton's method with a dense Hessian."""
    states = [torch.where(m, v, s) for s, m, v in zip(states, masks, values, strict=True)]
    free = torch.cat([~m.flatten() for m in masks])
    shapes = [s.shape for s in states]

    def unflat(flat):
        parts = flat.split([s.numel() for s in states])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    flat = torch.cat([s.flatten() for s in states])
    of_flat = lambda f: function(unflat(f))  # noqa: E731
    for _ in range(steps):
        slope = torch.func.grad(of_flat)(flat)[free]
        hessian = torch.func.hessian(of_flat)(flat)[free][:, free]
        step = torch.linalg.solve(hessian, slope)
        scale = 1.0
        while of_flat(flat.index_put((free.nonzero()[:, 0],), flat[free] - scale * step)) > of_flat(flat) + 1e-14:
            scale /= 2
            if scale < 1e-6:
                break
        flat = flat.index_put((free.nonzero()[:, 0],), flat[free] - scale * step)
        if float(slope.norm()) < 1e-13:
            break
    return [s.detach() for s in unflat(flat)]


def random_masks(seed, shares=(0.5, 0.2, 0.3, 0.6)):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 4), (6, 5), (6, 5), (6, 3)]
    masks = [torch.rand(s, generator=generator) < share for s, share in zip(shapes, shares, strict=True)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return masks, values


def close(found, expected, tolerance=1e-8):
    for name, state in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(found[name], state, rtol=0, atol=tolerance)


@pytest.mark.parametrize("relaxer", list(TIGHT))
def test_a_linear_net_settles_where_the_dense_quadratic_does_with_any_units_held(relaxer):
    """min 1/2 sum_l Pi_l |x_l - A_l x_{l-1} - b_l|^2 over the free units: one linear solve, for every relaxer."""
    net = chain(Plain)
    precisions = {"0": 0.7, "2": 1.5, "4": 1.0, "5": 0.8}
    learner = ebm.Learner(
        net, ebm.Algorithm(ebm.PredictiveCoding(precisions), relaxer=TIGHT[relaxer]), layers=["2", "4"]
    )
    masks, values = random_masks(3)
    start = [X, *(torch.zeros_like(v) for v in values[1:])]
    function = lambda s: energy(net, s, X, precisions.values())  # noqa: E731
    expected = newton(function, start, masks, values, steps=2)  # exact after one
    clamp = {name: (value, mask) for name, value, mask in zip(NAMES, values, masks, strict=True)}
    found = learner.relax(lambda: net(X), clamp=clamp)
    close(found.states, expected)
    assert list(found.states) == NAMES
    for state, value, mask in zip(found.states.values(), values, masks, strict=True):
        assert torch.equal(state[mask], value[mask])  # held exactly
    for name, error in zip(NAMES, terms(net, expected, X), strict=True):
        torch.testing.assert_close(found.errors[name], error.detach(), rtol=0, atol=1e-7)
        paid = 0.5 * precisions[name] * error.square().sum(1)
        torch.testing.assert_close(found.energies[name], paid.detach(), rtol=0, atol=1e-7)
        torch.testing.assert_close(found.states[name] - found.predictions[name], found.errors[name])
    torch.testing.assert_close(found.energy.sum(), function(expected).detach(), rtol=1e-9, atol=0)
    assert found.loss is None


@pytest.mark.parametrize("relaxer", list(TIGHT))
@pytest.mark.parametrize("nudge", [None, 0.4])
def test_a_nonlinear_net_settles_where_newton_does(relaxer, nudge):
    net = chain(nn.Tanh)
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=TIGHT[relaxer]), layers=["2", "4"])
    masks, values = random_masks(4)
    loss = lambda out: (out - Y).pow(2).mul(0.5).sum(1).mean()  # noqa: E731

    def total(s):
        return energy(net, s, X) + (0 if nudge is None else nudge * len(X) * loss(s[3]))

    start = [state.detach() for state in forward_states(net, X)]
    expected = newton(total, start, masks, values)
    clamp = {name: (value, mask) for name, value, mask in zip(NAMES, values, masks, strict=True)}
    found = learner.relax(lambda: loss(net(X)), clamp=clamp, nudge=nudge)
    close(found.states, expected)
    torch.testing.assert_close(found.loss, loss(expected[3]).detach(), rtol=1e-7, atol=0)


def forward_states(net, x):
    one = net[2](net[1](x))
    two = net[4](net[3](one))
    return [x, one, two, net[5](two)]


class Skips(nn.Module):
    """Two ways from one state to the next, an input that is used twice, and an output read out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.inp, self.act, self.out = nn.Identity(), nn.Tanh(), nn.Linear(5, 3)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(4, 5)
        self.double()

    def forward(self, x):
        x = self.inp(x)
        h = self.act(self.a(x))
        return self.out(self.act(self.b(h) + self.c(x)) + h)


@pytest.mark.slow
@pytest.mark.parametrize("relaxer", ["errors", "states"])
def test_calls_of_one_module_have_a_name_each_and_skips_are_followed(relaxer):
    net = Skips()
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=TIGHT[relaxer]))
    image = torch.randn(6, 3, dtype=torch.float64)

    def function(s):
        x, h, k, o = s
        errors = x - X, h - torch.tanh(net.a(x)), k - torch.tanh(net.b(h) + net.c(x)), o - net.out(k + h)
        return sum(0.5 * e.square().sum() for e in errors)

    zeros = [torch.zeros(6, n, dtype=torch.float64) for n in (4, 5, 5, 3)]
    masks = [torch.zeros_like(z, dtype=torch.bool) for z in zeros]
    masks[2][:, [1, 2, 4]] = True
    masks[3][:] = True
    expected = newton(function, zeros, masks, [*zeros[:2], zeros[2] + 0.3, image])
    # One sample's value holds for all; the input carries a state as soon as it is named.
    shown = zeros[2][0] + 0.3
    held = {"act#1": (shown, torch.arange(5).remainder(3) > 0), "out": image, "inp": (X, masks[0])}
    found = learner.relax(lambda: net(X), clamp=held)
    assert list(found.states) == ["inp", "act", "act#1", "out"]
    for name, state in zip(found.states, expected, strict=True):
        torch.testing.assert_close(found.states[name], state, rtol=0, atol=1e-8)


def test_an_input_without_a_term_of_its_own_is_all_the_others_to_place():
    """Linear, the output held: the least-squares solution in the covariance of the errors above, in closed form."""
    net = chain(Plain, widths=(2, 5, 5, 3))
    learner = ebm.Learner(net, layers=["2", "4"])
    a, b, c = (net[k].weight.detach() for k in (1, 3, 5))
    data = torch.zeros(6, 2, dtype=torch.float64)
    offset = net(data).detach()
    covariance = torch.eye(3).double() + c @ c.T + c @ b @ b.T @ c.T
    slope, weight = c @ b @ a, torch.linalg.inv(covariance)
    flat = torch.linalg.solve(slope.T @ weight @ slope, slope.T @ weight @ (Y - offset).T).T
    relaxer = ebm.QuasiNewton(500, tol=1e-12)
    found = learner.relax(lambda: net(data), clamp={"5": Y}, free=["0"], relaxer=relaxer)
    torch.testing.assert_close(found.states["0"], flat, rtol=1e-7, atol=1e-7)
    by_default = learner.relax(lambda: net(data), clamp={"5": Y}, free=["0"])
    torch.testing.assert_close(
        by_default.states["0"], flat, rtol=0.05, atol=0.05
    )  # a slope of 1e-4, to a force of 1e-6
    assert torch.equal(found.energies["0"], torch.zeros(6, dtype=torch.float64))
    prior = torch.linalg.solve(slope.T @ weight @ slope + torch.eye(2).double(), slope.T @ weight @ (Y - offset).T).T
    held_by_prior = learner.relax(
        lambda: net(data), clamp={"5": Y, "0": (data, torch.zeros(6, 2, dtype=torch.bool))}, relaxer=relaxer
    )
    torch.testing.assert_close(held_by_prior.states["0"], prior, rtol=1e-7, atol=1e-7)


def test_a_hopfield_net_with_units_held_settles_where_sweeps_by_hand_do():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(500, tol=1e-13))
    mask = torch.arange(6) < 2
    shown = torch.full((6,), 0.7, dtype=torch.float64)
    inputs = torch.ones(6, 4, dtype=torch.float64)
    clamp = {"0": inputs, "2": (shown, mask), "5": Y}
    found = ebm.Learner(net, algorithm).relax(lambda: net(X), clamp=clamp)
    with torch.no_grad():
        one, two = torch.zeros(6, 6).double(), torch.zeros(6, 5).double()
        for _ in range(500):
            one = torch.where(mask, shown, torch.tanh(net[1](inputs) + two @ net[3].weight))
            two = torch.tanh(net[3](one) + Y @ net[5].weight)
    torch.testing.assert_close(found.states["2"], one, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.states["4"], two, rtol=0, atol=1e-9)
    assert torch.equal(found.states["5"], Y)
    module = ebm.Equilibrium(net, algorithm, clamp=clamp)
    assert torch.equal(module(X), Y)  # the output is what it is held at
    clamp.pop("5")
    free = ebm.Learner(net, algorithm).relax(lambda: net(X), clamp=clamp)
    torch.testing.assert_close(ebm.Equilibrium(net, algorithm, clamp=clamp)(X), net[5](free.states["4"]).detach())


def test_an_equilibrium_with_units_held_infers_what_the_module_returns():
    """Half of the output held, the other half inferred, for every input and as a function of the input."""
    net = chain(nn.Tanh)
    mask = torch.tensor([True, False, False])
    relaxer = ebm.ErrorCoordinates(2000, tol=1e-12)
    algorithm = ebm.algorithm("predictive-coding", relaxer=relaxer)
    module = ebm.Equilibrium(net, algorithm, layers=["2", "4"], clamp={"5": (Y, mask)})
    filled = module(X)
    found = ebm.Learner(net, algorithm, layers=["2", "4"]).relax(lambda: net(X), clamp={"5": (Y, mask)})
    torch.testing.assert_close(filled, found.states["5"])
    assert (filled[:, 1:] - net(X)[:, 1:]).abs().max() > 1e-2
    by_input = ebm.Equilibrium(net, algorithm, layers=["2", "4"], clamp=lambda x: {"5": (x[:, :3], mask)})
    for x in (X, X[:2] + 1):
        assert torch.equal(by_input(x)[:, 0], x[:, 0])
    torch.testing.assert_close(ebm.Equilibrium(net, algorithm, layers=["2", "4"], clamp={"0": X + 1})(X), net(X + 1))


def test_states_that_are_given_back_are_at_rest():
    net = chain(nn.Tanh)
    learner = ebm.Learner(net, layers=["2", "4"])
    first = learner.relax(lambda: net(X), clamp={"5": Y, "0": X})
    again = learner.relax(lambda: net(X), clamp=first.states)
    for name in NAMES:
        assert torch.equal(first.states[name], again.states[name])
    assert float(again.residual.max()) == 0
    assert again.status == "converged"


class Normed(nn.Module):
    """Buffers, random draws, a frozen layer, and gradients that are there already."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.act = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh()
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.drop(self.act(self.norm(self.first(x)))))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_relaxing_leaves_no_trace(frozen, grad):
    net, x = Normed(), X.float()
    net(x).sum().backward()
    net.first.requires_grad_(False)
    if frozen:
        net.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    flags = [p.requires_grad for p in net.parameters()]
    random = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        found = ebm.Learner(net).relax(lambda: net(x), clamp={"last": Y}, gradients=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.requires_grad for p in net.parameters()] == flags
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, grads[name])
    assert set(found.gradients) == set(grads)
    assert not any(state.requires_grad for state in found.states.values())
    assert net.training


def test_samples_come_first_wherever_the_network_has_them():
    """A recurrent state (T, B, F) is given out and taken back as (B, T, F)."""
    torch.manual_seed(0)

    class Over(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.act, self.out = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

        def forward(self, x):  # (B, T, F)
            return self.out(self.act(self.inner(x.movedim(1, 0)))).movedim(0, 1)

    net, x = Over().double(), torch.randn(6, 7, 4, dtype=torch.float64)
    learner = ebm.Learner(net, batch_size=6)
    found = learner.relax(lambda: net(x))
    assert found.states["act"].shape == (6, 7, 5)
    torch.testing.assert_close(found.states["act"], torch.tanh(net.inner(x)).detach())
    value = torch.randn(6, 7, 5, dtype=torch.float64)
    held = learner.relax(lambda: net(x), clamp={"act": value})
    assert torch.equal(held.states["act"], value)
    error = value - torch.tanh(net.inner(x)).detach()
    torch.testing.assert_close(held.energies["act"], 0.5 * error.square().sum((1, 2)))


def test_an_input_that_moves_is_not_the_data_that_the_loss_compares_with():
    """An autoencoder: the target is what the caller handed in, not the state that stands for it in the network."""
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)).double()

    def function(s):
        x, h = s
        errors = x - X, h - torch.tanh(net[1](x))
        return sum(0.5 * e.square().sum() for e in errors) + 0.5 * (net[3](h) - X).square().sum()

    shapes = (6, 4), (6, 3)
    nothing = [torch.zeros(s, dtype=torch.bool) for s in shapes]
    expected = newton(
        function, [X, torch.zeros(shapes[1]).double()], nothing, [torch.zeros(s).double() for s in shapes]
    )
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=TIGHT["errors"]), layers=["0", "2"])
    found = learner.relax(lambda: 0.5 * (net(X) - X).square().sum(1).mean(), nudge=ebm.OneSided(1.0))
    torch.testing.assert_close(found.states["0"], expected[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(found.states["2"], expected[1], rtol=0, atol=1e-8)


# Learning


def test_held_units_teach_the_gradient_of_the_energy_s_minimum():
    """d/dtheta min_x I is autograd's slope of I at Newton's states, held; under both reductions."""
    net = chain(nn.Tanh)
    masks, values = random_masks(5)
    expected = newton(lambda s: energy(net, s, X), [s.detach() for s in forward_states(net, X)], masks, values)
    clamp = {name: (value, mask) for name, value, mask in zip(NAMES, values, masks, strict=True)}
    for reduction, share in (("mean", 1 / 6), ("sum", 1.0)):
        learner = ebm.Learner(net, ebm.Algorithm(relaxer=TIGHT["errors"]), layers=["2", "4"], loss_reduction=reduction)
        net.zero_grad()
        value = learner.backward(lambda: net(X), clamp=clamp)
        least = share * energy(net, expected, X)
        true = torch.autograd.grad(least, list(net.parameters()))
        torch.testing.assert_close(value, least.detach(), rtol=1e-9, atol=0)
        for p, t in zip(net.parameters(), true, strict=True):
            torch.testing.assert_close(p.grad, t, rtol=0, atol=1e-8)
        assert learner.report["result"] in ("converged", "stalled")  # at rounding
    # And it is the slope of the minimum itself: the states move along, and do not count.
    direction = [torch.randn_like(p) for p in net.parameters()]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(net.parameters(), direction, strict=True):
                p += sign * 1e-4 * d
        least = learner.relax(lambda: net(X), clamp=clamp).energy.sum()
        ends.append(float(least))
        with torch.no_grad():
            for p, d in zip(net.parameters(), direction, strict=True):
                p -= sign * 1e-4 * d
    slope = sum(float((p.grad * d).sum()) for p, d in zip(net.parameters(), direction, strict=True))
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(slope, rel=1e-5)


def test_a_loss_under_a_clamp_is_that_of_the_equilibrium_under_the_clamp():
    """As the nudge goes to 0, to O(lambda^2) with both signs: d loss / dtheta through the units that are free."""
    net = chain(nn.Tanh)
    mask = torch.tensor([True, False, False, True, False])
    shown = torch.full((5,), 0.5, dtype=torch.float64)
    function = lambda: 0.5 * (net(X) - Y).square().sum(1).mean()  # noqa: E731

    def held_loss():
        """With units of x_1 held and all above at its prediction, the loss of the forward pass from there."""
        one = torch.where(mask, shown, net[2](net[1](X)))
        two = net[4](net[3](one))
        return 0.5 * (net[5](two) - Y).square().sum(1).mean()

    true = torch.autograd.grad(held_loss(), list(net.parameters()))
    errors = []
    for strength in (1e-1, 1e-2):
        algorithm = ebm.Algorithm(nudge=ebm.Centered(strength), relaxer=TIGHT["errors"])
        found = ebm.Learner(net, algorithm, layers=["2", "4"]).gradients(function, clamp={"2": (shown, mask)})
        errors.append(
            max(float((found[n] - t).abs().max()) for (n, _), t in zip(net.named_parameters(), true, strict=True))
        )
    assert errors[1] < 1e-4
    assert 50 < errors[0] / errors[1] < 200


def test_a_state_at_the_input_makes_predictive_coding_unsupervised():
    """Latents inferred, weights learned, by the ordinary update: the loss is the term of the image."""
    net = chain(nn.Tanh, widths=(2, 5, 5, 3))
    latent = torch.zeros(6, 2, dtype=torch.float64)
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=TIGHT["errors"]), layers=["0", "2", "4"])
    closure = lambda: 0.5 * (net(latent) - Y).square().sum(1).mean()  # noqa: E731

    def function(s):
        x, h, k = s
        errors = x - latent, h - net[2](net[1](x)), k - net[4](net[3](h)), Y - net[5](k)
        return sum(0.5 * e.square().sum() for e in errors)

    start = [s.detach() for s in forward_states(net, latent)[:3]]
    masks = [torch.zeros_like(s, dtype=torch.bool) for s in start]
    expected = newton(function, start, masks, start)
    true = torch.autograd.grad(function(expected) / 6, list(net.parameters()))
    for _ in range(3):  # the second time as traced code
        found = learner.gradients(closure)
        for (name, _), t in zip(net.named_parameters(), true, strict=True):
            torch.testing.assert_close(found[name], t, rtol=0, atol=1e-8)
    assert learner.report["layers"] == ["0", "2", "4"]
    assert "traced" in learner.report["kernels"]
    held = ebm.Learner(net, ebm.Algorithm(relaxer=TIGHT["errors"]), layers=["2", "4"])
    nothing = torch.zeros(2, dtype=torch.bool)
    same = held.gradients(lambda: net(latent), clamp={"5": Y, "0": (latent, nothing)})
    for name, t in found.items():  # the same by holding the output
        torch.testing.assert_close(same[name], t, rtol=0, atol=1e-8)
    table = str(ebm.summary(net, latent, layers=["0", "2", "4"]))
    assert "input" in table.splitlines()[3]


# Refusals


def test_what_cannot_be_held_is_an_error_that_says_what_can():
    net = chain(nn.Tanh)
    learner = ebm.Learner(net, layers=["2", "4"])
    run = lambda: net(X)  # noqa: E731
    wrong = [
        ({"02": Y}, r"no layer '02'.*Did you mean '2'.*\['2', '4'\]"),
        ({"3": torch.zeros(6, 5)}, r"no layer '3'.*layers="),
        ({"5": Y[:4]}, r"'5'.*shape \(4, 3\).*\(6, 3\)"),
        ({"5": (Y, torch.ones(6, 3))}, "torch.bool"),
        ({"5": (Y, torch.ones(6, 2, dtype=torch.bool))}, r"mask has shape \(6, 2\)"),
        ({"5": Y / 0}, r"nan or inf.*isnan"),
        ({"5": 1.0}, "expected a tensor"),
        ([("5", Y)], "layer name"),
    ]
    for clamp, message in wrong:
        with pytest.raises(ebm.ConfigurationError, match=message):
            learner.relax(run, clamp=clamp)
    with pytest.raises(ebm.ConfigurationError, match=r"'1'.*Inputs"):
        learner.relax(run, free=["1"])
    with pytest.raises(ebm.ConfigurationError, match="finds no equilibrium"):
        learner.relax(run, relaxer=ebm.Sweep())
    with pytest.raises(ebm.ConfigurationError, match="real number"):
        learner.relax(lambda: net(X).sum(), nudge=1j)
    with pytest.raises(ebm.ConfigurationError, match="loss"):
        learner.relax(run, nudge=0.1)
    with pytest.raises(ebm.ConfigurationError, match="linear in it"):
        ebm.Learner(net, "equilibrium-propagation").relax(run, free=["0"])
    with pytest.raises(ebm.ConfigurationError, match=r"no loss.*lower bound"):
        ebm.Learner(net, "equilibrium-propagation").backward(run, clamp={"5": Y})
    with pytest.raises(ebm.ConfigurationError, match="something else than equilibria"):
        ebm.Learner(net, "zero-divergence").backward(lambda: net(X).sum(), clamp={"2": torch.zeros(5)})
    with pytest.raises(ebm.ConfigurationError, match="no term"):
        learner.backward(run, clamp={"4": torch.zeros(5)})  # of the last weights, which nothing holds


@pytest.mark.parametrize("preset", ebm.algorithms())
def test_every_preset_shows_its_states(preset):
    """Where the algorithm's own relaxer finds no equilibrium another one does."""
    net = chain(nn.Tanh, gain=0.4)
    found = ebm.Learner(net, preset, layers=["2", "4"]).relax(
        lambda: net(X), clamp={"5": Y, "2": (X[:, :1].expand(6, 5), X[:, :1].expand(6, 5) > 0)}
    )
    assert list(found.states) == ["2", "4", "5"]
    assert torch.equal(found.states["5"], Y)
    assert float(found.residual.max()) < 0.5 or found.status == "fixed"  # as many steps as published


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_held_feels_no_force_so_that_the_rest_can_settle(masked):
    """The residual is of what is free. A held unit is pulled for ever: counted in, nothing would ever have settled."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, value = torch.randn(6, 3, dtype=torch.float64), torch.full((6, 4), 0.3, dtype=torch.float64)
    held = (value, torch.arange(4) < 2) if masked else value
    learner = ebm.Learner(net, "predictive-coding")
    relaxer = ebm.GradientDescent(0.3, 4000, tol=1e-8)
    found = learner.relax(lambda: net(x), clamp={"3": held}, relaxer=relaxer)
    assert found.status == "converged"
    assert float(found.residual.max()) <= 1e-8
    count = 2 if masked else 4
    assert torch.equal(found.states["3"][:, :count], value[:, :count])
    assert float(found.errors["3"][:, :count].abs().min()) > 1e-3  # where it is held it is pulled


QUESTIONS = {
    "a name that is none": lambda asked: asked(clamp={1: torch.ones(4)}),
    "no mapping": lambda asked: asked(clamp=3),
    "an imaginary part": lambda asked: asked(clamp={"2": torch.ones(4, dtype=torch.complex64)}),
    "no numbers": lambda asked: asked(clamp={"2": torch.ones(4, device="meta")}),
    "free letters": lambda asked: asked(free="0"),
    "free numbers": lambda asked: asked(free=[0]),
    "free of nothing": lambda asked: asked(free=None),
    "a free name that carries no state": lambda asked: asked(free=["nope"]),
}


@pytest.mark.parametrize("kind", QUESTIONS)
@pytest.mark.parametrize("way", ["relax", "spectrum", "free_phase", "Equilibrium"])
def test_questions_check_what_they_are_given(way, kind):
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    learner, x = ebm.Learner(net), torch.randn(6, 3)

    def asked(**given):
        if way == "Equilibrium":
            ebm.Equilibrium(net, "predictive-coding", **given)(x)
        elif way == "free_phase":
            with learner.free_phase(lambda: net(x), **given):
                pass
        else:
            getattr(learner, way)(lambda: net(x), **given)

    with pytest.raises(ebm.ConfigurationError, match="clamp" if kind in list(QUESTIONS)[:4] else "free"):
        QUESTIONS[kind](asked)


@pytest.mark.parametrize("nudge", [float("nan"), float("inf"), True, "0.1", 1j, [0.1], 1e39, ebm.OneSided])
def test_a_nudge_that_is_no_number_is_refused(nudge):
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    for ask in (ebm.Learner(net).relax, ebm.Learner(net).spectrum):
        with pytest.raises(ebm.ConfigurationError, match="nudge="):
            ask(lambda: net(x).square().mean(), nudge=nudge)


@pytest.mark.parametrize("given", [{"relaxer": "fast"}, {"relaxer": 3}, {"gradients": "yes"}])
def test_other_arguments_of_relax(given):
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    with pytest.raises(ebm.ConfigurationError, match=next(iter(given))):
        ebm.Learner(net).relax(lambda: net(x), **given)


def test_a_clamp_that_is_no_function_of_the_inputs():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    for found in (None, 3, {"1": "ones"}):
        with pytest.raises(ebm.ConfigurationError, match="clamp"):
            ebm.Equilibrium(net, "predictive-coding", clamp=lambda x, found=found: found)(x)


def test_calls_of_an_input_are_freed_one_by_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.a, self.b = nn.Identity(), nn.Linear(2, 4).double(), nn.Linear(4, 3).double()

        def forward(self, left, right):
            return self.b(torch.tanh(self.a(self.input(left)) + self.a(self.input(right))))

    net = Twice()
    left, right, target = (torch.randn(5, n).double() for n in (2, 2, 3))
    nowhere = torch.zeros(2, dtype=torch.bool)

    def paid(*free):
        clamp = {"b": target, "input": (left, nowhere), "input#1": (right, nowhere)}
        relaxed = ebm.Learner(net, layers=["a", "b"]).relax(lambda: net(left, right), clamp=clamp, free=list(free))
        return [float(relaxed.errors[name].norm()) for name in ("input", "input#1")]

    # The net sees the sum of both alone: where one moves for free, the other, which would pay, stays where it is.
    assert min(paid()) > 1e-3
    assert paid("input") == pytest.approx([paid("input")[0], 0.0], abs=1e-5)
    assert paid("input#1") == pytest.approx([0.0, paid("input#1")[1]], abs=1e-5)
    assert min(max(paid("input")), max(paid("input#1"))) > 1e-3
