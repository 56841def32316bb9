"""Operations that code is made of others for, against torch's own."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_ebm as ebm
from lightning_ebm.program.decompositions import DECOMPOSITIONS, mean_pool, mean_pool_slope
from lightning_ebm.program.tracer import traced_graph

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((2, 3, 8, 8), (2, 2)), ((5, 6, 9), (3, 3)), ((2, 3, 1, 8), (1, 2)), ((1, 1, 4, 6), (4, 3)), ((2, 3, 6, 4), (2,))],
)
def test_means_of_windows_and_their_slopes_are_torch_s(shape, kernel):
    x = torch.randn(shape, dtype=torch.float64)
    options = kernel, kernel, (0, 0), False, True, None
    theirs = aten.avg_pool2d(x, *options)
    torch.testing.assert_close(mean_pool(x, *options), theirs, rtol=0, atol=1e-15)
    slope = torch.randn_like(theirs)
    torch.testing.assert_close(
        mean_pool_slope(slope, x, *options), aten.avg_pool2d_backward(slope, x, *options), rtol=0, atol=1e-16
    )


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.randn(1, 1, 7, 8), ((2, 2),)),  # a row is left over
        (torch.randn(1, 1, 8, 8), ((2, 2), (1, 1))),  # windows overlap
        (torch.randn(1, 1, 8, 8), ((2, 2), (3, 3))),  # or leave something out
        (torch.randn(1, 1, 8, 8), ((2, 2), (2, 2), (1, 1))),
        (torch.randn(1, 1, 8, 8), ((2, 2), (2, 2), (0, 0), False, True, 3)),
        (torch.randn(1, 1, 64, 64), ((8, 8),)),
        (torch.randn(1, 4, 8, 8).to(memory_format=torch.channels_last), ((2, 2),)),
        (torch.randn(1, 4, 8, 8).bfloat16(), ((2, 2),)),
    ],
)
def test_others_are_left_to_torch(x, options):
    assert mean_pool(x, *options) is None


class Counting(TorchDispatchMode):
    """Operations, by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Around(nn.Module):
    """Mean pooling of every kind between two convolutions."""

    def __init__(self, pool):
        super().__init__()
        self.first, self.act, self.pool = nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), pool
        self.second, self.last = nn.Conv2d(3, 2, 3, padding=1), nn.LazyLinear(4)

    def forward(self, x):
        return self.last(torch.tanh(self.second(self.pool(self.act(self.first(x))))).flatten(1))


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2), nn.AvgPool2d((1, 3)), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True)]
)
@pytest.mark.parametrize("algorithm", ["predictive-coding", "error-pc", "dual-propagation"])
def test_code_gives_the_update_of_the_plain_way(pool, algorithm):
    torch.manual_seed(0)
    x, y = torch.randn(5, 1, 6, 9, dtype=torch.float64), torch.randint(0, 4, (5,))
    net = Around(pool).double()
    net(x)
    found = [
        ebm.Learner(net, algorithm, capture=capture).gradients(lambda: F.cross_entropy(net(x), y))
        for capture in (False, True)
    ]
    assert found[0].keys() == found[1].keys()
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-9, atol=1e-11)


def test_what_the_users_own_pass_has_pooled_is_recalled_and_nothing_behind_it_computed_again():
    torch.manual_seed(0)
    x, y = torch.randn(5, 1, 6, 9), torch.randint(0, 4, (5,))
    counts = []
    for pool in (nn.AvgPool2d(3), nn.MaxPool2d(3)):
        net = Around(pool)
        net(x)
        learner = ebm.Learner(net, "zero-divergence")
        for _ in range(3):
            learner.backward(lambda net=net: F.cross_entropy(net(x), y))
        with Counting() as counting:
            learner.backward(lambda net=net: F.cross_entropy(net(x), y))
        counts.append(counting.found["aten.convolution.default"])
    assert counts == [2, 2]


def test_a_trace_has_the_others_in_their_place_below_autograd():
    def evaluate(point, given):
        total = F.avg_pool2d(point[0].requires_grad_(), 2).square().sum()
        return [total, *torch.autograd.grad(total, point)]

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    traced, expected = traced_graph(evaluate, [x], [])
    assert not {node.target for node in traced.graph.nodes} & set(DECOMPOSITIONS)
    reference = F.avg_pool2d(x.requires_grad_(), 2).square().sum()
    torch.testing.assert_close(expected[0], reference.detach())
    torch.testing.assert_close(expected[1], torch.autograd.grad(reference, x)[0])
