"""Linear layers of the user's own, whose weights are computed of parameters, and of constants put into them."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


def over_its_largest_singular_value(layer):
    with torch.no_grad():
        right = F.normalize(layer.weight.t() @ layer.left, dim=0)
        left = F.normalize(layer.weight @ right, dim=0)
        layer.left.copy_(left)
    value = torch.dot(left, torch.mv(layer.weight, right))
    return layer.weight / torch.max(torch.ones(1).double(), value / 0.9)


WEIGHTS = {
    "itself": lambda layer: layer.weight,
    "masked": lambda layer: layer.weight * layer.mask,
    "filled": lambda layer: layer.weight.masked_fill(layer.mask == 0, 0.0),
    "noisy": lambda layer: layer.weight + F.softplus(layer.spread) * torch.randn_like(layer.weight),
    "dropped": lambda layer: F.dropout(layer.weight, 0.3),
    "its signs": lambda layer: layer.weight + (layer.weight.sign() - layer.weight).detach(),
    "beside a frozen one": lambda layer: layer.mask + layer.spread[:, :2] @ layer.spread[:2],
    "scaled": lambda layer: layer.weight * torch.ones(1).double(),
    "bounded": over_its_largest_singular_value,
}


class Own(nn.Module):
    def __init__(self, inputs, outputs, weight):
        super().__init__()
        self.weight, self.spread = (nn.Parameter(0.5 * torch.randn(outputs, inputs)) for _ in range(2))
        self.register_buffer("mask", (torch.rand(outputs, inputs) < 0.7).float())
        self.register_buffer("left", torch.randn(outputs))
        self.computed = weight

    def forward(self, x):
        return F.linear(x, self.computed(self))


class Net(nn.Module):
    """Its activations are functions, so that only its linear layers can be seen."""

    def __init__(self, weight):
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(b): Own(a, b, weight) if b != 5 else nn.Linear(a, b) for a, b in itertools.pairwise((4, 8, 6, 5, 3))}
        )

    def forward(self, x):
        *hidden, last = self.layers.values()
        for layer in hidden:
            x = torch.tanh(layer(x))
        return last(x)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_they_carry_states_as_torchs_own_do(weight):
    torch.manual_seed(0)
    net = Net(weight).double()
    assert [layer.name for layer in ebm.summary(net, X).layers] == ["layers.8", "layers.6", "layers.5"]
    state = {name: value.clone() for name, value in net.state_dict().items()}

    def closure():
        torch.manual_seed(2)
        net.load_state_dict(state)
        return F.cross_entropy(net(X), Y)

    true = ebm.reference.backprop(net, closure)
    for name, bound in (("zero-divergence", 1e-12), ("pc-nudge", 1e-2)):
        found = ebm.Learner(net, name).gradients(closure)
        assert ebm.metrics.alignment(found, true)["relative_error"] < bound


def test_what_constants_are_put_into_may_be_what_flows():
    """One sample, and a place for each of its tokens: of the same shape as the batch, and no weight."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"first": nn.Linear(4, 8), "second": nn.Linear(8, 8), "last": nn.Linear(8, 3)})
    net.places = nn.Parameter(torch.randn(1, 5, 4))
    net.double()
    for samples in (1, 2):
        x = torch.randn(samples, 5, 4).double()

        def closure(x=x):
            hidden = torch.tanh(net["second"](torch.tanh(net["first"](x + net.places))))
            return net["last"](hidden).square().mean()

        assert [*ebm.Learner(net, "pc-nudge").relax(closure).states] == ["first", "second"]
