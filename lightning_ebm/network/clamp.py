"""Clamps: which units are held at which values, by the names of layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.network.clamped_states import Hold
from lightning_ebm.network.network import Network
from lightning_ebm.network.samples import samples_back, samples_first

Clamp = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""By the name of a layer: a value for all of its units, or a value and a mask, True where a unit is held.

Both have the shape of the state, samples first, ``(B, ...)``; or that of one sample, and then hold for all of them.
"""


def checked_clamp(clamp: Any) -> Clamp:
    """`clamp`, if it is one as far as can be told before the layers are known."""
    if not isinstance(clamp, Mapping):
        raise ConfigurationError(
            f'clamp={clamp!r}: expected {{layer name: tensor}} or {{layer name: (tensor, mask)}}, as {{"0": inputs}}.'
        )
    checked_names("clamp", clamp)
    for name, given in clamp.items():
        value, mask = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if not isinstance(value, Tensor) or not (mask is None or isinstance(mask, Tensor)):
            raise ConfigurationError(
                f"clamp[{name!r}]: expected a tensor, or a pair of a tensor and a boolean mask; got"
                f" {type(given).__name__}."
            )
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigurationError(
                f"clamp[{name!r}]: the mask has dtype {mask.dtype}; expected torch.bool, True where a unit is held."
                " Write mask > 0, or mask.bool(): numbers would leave it open what 0.5 means."
            )
    return clamp


def checked_names(argument: str, names: Any) -> tuple[str, ...]:
    """Names of layers, if that is what they are; a string alone would be taken for its letters."""
    some = isinstance(names, list | tuple | set | frozenset | Mapping)
    if not some or not all(isinstance(name, str) for name in names):
        write = f"; write [{names!r}]" if isinstance(names, str) else ""
        checked.refuse("", argument, names, f'names of layers, as in ebm.summary, such as ["0"]{write}')
    return tuple(names)


def resolved(clamp: Clamp, network: Network) -> dict[int, Hold]:
    """What is held, by the index of the layer.

    Raises:
        ConfigurationError: no layer of a name carries a state, or a value or mask does not fit its state.
    """
    index = {name: k for k, name in enumerate(network.names)}
    refuse_unknown("clamp", clamp, network)
    found = {}
    for name, given in clamp.items():
        value, mask = given if isinstance(given, tuple) else (given, None)
        k = index[name]
        if value.is_meta or (value.is_complex() and not network.free[k].is_complex()):
            got = "no numbers, on the device meta" if value.is_meta else f"dtype {value.dtype}"
            raise ConfigurationError(
                f"clamp[{name!r}]: the value has {got}, and the state {network.free[k].dtype}: give real numbers."
            )
        value = _fitted(name, "value", value.detach().to(network.free[k]), network, k)
        hold = Hold(value, None if mask is None else _fitted(name, "mask", mask.to(value.device), network, k))
        if not bool(torch.isfinite(hold.put(torch.zeros_like(value))).all()):
            raise ConfigurationError(
                f"clamp[{name!r}]: units are to be held at nan or inf, where no energy is finite. For missing values"
                " give a mask, {name: (value, ~value.isnan())}."
            )
        found[k] = hold
    return found


def refuse_unknown(argument: str, names: Any, network: Network) -> None:
    """Refuses names of layers that carry no state."""
    for name in names:
        if name not in network.names:
            close = checked.nearest(name, network.names)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"{argument}: no layer {name!r} carries a state.{hint} Layers with states: {list(network.names)}."
                " Inputs are named by an nn.Identity that they pass through, outputs by their module; other modules"
                " carry states where layers=[...] says so."
            )


def _fitted(name: str, what: str, tensor: Tensor, network: Network, k: int) -> Tensor:
    """A value or mask in the shape of the state."""
    state, layout = network.free[k], network.layouts[k]
    shape = samples_first(state, layout, network.batch_size).shape
    one = shape[1:] if layout is not None else shape
    if tensor.shape not in (shape, one, (1, *one)):
        raise ConfigurationError(
            f"clamp[{name!r}]: the {what} has shape {tuple(tensor.shape)}; expected {tuple(shape)}, that of the state"
            f" with samples first, or {tuple(one)}, one for all samples."
        )
    laid_out = torch.empty_like(state, dtype=tensor.dtype)  # as the program expects its states in memory
    return laid_out.copy_(samples_back(tensor.expand(shape), state, layout))
