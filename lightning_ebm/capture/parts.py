"""Analytic functions of x + i y, from real and imaginary part to real and imaginary part."""

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor]


def apart(z: Tensor) -> Parts:
    """x and y, each by itself in memory."""
    return z.real.contiguous(), z.imag.contiguous()


def tanh(x: Tensor, y: Tensor) -> Parts:
    """(t + i s c (1 - t^2)) / (c^2 + t^2 s^2), with t = tanh x, s = sin y, c = cos y: nothing in it overflows."""
    t, s, c = torch.tanh(x), torch.sin(y), torch.cos(y)
    imaginary = s * c
    below = c.square_().add_(s.mul_(t).square_())
    imaginary.mul_(torch.rsub(t.square(), 1)).div_(below)
    return t.div_(below), imaginary


def sigmoid(x: Tensor, y: Tensor) -> Parts:
    """1/2 + 1/2 tanh((x + i y) / 2)."""
    real, imaginary = tanh(0.5 * x, 0.5 * y)
    return real.mul_(0.5).add_(0.5), imaginary.mul_(0.5)


def exp(x: Tensor, y: Tensor) -> Parts:
    """e^x (cos y + i sin y)."""
    size = torch.exp(x)
    return torch.cos(y).mul_(size), torch.sin(y).mul_(size)


def log(x: Tensor, y: Tensor) -> Parts:
    """log |x + i y| and its angle."""
    return torch.hypot(x, y).log_(), torch.atan2(y, x)


def slope_of_tanh(x: Tensor, y: Tensor) -> Parts:
    """The conjugate of 1 - z^2 at the value z = x + i y of tanh."""
    return torch.rsub(x * x, 1).addcmul_(y, y), (x * y).mul_(2.0)


def slope_of_sigmoid(x: Tensor, y: Tensor) -> Parts:
    """The conjugate of z (1 - z) at the value z = x + i y of a sigmoid."""
    return (x - x * x).addcmul_(y, y), (2 * x - 1).mul_(y)
