"""Whether a pass is an analytic function of its complex states."""

import math

import torch
from torch import Tensor

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.evaluations.of_slope import ones_for
from lightning_ebm.program.interpreter import Pass


def is_analytic(seen: Pass, loss: Tensor, rounding: float) -> bool:
    """Cauchy and Riemann: multiplied by i on one side, an analytic slope is multiplied by i on the other.

    Args:
        seen: a pass at complex states.
        loss: its loss.
        rounding: of its arithmetic.

    Returns:
        False where states ran away, of which the relaxer has more to say.

    Raises:
        UnsupportedModuleError: a prediction or the loss is not analytic.
    """
    for name, top in [(call.key.name, call.prediction) for call in seen.layers] + [("the loss", loss)]:
        if not top.requires_grad:
            continue
        # Of what is real though it moves with complex states nothing can be multiplied by i: it is not analytic.
        factors = (1, 1j) if top.is_complex() else (1, 0)
        plain, turned = (
            torch.autograd.grad(top, seen.states, factor * ones_for(top), retain_graph=True, allow_unused=True)
            for factor in factors
        )
        for one, other in zip(plain, turned, strict=True):
            if one is None or other is None or not one.numel() or not one.is_complex():
                continue
            room = 1e4 * max(rounding, torch.finfo(one.dtype).eps) * float(one.abs().max())
            if not math.isfinite(room):
                return False
            if not torch.allclose(other, 1j * one, rtol=0.0, atol=room):
                raise UnsupportedModuleError(
                    f"What is computed between the states below and {name!r} is not an analytic function of them"
                    " (abs, a norm, a variance, a real part, a conjugate, a maximum): a holomorphic nudge would give a"
                    " number that is no gradient. Take ebm.Centered(...), or tanh, sigmoid and linear maps throughout,"
                    " and squares in place of norms."
                )
    return True
