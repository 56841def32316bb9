"""What a pass picks by masks, counts and indices that follow from its states belongs to the pass, all of it at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (24,), generator=GENERATOR)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head, self.gate, self.experts = nn.Linear(6, 3), nn.Linear(6, 3), nn.Parameter(0.5 * torch.randn(3, 6, 6))
        self.double()


def routed(net, picked):
    """Experts of bounded capacity: what comes too late is left out, and the gate's weight scales what is not."""
    h = net.body(X)
    weight, expert = net.gate(h).softmax(1).max(1)
    with picked():
        place = (F.one_hot(expert, 3).cumsum(0) - 1).gather(1, expert[:, None]).squeeze(1)
        kept = place < 7
        expert, place = (expert[kept], place[kept]) if picked is torch.no_grad else (expert, place)
    slots = h.new_zeros(3, 7, 6)
    where = (expert, place) if picked is torch.no_grad else (expert[kept], place[kept])
    slots[where] = h[kept]
    out = torch.zeros_like(h)
    out[kept] = torch.einsum("ecd,edf->ecf", slots, net.experts)[where] * weight[kept, None]
    return F.cross_entropy(net.head(h + out), Y)


def scattered(net, picked):
    h = net.body(X)
    with picked():
        positive = h > 0.1
    h = torch.zeros_like(h).masked_scatter(positive, 2 * h[positive])
    return F.cross_entropy(net.head(h), Y)


def averaged(net, picked):
    """A sum over positions, divided by how many there are."""
    h = net.body(X)
    with picked():
        active = h > 0.2
        rows, columns = active.nonzero().unbind(1)
        count = active.sum()
    return F.cross_entropy(net.head(h), Y) + h[rows, columns].square().sum() / count


def looked_up(net, picked):
    """Rows of a table by what is predicted where the network is sure; a mask that is made of a mask as well."""
    h = net.body(X)
    out = net.head(h)
    with picked():
        sure, predicted = out.softmax(1).max(1)
        sure = sure > 0.4
        unsure = ~sure
        some = predicted[sure]
    return F.cross_entropy(out[sure], Y[sure]) + net.experts[some].square().mean() + out[unsure].square().sum() / 24


STEPS = [routed, scattered, averaged, looked_up]


def update(step, algorithm, capture=True, picked=torch.enable_grad):
    net = Net()
    learner = ebm.Learner(net, algorithm, capture=capture)
    for _ in range(3):
        found = learner.gradients(lambda: step(net, picked))
    return net, found


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("capture", [True, False])
def test_choices_made_in_the_step_are_those_that_are_made_without_gradients(step, capture):
    """At a strength at which states move far, so that masks and indices would be others."""
    relaxer = ebm.ErrorCoordinates(30, lr=0.2, tol=0)
    algorithm = ebm.algorithm("predictive-coding", relaxer=relaxer)
    _, found = update(step, algorithm, capture, torch.enable_grad)
    _, expected = update(step, algorithm, capture, torch.no_grad)
    torch.testing.assert_close(flat(found.values()), flat(expected.values()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("step", STEPS)
def test_updates_tend_to_the_gradient(step):
    relaxer = ebm.ErrorCoordinates(100, tol=1e-8)

    def off(strength):
        net, found = update(step, ebm.algorithm("pc-nudge", nudge=ebm.OneSided(strength), relaxer=relaxer))
        trained = [p for name, p in net.named_parameters() if name in found]
        wanted = torch.autograd.grad(step(net, torch.enable_grad), trained)
        return float(flat(found.values()).sub(flat(wanted)).norm())

    assert 8 < off(1e-3) / off(1e-4) < 12


@pytest.mark.parametrize("capture", [True, False])
def test_indices_beyond_what_the_pass_has_made_room_for_are_told_with_the_remedy(capture):
    net, pull = Net(), torch.zeros((), dtype=torch.float64)

    def closure(seen=lambda h: h):
        h = net.body(X)
        rank = (seen(h) > 0.6).sum(1)
        sums = h.new_zeros(int(rank.max()) + 1, 6).index_add(0, rank, h)
        return F.cross_entropy(net.head(h), Y) + 0.01 * sums.square().mean() - pull * h.sum(1).mean()

    learner = ebm.Learner(net, ebm.algorithm("predictive-coding"), capture=capture)
    for _ in range(3):
        learner.gradients(closure)
    pull.fill_(3.0)  # all units are above it from now on
    with pytest.raises(ebm.UnsupportedModuleError, match=r"at other states.*index.*detached"):
        learner.gradients(closure)
    learner.gradients(lambda: closure(torch.Tensor.detach))
