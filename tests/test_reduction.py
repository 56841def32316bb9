"""A loss that sums over the batch is said to, once, where a mean was declared; one that does not, never."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(12, 5, generator=GENERATOR)
CLASSES = torch.randint(3, (12,), generator=GENERATOR)
Y = torch.randn(12, 3, generator=GENERATOR)

SUMS = {
    "cross-entropy": lambda out, net: F.cross_entropy(out, CLASSES, reduction="sum"),
    "squares by torch": lambda out, net: nn.MSELoss(reduction="sum")(out, Y),
    "squares by hand": lambda out, net: ((out - Y) ** 2).sum(),
    "each sample, then all": lambda out, net: (out - Y).square().mean(1).sum(),
    "likelihood": lambda out, net: -out.log_softmax(1).gather(1, CLASSES[:, None]).sum(),
    "with a mean beside it": lambda out, net: F.cross_entropy(out, CLASSES) + F.mse_loss(out, Y, reduction="sum"),
    "in double": lambda out, net: F.smooth_l1_loss(out, Y, reduction="sum").double(),
}
MEANS = {
    "cross-entropy": lambda out, net: F.cross_entropy(out, CLASSES),
    "units summed, samples not": lambda out, net: (out - Y).square().sum(1).mean(),
    "divided by hand": lambda out, net: (out - Y).square().sum() / len(X),
    "divided by what was divided": lambda out, net: (out - Y).square().sum() / torch.tensor(12.0),
    "samples first": lambda out, net: (out - Y).square().mean(0).sum(),
    "a penalty on weights": lambda out, net: F.mse_loss(out, Y) + sum(p.square().sum() for p in net.parameters()),
    "a penalty of as many elements": lambda out, net: F.mse_loss(out, Y) + net[0].bias.square().sum(),
}


def heard(loss, caplog, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3))
    learner = ebm.Learner(net, "pc-nudge", **options)
    for _ in range(2):
        learner.gradients(lambda: loss(net(X), net))
    return [record.getMessage() for record in caplog.records if "loss_reduction" in record.getMessage()]


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("capture", [True, False])
def test_a_sum_that_is_not_declared_is_said_once(name, capture, caplog):
    assert len(heard(SUMS[name], caplog, capture=capture)) == 1


@pytest.mark.parametrize("name", SUMS)
def test_nothing_is_said_of_one_that_is_declared(name, caplog):
    assert not heard(SUMS[name], caplog, loss_reduction="sum")


@pytest.mark.parametrize("name", MEANS)
def test_nothing_is_said_of_a_mean(name, caplog):
    assert not heard(MEANS[name], caplog)
