"""Under Fabric with 16-bit floats the optimizer divides gradients by a scale, which updates have to carry."""

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)


def what_setup_returned(fabric):
    module, optimizer = fabric.setup(*with_optimizer(Classifier().net))
    return module, module, optimizer


def what_holds_it(fabric):
    net = Classifier().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    both = nn.Sequential(fabric.setup_module(net[:2]), fabric.setup_module(net[2]))
    return both, both, fabric.setup_optimizers(optimizer)


def what_it_was_given(fabric):
    inner, optimizer = with_optimizer(Classifier())
    wrapped, optimizer = fabric.setup(inner, optimizer)
    return inner, wrapped, optimizer


def with_optimizer(module):
    return module, torch.optim.SGD(module.parameters(), lr=0.1)


@pytest.mark.parametrize("ways", [what_setup_returned, what_holds_it, what_it_was_given])
def test_updates_carry_the_scale_of_fabric(ways):
    ends = []
    for learns in (False, True):
        torch.manual_seed(0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
        fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
        module, run, optimizer = ways(fabric)
        learner = ebm.Learner(module, "zero-divergence")
        for _ in range(4):
            x, y = torch.randn(6, 4), torch.arange(6) % 2
            optimizer.zero_grad()
            if learns:
                learner.backward(lambda run=run, x=x, y=y: F.cross_entropy(run(x).float(), y))
            else:
                fabric.backward(F.cross_entropy(run(x).float(), y))
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=2e-3, atol=2e-4)


def test_scales_of_several_fabrics_are_refused():
    parts = []
    for _ in range(2):
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        parts.append(Fabric(accelerator="cpu", devices=1, plugins=[plugin]).setup_module(nn.Linear(4, 4)))
    net = nn.Sequential(parts[0], nn.Tanh(), parts[1])
    with pytest.raises(ebm.ConfigurationError, match="several Fabrics"):
        ebm.Learner(net, "zero-divergence").backward(lambda: net(torch.randn(3, 4)).float().square().mean())
