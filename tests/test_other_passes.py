"""Beside the one pass: writes that autograd does not see, other threads, iterators, generators, buffers."""

import itertools
import threading

import numpy as np
import pytest
import torch
from test_other_gradients import EXACT, FINITE, Net, X, Y, farthest, fit
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm


class GaussianLoss(Net):
    """torch's own loss clamps a copy of the variance while gradients are off."""

    def training_step(self, batch, index):
        mean, variance, _ = self.net(batch[0]).unbind(1)
        return F.gaussian_nll_loss(mean, batch[0][:, 0], 0.1 * variance.exp(), eps=0.1)


class Clamped(Net):
    """A straight-through clamp and a scale between two layers."""

    def training_step(self, batch, index):
        hidden = 2.0 * self.net[:2](batch[0])
        with torch.no_grad():
            hidden.clamp_(-0.5, 0.7).mul_(hidden.abs() + 0.1)
        return F.cross_entropy(self.net[2:](hidden), batch[1])


@pytest.mark.parametrize("make", [GaussianLoss, Clamped])
@pytest.mark.parametrize("capture", [True, False])
def test_writes_that_autograd_does_not_see_keep_their_slope(make, capture):
    stock = fit(make)
    assert farthest(stock, fit(make, ebm.EBMStrategy(EXACT, capture=capture))) < 1e-12


def test_they_are_repeated_at_other_states():
    """pc-nudge tends to autograd's gradient with the nudge, and code is the plain way."""
    module = Clamped()
    batch = X[:8], Y[:8]

    def off(strength, capture):
        algorithm = ebm.algorithm("error-pc", nudge=ebm.OneSided(strength), relaxer=ebm.ErrorCoordinates(30))
        learner = ebm.Learner(module, algorithm, capture=capture)
        for _ in range(2):
            found = learner.gradients(lambda: module.training_step(batch, 0))
        wanted = torch.autograd.grad(module.training_step(batch, 0), list(module.parameters()))
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found.values(), wanted, strict=True))

    one, other = off(1e-3, True), off(1e-4, True)
    assert 8 < one / other < 12
    assert abs(off(1e-3, False) - one) < 1e-9


def test_a_module_may_be_called_by_another_thread_while_a_step_is_recorded():
    module = Net()
    net = module.net
    wanted = net(X).detach()
    learner = ebm.Learner(net, EXACT)
    errors, stop = [], threading.Event()

    def serve():
        while not stop.is_set():
            try:
                if not torch.equal(net(X), wanted):
                    errors.append("differs")
            except Exception as error:
                errors.append(repr(error))

    thread = threading.Thread(target=serve)
    thread.start()
    found = [learner.gradients(lambda: F.cross_entropy(net(X), Y)) for _ in range(20)]
    stop.set()
    thread.join()
    assert not errors
    true = torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.parameters()))
    for one in found:
        for a, b in zip(one.values(), true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


class Drawing(Net):
    source = staticmethod(itertools.count)

    def __init__(self):
        super().__init__()
        self.held, self.seen = type(self).source(), []

    def training_step(self, batch, index):
        self.seen.append(self.draw())
        return self.loss(batch)

    def draw(self):
        return next(self.held)


class OfGenerator(Drawing):
    source = staticmethod(lambda: (k for k in range(100)))


class OfNumPy(Drawing):
    source = staticmethod(lambda: np.random.RandomState(0))

    def draw(self):
        return self.held.rand()


@pytest.mark.parametrize("make", [Drawing, OfGenerator])
def test_an_iterator_is_not_drawn_from_twice(make):
    stock = fit(make)
    assert fit(make, ebm.EBMStrategy(FINITE)).seen == stock.seen
    module = make()
    held = module.held
    with pytest.raises(ebm.UnsupportedModuleError, match="'held'"):
        fit(lambda: module, ebm.EBMStrategy("equilibrium-propagation"))
    assert module.held is held
    assert next(held) == 0


def test_generators_of_numpy_go_on_as_under_stock():
    assert fit(OfNumPy, ebm.EBMStrategy("equilibrium-propagation")).seen == fit(OfNumPy).seen


def test_an_operation_without_a_second_derivative_is_named():
    net = Net().net
    net[1], net[3] = nn.Hardsigmoid(), nn.Hardsigmoid()
    learner = ebm.Learner(net, "infinitesimal")
    with pytest.raises(ebm.UnsupportedModuleError, match=r"hardsigmoid_backward.*nn\.Hardtanh"):
        learner.gradients(lambda: F.cross_entropy(net(X), Y))


@pytest.mark.parametrize("operation", ["hardsigmoid", "cdist"])
def test_a_spectrum_that_needs_one_names_it_too(operation):
    net = Net().net
    if operation == "hardsigmoid":
        net[1], net[3] = nn.Hardsigmoid(), nn.Hardsigmoid()
    others = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ebm.UnsupportedModuleError, match=rf"\(\S*{operation}_backward\).*eigenvalues"):
        ebm.Learner(net).spectrum(lambda: torch.cdist(net(X), others).mean(1).square().mean(), nudge=1.0)


