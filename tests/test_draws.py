"""Draws whose parameters have a slope: autograd's slope through them is zero, and reaches what lies before."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


def over_a_part(h):
    drawn = h.clone()
    drawn[:, :2].exponential_()
    return drawn


DRAWS = {
    "normal of a mean": lambda h: torch.normal(h, 1.0),
    "normal of a deviation": lambda h: torch.normal(0.0, h.exp()),
    "normal of both": lambda h: torch.normal(h, h.exp()),
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()),
    "bernoulli in place": lambda h: torch.empty_like(h).bernoulli_(h.sigmoid()),
    "poisson": lambda h: torch.poisson(h.exp()),
    "normal over a copy": lambda h: h + h.clone().normal_(),
    "uniform over a copy": lambda h: h * h.clone().uniform_(),
    "over a part": over_a_part,
    "straight through": lambda h: h + (torch.bernoulli(h.sigmoid()) - h).detach(),
}


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.first, self.hidden, self.last, self.act = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Tanh()
        self.draw = draw

    def forward(self, x):
        return self.last(self.act(self.draw(self.hidden(self.act(self.first(x))))))


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_the_update_is_backprops_and_reaches_what_backprop_reaches(draw, capture):
    """A parameter that has a gradient of zero is decayed by its optimizer; one that has none is not."""
    torch.manual_seed(0)
    net = Noisy(draw).double()
    learners = {name: ebm.Learner(net, name, capture=capture) for name in ("zero-divergence", "pc-nudge")}
    for _ in range(3):

        def closure():
            torch.manual_seed(2)
            return F.cross_entropy(net(X), Y)

        true = ebm.reference.backprop(net, closure)
        assert len(true) == 6
        for name, learner in learners.items():
            found = learner.gradients(closure)
            assert found.keys() == true.keys()
            assert ebm.metrics.alignment(found, true)["relative_error"] < (1e-12 if name == "zero-divergence" else 1e-2)
