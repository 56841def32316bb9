"""What feedback operators are, and how they follow the weights that they stand for."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ebm import checked


class FeedbackRule(ABC):
    """From the weights of a network to the operators that forces go back through.

    Letters: W the weight of a product, as its operation takes it: ``(in, out)`` for `nn.Linear`, ``(out, in, ...)`` for
    convolutions; B its operator, in that shape.
    """

    @abstractmethod
    def first(self, index: int, weight: Tensor) -> Tensor:
        """B when a weight is seen for the first time; `index` tells the products of a network apart."""

    def following(self, index: int, operator: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        """B once the optimizer has moved the weight from `before` to `weight`; it stays unless a rule says more."""
        return operator

    @property
    def homeostasis(self) -> float:
        """Step size of the operators' descent on the asymmetry of the forces, once a step; 0 takes none."""
        return 0.0


def drawn(seed: int, index: int, like: Tensor) -> Tensor:
    """Standard normal numbers in its shape, the same on every device and in every process."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


@dataclass(frozen=True)
class RandomFeedback(FeedbackRule):
    """B = scale * |W|_rms * xi, drawn once and fixed: feedback alignment.

    Args:
        scale: size of B relative to the root mean square of the weight when it is first seen.
        seed: of the draw.

    Raises:
        ConfigurationError: a scale that is not positive.

    Source:
        Lillicrap et al. 2016.
    """

    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        scale = checked.number(self, "scale", self.scale, "a positive number; at 0 no force would go back", above=0)
        checked.keep(self, scale=scale, seed=checked.count(self, "seed", self.seed, least=0))

    def first(self, index: int, weight: Tensor) -> Tensor:
        return self.scale * weight.square().mean().sqrt() * drawn(self.seed, index, weight)


@dataclass(frozen=True)
class KolenPollack(RandomFeedback):
    """B <- (1 - decay) B + s, where s is the step that the optimizer made of W apart from its decay.

    W moves by W <- (1 - decay) W + s, so that B - W shrinks by 1 - decay with every step, and feedback becomes the
    transpose without being told it. The step is read off the weights, s = W' - (1 - decay) W, whatever optimizer and
    learning rate have made it; accumulated gradients, clipping and schedules are in it.

    The trap: `decay` has to be what the optimizer decays weights by in each step, lr * weight_decay for `SGD` and
    `AdamW`. With an optimizer that decays them by less the rule still converges, but as B would have been told a part
    of W; with ``decay=0`` B - W stays what it was.

    Args:
        decay: share of the weight lost in each step, from 0 to below 1.
        scale: as in `RandomFeedback`.
        seed: as in `RandomFeedback`.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        Kolen and Pollack 1994, as in Akrout et al. 2019 (arXiv 1904.05391).
    """

    decay: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        share = "a share from 0 to below 1, lr * weight_decay of the optimizer"
        checked.keep(self, decay=checked.number(self, "decay", self.decay, share, least=0, below=1))

    def following(self, index: int, operator: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        return (1 - self.decay) * (operator - before) + weight


@dataclass(frozen=True)
class JacobianHomeostasis(RandomFeedback):
    """B <- B - lr/B_batch d/dB sum_b 1/2 [u' (J - J') v]^2, with J the Jacobian of the forces and u, v normal noise.

    The average over u and v is 1/2 |J - J'|^2, 0 where the forces are the slope of an energy again, so that B tends to
    the weight without being told it, from how the forces respond to small noise in states. It is taken where the first
    phase after an optimizer step starts, with one pair of noises a sample. The operators alone descend; weights
    learn from their own update, which in the source the penalty is added to. The operator of the read-out, "loss",
    stays as it was drawn: without the loss no force goes back through it.

    The bracket is linear in B - W, so that the sum f over the batch, of slope g, has its minimum of 0 at W: a step is
    2 f / |g|^2 where that is shorter than lr/B_batch, and none leads away from W. Many units and few samples need it.

    Args:
        lr: the longest step.
        scale: as in `RandomFeedback`.
        seed: as in `RandomFeedback`.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        Laborieux and Zenke 2024 (arXiv 2309.02214, its abstract), whose penalty is |J - J'|^2 by random projections.
    """

    lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        checked.keep(self, lr=checked.number(self, "lr", self.lr, "a positive step size, such as 0.1", above=0))

    @property
    def homeostasis(self) -> float:
        return self.lr


@dataclass(frozen=True)
class SignSymmetry(FeedbackRule):
    """B = sign(W) |W|_rms: the signs of the weights, at one size.

    Source:
        Liao et al. 2016; Xiao et al. 2018, as told in Akrout et al. 2019 (arXiv 1904.05391).
    """

    def first(self, index: int, weight: Tensor) -> Tensor:
        return weight.sign() * weight.square().mean().sqrt()

    def following(self, index: int, operator: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        return self.first(index, weight)


@dataclass(frozen=True)
class Mismatch(FeedbackRule):
    """B = W (1 + sigma xi), xi standard normal and fixed: a second copy of the weights, off from device to device.

    Args:
        sigma: relative standard deviation; 0 is the transpose.
        seed: of the devices.

    Raises:
        ConfigurationError: an argument out of range.
    """

    sigma: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = "a relative standard deviation of at least 0"
        checked.keep(
            self,
            sigma=checked.number(self, "sigma", self.sigma, wanted, least=0),
            seed=checked.count(self, "seed", self.seed, least=0),
        )

    def first(self, index: int, weight: Tensor) -> Tensor:
        return weight * (1 + self.sigma * drawn(self.seed, index, weight))

    def following(self, index: int, operator: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        return self.first(index, weight)
