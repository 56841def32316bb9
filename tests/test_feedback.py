"""Feedback that is not the transpose, against states, forces and updates written out by hand with B in place of W'."""

import itertools

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.evaluations import Asymmetry
from lightning_ebm.relaxers import Wrapper

SIZES = (5, 7, 6, 4)


def network(act=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    parts = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        parts += [nn.Linear(fan_in, fan_out), act()]
    return nn.Sequential(*parts[:-1]).double()


def batch(seed=1, count=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, SIZES[0], generator=g, dtype=torch.float64)
    return x, torch.randn(count, SIZES[-1], generator=g, dtype=torch.float64)


def closure(net, x, y):
    return lambda: 0.5 * (net(x) - y).square().sum(1).mean()


class ByHand:
    """Two hidden layers of tanh and a linear read-out, every slope written out; B has the shape of W, (out, in)."""

    def __init__(self, net, x, y, feedback=None):
        self.w = [net[k].weight.detach() for k in (0, 2, 4)]
        self.b = [net[k].bias.detach() for k in (0, 2, 4)]
        self.x, self.y = x, y
        self.back = {1: self.w[1], 2: self.w[2]} if feedback is None else feedback  # of the second and the third

    def predicted(self, states):
        below = [self.x, *states]
        return [torch.tanh(h @ w.T + b) for h, w, b in zip(below, self.w[:2], self.b[:2], strict=False)]

    def forward(self):
        first = torch.tanh(self.x @ self.w[0].T + self.b[0])
        return [first, torch.tanh(first @ self.w[1].T + self.b[1])]

    def output(self, last):
        return last @ self.w[2].T + self.b[2]

    def forces(self, states, strength):
        (x1, x2), (mu1, mu2) = states, self.predicted(states)
        e1, e2 = x1 - mu1, x2 - mu2
        return [
            e1 - (e2 * (1 - mu2**2)) @ self.back[1],
            e2 + strength * (self.output(x2) - self.y) @ self.back[2],
        ]

    def relaxed(self, strength, lr, steps):
        states = self.forward()
        for _ in range(steps):
            states = [x - lr * f for x, f in zip(states, self.forces(states, strength), strict=True)]
        return states

    def local(self, deltas, below, output_error, strength=1.0):
        """Updates from what each layer has at its drive, averaged over the batch."""
        found = {}
        for k, (delta, h) in enumerate(zip([*deltas, output_error], below, strict=True)):
            found[f"{2 * k}.weight"] = delta.T @ h / len(self.x) / strength
            found[f"{2 * k}.bias"] = delta.mean(0) / strength
        return found

    def update(self, states, strength):
        """1/lambda dE/dtheta: a layer's error times the slope of its activation, times what is below it."""
        mus = self.predicted(states)
        deltas = [-(x - mu) * (1 - mu**2) for x, mu in zip(states, mus, strict=True)]
        error = strength * (self.output(states[1]) - self.y)
        return self.local(deltas, [self.x, *states], error, strength)

    def feedback_alignment(self):
        """Backprop with B in place of W: Lillicrap et al. 2016."""
        h1, h2 = self.forward()
        error = self.output(h2) - self.y
        d2 = (error @ self.back[2]) * (1 - h2**2)
        d1 = (d2 @ self.back[1]) * (1 - h1**2)
        return self.local([d1, d2], [self.x, h1, h2], error)


def operators(relaxer, order=("3", "loss")):
    """B in the shape (out, in), from what the relaxer holds, (in, out)."""
    return {k: relaxer.operators[name].T for k, name in zip((1, 2), order, strict=True)}


def same(found, expected, tol=1e-12):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tol, atol=tol)


def apart(found, expected):
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("inner", [ebm.Sweep(), ebm.FixedPrediction(max_steps=20, tol=0.0)])
def test_a_sweep_and_fixed_predictions_are_feedback_alignment(inner, capture):
    net, (x, y) = network(), batch()
    relaxer = ebm.Feedback(inner, ebm.RandomFeedback(seed=3))
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=relaxer, nudge=ebm.OneSided(0.3)), capture=capture)
    for _ in range(3):  # the first the plain way, then by code
        found = learner.gradients(closure(net, x, y))
    hand = ByHand(net, x, y, operators(relaxer))
    same(found, hand.feedback_alignment())
    assert apart(found, ByHand(net, x, y).feedback_alignment()) > 0.3  # and not backprop
    if capture:
        assert learner.report["kernels"].startswith("traced")