def test_nan_that_the_step_makes_is_not_the_fault_of_the_buffers_it_spoils():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(6).double())

        def training_step(self, batch, index):
            return F.cross_entropy(self.net((batch[0] - 9).log()), batch[1])

    with pytest.raises(ebm.RelaxationDivergedError, match=r"The loss of the forward pass is nan"):
        fit(Normed, ebm.EBMStrategy(FINITE))


class Sign(torch.autograd.Function):
    """A step with a surrogate slope, as in binary and spiking networks."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class Quantized(nn.Module):
    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).double()


class Binary(nn.Module):
    def forward(self, x):
        return Sign.apply(x)


class Written(nn.Module):
    """The remedy of the message."""

    def forward(self, x):
        return x + ((x / 0.1).round() * 0.1 - x).detach()


@pytest.mark.parametrize("part", [Binary, Quantized])
@pytest.mark.parametrize("strength", [1e-4, 1e-6])
def test_forces_that_are_not_the_slope_of_the_energy_are_refused_with_the_remedy(part, strength):
    net = nn.Sequential(nn.Linear(4, 10), part(), nn.Linear(10, 8), part(), nn.Linear(8, 3)).double()
    layers = ["0", "2"]  # what is quantized is the state
    closure = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    wanted = torch.autograd.grad(closure(), list(net.parameters()))
    exact = ebm.Learner(net, EXACT, layers=layers).gradients(closure)
    for a, b in zip(exact.values(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # quantized in 32 bits
    learner = ebm.Learner(net, ebm.algorithm("pc-nudge", nudge=ebm.OneSided(strength)), layers=layers)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"straight-through.*detach"):
        learner.gradients(closure)


def test_the_remedy_tends_to_autograd():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 10), Written(), nn.Linear(10, 8), Written(), nn.Linear(8, 3)).double()
    closure = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    wanted = torch.autograd.grad(closure(), list(net.parameters()))

    def off(strength):
        learner = ebm.Learner(net, ebm.algorithm("pc-nudge", nudge=ebm.OneSided(strength)), layers=["0", "2"])
        found = learner.gradients(closure)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found.values(), wanted, strict=True))

    assert 8 < off(1e-3) / off(1e-4) < 12


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -0.5 * gradient


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Sine(torch.autograd.Function):
    """The slope is its own, as of any activation that is written so to save memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Rectified(torch.autograd.Function):
    """The same, with a kink."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


def hooked(change):
    def through(h):
        h = h * 1.0
        h.register_hook(change)
        return h

    return through


BETWEEN = {
    "reversed": (lambda h: Reversed.apply(h), "function Reversed"),
    "straight through": (lambda h: Rounded.apply(h), "function Rounded"),
    "scaled by a hook": (hooked(lambda gradient: 0.3 * gradient), "a hook that changes gradients"),
    "looked at by a hook": (hooked(lambda gradient: None), None),
    "its own slope": (lambda h: Sine.apply(h), None),
    "its own slope, with a kink": (lambda h: Rectified.apply(h), None),
    "of weights alone": (lambda h: h @ Rounded.apply(torch.eye(6, dtype=h.dtype, requires_grad=True)), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("between", BETWEEN)
def test_feedback_that_is_no_slope_is_told_where_states_rest_by_it(between, dtype, caplog):
    """A domain classifier behind the features; relative to central differences of what is computed."""
    through, name = BETWEEN[between]
    torch.manual_seed(0)
    net, domain = Net().net.to(dtype), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    x = X.to(dtype)

    def closure():
        h = net[:4](x)
        return F.cross_entropy(net[4](h), Y) + F.cross_entropy(domain(through(h)), (x[:, 0] > 0).long())

    both = nn.ModuleList([net, domain])
    relaxers = {"equilibrium-propagation": {"relaxer": ebm.FixedPoint(5)}, "zero-divergence": {}}
    for preset, says in (("equilibrium-propagation", name is not None), ("zero-divergence", False)):
        caplog.clear()
        learner = ebm.Learner(both, ebm.algorithm(preset, **relaxers[preset]))
        for _ in range(2):
            learner.gradients(closure)
        told = [r.getMessage() for r in caplog.records if "not the slope of what it computes" in r.getMessage()]
        assert len(told) == says
        assert all(name in text for text in told)


def test_a_step_of_an_optimizer_that_calls_its_closure_relaxes_at_every_call():
    """As plain LBFGS, which evaluates the loss up to four times a step."""
    stock, net = Net().net, Net().net
    plain, ours = (torch.optim.LBFGS(one.parameters(), lr=0.3, max_iter=4) for one in (stock, net))
    learner, calls = ebm.Learner(net, EXACT), []

    def by_autograd():
        plain.zero_grad()
        loss = F.cross_entropy(stock(X), Y)
        loss.backward()
        return loss

    def closure():
        calls.append(1)
        return F.cross_entropy(net(X), Y)

    for _ in range(3):
        torch.testing.assert_close(learner.step(closure, ours), plain.step(by_autograd).detach())
    assert len(calls) > 6
    assert farthest(stock, net) < 1e-12
