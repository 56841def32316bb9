"""Activation modules of people's own: states sit where those of torch's kinds would have them, by what calls do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm


class Own(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class HardSigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6()

    def forward(self, x):
        return self.relu(x + 3) / 6


class HardSwish(nn.Module):
    """As in much code of MobileNetV3: modules within a module."""

    def __init__(self):
        super().__init__()
        self.sigmoid = HardSigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


ALIKE = {
    "gelu": (nn.GELU, lambda: Own(F.gelu)),
    "silu": (nn.SiLU, lambda: Own(lambda x: x * torch.sigmoid(x))),
    "mish": (nn.Mish, lambda: Own(lambda x: x * torch.tanh(F.softplus(x)))),
    "relu, in place": (nn.ReLU, lambda: Own(lambda x: F.relu_(1 * x))),
    "leaky relu": (lambda: nn.LeakyReLU(0.1), lambda: Own(lambda x: torch.where(x > 0, x, 0.1 * x))),
    "hard swish": (nn.Hardswish, HardSwish),
    "hard swish, a function": (nn.Hardswish, lambda: Own(F.hardswish)),
    "log sigmoid": (nn.LogSigmoid, lambda: Own(F.logsigmoid)),
}
FUNCTIONS = {
    "sine": lambda x: torch.sin(30 * x),
    "squared relu": lambda x: F.relu(x) ** 2,
    "product with itself": lambda x: x * x,
    "reciprocal": lambda x: 1 / (2 + x),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "scale and shift": lambda x: 3 * x + 1,
    "quotient": lambda x: x / 7,
    "identity": lambda x: x,
    "copy": lambda x: x.clone(),
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: x / x.square().mean(-1, keepdim=True).sqrt(),
    "sorted": lambda x: x.sort(-1).values,
}


def block(act):
    """Two weights, an activation behind the first alone: states at blocks would leave two weights in a row."""
    return nn.Sequential(nn.Linear(6, 6), act(), nn.Linear(6, 6), act())


def network(act):
    torch.manual_seed(0)
    return nn.Sequential(block(act), block(act), nn.Linear(6, 2)).double()


def data():
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ALIKE)
def test_an_activation_of_ones_own_is_a_layer_as_torchs_is(name):
    torchs, own = (network(make) for make in ALIKE[name])
    found = [[layer.name for layer in ebm.summary(net, data()).layers] for net in (torchs, own)]
    assert found[1] == found[0] == ["0.1", "0.3", "1.1", "1.3"]
    strong = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 5))
    for algorithm in ("zero-divergence", strong):
        ones, others = (
            ebm.Learner(net, algorithm).gradients(lambda net=net: net(data()).square().mean()) for net in (torchs, own)
        )
        for key in ones:
            torch.testing.assert_close(others[key], ones[key], rtol=1e-9, atol=1e-12)


def bends_each_by_itself(function):
    """By autograd's Jacobians at two points: diagonal, and another at the other point."""
    points = [data()[0], -0.7 * data()[0]]
    slopes = [torch.autograd.functional.jacobian(function, point) for point in points]
    diagonal = all(torch.equal(slope, torch.diag(slope.diag())) for slope in slopes)
    return diagonal and not torch.allclose(*slopes)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_bends_each_element_by_itself_is_an_activation_and_nothing_else_is(name):
    function = FUNCTIONS[name]
    found = ebm.summary(network(lambda: Own(function)), data())
    assert (found.chosen == "activations") == bends_each_by_itself(function)
    assert {layer.activation for layer in found.layers} == ({"Own"} if found.chosen == "activations" else {None})


def test_random_units_data_and_losses_are_no_activations():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.ready, self.act = Own(torch.log1p), nn.Tanh()
            self.drop = Own(lambda x: F.dropout(x, 0.3))
            self.a, self.b, self.error = nn.Linear(6, 6), nn.Linear(6, 2), Own(torch.square)

        def forward(self, x):
            return self.error(self.b(self.drop(self.act(self.a(self.ready(x.abs()))))) - 1).sum(1)

    net = Step().double()
    assert [layer.name for layer in ebm.summary(net, data(), output="readout").layers] == ["act"]


def test_energies_of_drives_take_torchs_activations_alone():
    """They need its convex function, and know those of torch's kinds."""
    net = network(lambda: Own(torch.tanh))
    learner = ebm.Learner(net, ebm.algorithm("equilibrium-propagation", relaxer=ebm.GradientDescent(0.1, 3)))
    learner.gradients(lambda: net(data()).square().mean())
    assert learner.plan.chosen != "activations"


def test_nearly_equal_sets_give_way_to_the_one_with_fewer_states():
    """A Transformer of two blocks with norms behind its sums: within them hardly more is local, and it trains worse."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.up, self.down, self.act = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.GELU()
            self.one, self.two = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x):
            x = self.one(x + self.mix(x))
            return self.two(x + self.down(self.act(self.up(x))))

    net = nn.Sequential(Block(), Block(), nn.Linear(8, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 2))
    found = ebm.summary(net, torch.randn(3, 8))
    means = {judged.what: judged.mean for judged in found.compared}
    assert means["blocks"] < means["activations"] < means["blocks"] + 0.02
    assert [layer.name for layer in found.layers] == ["0", "1"]
