"""Whether an update is local."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.learner import Learner
from lightning_ebm.presets import algorithm as preset
from lightning_ebm.program.autograd_graph import named_gradients
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.program.module_walk import clean
from lightning_ebm.reference import backprop
from lightning_ebm.step.closure import Closure
from lightning_ebm.step.setup import output_for


def check_locality(
    module: nn.Module,
    closure: Closure,
    algorithm: str | Algorithm = "predictive-coding",
    *,
    layers: Layers = None,
    output: Output = "auto",
    loss_reduction: Literal["mean", "sum"] = "mean",
    scale: float = 0.1,
) -> dict[str, tuple[str, ...]]:
    """Proves that every layer's update is local: with all states held, it depends on no other layer's parameters.

    States are relaxed once. Then, for each layer l in turn, the parameters in its drive are moved at random and the
    update of all parameters is read again at the *same* states. Only parameters that share a drive with those moved
    (or enter the loss beside them) may get another update; all others must get the same one, bit for bit.

    Args:
        module: the user's module; afterwards as it was.
        closure: returns the loss.
        algorithm: whose update to check.
        layers: as in `Learner`.
        output: as in `Learner`.
        loss_reduction: as in `Learner`.
        scale: standard deviation of the move, relative to that of each parameter (plus 1e-3).

    Returns:
        For each layer moved, the names of the parameters whose update changed.

    Raises:
        AssertionError: an update changed that had no business to; names the layer moved and the parameter.
    """
    chosen = preset(algorithm)
    output = output_for(chosen, output)
    finder = Learner(module, "zero-divergence", layers=layers, output=output, loss_reduction=loss_reduction)
    finder.gradients(closure)
    plan = finder.plan
    assert plan is not None
    learner = Learner(module, chosen, layers=layers, output=output, loss_reduction=loss_reduction)
    update = _read_again(learner, closure) if chosen.rule.relaxes else lambda: backprop(module, closure)
    before = update()
    again = update()
    unstable = [name for name in before if not torch.equal(before[name], again[name])]
    assert not unstable, f"The update of {unstable} differs between two readings at the same states and parameters."
    drives = [row.parameters for row in plan.rows] + [plan.loss_parameters]
    names = [str(key) for key in plan.states] + ["(loss)"]
    changed: dict[str, tuple[str, ...]] = {}
    for name, moved in zip(names, drives, strict=True):
        near = {other for drive in drives if set(drive) & set(moved) for other in drive}
        with _moved(module, set(moved), scale):
            after = update()
        changed[name] = tuple(p for p in before if not torch.equal(before[p], after[p]))
        far = [p for p in changed[name] if p not in near]
        assert not far, (
            f"The update of {far} changed when only {list(moved)}, the parameters in the drive of {name!r}, were moved"
            " and every state was held: it uses information that is not present at its own layer."
        )
    return changed


def _read_again(learner: Learner, closure: Closure) -> Callable[[], dict[str, Tensor]]:
    """Relaxes once; reads the update at those states, and the parameters of when it is called."""
    step = learner.begin(closure)
    with step.first_pass():
        loss = closure()
    step.surrogate(loss)
    network = step.network
    assert network is not None
    held = [end._replace(found=network.held(end.found)) for end in step.held]

    def update() -> dict[str, Tensor]:
        network.parameters_moved()
        return named_gradients(learner.module, network.update(learner.algorithm.rule, held))

    return update


@contextmanager
def _moved(module: nn.Module, names: set[str], scale: float) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    held = [(p, p.data) for name, p in module.named_parameters() if clean(name) in names]
    try:
        for parameter, value in held:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            spread = value.std(correction=0) if value.numel() > 1 else value.abs()
            parameter.data = value + scale * (spread + 1e-3) * noise
        yield
    finally:
        for parameter, value in held:
            parameter.data = value
