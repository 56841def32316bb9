"""Strengths per element of the loss: against the same strength multiplied by hand, and predictive coding by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

G = torch.Generator().manual_seed(1)
X = torch.randn(4, 6, dtype=torch.float64, generator=G)
IMAGES = torch.rand(4, 784, dtype=torch.float64, generator=G)
RELAXER = ebm.ErrorCoordinates(max_steps=400, tol=1e-10)


def decoder(out=784):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, out)).double()


def update(net, closure, nudge, **options):
    return ebm.Learner(net, ebm.Algorithm(ebm.PredictiveCoding(), nudge, RELAXER), **options).gradients(closure)


def same(one, other, tolerance=1e-9):
    assert ebm.metrics.alignment(one, other)["relative_error"] < tolerance


@pytest.mark.parametrize("capture", [True, False])
def test_per_element_is_the_strength_times_784_pixels(capture):
    net = decoder()
    closure = lambda: F.mse_loss(net(X), IMAGES)  # noqa: E731
    one = update(net, closure, ebm.OneSided(0.5, per="element"), capture=capture)
    same(one, update(net, closure, ebm.OneSided(0.5 * 784), capture=capture))
    weak = update(net, closure, ebm.OneSided(0.5), capture=capture)
    assert ebm.metrics.alignment(one, weak)["relative_error"] > 0.05  # it is another update


def test_it_is_predictive_coding_on_half_the_sum_of_squares():
    """E = 1/2 |x - tanh(W1 u + b1)|^2 + 1/2 |y - W2 x - b2|^2 is quadratic in x: solved as a linear system."""
    net = decoder()
    found = update(net, lambda: F.mse_loss(net(X), IMAGES), ebm.OneSided(0.5, per="element"))
    w1, b1, w2, b2 = [p.detach() for p in net.parameters()]
    mu = (X @ w1.T + b1).tanh()
    x = torch.linalg.solve(torch.eye(5, dtype=X.dtype) + w2.T @ w2, (mu + (IMAGES - b2) @ w2).T).T
    slope = (mu - x) * (1 - mu**2)
    out = x @ w2.T + b2 - IMAGES
    by_hand = {"0.weight": slope.T @ X, "0.bias": slope.sum(0), "2.weight": out.T @ x, "2.bias": out.sum(0)}
    known_factor = 2 / (784 * len(X))  # from 1/2 of a sum over all to the mean over all
    same(found, {name: known_factor * value for name, value in by_hand.items()}, 1e-7)


LOSSES = {
    "mean": (lambda o, y: (o - y).square().mean(), 12),
    "scaled": (lambda o, y: 0.5 * (o - y).square().mean(), 12),
    "halved": (lambda o, y: (o - y).square().mean() / 2, 12),
    "in two steps": (lambda o, y: (o - y).square().mean(1).mean(), 12),
    "sum over units": (lambda o, y: (o - y).square().sum(1).mean(), 1),
    "part of each": (lambda o, y: (o - y).square().unflatten(1, (3, 4)).sum(1).mean(), 4),
    "smooth": (lambda o, y: F.smooth_l1_loss(o, y), 12),
    "binary": (lambda o, y: F.binary_cross_entropy_with_logits(o, y.sigmoid()), 12),
    "classes": (lambda o, y: F.cross_entropy(o, y.argmax(1)), 1),
    "tokens": (lambda o, y: F.cross_entropy(o.reshape(-1, 4), y.reshape(-1, 4).argmax(1)), 3),
    "tokens, classes second": (lambda o, y: F.cross_entropy(o.reshape(-1, 4, 3), y.reshape(-1, 4, 3).argmax(1)), 3),
    "two alike": (lambda o, y: F.mse_loss(o, y) + F.l1_loss(o, 2 * y), 12),
}
UNKNOWN = {
    "divided by hand": lambda o, y: (o - y).square().sum() / 48,
    "two unlike": lambda o, y: F.mse_loss(o, y) + o.square().sum(1).mean(),
    "a norm": lambda o, y: (o - y).norm(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_number_is_read_from_the_record(name):
    loss, number = LOSSES[name]
    net, y = decoder(12), IMAGES[:, :12]
    closure = lambda: loss(net(X), y)  # noqa: E731
    same(update(net, closure, ebm.OneSided(0.1, per="element")), update(net, closure, ebm.OneSided(0.1 * number)), 1e-6)


def test_with_a_sum_over_samples_the_mean_of_each_counts():
    net, y = decoder(12), IMAGES[:, :12]
    closure = lambda: (net(X) - y).square().mean(1).sum()  # noqa: E731
    one = update(net, closure, ebm.OneSided(0.1, per="element"), loss_reduction="sum")
    same(one, update(net, closure, ebm.OneSided(1.2), loss_reduction="sum"), 1e-6)


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_it_cannot_be_told_an_error_says_what_to_do(name):
    net, y = decoder(12), IMAGES[:, :12]
    with pytest.raises(ebm.ConfigurationError, match=r"cannot be told.*Multiply the strength"):
        update(net, lambda: UNKNOWN[name](net(X), y), ebm.OneSided(0.1, per="element"))


def test_other_words_are_refused():
    with pytest.raises(ebm.ConfigurationError, match='expected "sample" or "element"'):
        ebm.OneSided(1.0, per="pixel")


@pytest.mark.parametrize(
    ("algorithm", "out", "said"),
    [
        ("predictive-coding", 784, True),
        ("predictive-coding", 12, False),
        ("pc-nudge", 784, False),
        ("zero-divergence", 784, False),
        (ebm.algorithm("predictive-coding", nudge=ebm.OneSided(0.5, per="element")), 784, False),
    ],
)
def test_a_finite_nudge_that_is_felt_by_none_is_said_once(algorithm, out, said, caplog):
    net, y = decoder(out), IMAGES[:, :out]
    learner = ebm.Learner(net, algorithm)
    for rows in (4, 3, 4):
        learner.gradients(lambda rows=rows: F.mse_loss(net(X[:rows]), y[:rows]))
    lines = [r.getMessage() for r in caplog.records if "elements of each sample" in r.getMessage()]
    assert len(lines) == said
    if said:
        assert "each feels a nudge of 1 / 784 = 0.001" in lines[0]
        found = learner.gradients(lambda: F.mse_loss(net(X), y))
        true = ebm.reference.backprop(net, lambda: F.mse_loss(net(X), y))
        assert ebm.metrics.alignment(found, true)["cosine"] > 0.999  # as it says
