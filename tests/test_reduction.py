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
    "half of the squares": lambda out, net: 0.5 * (out - Y).square().sum(),
    "squares, divided by two": lambda out, net: (out - Y).square().sum() / 2,
    "three times as strong": lambda out, net: 3 * F.cross_entropy(out, CLASSES, reduction="sum"),
    "by a factor that is a tensor": lambda out, net: torch.tensor(0.5) * F.mse_loss(out, Y, reduction="sum"),
    "by Python's sum": lambda out, net: sum((out - Y).square().sum(1)),
    "sample by sample": lambda out, net: sum(F.cross_entropy(out[k : k + 1], CLASSES[k : k + 1]) for k in range(12)),
    "sample by sample, halved": lambda out, net: 0.5 * sum((o - y).square().sum() for o, y in zip(out, Y, strict=True)),
    "a scalar product": lambda out, net: torch.dot((out - Y).flatten(), (out - Y).flatten()),
    "in Einstein's way": lambda out, net: torch.einsum("bi,bi->", out - Y, out - Y),
    "a trace": lambda out, net: ((out - Y) @ (out - Y).T).trace(),
    "the square of a norm": lambda out, net: (out - Y).norm() ** 2,
    "the square of a distance": lambda out, net: torch.dist(out, Y) ** 2,
    "flattened": lambda out, net: (out - Y).flatten().square().sum(),
    "without nan": lambda out, net: (out - Y).square().nansum(),
    "masked": lambda out, net: ((out - Y).square() * (Y > 0)).sum(),
    "in double": lambda out, net: F.smooth_l1_loss(out, Y, reduction="sum").double(),
}
MEANS = {
    "cross-entropy": lambda out, net: F.cross_entropy(out, CLASSES),
    "units summed, samples not": lambda out, net: (out - Y).square().sum(1).mean(),
    "divided by hand": lambda out, net: (out - Y).square().sum() / len(X),
    "divided by what was divided": lambda out, net: (out - Y).square().sum() / torch.tensor(12.0),
    "half, divided by hand": lambda out, net: 0.5 * (out - Y).square().sum() / len(X),
    "four times a mean of the batch": lambda out, net: (
        4 * F.kl_div(out.log_softmax(1), Y.softmax(1), reduction="batchmean")
    ),
    "ten times a mean by hand": lambda out, net: 10 * ((out - Y).square().sum() / len(X)),
    "weighted, then scaled": lambda out, net: 20 * ((out - Y).square() * torch.full((12, 1), 1 / 12)).sum(),
    "scaled and masked": lambda out, net: 5.0 * (((out - Y).square() * (Y > 0)).sum() / (Y > 0).sum()),
    "beside a hundredth of a sum": lambda out, net: F.cross_entropy(out, CLASSES) + 0.01 * out.square().sum(),
    "multiplied by one over it": lambda out, net: (out - Y).square().sum() * (1 / len(X)),
    "sample by sample": lambda out, net: (
        sum(F.cross_entropy(out[k : k + 1], CLASSES[k : k + 1]) for k in range(12)) / 12
    ),
    "stacked": lambda out, net: torch.stack([(o - y).square().sum() for o, y in zip(out, Y, strict=True)]).mean(),
    "weights that add up to one": lambda out, net: (
        F.cross_entropy(out, CLASSES, reduction="none") * torch.softmax(X[:, 0], 0)
    ).sum(),
    "masked, over the number that is left": lambda out, net: ((out - Y).square() * (Y > 0)).sum() / (Y > 0).sum(),
    "masked, over Python's number": lambda out, net: ((out - Y).square() * (Y > 0)).sum() / int((Y > 0).sum()),
    "a scalar product, divided": lambda out, net: torch.dot((out - Y).flatten(), (out - Y).flatten()) / 12,
    "a last sample alone": lambda out, net: (out[-1] - Y[-1]).square().sum(),
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


def test_a_small_part_of_a_sum_beside_a_mean_is_the_mean_that_it_equals():
    """A hundredth of a sum over 12 is 0.12 of a mean: the same nudge for each sample, and nothing to tell."""

    def update(beside):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=ebm.ErrorCoordinates(100, tol=1e-9)))
        return learner.gradients(lambda: F.cross_entropy(out := net(X.double()), CLASSES) + beside(out.square().sum(1)))

    summed, averaged = update(lambda each: 0.01 * each.sum()), update(lambda each: 0.12 * each.mean())
    for one, other in zip(summed.values(), averaged.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
