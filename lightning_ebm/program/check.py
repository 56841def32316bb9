"""A new record against autograd: the exact rule on the record must be autograd's own gradient of the user's pass."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_ebm.counted import counted
from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.network.tensor_version import versions
from lightning_ebm.program.autograd_graph import graph_of
from lightning_ebm.program.collectives import Refusing
from lightning_ebm.program.custom_calls import is_of_the_users
from lightning_ebm.program.exact_rule import exact_rule
from lightning_ebm.program.interpreter import Program, at_prediction
from lightning_ebm.program.module_walk import clean
from lightning_ebm.program.named import named
from lightning_ebm.program.record import Record
from lightning_ebm.program.rounding import Rounding
from lightning_ebm.program.seams import hooked_input, hooked_output
from lightning_ebm.program.tensors import largest
from lightning_ebm.program.user_hooks import without_hooks
from lightning_ebm.program.wiring import Plan
from lightning_ebm.purity import untouched, untouched_tensors

log = logging.getLogger(__name__)


def check_against_autograd(module: nn.Module, program: Program, plan: Plan, loss: Tensor) -> frozenset[str]:
    """Compares the two gradients, and the tensors that they reach.

    The exact rule sends each layer's error down one layer's own Jacobian at a time, so it only is the gradient if
    drives, predictions, wiring and loss of the record are those of the pass.

    Args:
        module: the user's module.
        program: the record, cut at its states.
        plan: the wiring.
        loss: what the user's pass returned, in its own graph.

    Returns:
        what this says too little of: parameters whose gradient is zero everywhere, as below a layer that begins with
        weights of zero, or not finite; and code of the user's own, which may yet be handed another gradient.

    Raises:
        UnsupportedModuleError: they differ, or the record reaches other parameters.
    """
    names = {id(p): clean(name) for name, p in module.named_parameters()}
    leaves = graph_of([loss])[0]
    with without_hooks(leaves):
        return _compare(names, module, program, plan, loss, leaves)


def _compare(
    names: dict[int, str], module: nn.Module, program: Program, plan: Plan, loss: Tensor, leaves: Sequence[Tensor]
) -> frozenset[str]:
    own = program.user_code()
    if not leaves:  # all have been frozen since: there is nothing to compare, and all of it when it is thawed
        return frozenset(names.values()) | ({own} if own is not None else set())
    alone = nullcontext() if own is None else Refusing(own)
    with _writing_nothing(module, program), _handing_out_nothing(module, program), alone:
        found = _autograds_own(module, program.record, loss, leaves)
    program.record.told()
    seen = program.run(at_prediction())
    try:
        ours = exact_rule(seen, plan, leaves)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _fails_elsewhere(error, program) from error
    ours = [None if g is None else g.to_dense() for g in ours]
    true = [None if t is None else t.to_dense() for t in found]
    rounding = max(seen.rounding, torch.finfo(loss.dtype).eps)
    called = [names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)}") for leaf in leaves]
    if not all(p is None or torch.isfinite(p).all() for p in true):
        return frozenset(called)
    bounds = Rounding(program, plan, leaves, ours, rounding)
    parting: dict[str, str] = {}
    for k, (name, g, t) in enumerate(zip(called, ours, true, strict=True)):
        if t is None:
            continue
        if g is None:
            if bool(t.any()):
                parting[name] = f"autograd reaches {name}, and what was recorded of the step does not"
            continue
        off, size = largest(g - t), largest(t)
        if not bounds.explains(k, off, size):
            parting[name] = f"the gradient of {name} is {off / max(size, 1e-300):.2g} off autograd's own"
    if parting:
        _refuse(parting, program, plan, module, loss)
    silent = {name for name, t in zip(called, true, strict=True) if t is not None and not t.any()}
    if own is not None:
        _check_proportional(program, plan, leaves, ours, rounding)
        silent.add(own)
    return frozenset(silent)


@contextmanager
def _writing_nothing(module: nn.Module, program: Program) -> Iterator[None]:
    """Refuses backward code of the user's own that writes to what was there before: it runs at every evaluation."""
    own = [node for node in program.order if _foreign(node.func)]
    if not own:
        yield
        return
    record = program.record
    handed = [record.inputs.get(value, record.leaves.get(value)) for node in own for value in node.values()]
    held = [t for t in [*handed, *module.buffers()] if t is not None and not t.is_inference()]
    before = versions(held)
    yield
    for tensor, now, then in zip(held, versions(held), before, strict=True):
        if now != then:
            names = ", ".join(sorted({_foreign(node.func) for node in own}))
            raise UnsupportedModuleError(
                f"The backward code of a custom autograd function ({names}) writes to a tensor of shape"
                f" {tuple(tensor.shape)} that was there before: it runs at every evaluation of a relaxation, and would"
                " write each time. Write to it in training_step, or in on_after_backward."
            )