@pytest.mark.parametrize("capture", [False, True])
def test_predictive_coding_relaxes_on_the_forces_written_by_hand(capture):
    net, (x, y) = network(), batch()
    relaxer = ebm.Feedback(ebm.GradientDescent(0.2, 15), ebm.RandomFeedback(seed=5))
    algorithm = ebm.Algorithm(nudge=ebm.OneSided(0.8), relaxer=relaxer)
    learner = ebm.Learner(net, algorithm, capture=capture)
    for _ in range(3):
        found = learner.gradients(closure(net, x, y))
    hand = ByHand(net, x, y, operators(relaxer))
    same(found, hand.update(hand.relaxed(0.8, 0.2, 15), 0.8))
    plain = ByHand(net, x, y)
    assert apart(found, plain.update(plain.relaxed(0.8, 0.2, 15), 0.8)) > 0.3


def test_the_transpose_as_operator_changes_nothing():
    net, (x, y) = network(), batch()
    for inner in (ebm.GradientDescent(0.2, 15), ebm.ErrorCoordinates(10, 0.5, tol=0.0), ebm.Sweep()):
        algorithms = [
            ebm.Algorithm(nudge=ebm.OneSided(0.8), relaxer=r) for r in (inner, ebm.Feedback(inner, ebm.Mismatch(0.0)))
        ]
        plain, fed = (ebm.Learner(net, a).gradients(closure(net, x, y)) for a in algorithms)
        same(fed, plain)


class Hopfield:
    """The states of a Hopfield net with hard sigmoids, best responses with B in place of W'."""

    def __init__(self, net, x, y, feedback):
        self.w = [net[k].weight.detach() for k in (0, 2, 4)]
        self.b = [net[k].bias.detach() for k in (0, 2, 4)]
        self.x, self.y, self.back = x, y, feedback

    def relaxed(self, strength, start, sweeps):
        x1, x2, x3 = (s.clone() for s in start)
        for _ in range(sweeps):
            x1n = (self.x @ self.w[0].T + self.b[0] + x2 @ self.back[1]).clamp(0, 1)
            x3n = (x2 @ self.w[2].T + self.b[2] - strength * (x3 - self.y)).clamp(0, 1)
            x2n = (x1n @ self.w[1].T + self.b[1] + x3n @ self.back[2]).clamp(0, 1)
            x1, x2, x3 = x1n, x2n, x3n
        return [x1, x2, x3]

    def local(self, states):
        """dE/dtheta = -post pre'."""
        below = [self.x, *states]
        found = {}
        for k, (h, s) in enumerate(zip(below, states, strict=False)):
            found[f"{2 * k}.weight"] = -s.T @ h / len(self.x)
            found[f"{2 * k}.bias"] = -s.mean(0)
        return found


def test_equilibrium_propagation_with_asymmetric_weights_is_the_vector_field_rule_by_hand():
    torch.manual_seed(0)
    parts = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        parts += [nn.Linear(fan_in, fan_out), nn.Hardtanh(0, 1)]
    net, (x, y) = nn.Sequential(*parts).double(), batch()
    relaxer = ebm.Feedback(ebm.FixedPoint(60), ebm.RandomFeedback(0.7, seed=2))
    algorithm = ebm.Algorithm(ebm.Hopfield(), ebm.Centered(0.4), relaxer)
    learner = ebm.Learner(net, algorithm, output="state")
    found = learner.gradients(closure(net, x, y))
    hand = Hopfield(net, x, y, operators(relaxer, ("3", "5")))
    free = hand.relaxed(0.0, [torch.zeros(8, n, dtype=torch.float64) for n in SIZES[1:]], 200)
    plus, minus = (hand.local(hand.relaxed(s, free, 200)) for s in (0.4, -0.4))
    same(found, {n: (plus[n] - minus[n]) / 0.8 for n in plus}, 1e-9)


