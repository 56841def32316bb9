"""A step makes its tensors where the user's are, in their precision: an emulation, as there need be no other device.

`torch.set_default_device("meta")` puts every tensor that is made without saying where on a device that holds no
numbers, while module and batch stay on the CPU. One that meets theirs raises; one that is read has nothing to say.
The default dtype is exchanged likewise. Weights must come out bit by bit as without.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

RELAXERS = {
    "20 Euler steps": ebm.GradientDescent(0.1, 20),
    "states to a tolerance": ebm.GradientDescent(0.5, 50, tol=1e-3),
    "Anderson": ebm.Anderson(20, coordinates="errors"),
    "quasi-Newton": ebm.QuasiNewton(20),
    "momentum": ebm.StateOptimizer(torch.optim.SGD, max_steps=5, lr=0.1, momentum=0.9),
    "cheapest": ebm.Cheapest(ebm.ErrorCoordinates(), ebm.Anderson(coordinates="errors")),
    "Langevin": ebm.Langevin(0.01, max_steps=10, lr=0.05),
}
ALGORITHMS = {name: name for name in ebm.algorithms()}
ALGORITHMS |= {name: ebm.algorithm("predictive-coding", relaxer=relaxer) for name, relaxer in RELAXERS.items()}
ALGORITHMS |= {
    "random sign": ebm.algorithm("equilibrium-propagation", nudge=ebm.RandomSign(0.1)),
    "strongest": ebm.algorithm("predictive-coding", nudge="auto"),
    "last visit": ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(8)),
}


class Batched(nn.Sequential):
    """Samples see each other, and a tensor without samples."""

    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.norm, self.last = nn.Linear(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.act(self.up(x.unflatten(1, (3, 2))))
        return self.last(self.norm(h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


NETS = {"batched": Batched, "attends": Attends}


def trained(algorithm, make):
    """The weights after three steps, or the refusal."""
    torch.manual_seed(0)
    net = make()
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    learner, optimizer = ebm.Learner(net, algorithm), torch.optim.SGD(net.parameters(), 0.05)

    def steps():
        try:
            for _ in range(3):
                learner.step(lambda: F.cross_entropy(net(x), y), optimizer)
                assert learner.report["loss"] > 0  # read
        except ebm.EBMError as error:
            return type(error).__name__
        return [value.detach() for value in net.state_dict().values()]

    return steps


@contextmanager
def other_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def other_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def check(found, plain):
    if isinstance(plain, str):
        assert found == plain
        return
    for one, other in zip(found, plain, strict=True):
        assert (one.device, one.dtype) == (other.device, other.dtype)
        assert torch.equal(one, other)


@pytest.mark.crossed(2)
@pytest.mark.parametrize(("net", "seldom"), [("batched", True), ("attends", False)], ids=["asked rarely", "always"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_is_made_elsewhere_or_in_another_precision(name, net, seldom, monkeypatch):
    if seldom:
        monkeypatch.setattr("lightning_ebm.network.network.runs_behind", lambda device: True)
    again = lambda: trained(ebm.algorithm(copy.deepcopy(ALGORITHMS[name])), NETS[net])  # noqa: E731
    plain = again()()
    for exchanged in (other_device, other_dtype):
        steps = again()
        with exchanged():
            found = steps()
        check(found, plain)


def test_the_emulation_finds_what_is_made_elsewhere():
    class Careless(ebm.ErrorCoordinates):
        def relax(self, landscape, start, strength):
            found = super().relax(landscape, start, strength)
            found.point = [x + torch.zeros(1) for x in found.point]
            return found

    steps = trained(ebm.algorithm("predictive-coding", relaxer=Careless()), Batched)
    with other_device(), pytest.raises(RuntimeError, match="meta"):
        steps()
