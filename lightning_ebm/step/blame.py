"""Whose fault it is that a batch cannot be trained on: weights, batch, buffers, loss, overflow, or the relaxation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.program.module_walk import clean
from lightning_ebm.program.tensors import of_batch

Backprop = Callable[[], Mapping[str, Tensor]]
"""Gives the gradient of the feed-forward network, by name."""

_SKIP = ' on_divergence="skip" leaves out such batches, and counts them.'


def floating_tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch that may hold nan or infinity. That may be meant, as in masks."""
    return [tensor for _, tensor in _tensors(batch)]


def total_of(tensor: Tensor) -> Tensor:
    """The sum, which any number that is not finite spoils, several times sooner than each could be tested.

    It may also overflow: whoever acts on it looks again.
    """
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))


def blamed(
    error: RelaxationDivergedError,
    module: nn.Module,
    buffers: Sequence[tuple[str, Tensor]],
    batch: Any,
    loss: Tensor | None,
    backprop: Backprop | None,
) -> RelaxationDivergedError:
    """The error with its cause: the first of those that are known to spoil all that comes after.

    Args:
        error: what the relaxation, or the loss, ended with.
        module: the user's.
        buffers: its own, by name, as they were before the pass.
        batch: what it is trained on, as far as that is known.
        loss: of the forward pass; None where there is none yet.
        backprop: gives the gradient of the feed-forward network; None where there is no pass to ask.
    """
    text = _in_weights(module)
    text = text or _in_batch(batch, loss, backprop) or _in_buffers(buffers)
    text = text or _in_loss(loss, batch) or (None if backprop is None else _in_gradient(backprop))
    return error if text is None else RelaxationDivergedError(text)


def _in_weights(module: nn.Module) -> str | None:
    if not (weights := _spoiled(module.named_parameters())):
        return None
    return (
        f"The weights hold nan or inf already: {_listed(weights)}. An update before this one was too large: lower"
        " the learning rate of the parameters, clip gradients, and go on from a checkpoint of before. Or it was nan"
        " itself, as the slope of a root at 0 is, of which exact rules hand on what backprop does:"
        " torch.autograd.set_detect_anomaly(True) names the operation."
    )


def _in_batch(batch: Any, loss: Tensor | None, backprop: Backprop | None) -> str | None:
    """Numbers that are not finite, unless loss and gradient are: then they are meant, as in masks."""
    spoiled = _spoiled_in(batch)
    if not spoiled or (_is_finite(loss) and backprop is not None and not spoils(backprop())):
        return None
    return (
        f"The batch holds numbers that are not finite ({'; '.join(spoiled)}), and the weights are finite: one such"
        f" number spoils every update. Clean the data, or drop the samples before training_step;{_SKIP}"
    )


def _in_buffers(buffers: Sequence[tuple[str, Tensor]]) -> str | None:
    if not (stale := _spoiled(buffers)):
        return None
    return (
        f"Buffers hold nan or inf: {_listed(stale)}. Running statistics stay so once a batch with nan has been"
        " through them. Go on from a checkpoint of before, or set them anew (reset_running_stats)."
    )


def _in_loss(loss: Tensor | None, batch: Any) -> str | None:
    if loss is None or _is_finite(loss):
        return None
    value = float(loss.detach().real)
    if empty := _empty_in(batch):
        return (
            f"The batch holds no sample ({empty}), and a mean over nothing is {value}: there is nothing to learn from."
            f" Leave it out before training_step, or sum the loss;{_SKIP}"
        )
    return (
        f"The loss of the forward pass is {value}, while weights and inputs are finite: there is nothing finite to"
        " relax towards. Look at the labels, for log(0) or 0/0 in the loss, and for a mean over nothing, where a mask"
        " or ignore_index leaves no target; if it has grown over the last steps, lower the learning rate of the"
        f" parameters, or clip.{_SKIP}"
    )


def _in_gradient(backprop: Backprop) -> str | None:
    gradients = backprop()
    if nan := [name for name, g in gradients.items() if bool(g.to_dense().isnan().any())]:
        return (
            f"The loss is finite, and its own gradient is nan in {_listed(nan)}, by backprop as well: an operation of"
            " the step has no slope where it was evaluated. Such are the root, norm or standard deviation of zeros, and"
            " 0 * nan on the way back from what torch.where, nanmean or a mask has left out. Add a small number under"
            f" the root, and fill what is left out before anything is computed with it.{_SKIP}"
        )
    if overflown := _spoiled(_squares(gradients)):
        return (
            f"The loss is finite, and the square of its own gradient is not: it overflows in {_listed(overflown)}, so"
            " that no relaxation could tell how far it has come. The weights have grown too large: lower the"
            " learning rate of the parameters, clip gradients, and go on from a checkpoint of before."
        )
    return None


def _is_finite(loss: Tensor | None) -> bool:
    return loss is None or bool(torch.isfinite(loss.detach()).all())


def spoils(gradients: Mapping[str, Tensor]) -> bool:
    """Whether a gradient is not finite."""
    return bool(_spoiled(gradients.items()))


def _squares(gradients: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """|g|^2 by name: what relaxers compare forces by."""
    return ((name, gradient.abs().square().sum()) for name, gradient in gradients.items())


def _spoiled_in(batch: Any) -> list[str]:
    return [f"{where}: {_told(tensor)}" for where, tensor in _tensors(batch) if _is_spoiled(tensor)]


def _empty_in(batch: Any) -> str:
    """Where a batch holds a tensor of no sample, in words; nothing where it holds none."""
    empty = ((where, tensor) for where, tensor in _tensors(batch) if tensor.ndim and not len(tensor))
    return next((f"{where} has shape {tuple(tensor.shape)}" for where, tensor in empty), "")


def _tensors(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch that can hold nan, and how to get at them."""
    for where, tensor in of_batch(batch):
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta:
            with suppress(RuntimeError):  # what a call within torch.func was handed cannot be looked at outside of it
                if tensor.layout is torch.strided:
                    yield where, tensor.detach()


def _is_spoiled(tensor: Tensor) -> bool:
    return not bool(torch.isfinite(tensor.to_dense()).all())


def _told(tensor: Tensor) -> str:
    counts = {"nan": int(torch.isnan(tensor).sum()), "inf": int(torch.isinf(tensor).sum())}
    return " and ".join(f"{count} times {what}" for what, count in counts.items() if count)


def _spoiled(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    floating = ((name, t.detach()) for name, t in named if t.is_floating_point() or t.is_complex())
    return [clean(name) for name, t in floating if _is_spoiled(t)]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