def test_contrastive_hebbian_learning_with_its_own_feedback_is_the_clamp_by_hand():
    """Xie and Seung's contrast, gamma^(l-L) [x x' free - x x' clamped], with gamma B in the place of gamma W'."""
    torch.manual_seed(0)
    parts = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        parts += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    net, (x, y), gamma = nn.Sequential(*parts).double(), batch(), 0.3
    relaxer = ebm.Feedback(ebm.FixedPoint(100), ebm.RandomFeedback(0.7, seed=2))
    algorithm = ebm.algorithm("contrastive-hebbian", energy=ebm.Hopfield(gamma), relaxer=relaxer)
    found = ebm.Learner(net, algorithm).gradients(closure(net, x, y))
    w, b = ([getattr(net[k], name).detach() for k in (0, 2, 4)] for name in ("weight", "bias"))
    back = operators(relaxer, ("3", "5"))

    def settled(held=None):
        x2, x3 = torch.zeros(8, 6).double(), torch.zeros(8, 4).double() if held is None else held
        for _ in range(300):
            x1 = torch.tanh(x @ w[0].T + b[0] + gamma * x2 @ back[1])
            x2 = torch.tanh(x1 @ w[1].T + b[1] + gamma * x3 @ back[2])
            x3 = torch.tanh(x2 @ w[2].T + b[2]) if held is None else held
        return [x1, x2, x3]

    free = settled()
    clamped = settled(y)  # o - dL/do of half a squared error
    for k in range(3):
        share = gamma ** (k - 2) / len(x)
        hebb = [side[k].T @ (x if k == 0 else side[k - 1]) for side in (free, clamped)]
        assert torch.allclose(found[f"{2 * k}.weight"], share * (hebb[0] - hebb[1]), rtol=1e-9, atol=1e-12)
        assert torch.allclose(found[f"{2 * k}.bias"], share * (free[k] - clamped[k]).sum(0), rtol=1e-9, atol=1e-12)


def test_kolen_pollack_is_the_loop_by_hand_and_comes_to_the_transpose():
    net, (x, y) = network(), batch()
    lr, decay, steps = 0.05, 0.2, 120
    relaxer = ebm.Feedback(ebm.Sweep(), ebm.KolenPollack(decay=lr * decay, seed=4))
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=relaxer))
    optimizer = torch.optim.SGD(net.parameters(), lr, weight_decay=decay)
    learner.gradients(closure(net, x, y))
    back, start = operators(relaxer), ByHand(net, x, y)
    first = (back[1] - net[2].weight).norm().item()
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(steps):
        learner.step(closure(net, x, y), optimizer)
        start.w = [params[f"{2 * k}.weight"] for k in range(3)]
        start.b = [params[f"{2 * k}.bias"] for k in range(3)]
        start.back = back
        steps_of = start.feedback_alignment()
        params = {n: p - lr * (steps_of[n] + decay * p) for n, p in params.items()}
        back = {k: b - lr * (steps_of[f"{2 * k}.weight"] + decay * b) for k, b in back.items()}
    same(dict(net.named_parameters()), params, 1e-10)
    learner.gradients(closure(net, x, y))  # sees the last step
    for k, operator in operators(relaxer).items():
        torch.testing.assert_close(operator, back[k], rtol=1e-10, atol=1e-12)
    last = (operators(relaxer)[1] - net[2].weight).norm().item()
    assert last / first == pytest.approx((1 - lr * decay) ** steps, rel=1e-9)


def test_operators_come_back_from_a_checkpoint():
    net, (x, y) = network(), batch()

    def made():
        return ebm.Learner(net, ebm.Algorithm(relaxer=ebm.Feedback(ebm.Sweep(), ebm.KolenPollack(decay=0.1))))

    one, optimizer = made(), torch.optim.SGD(net.parameters(), 0.1, weight_decay=1.0)
    for _ in range(3):
        one.step(closure(net, x, y), optimizer)
    other = made()
    other.load_state_dict(one.state_dict())
    same(other.gradients(closure(net, x, y)), one.gradients(closure(net, x, y)), 0.0)
    assert apart(made().gradients(closure(net, x, y)), one.gradients(closure(net, x, y))) > 0.01


class Skip(nn.Module):
    """A convolution, a fixed pooling, and a layer that reads two states."""

    def __init__(self):
        super().__init__()
        self.conv, self.act0 = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()
        self.conv1, self.act1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Tanh()
        self.a, self.b, self.act2 = nn.Linear(27, 4), nn.Linear(27, 4, bias=False), nn.Tanh()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        h0 = self.act0(self.conv(x))
        h1 = self.act1(self.conv1(h0))
        pooled = F.avg_pool2d(h1, 2).flatten(1), F.avg_pool2d(h0, 2).flatten(1)
        return self.out(self.act2(self.a(pooled[0]) + self.b(pooled[1])))


