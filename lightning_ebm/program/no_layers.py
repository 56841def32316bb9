"""What is said where no layer, or not the ones that were asked for, can carry a state."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from lightning_ebm.errors import LayerDiscoveryError, UnsupportedModuleError
from lightning_ebm.program.calls import clean
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.record import Record
from lightning_ebm.program.wiring import Plan


def refuse(module: nn.Module, tried: list[str], called: bool, record: Record) -> NoReturn:
    """Says why no layer of a pass can carry a state.

    Args:
        module: the user's.
        tried: what was looked at, and why it did not do.
        called: whether any of its layers was called.
        record: of the pass.

    Raises:
        LayerDiscoveryError: there is none.
        UnsupportedModuleError: there are some that cannot be seen, or hold complex numbers.
    """
    scripted = [name for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedModuleError(
            f"No layer of {type(module).__name__} can carry a state, as {clean(scripted[0]) or 'it'!r} is compiled by"
            " torch.jit.script: calls inside of it cannot be seen. Train the module as it was before scripting."
        )
    if any(mark.prediction.is_complex for mark in record.marks):
        raise UnsupportedModuleError(
            f"No layer of {type(module).__name__} can carry a state: its layers return complex numbers, and an energy"
            " is a function of real states. Write the complex layers as real ones on pairs (torch.view_as_real), or"
            " give states to layers that return real numbers: layers=[...]."
        )
    if record.transformed:
        raise LayerDiscoveryError(
            f"The layers of {type(module).__name__} are called within a transform of torch.func (vmap, jvp, grad,"
            " hessian), where none can carry a state. Call the module on the batch itself, without vmap, and take"
            " slopes by torch.autograd.grad(..., create_graph=True)."
        )
    if not called and any(True for _ in module.children()):
        raise LayerDiscoveryError(
            f"No layer of {type(module).__name__} was called while the loss was computed, so there is nothing that can"
            " relax. Does the loss come from this very module, or from a copy, another module, or values computed"
            " before? Call the module inside the closure, or inside training_step."
        )
    raise LayerDiscoveryError(
        f"No layer of {type(module).__name__} can carry a state (tried: {'; '.join(tried) or 'nothing'}): a layer is"
        " a call of an activation module, or of a module you name, that the loss depends on and that trainable"
        " parameters feed. Without one nothing relaxes and the update would be plain backprop. If the network has a"
        ' single weighted layer, give its output a state with output="state"; if its nonlinearities are functions'
        ' (F.relu), name the modules in front of them: layers=["fc1", "fc2"] or layers=nn.Linear.'
    )


def absent(
    candidates: Mapping[nn.Module, str], layers: Layers, plan: Plan, why_not: Mapping[str, str]
) -> dict[str, str]:
    """Names that were asked for and carry no state; of types, one module of each of which none does. And why."""
    kinds: tuple[Any, ...] = layers if isinstance(layers, tuple) else (layers,)
    if isinstance(layers, list) or all(isinstance(kind, str) for kind in kinds):
        groups = [[name] for name in candidates.values()]
    elif all(isinstance(kind, type) for kind in kinds):
        groups = [[name for m, name in candidates.items() if isinstance(m, kind)] for kind in kinds]
    else:  # found, or by a predicate, which asks for none in particular
        return {}
    carrying = {key.name for key in plan.states}
    return {
        group[0]: why_not.get(group[0], "it is no layer of this pass")
        for group in groups
        if group and not carrying & set(group)
    }


def shown(layers: Layers) -> str:
    """`layers` as the user wrote it."""
    kinds = layers if isinstance(layers, tuple) else (layers,)
    names = [kind.__name__ for kind in kinds if isinstance(kind, type)]
    return ", ".join(names) if len(names) == len(kinds) else repr(layers)
