"""What only rounding moves has settled: single precision ends as double precision does, in as many steps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

BY_TOLERANCE = [
    name for name in ebm.algorithms() if ebm.algorithm(name).relaxer.tol and name not in ("backprop", "infinitesimal")
]  # nothing relaxes in those two


def case(dtype: torch.dtype, off: float, wide: int):
    """A network whose outputs are off by so much, so that errors are small beside the states."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, wide), nn.Tanh(), nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, 4)).double()
    x, noise = torch.rand(16, 8).double(), torch.randn(16, 4).double()
    with torch.no_grad():
        net[0].bias.add_(1.0)  # states whose size has nothing to do with how far they move
        target = net(x) + off * noise
    net, x, target = net.to(dtype), x.to(dtype), target.to(dtype)
    return net, lambda: F.mse_loss(net(x), target, reduction="sum") / len(x)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("off", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("wide", [16, 64, 256])
@pytest.mark.parametrize("name", BY_TOLERANCE)
def test_single_precision_ends_as_double_precision_does(name, wide, off):
    ends = []
    for dtype in (torch.float64, torch.float32):
        net, closure = case(dtype, off, wide)
        learner = ebm.Learner(net, name)
        learner.gradients(closure)
        ends.append((learner.report["result"], learner.report["steps"]))
    (result, steps), (single, taken) = ends
    assert result == "converged"
    assert single == "converged", ends
    assert taken <= steps + 3, ends


@pytest.mark.parametrize("name", ["predictive-coding", "pc-nudge", "augmented-lagrangian-pc", "dual-propagation"])
def test_forces_that_are_differences_settle_among_what_they_are_differences_of(name):
    """784 inputs and three hidden layers of tanh: multipliers end as 1e7 times what is left to do."""
    torch.manual_seed(0)
    parts = [layer for a, b in [(784, 256), (256, 256), (256, 256)] for layer in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*parts, nn.Linear(256, 10))
    x, y = torch.rand(64, 784), torch.randint(10, (64,))
    learner = ebm.Learner(net, name)
    found = learner.gradients(lambda: F.cross_entropy(net(x), y))
    assert learner.report["result"] == "converged"
    assert learner.report["steps"] <= 16
    if name != "predictive-coding":
        true = ebm.reference.backprop(net, lambda: F.cross_entropy(net(x), y))
        assert ebm.metrics.alignment(found, true)["relative_error"] < 1e-3
    if name == "augmented-lagrangian-pc":  # each dual step leaves a hundredth or less of what the one before left
        assert max(learner.report["residual"]) < 1e-5


class Attending(nn.Module):
    """A residual block of doubles, but for the softmax of its attention, which is taken in the kind of number given."""

    def __init__(self, softmax_in: torch.dtype) -> None:
        super().__init__()
        self.softmax_in = softmax_in
        self.norm, self.mixed, self.spread = nn.LayerNorm(16), nn.Linear(16, 48), nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, h):
        q, k, v = self.mixed(self.norm(h)).chunk(3, dim=-1)
        h = h + (q @ k.mT).softmax(-1, dtype=self.softmax_in).to(v.dtype) @ v
        return h + self.down(self.act(self.up(self.spread(h))))


def transformer(softmax_in: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), *(Attending(softmax_in) for _ in range(3)), nn.Linear(16, 5)).double()


@pytest.mark.parametrize("layers", [nn.GELU, Attending])
@pytest.mark.parametrize("name", ["zero-divergence", "pc-nudge"])
def test_a_stretch_in_single_precision_rounds_a_network_of_doubles(name, layers):
    """Neither the self-check nor a relaxation may ask for double precision where softmax is taken in single."""
    net, exact = transformer(torch.float32), transformer(torch.float64)
    x, y = torch.randn(8, 12, 6).double(), torch.randint(5, (8, 12))
    learner = ebm.Learner(net, name, layers=layers)
    found = learner.gradients(lambda: F.cross_entropy(net(x).mT, y))
    true = torch.autograd.grad(F.cross_entropy(exact(x).mT, y), list(exact.parameters()))
    off = ebm.metrics.alignment(found, dict(zip(found, true, strict=True)))["relative_error"]
    assert off < (1e-5 if name == "zero-divergence" else 1e-2)
    assert learner.report["result"] in ("converged", "max_steps")


@pytest.mark.parametrize("name", ["error-pc", "incremental-pc"])
def test_an_energy_may_be_larger_than_half_precision_holds(name):
    """The loss is a mean, and the energy a sum over samples: 2048 times 48 is beyond float16."""
    found = []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
        x, y = torch.randn(2048, 6).to(dtype), torch.full((2048, 3), 7.0, dtype=dtype)
        ebm.Learner(net, name).backward(lambda net=net, x=x, y=y: nn.functional.mse_loss(net(x), y))
        found.append(net[2].weight.grad.float())
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02 * float(found[1].abs().max()))