@contextmanager
def _handing_out_nothing(module: nn.Module, program: Program) -> Iterator[None]:
    """Refuses backward code of the user's own that fills `.grad` itself: it would at every evaluation, at any scale."""
    own = _foreign_in(program)
    if not own:
        yield
        return
    parameters = dict(module.named_parameters())
    before = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        yield
        filled = [clean(name) for name, p in parameters.items() if p.grad is not None]
    finally:
        for name, p in parameters.items():
            p.grad = before[name]
    if filled:
        raise UnsupportedModuleError(
            f"The backward code of a custom autograd function ({', '.join(own)}) calls backward() itself, as reversible"
            f" blocks and checkpoints by hand do, and so adds to the gradient of {counted(len(filled), 'parameter')}"
            f" ({', '.join(filled[:3])}{', ...' if len(filled) > 3 else ''}): it would at every evaluation of a"
            " relaxation, of errors that are none of the loss's own. Nothing was learned. Call the layers as they are,"
            " or within torch.utils.checkpoint(..., use_reentrant=False); or hand the function its parameters and"
            " return their gradients, by torch.autograd.grad."
        )


def told_to_hooks(module: nn.Module, record: Record, loss: Tensor) -> None:
    """Hooks between the operations of a pass that is known already are told of its own gradient."""
    leaves = graph_of([loss])[0]
    with without_hooks(leaves):
        _autograds_own(module, record, loss, leaves)
    record.told()


