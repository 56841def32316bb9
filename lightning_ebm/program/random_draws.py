"""Random operations, repeated at other states with what the recorded pass drew."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.operations import Traits, without_slope

Repeated = Callable[[Any, Any, Any], tuple[Callable[..., Any], tuple[Any, ...]]]
"""From arguments and results of the recorded operation, a function that draws nothing, and its arguments."""

_NO_SLOPE = frozenset(
    {"multinomial", "randperm", "rand", "randn", "randint", "binomial", "rand_like", "randn_like", "randint_like"}
)
"""What these give has no slope in what they are given, so it is a constant."""
_ZERO_SLOPE = frozenset(
    {"bernoulli", "normal", "poisson"}
    | {"bernoulli_", "uniform_", "normal_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
)
"""What these give, or leave where they write, has a slope of zero: autograd reaches what they are given."""


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a random operation draws anything this time: attention and cuDNN's layers without dropout do not."""
    names = [argument.name for argument in func._schema.arguments]
    rate = next((name for name in ("dropout_p", "dropout") if name in names), None)
    if rate is None:
        return True
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get(rate, 0.0) != 0 and given.get("train", True))


def repeated_without_drawing(kind: Traits, args: Any) -> Repeated | None:
    """How to repeat a random operation; None where its result is a constant.

    Raises:
        UnsupportedModuleError: it draws and computes in one, in a way that is not known here.
    """
    if kind.name == "native_dropout":
        return _dropout
    if kind.name in ("rrelu_with_noise", "rrelu_with_noise_"):
        return _leaky
    if kind.name in _NO_SLOPE or not _learning(args):
        return None
    if kind.name in _ZERO_SLOPE:
        return _drawn
    raise draws_and_computes(kind.name)


def _learning(args: Any) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def draws_and_computes(name: str) -> UnsupportedModuleError:
    """For a step with an operation that draws from a distribution whose parameters have a slope."""
    return UnsupportedModuleError(
        f"The step draws random numbers inside an operation that also computes with its layers ({name}): it could"
        " not be repeated at other states with the same draws. Draw first, then compute; in attention, dropout of 0, or"
        " torch.nn.attention.sdpa_kernel(SDPBackend.MATH); for gamma, beta and Dirichlet samples, a distribution whose"
        " draws are a function of noise, such as Normal or Kumaraswamy, or .sample() and its log_prob."
    )


def _drawn(args: Any, kwargs: Any, result: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return without_slope, (result.detach().clone(), *_learning(args))


def _dropout(args: Any, kwargs: Any, result: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    x, p, train = (*args, *kwargs.values())[:3]
    if train is False or p == 0:
        return masked_dropout, (x, torch.ones_like(result[1]), 1.0)
    return masked_dropout, (x, result[1], 0.0 if p == 1 else 1 / (1 - p))


def masked_dropout(x: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dropout with a mask that has been drawn."""
    return x * mask * scale, mask


_RRELU = 0.125, 1 / 3, False


def _leaky(args: Any, kwargs: Any, result: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    x, noise, *given = args
    lower, upper, training = (*given, *_RRELU[len(given) :])[:3]  # torch leaves out what is at its default
    training = kwargs.get("training", training)
    slope = noise.detach().clone() if training else torch.full_like(x, (lower + upper) / 2)
    return leaky_by, (x, slope)


def leaky_by(x: Tensor, slope: Tensor) -> Tensor:
    """A leaky ReLU with a slope for each element that has been drawn; 1 where it was not negative then."""
    return torch.where(x > 0, x, x * slope)
