"""Gradients that somebody wrote down, which are not the slope of what is computed: hooks, surrogates, reversals."""

import pytest
import torch
from test_other_gradients import Net, X, Y
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.step.recorded import Recorded


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
        return torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x)


class Binary(nn.Module):
    def forward(self, x):
        return Sign.apply(x)


class Written(nn.Module):
    """Straight through by hand: what is added is a constant."""

    def forward(self, x):
        return x + ((x / 0.1).round() * 0.1 - x).detach()


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


class WithMore(torch.autograd.Function):
    """Gives what else it has found, of which its backward code knows no slope, as kernels of attention do."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), 3 * x.square().sum(1)

    @staticmethod
    def backward(ctx, gradient, of_more):
        assert of_more is None, "nothing was computed from it"
        return gradient * ctx.saved_tensors[0].cos()


def hooked(change):
    def through(h):
        h = h * 1.0
        h.register_hook(change)
        return h

    return through


def with_backward_hook(change):
    module = nn.Identity()
    module.register_full_backward_hook(change)
    return module


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x) if x.requires_grad else x


def between(*parts):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *parts, nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


NETS = {
    "scaled by a hook": lambda: between(Through(hooked(lambda gradient: 5 * gradient))),
    "turned round by a hook": lambda: between(Through(hooked(lambda gradient: -2 * gradient))),
    "scaled by a hook of a module": lambda: between(with_backward_hook(lambda m, gi, go: (4 * gi[0],))),
    "scaled by a hook, samples see each other": lambda: between(
        nn.BatchNorm1d(6), Through(hooked(lambda gradient: 5 * gradient))
    ),
    "reversed": lambda: between(Through(lambda x: Reversed.apply(x))),
    "written unseen": lambda: between(Through(squeezed)),
    "by hand": lambda: between(Written()),
}


def squeezed(x):
    x = 1.0 * x
    with torch.no_grad():
        x.mul_(0.2)
    return x


def off(net, strength, capture=True, **options):
    """Of the whole update, from autograd's gradient; nothing may be left to say."""
    wanted = torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.parameters()))
    relaxer = ebm.ErrorCoordinates(64, tol=1e-7)
    algorithm = ebm.algorithm("pc-nudge", nudge=ebm.OneSided(strength), relaxer=relaxer)
    learner = ebm.Learner(net, algorithm, capture=capture, **options)
    for _ in range(2):
        found = learner.gradients(lambda: F.cross_entropy(net(X), Y))
    assert learner.report["result"] == "converged"
    far = torch.cat([(a - b).flatten() for a, b in zip(found.values(), wanted, strict=True)])
    return float(far.norm() / torch.cat([b.flatten() for b in wanted]).norm())


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("capture", [True, False])
def test_errors_go_back_through_them_and_tend_to_the_gradient_of_autograd(kind, capture):
    """No step is judged by the energy, which such forces do not lower."""
    torch.manual_seed(0)
    net = NETS[kind]().double()
    assert 8 < off(net, 1e-3, capture) / off(net, 1e-4, capture) < 12


@pytest.mark.parametrize("part", [Binary, Quantized])
@pytest.mark.parametrize("capture", [True, False])
def test_surrogate_slopes_of_states_send_errors_back_too(part, capture):
    """States are what is quantized; in 32 bits, as that operation of torch computes."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 10), part(), nn.Linear(10, 8), part(), nn.Linear(8, 3)).double()
    assert off(net, 1e-5, capture, layers=["0", "2"]) < 1e-6


def test_what_nobody_has_told_is_refused_where_no_step_lowers_the_energy(monkeypatch):
    monkeypatch.setattr(Recorded, "not_a_slope", lambda self: None)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 10), Binary(), nn.Linear(10, 8), Binary(), nn.Linear(8, 3)).double()
    learner = ebm.Learner(net, "pc-nudge", layers=["0", "2"])
    with pytest.raises(ebm.UnsupportedModuleError, match=r"straight-through.*detach"):
        learner.gradients(lambda: F.cross_entropy(net(X), Y))


BETWEEN = {
    "reversed": (lambda h: Reversed.apply(h), "function Reversed"),
    "straight through": (lambda h: Rounded.apply(h), "function Rounded"),
    "scaled by a hook": (hooked(lambda gradient: 0.3 * gradient), "a hook that changes gradients"),
    "scaled by a hook of a module": (
        with_backward_hook(lambda module, given, gradients: (0.3 * given[0],)),
        "a backward hook of Identity that changes gradients",
    ),
    "looked at by a hook of a module": (with_backward_hook(lambda module, given, gradients: None), None),
    "quantized by torch": (Quantized(), "fake_quantize_per_tensor_affine"),
    "written under no_grad": (squeezed, "a write under torch.no_grad()"),
    "looked at by a hook": (hooked(lambda gradient: None), None),
    "its own slope": (lambda h: Sine.apply(h), None),
    "its own slope, and more that nothing reads": (lambda h: WithMore.apply(h)[0], None),
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