def _autograds_own(
    module: nn.Module, record: Record, loss: Tensor, leaves: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradient of the user's pass, told to hooks between its operations.

    Where saved tensors have hooks, as those of checkpoints, forward passes of the user's run again in it. It is a
    backward pass of ours alone, so that what they do to the module is undone; but not what other hooks do.
    """
    again = nullcontext() if not record.notes else (untouched_tensors if record.has_hooks else untouched)(module)
    share = torch.full_like(loss, record.share)
    with again:
        found = torch.autograd.grad(loss, leaves, share, retain_graph=True, allow_unused=True)
    return found if record.share == 1.0 else tuple(None if g is None else g / record.share for g in found)


def _fails_elsewhere(error: Exception, program: Program) -> Exception:
    """What the user's own backward code raises where it has been handed other tensors than those of the pass."""
    own = _foreign_in(program)
    if not own or isinstance(error, UnsupportedModuleError | torch.OutOfMemoryError):
        return error
    return UnsupportedModuleError(
        f"The backward code of a custom autograd function ({', '.join(own)}) fails at other states than those of the"
        f" step's own pass: {error}. There it is handed other tensors, while a function or an object that it keeps"
        " computes with those of the pass. Hand all tensors that it computes with to .apply(...), and compute with"
        ' what comes in; or take algorithm="backprop" for this module.'
    )


_SCALES = (2.0**-10, 2.0**10)
"""Powers of two: what is proportional is rounded as the gradient itself is, so that most of it comes out bit by bit."""


def _check_proportional(
    program: Program, plan: Plan, leaves: Sequence[Tensor], ours: Sequence[Tensor | None], rounding: float
) -> None:
    """Errors come in the scale of the nudge: backward code of the user's own must be proportional to its input.

    Each parameter counts for itself: what clips on the way to small gradients is nothing beside large ones. float16
    alone is coarse here, as it cannot hold much that is 1,000 times smaller or larger.
    """
    sizes = [0.0 if g is None else largest(g) for g in ours]
    top = max(sizes, default=0.0)
    noise = min(rounding, torch.finfo(torch.float32).eps)
    narrow = rounding == torch.finfo(torch.float16).eps
    most = 0.1 if narrow else max(0.01, 4 * rounding)
    worst = 0.0
    for scale in _SCALES:
        scaled = exact_rule(program.run(at_prediction()), plan, leaves, scale)
        for size, g, s in zip(sizes, ours, scaled, strict=True):
            off = 0.0 if g is None or s is None else largest(g - s / scale)
            beside = top if narrow else max(size, 1e3 * noise * top)
            if not off <= most * beside:
                raise UnsupportedModuleError(_NOT_PROPORTIONAL.format(_in_brackets(program)))
            worst = max(worst, off / beside if off else 0.0)
    if not narrow and worst > max(1e3 * noise, 4 * rounding):
        log.warning(_NEARLY_PROPORTIONAL, _in_brackets(program), f"{worst:.1g}")


_NOT_PROPORTIONAL = (
    "A gradient hook, or the backward code of a custom autograd function{}, gives something that is not proportional to"
    " the gradient it is given, as clipping and taking signs do, and solvers that stop at an absolute tolerance."
    " Between layers errors come in the scale of the nudge, so that it would do something else than under backprop."
    " Clip the gradients of parameters instead (Trainer(gradient_clip_val=...), or a hook on the parameter);"
    " differentiate through a solver in place of its adjoint method, or let that take fixed steps or a finer tolerance."
)
_NEARLY_PROPORTIONAL = (
    "A gradient hook, or the backward code of a custom autograd function%s, is only roughly proportional to the"
    " gradient it is given, as solvers with a tolerance are: of a thousandth or a thousandfold of it, updates come out"
    " %s of their size off. Between layers errors come in the scale of the nudge, so that they may be that far from"
    " backprop's. A finer tolerance mends it."
)


def _in_brackets(program: Program) -> str:
    own = _foreign_in(program)
    return f" ({', '.join(own)})" if own else ""


def _foreign(func: Any) -> str:
    """The name of a function that is neither torch's operation nor this library's."""
    if func in (hooked_input, hooked_output):
        return "backward hooks of modules"
    return named(func).name if is_of_the_users(func) else ""


def _foreign_in(program: Program) -> list[str]:
    """The names of such functions."""
    return sorted({name for node in program.order if (name := _foreign(node.func))})


_SCRIPTED = (
    " {} is compiled by torch.jit.script, and what torch makes of it after some calls cannot be seen. Train with what"
    " it was before scripting (PYTORCH_JIT=0 in the environment turns scripting off)."
)
_ON_NODES = (
    " The step reads grad_fn: a hook on a node of autograd's graph (grad_fn.register_hook) changes gradients where no"
    " other state could have it. Use tensor.register_hook on the tensor instead."
)
_PACKED = (
    " Hooks on saved tensors (torch.autograd.graph.saved_tensors_hooks) may hand back others than they were given, as"
    " those that compress do: the gradient is then that of no function."
)
OVERWRITTEN = (
    " The step has used a tensor, and then writes to its memory where autograd does not look (.data, .numpy(), DLPack,"
    " .untyped_storage(); a batch norm in training mode does, to running statistics that it has read in evaluation mode"
    " before): autograd's own gradient then mixes what was there with what is. Write before the tensor is used, after"
    " the backward pass, or to a copy; run a batch norm in training mode first."
)


def _refuse(parting: dict[str, str], program: Program, plan: Plan, module: nn.Module, loss: Tensor) -> NoReturn:
    # What comes in on the way down is wrong in every layer below: the last one from the input is where it starts.
    drives = [(str(row.key), row.parameters) for row in plan.rows] + [("the loss", plan.loss_parameters)]
    where = next((f", in the drive of {k}" for k, names in reversed(drives) if parting.keys() & set(names)), "")
    name = next((n for _, names in reversed(drives) for n in names if n in parting), next(iter(parting)))
    scripted = [repr(clean(name)) for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    compiled = any("torch::jit" in node.name() for node in graph_of([loss])[1])
    there = _foreign_in(program)
    raise UnsupportedModuleError(
        f"The step cannot be repeated at other states: {parting[name]}{where}."
        + (f" What stands there besides torch's own operations: {', '.join(there)}." if there else "")
        + (f" Hooks on {len(program.record.hooks)} hidden tensors change gradients." if program.record.hooks else "")
        + (_ON_NODES if program.record.reads_graph else "")
        + (_PACKED if program.record.packs else "")
        + (OVERWRITTEN if program.overwritten() else "")
        + (_SCRIPTED.format((scripted or ["A function that the step calls"])[0]) if compiled else "")
        + " A custom autograd function, a hook, a checkpoint or an operation with a state of its own can be the cause;"
        ' the update would be wrong, so nothing was learned. Use algorithm="backprop" for this module, or replace that'
        " part."
    )
