"""Layers that return complex numbers carry no state: refused by name, or right where states are real."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm


class Split(nn.Module):
    """tanh of the real and of the imaginary part."""

    def forward(self, z):
        return torch.complex(z.real.tanh(), z.imag.tanh())


class Modulus(nn.Module):
    """|z|."""

    def forward(self, z):
        return z.abs()


class Spectral(nn.Module):
    """What a Fourier neural operator does: complex weights between a transform and its inverse, real outside."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size // 2 + 1, size // 2 + 1, dtype=torch.cdouble) / size)

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) @ self.weight, n=x.shape[-1])


def linear(before, after):
    return nn.Linear(before, after, dtype=torch.cdouble)


def of_autograd(net, loss):
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss(), net.parameters()), strict=True))


PRESETS = ["zero-divergence", "pc-nudge", "predictive-coding", "error-pc", "infinitesimal", "incremental-pc"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("capture", [True, False])
def test_a_network_of_complex_layers_is_refused_by_name(preset, capture):
    net = nn.Sequential(linear(4, 6), Split(), linear(6, 6), Split(), linear(6, 2))
    z = torch.randn(8, 4, dtype=torch.cdouble)
    learner = ebm.Learner(net, preset, capture=capture)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"complex numbers.*view_as_real"):
        learner.gradients(lambda: net(z).abs().square().mean())


def test_a_complex_layer_that_was_named_is_refused_with_the_reason():
    net = nn.Sequential(linear(4, 6), Modulus(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    net[0] = linear(4, 6)
    z = torch.randn(8, 4, dtype=torch.cdouble)
    learner = ebm.Learner(net, "predictive-coding", layers=["0", "3"])
    with pytest.raises(ebm.LayerDiscoveryError, match="'0': it returns complex numbers"):
        learner.gradients(lambda: net(z).square().mean())


@pytest.mark.parametrize("capture", [True, False])
def test_complex_weights_between_real_states_are_right(capture):
    """The exact rule is autograd's gradient to rounding, and pc-nudge tends to it."""
    torch.manual_seed(0)
    front = nn.Sequential(linear(4, 6), Modulus(), nn.Linear(6, 8), nn.Tanh()).double()
    front[0] = linear(4, 6)
    net = nn.Sequential(front, nn.Linear(8, 8).double(), nn.Tanh(), Spectral(8), nn.Tanh(), nn.Linear(8, 3).double())
    z, y = torch.randn(8, 4, dtype=torch.cdouble), torch.randint(3, (8,))

    def loss():
        return F.cross_entropy(net(z), y)

    wanted = of_autograd(net, loss)
    for preset, room in (("zero-divergence", 1e-10), ("pc-nudge", 2e-2)):
        learner = ebm.Learner(net, preset, capture=capture)
        for _ in range(3):  # the second and third run as code
            found = learner.gradients(loss)
        for name, gradient in wanted.items():
            assert (found[name] - gradient).abs().max() <= room * gradient.abs().max(), (preset, name)
