"""True gradients: slow, obvious, and the oracle of everything else."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ebm import checked
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies.base import Energy, has_best_response
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import Landscape, ResponseForces
from lightning_ebm.learner import Learner
from lightning_ebm.nudges import Infinitesimal
from lightning_ebm.presets import algorithm as preset
from lightning_ebm.program.autograd_graph import named_gradients
from lightning_ebm.program.before import Undoing
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.purity import build, untouched
from lightning_ebm.relaxers import Anderson, FixedPoint, GradientDescent, Relaxation, Relaxer
from lightning_ebm.step.closure import Closure, check_closure, checked_loss
from lightning_ebm.step.setup import output_for

Reference = Literal["backprop", "equilibrium"]
"""Which gradient is called true."""


def backprop(module: nn.Module, closure: Closure) -> dict[str, Tensor]:
    """dL/dtheta of the feed-forward network, as ``loss.backward()`` would put it into ``.grad``.

    Leaves no trace: one extra pass from the random state and buffers of now, which are put back afterwards.

    Args:
        module: whose parameters.
        closure: returns the loss, a scalar.

    Returns:
        ``{parameter name: tensor}``, without the parameters that the loss does not reach.

    Raises:
        ConfigurationError: the closure returns no usable loss.
    """
    checked.instance("backprop", "module", module, nn.Module, "a torch.nn.Module")
    check_closure(closure)
    build(module, closure)
    undoing = Undoing()
    with untouched(module), torch.enable_grad():
        try:
            with undoing:
                loss = closure()
            return named_gradients(module, checked_loss(loss, module), hooked=True)
        finally:
            undoing.restore()


def equilibrium(
    module: nn.Module,
    closure: Closure,
    algorithm: str | Algorithm,
    *,
    layers: Layers = None,
    output: Output = "auto",
    loss_reduction: Literal["mean", "sum"] = "mean",
) -> dict[str, Tensor]:
    """d L(x_bar(theta)) / dtheta, the gradient of the loss at the free equilibrium, by implicit differentiation.

    x_bar = argmin_x I is found to rounding, whatever the algorithm's own relaxer would stop at; then H p = dL/dx is
    solved there, and the gradient is dL/dtheta - (d2I/dtheta dx) p. Of the algorithm only the energy and the initial
    state matter. For a divergence energy x_bar is the forward pass and this is `backprop`'s gradient. No trace is left.

    Args:
        module: whose parameters.
        closure: returns the loss, a scalar.
        algorithm: whose energy.
        layers: as in `Learner`.
        output: as in `Learner`; "auto" is a state for algorithms that hold the output.
        loss_reduction: as in `Learner`.

    Returns:
        ``{parameter name: tensor}``, without the parameters that the loss does not reach.

    Raises:
        RelaxationDivergedError: no equilibrium was found, or what was found is no minimum.

    Source:
        Almeida 1987; Pineda 1987.
    """
    chosen = preset(algorithm)
    if not chosen.rule.relaxes:
        return backprop(module, closure)
    exact = exactly(chosen)
    output = output_for(chosen, output)
    learner = Learner(module, exact, layers=layers, output=output, loss_reduction=loss_reduction)
    return learner.gradients(closure)


def exactly(algorithm: Algorithm) -> Algorithm:
    """The algorithm whose update is the true gradient at the free equilibrium of `algorithm`'s energy."""
    settled = Settled(algorithm.energy)
    return dataclasses.replace(
        algorithm, nudge=Infinitesimal(), relaxer=settled, free_relaxer=None, update="cross-derivative"
    )


class Settled(Relaxer):
    """Sweeps, then accelerated ones, until the states answer themselves to rounding.

    Args:
        energy: of the algorithm; one without a best response is descended by gradient steps.
    """

    def __init__(self, energy: Energy) -> None:
        self._sweeps = has_best_response(energy)

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        if not self._sweeps:
            return GradientDescent(lr=0.5, max_steps=20000, tol=1e-13).relax(landscape, start, strength)
        near = FixedPoint(max_steps=200, tol=1e-13).relax(landscape, start, strength)
        if near.status == "converged":
            return near
        found = Anderson(max_steps=500, memory=6, tol=1e-13).relax(landscape, near.point, strength)
        moved = landscape.evaluate(ResponseForces(), found.point, strength).gradients
        size = landscape.per_sample([x.square() for x in found.point]).sqrt()
        left = float((landscape.per_sample([g.square() for g in moved]).sqrt() / size.clamp_min(1e-30)).max())
        if not left <= 1e5 * torch.finfo(size.dtype).eps:
            raise RelaxationDivergedError(
                f"No free equilibrium was found: after 700 sweeps the states still move by {left:.2g} of their size."
                " Implicit differentiation needs one. The feedback loop is too strong: use smaller weights, bounded"
                " activations or a smaller gain, ebm.Hopfield(feedback=...)."
            )
        return found
