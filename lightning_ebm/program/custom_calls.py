"""Calls that are one operation of a record: custom autograd functions, and what hooks of modules do with tensors."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.collectives import collective
from lightning_ebm.program.effects import Effects, SameDraws
from lightning_ebm.program.named import named
from lightning_ebm.program.operations import is_operator
from lightning_ebm.program.random_draws import draws_and_computes
from lightning_ebm.program.record import Node, Value, meta_of
from lightning_ebm.program.sharded import refuse_static_graph
from lightning_ebm.program.tensors import listed, tensors_in

if TYPE_CHECKING:
    from lightning_ebm.program.recorder import Recorder


def is_of_the_users(func: Any) -> bool:
    """Whether an operation of a record is a function that neither torch nor this library has."""
    return not is_operator(func) and named(func).module.partition(".")[0] != __name__.partition(".")[0]


def record_function(
    recorder: "Recorder", function: type[torch.autograd.Function], run: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """A custom function is one node: its forward runs while gradients are off, and its backward is in no record."""
    if function.__module__.startswith("torch.distributed") and ".fsdp" not in function.__module__:
        if any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
            raise collective(function.__name__)
        return run(*args, **kwargs)  # of constants: gradients are off within, so that it gives constants
    if function.__module__.startswith("torch.distributed"):  # it tells FSDP when gradients are there
        with recorder.pausing():
            result = run(*args, **kwargs)
        pairs = zip(tensors_in((args, kwargs)), tensors_in(result), strict=False)
        for old, new in pairs:
            recorder.contents.bind(new, recorder.contents.value(old))
        return result
    if function.__module__.startswith("torch.distributions"):  # where a function draws, as Dirichlet's does
        if any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
            raise draws_and_computes(function.__name__)
        with recorder.pausing():
            return run(*args, **kwargs)
    if function.__module__ == DistributedDataParallel.__module__:
        refuse_static_graph(args)
    if function is CheckpointFunction:
        raise UnsupportedModuleError(
            "torch.utils.checkpoint with use_reentrant=True runs the layers where nothing can be recorded, so that"
            " they could not relax and their parameters would not learn. Use use_reentrant=False."
        )
    if function.__module__ == CheckpointFunction.__module__:  # of older releases: it keeps inputs
        with recorder.pausing():
            return run(*args, **kwargs)
    return _record_users_own(recorder, function, run, args, kwargs)


def _record_users_own(
    recorder: "Recorder", function: type[torch.autograd.Function], run: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    recorder.following.stop()
    # To autograd what lies in lists and objects is a constant.
    seen = [recorder.contents.value(arg) if isinstance(arg, Tensor) else arg for arg in args]
    node = Node(run, tuple(seen), recorder.seen_by_name(kwargs))
    before = {id(t) for t in tensors_in((args, kwargs))}
    effects = Effects(recorder.contents, function.__name__)
    with recorder.observing(effects):
        result = run(*args, **kwargs)
        node.written = effects.written_among(args, function.__name__)
    if effects.random is not None:
        node.func = SameDraws(run, effects.random)
    for tensor in effects.written:  # as what is written while gradients are off anywhere; not what is returned of it
        recorder.contents.constant_from_now(tensor)
    for tensor in listed(result):
        if not isinstance(tensor, Tensor):
            node.results.append(None)
            continue
        if id(tensor) in before and tensor._version:
            raise UnsupportedModuleError(
                f"The custom autograd function {function.__name__} writes to its input and returns it (mark_dirty):"
                " what it computes cannot be repeated at other states. Return a new tensor."
            )
        value = Value(node, meta_of(tensor))
        node.results.append(value)
        recorder.contents.bind(tensor, value, keeps=True)
    recorder.record.nodes.append(node)
    return result


def record_hooked(
    recorder: "Recorder", func: Callable[..., Any], call: Any, run: Callable[[Any], Any], args: Any
) -> Any:
    """Tensors on their way into, or out of, a module that has backward hooks."""
    with recorder.pausing():
        result = run(args)
    pairs = [(old, new) for old, new in zip(listed(args), listed(result), strict=True) if isinstance(old, Tensor)]
    if any(new is not old for old, new in pairs):
        recorder.following.stop()
        recorder.record.has_hooks = True
        node = Node(func, (call, *recorder.seen([old for old, _ in pairs])), {})
        for _, tensor in pairs:
            value = Value(node, meta_of(tensor))
            node.results.append(value)
            recorder.contents.bind(tensor, value)
        recorder.record.nodes.append(node)
    return result


def higher_order(name: str) -> UnsupportedModuleError:
    """For a step that calls an operation that takes functions."""
    return UnsupportedModuleError(
        f"The step calls {name!r}, an operation that takes functions (torch.cond, torch.while_loop, scan,"
        " flex_attention): what it runs inside cannot be recorded, nor repeated at other states. Write it in Python,"
        " with if and for, or F.scaled_dot_product_attention."
    )