def test_convolutions_pooling_and_skips_are_backprop_with_the_weights_of_another_net():
    """Feedback alignment by autograd: a product whose slope comes from a net with other weights."""
    torch.manual_seed(0)
    net = Skip().double()
    x, y = torch.randn(6, 2, 6, 6).double(), torch.randn(6, 3).double()
    relaxer = ebm.Feedback(ebm.Sweep(), ebm.RandomFeedback(seed=1))
    found = ebm.Learner(net, ebm.Algorithm(relaxer=relaxer)).gradients(closure(net, x, y))
    assert set(relaxer.operators) == {"act1", "act2", "act2#1", "loss"}
    by_shape = {name: (o if o.ndim == 4 else o.T) for name, o in relaxer.operators.items()}
    fresh = lambda t: t.detach().requires_grad_()  # noqa: E731
    # by hand, from the top down, each Jacobian that of a product with the operator
    h0 = net.act0(net.conv(x)).detach()
    h1 = net.act1(net.conv1(h0)).detach()
    pooled = F.avg_pool2d(h1, 2).flatten(1), F.avg_pool2d(h0, 2).flatten(1)
    a2 = net.a(pooled[0]) + net.b(pooled[1])
    h2 = net.act2(a2).detach()
    error = (net.out(h2) - y).detach() / 6
    d2 = (error @ by_shape["loss"]) * (1 - h2**2)
    both = []
    for left in (("act2", "act2#1"), ("act2#1", "act2")):  # which is whose is told by the shapes of neither
        probe1, probe0 = fresh(h1), fresh(h0)
        to1 = F.avg_pool2d(probe1, 2).flatten(1) @ by_shape[left[0]].T
        to0 = F.avg_pool2d(probe0, 2).flatten(1) @ by_shape[left[1]].T
        g1, g0 = torch.autograd.grad((d2 * (to1 + to0)).sum(), (probe1, probe0))
        d1 = (g1 * (1 - h1**2)).detach()
        probe = fresh(h0)
        (more,) = torch.autograd.grad((F.conv2d(probe, by_shape["act1"], padding=1) * d1).sum(), probe)
        d0 = (g0 + more) * (1 - h0**2)
        kernel = fresh(net.conv.weight)
        (expected,) = torch.autograd.grad((F.conv2d(x, kernel, net.conv.bias, padding=1) * d0.detach()).sum(), kernel)
        both.append(float((found["conv.weight"] - expected).norm() / expected.norm()))
    assert min(both) < 1e-12 < 1e-3 < max(both)


def test_networks_whose_feedback_does_not_stop_at_a_layer_are_refused_by_name():
    x, y = batch()

    class Gram(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.act1, self.out = nn.Linear(5, 4), nn.Tanh(), nn.Tanh(), nn.Linear(4, 4)

        def forward(self, x):
            h = self.act(self.a(x))
            return self.out(self.act1(torch.bmm(h[:, :, None], h[:, None]).sum(1)))

    one, two = [nn.Linear(5, 4), nn.Tanh()], [nn.Linear(4, 4), nn.Linear(4, 4)]
    cases = [
        (nn.Sequential(*one, *two, nn.Tanh(), nn.Linear(4, 4)), ["1", "4"], "'4' has two products with weights in a"),
        (Gram(), ["act", "act1"], "'act1' multiplies states by states"),
        (nn.Sequential(*one, *two), ["1"], "loss computes .* in a row"),
    ]
    for net, layers, message in cases:
        net = net.double()
        learner = ebm.Learner(net, ebm.Algorithm(relaxer=ebm.Feedback(ebm.Sweep())), layers=layers, output="readout")
        with pytest.raises(ebm.UnsupportedModuleError, match=message):
            learner.gradients(closure(net, x, y))


def test_relaxers_and_nudges_that_need_a_slope_are_refused():
    for relaxer in (
        ebm.ErrorCoordinates(),
        ebm.QuasiNewton(),
        ebm.GradientDescent(0.1, 9, tol=1e-3),
        ebm.AcceleratedFixedPoint(),
        ebm.AugmentedLagrangian(),
    ):
        with pytest.raises(ebm.ConfigurationError, match="finds its steps by the energy"):
            ebm.Feedback(relaxer)
    with pytest.raises(ebm.ConfigurationError, match="finite nudge"):
        ebm.Algorithm(ebm.PredictiveCoding(), ebm.Infinitesimal(), ebm.Feedback(ebm.GradientDescent(0.1, 5)))
    with pytest.raises(ebm.ConfigurationError, match="share from 0"):
        ebm.KolenPollack(decay=1.5)


def test_alignment_is_logged_as_ever_and_is_that_of_the_rule_by_hand(tmp_path):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            return 0.5 * (self.net(batch[0]) - batch[1]).square().sum(1).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    module, data = Module(), batch()
    relaxer = ebm.Feedback(ebm.Sweep(), ebm.RandomFeedback(seed=3))
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(ebm.Algorithm(relaxer=relaxer)), max_steps=1, accelerator="cpu", devices=1,
        callbacks=[ebm.GradientAlignment(1)], logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, precision="64-true", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 8))
    found = ByHand(module.net, *data, operators(relaxer, ("net.3", "loss"))).feedback_alignment()
    true = ByHand(module.net, *data).feedback_alignment()
    one, other = (torch.cat([g.flatten() for g in grads.values()]) for grads in (found, true))
    cosine = float(torch.cosine_similarity(one, other, dim=0))
    assert cosine < 0.95
    assert float(trainer.callback_metrics["alignment/cosine"]) == pytest.approx(cosine, rel=1e-6)


