"""Layers that were asked for, or looked for, and that a pass does not have: which, why, and what to do."""

from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch
from torch import nn

from lightning_ebm.errors import LayerDiscoveryError, UnsupportedModuleError
from lightning_ebm.program.candidates import WEIGHTED, Asked, Layers, asked_for
from lightning_ebm.program.custom_calls import is_of_the_users
from lightning_ebm.program.module_walk import clean, modules_of, parameters_of
from lightning_ebm.program.named import named
from lightning_ebm.program.record import Record
from lightning_ebm.program.wiring import Plan


def refuse_all(module: nn.Module, tried: list[str], called: bool, record: Record) -> NoReturn:
    """No call can carry a state: why, and what to do.

    Args:
        module: the user's.
        tried: sets of modules, and what became of them, in words.
        called: whether any of them was called.
        record: of the pass.

    Raises:
        LayerDiscoveryError: always, or its kin that names the cause.
        UnsupportedModuleError: layers are scripted, or return complex numbers.
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
    inside = any(mark.module is not module or isinstance(module, WEIGHTED) for mark in record.marks)
    if direct := _used_directly(module, record):
        raise LayerDiscoveryError(
            f"The loss is computed from parameters of {type(module).__name__} that no call of a layer has used"
            f" ({', '.join(direct[:3])}{', ...' if len(direct) > 3 else ''}): tensors are used directly (x @ self.W,"
            " F.linear(x, layer.weight), layer.forward(x), torch.tanh), or by modules that it does not hold (functional"
            " calls of a template), so that nothing says where a layer ends. Call modules of its own there (nn.Linear,"
            " nn.Tanh), or hand the output of each layer through an nn.Identity() of its own and name these:"
            " layers=[...]."
        )
    if not called and not inside and any(True for _ in module.children()):
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
        ' (F.relu), name the modules in front of them: layers=["fc1", "fc2"] or layers=nn.Linear.' + _hidden_in(record)
    )


def _used_directly(module: nn.Module, record: Record) -> list[str]:
    """Names of parameters that a pass has read outside of any call of the module that holds them.

    Where others were called, of matrices alone: a temperature beside a network hides no layer.
    """
    called = {m for mark in record.marks if mark.module is not module for m in modules_of(mark.module)}
    if isinstance(module, WEIGHTED):
        called.add(module)
    read = _read_by(record)
    return [
        clean(f"{name}.{own}" if name else own)
        for name, m in module.named_modules()
        for own, p in m.named_parameters(recurse=False)
        if id(p) in read and m not in called and (p.ndim > 1 or not called)
    ]


def _hidden_in(record: Record) -> str:
    """What may have called layers where none can be seen."""
    own = sorted({named(node.func).name for node in record.nodes if is_of_the_users(node.func)})
    if not own:
        return ""
    return (
        f" Layers that a custom autograd function ({', '.join(own)}) calls in its forward, as those of reversible"
        " networks do, cannot be seen: call them as they are, or within torch.utils.checkpoint(...,"
        " use_reentrant=False)."
    )


def refuse_output(module: nn.Module) -> NoReturn:
    """The output is to be a state, and no call returns it.

    Raises:
        LayerDiscoveryError: always.
    """
    raise LayerDiscoveryError(
        f'The output of {type(module).__name__} was to be a state (output="state", or a nudge that holds it), and no'
        " call of a module with weights returns it: the last weights are used directly (x @ self.W, F.linear(x,"
        " layer.weight), layer.forward(x)), so that the last hidden layer would stand for it. Call a module there,"
        " such as nn.Linear."
    )


def skipped_in(module: nn.Module, record: Record) -> set[str]:
    """Names of blocks that a pass has left out of a list of them, and of all in them.

    So do stochastic depth, and experts that no sample is sent to: of a block in an `nn.ModuleList` or `nn.ModuleDict`
    no parameter has been read, and of another one of its kind some have. Nothing of it is a part of another layer.
    """
    read = _read_by(record)
    found: set[str] = set()
    for name, container in module.named_modules():
        if not isinstance(container, nn.ModuleList | nn.ModuleDict):
            continue
        held = {child: parameters_of(modules_of(child)) for child in container.children()}
        called = {child: any(id(p) in read for p in parameters) for child, parameters in held.items()}
        kinds = {type(child) for child, was in called.items() if was}
        out = {child for child, was in called.items() if held[child] and not was and type(child) in kinds}
        for part, child in container.named_children():
            if child in out:
                first = f"{name}.{part}" if name else part
                found.update(clean(f"{first}.{inner}" if inner else first) for inner, _ in child.named_modules())
    return found


def is_read(modules: Iterable[nn.Module], record: Record) -> bool:
    """Whether a pass has read any parameter of these modules, or of those in them."""
    read = _read_by(record)
    return any(id(p) in read for module in modules for p in parameters_of(modules_of(module)))


def _read_by(record: Record) -> set[int]:
    """Of what was there before the pass, what it has read."""
    return {id(tensor) for tensors in (record.leaves, record.inputs) for tensor in tensors.values()}


def absent_from(
    candidates: Mapping[nn.Module, str], layers: Layers, plan: Plan, why_not: Mapping[str, str]
) -> dict[str, str]:
    """Names that were asked for and carry no state; of types, one module of each of which none does. And why."""
    if layers is None:  # found, and none in particular asked for
        return {}
    asked = asked_for(layers)
    groups = [[name] for name in candidates.values() if name in asked.names]
    groups += [[name for m, name in candidates.items() if isinstance(m, kind)] for kind in asked.kinds]
    carrying = {key.name for key in plan.states}
    return {
        group[0]: why_not.get(group[0], "it is no layer of this pass")
        for group in groups
        if group and not carrying & set(group)
    }


def shown(layers: Layers) -> str:
    """What was asked for, as the user wrote it."""
    asked = Asked() if layers is None else asked_for(layers)
    return repr(layers) if asked.names or not asked.kinds else ", ".join(kind.__name__ for kind in asked.kinds)
