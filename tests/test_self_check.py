"""The check of a record against autograd: it refuses what no rounding explains, however faint, and nothing else."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm


class HandedBack(nn.Linear):
    """Its input comes to the backward pass as something else."""

    def __init__(self, width: int, otherwise) -> None:
        super().__init__(width, width)
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, self.otherwise):
            return super().forward(x)


class Faint(nn.Module):
    """One branch that says little."""

    def __init__(self, share: float, otherwise) -> None:
        super().__init__()
        self.share, self.bottom, self.top = share, nn.Linear(8, 8), nn.Linear(8, 4)
        self.branch = HandedBack(8, otherwise)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.bottom(x))
        return self.top(torch.tanh(h + self.share * torch.tanh(self.branch(h))))


def learned(net: nn.Module, x: Tensor, layers=None) -> None:
    learner = ebm.Learner(net, "zero-divergence", layers=layers)
    learner.backward(lambda: F.cross_entropy(net(x), torch.arange(len(x)) % 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 0.03, 0.003])
@pytest.mark.parametrize("otherwise", ["twice", "another sample's"])
def test_a_gradient_that_is_another_is_seen_however_faint_it_is(dtype, share, otherwise):
    ways = {"twice": lambda saved: 2 * saved, "another sample's": lambda saved: saved.roll(1, 0)}
    torch.manual_seed(0)
    x = torch.randn(16, 8).to(dtype)
    with pytest.raises(ebm.UnsupportedModuleError, match="off autograd's own"):
        learned(Faint(share, ways[otherwise]).to(dtype), x)
    learned(Faint(share, lambda saved: saved).to(dtype), x)


class Block(nn.Module):
    """Slopes of the biases of `first` and `second` cancel behind the batch norm, and add up in another order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.relu, self.tanh = nn.BatchNorm1d(width), nn.ReLU(), nn.Tanh()

    def forward(self, h: Tensor) -> Tensor:
        z = self.relu(self.norm(self.first(h) + self.second(h)))
        return h + self.tanh(self.third(z)) + z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_cancels_may_part_by_the_rounding_of_its_parts_however_large_they_are(dtype):
    """Batch norms of small inputs: the parts are larger than any gradient that is left of them."""
    for seed in range(6):
        torch.manual_seed(seed)
        blocks = [Block(16) for _ in range(2 + 2 * seed)]
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), *blocks, nn.Linear(16, 3)).to(dtype)
        x = torch.randn(12, 8).to(dtype)
        learned(net, 0.01 * x, [nn.Tanh, nn.ReLU, nn.Linear])


@pytest.mark.parametrize("noise", [0.3, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_in_what_comes_back_is_no_rounding(dtype, noise):
    torch.manual_seed(0)
    noisy = Faint(1.0, lambda saved: saved * (1 + noise * torch.randn_like(saved))).to(dtype)
    with pytest.raises(ebm.UnsupportedModuleError, match="off autograd's own"):
        learned(noisy, torch.randn(16, 8).to(dtype))


@pytest.mark.parametrize("algorithm", ["zero-divergence", "pc-nudge", "equilibrium-propagation"])
@pytest.mark.parametrize("first", [True, False], ids=["from the first step on", "later"])
def test_a_loss_whose_weights_have_all_been_frozen_since_teaches_nothing(first: bool, algorithm: str) -> None:
    """As when another optimizer's parameters are toggled between a loss and its `backward`; not an error of torch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    learner = ebm.Learner(net, algorithm)

    def loss(frozen: bool) -> Tensor:
        net.requires_grad_(True)
        found = net(x).square().mean()
        net.requires_grad_(not frozen)
        return found

    for step in range(4):
        frozen = (step % 2 == 0) is first
        net.zero_grad()
        assert float(learner.backward(lambda frozen=frozen: loss(frozen))) > 0
        assert [p.grad is None for p in net.parameters()] == [frozen] * 6
    expected = ebm.reference.backprop(net, lambda: loss(False))
    if algorithm == "zero-divergence":
        net.zero_grad()
        learner.backward(lambda: loss(False))
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-14)


def test_code_that_was_first_seen_while_all_was_frozen_is_checked_when_it_is_thawed() -> None:
    net = Faint(1.0, lambda saved: 2 * saved)

    def loss(frozen: bool) -> Tensor:
        net.requires_grad_(True)
        found = F.cross_entropy(net(torch.ones(3, 8)), torch.arange(3))
        net.requires_grad_(not frozen)
        return found

    learner = ebm.Learner(net, "zero-divergence")
    learner.backward(lambda: loss(True))
    with pytest.raises(ebm.UnsupportedModuleError):
        learner.backward(lambda: loss(False))
