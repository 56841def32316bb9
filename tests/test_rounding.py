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
