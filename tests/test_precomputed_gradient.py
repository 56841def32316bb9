"""Updates handed to backward: the right ones, once, and none for states."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.network.precomputed_gradient import slopes_of


@pytest.fixture
def graph():
    """Two layers cut at a state: ``(outputs with their seeds, state, parameters)``."""
    generator = torch.Generator().manual_seed(0)
    lower, upper = (torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x, seed = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    prediction = torch.tanh(x @ lower)
    state = prediction.detach().requires_grad_()
    loss = (state @ upper).square().mean() + 0.1 * lower.sum()
    return [(prediction, seed), (loss, torch.tensor(3.0, dtype=torch.float64))], state, [lower, upper]


def expected(seeds, parameters):
    return torch.autograd.grad(sum((s * out).sum() for out, s in seeds), parameters, retain_graph=True)


def test_parameters_get_the_gradient_and_states_none(graph):
    seeds, state, parameters = graph
    want = expected(seeds, parameters)
    (0.5 * slopes_of(seeds, [state])).backward()
    assert state.grad is None
    for parameter, gradient in zip(parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, 0.5 * gradient, rtol=1e-14, atol=0)


def test_the_graph_is_kept_exactly_where_it_is_asked_for(graph):
    seeds, state, parameters = graph
    want = expected(seeds, parameters)
    total = slopes_of(seeds, [state])
    for retain in (True, False):
        found = torch.autograd.grad(total, parameters, retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(slopes_of(seeds, [state]), parameters)


def test_what_hangs_on_no_parameter_is_a_constant():
    state = torch.ones(2, requires_grad=True)
    assert slopes_of([(torch.ones(2), torch.ones(2)), (2 * state, torch.ones(2))], [state]).item() == 6.0


class Doubled(torch.autograd.Function):
    """The identity, whose author wants twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope


@pytest.mark.parametrize("algorithm", ["zero-divergence", "fixed-prediction", "augmented-lagrangian-pc", "pc-nudge"])
@pytest.mark.parametrize("own", [False, True])
def test_hooks_of_parameters_act_once_on_the_whole_update(algorithm, own):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(4, 5), torch.randint(0, 3, (4,))

    def closure():
        return F.cross_entropy(net[4](Doubled.apply(net[:4](x)) if own else net[:4](x)), y)

    learner = ebm.Learner(net, algorithm, capture=False)
    plain = learner.gradients(closure)
    seen = []

    def hook(slope):
        seen.append(slope)
        return -3 * slope

    net[2].weight.register_hook(hook)
    learner.backward(closure)
    assert len(seen) == 1
    torch.testing.assert_close(net[2].weight.grad, -3 * plain["2.weight"])
    torch.testing.assert_close(net[0].weight.grad, plain["0.weight"])