def test_the_asymmetry_is_that_of_the_jacobian_of_the_forces_and_its_slope_too():
    """Against a dense Jacobian of the forces by hand; s^2 averages to |J - J'|^2 over the noise."""
    net, (x, y) = network(), batch(count=3)
    back = {1: torch.randn(6, 7).double().requires_grad_(), 2: torch.randn(4, 6).double().requires_grad_()}
    states = [s + 0.1 for s in ByHand(net, x, y, back).forward()]
    u, v = torch.randn(2, 3, 13).double()
    expected = 0.0
    for b in range(3):  # samples do not see each other
        hand = ByHand(net, x[b : b + 1], y[b : b + 1], back)
        flat = torch.cat([s[b] for s in states])
        jacobian = torch.autograd.functional.jacobian(
            lambda f, hand=hand: torch.cat(hand.forces([f[None, :7], f[None, 7:]], 0.0), 1)[0], flat, create_graph=True
        )
        expected = expected + 0.5 * (u[b] @ (jacobian - jacobian.T) @ v[b]) ** 2
    slopes = torch.autograd.grad(expected, back[1])[0]
    learner = ebm.Learner(net, "predictive-coding", capture=False)
    seen = {}

    class Asks(Wrapper):
        def in_front(self, landscape):
            operators = [back[1].detach().T, back[2].detach().T]
            point = [*states, *torch.split(u, [7, 6], 1), *torch.split(v, [7, 6], 1), *operators]
            seen["found"] = landscape.evaluate(Asymmetry(2), point, 0.0)
            return landscape

    learner.relax(closure(net, x, y), nudge=0.5, relaxer=Asks(ebm.GradientDescent(0.1, 1)))
    value, slope, _ = seen["found"]
    torch.testing.assert_close(value, expected.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(slope.T, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("act", [nn.Identity, nn.Tanh])
def test_homeostasis_makes_feedback_the_transpose_without_a_decay(act):
    net, (x, y) = network(act), batch(count=64)
    relaxer = ebm.Feedback(ebm.GradientDescent(0.1, 5), ebm.JacobianHomeostasis(lr=0.1, seed=4))
    learner = ebm.Learner(net, ebm.Algorithm(relaxer=relaxer), layers=["1", "3"])
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    misses, asymmetries = [], []
    for _ in range(150):
        learner.step(closure(net, x, y), optimizer)
        misses.append((relaxer.operators["3"].T - net[2].weight.detach()).norm().item())
        asymmetries.append(relaxer.asymmetry.item())
    assert misses[-1] < 0.1 * misses[0]
    assert asymmetries[-1] < 0.05 * asymmetries[0]


def test_homeostasis_never_leads_away_from_the_transpose_whatever_the_width():
    """Of many units and few samples a fixed step of 0.1 made operators grow without bound."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2)).double()
    x, y = batch(count=6)
    x, y = x[:, :4], y[:, :2]
    relaxer = ebm.Feedback(ebm.FixedPoint(5), ebm.JacobianHomeostasis())
    learner = ebm.Learner(net, ebm.Algorithm(ebm.Hopfield(0.5), ebm.OneSided(0.1), relaxer))
    optimizer = torch.optim.SGD(net.parameters(), 1e-12)  # which has to move them, as that is when operators do
    learner.step(closure(net, x, y), optimizer)
    readout, misses = relaxer.operators["loss"].clone(), []
    for _ in range(40):
        learner.step(closure(net, x, y), optimizer)
        misses.append((relaxer.operators["3"].T - net[2].weight.detach()).norm().item())
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(misses))
    assert misses[-1] < 0.9 * misses[0]
    assert torch.equal(relaxer.operators["loss"], readout)
