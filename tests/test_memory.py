"""What a step takes, by the allocator's own account: exact, and the same on every machine."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import lightning_ebm as ebm
from lightning_ebm.energies.base import LayerView, reads_drive

WIDTH, BATCH, LAYERS = 64, 512, 4
STATE = WIDTH * BATCH * 4


def peak(steps: int, **options: bool) -> float:
    """Bytes at the peak of a training step that is not the first of its kind, in sizes of one layer's state."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    net = nn.Sequential(*blocks, nn.Linear(WIDTH, 10))
    x, y = torch.randn(BATCH, WIDTH), torch.arange(BATCH) % 10
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, steps))
    learner = ebm.Learner(net, algorithm, **options)

    def step() -> None:
        net.zero_grad()
        learner.backward(lambda: F.cross_entropy(net(x), y))

    step()
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / STATE


@pytest.mark.parametrize("capture", [True, False])
def test_more_steps_take_no_more(capture: bool) -> None:
    assert peak(100, capture=capture) < 1.02 * peak(5, capture=capture)


def test_a_captured_step_takes_less_than_a_plain_one() -> None:
    """Per layer at the end: the forward pass, x, dE/dx, and of what the update reads x - mu and mu; drives are gone."""
    captured, plain = peak(5), peak(5, capture=False)
    assert captured < 0.9 * plain
    assert captured < 6 * LAYERS


class Gated(ebm.PredictiveCoding):
    """Looks at the drive, though its parent does not."""

    def layer_precision(self, layer: LayerView) -> Tensor:
        assert layer.activation is not None
        assert torch.equal(torch.tanh(layer.drive), layer.prediction)
        return 1 + layer.drive.detach().square()


@pytest.mark.parametrize("capture", [True, False])
def test_a_subclass_that_reads_the_drive_is_given_it(capture: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    relaxer = ebm.GradientDescent(0.05, 40)
    learner = ebm.Learner(net, ebm.Algorithm(Gated(), ebm.OneSided(1e-4), relaxer), capture=capture)
    found = learner.gradients(lambda: F.mse_loss(net(x), y))
    assert reads_drive(Gated())
    assert not reads_drive(ebm.PredictiveCoding())
    top = ebm.reference.backprop(net, lambda: F.mse_loss(net(x), y))
    assert torch.allclose(found["4.weight"], top["4.weight"], rtol=0, atol=1e-3)  # whatever the precision
