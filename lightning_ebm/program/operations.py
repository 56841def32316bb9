"""What kinds of operations do to tensors: what they write to, share, draw."""

from functools import cache
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lightning_ebm.program.collectives import writes_first
from lightning_ebm.program.tensors import tensors_in


class Traits(NamedTuple):
    """What a kind of operation does to tensors.

    Attributes:
        name: without namespace and overload.
        writes: positions or names of the arguments that it writes to.
        views: whether its results are views of its arguments in autograd's eyes.
        by_shape: whether only the shape of its arguments matters.
        random: whether it draws from a generator.
        dynamic: whether the shape of its result depends on values.
        unfilled: whether what it gives holds nothing yet: functions in C++ fill it where no operation is seen.
        plain: whether it is a function of its arguments and nothing else: it writes to none, draws nothing, and gives
            tensors whose shapes follow from those of its arguments.
        asked: whether its last argument says which of its results are wanted, as that of a convolution's backward does.
    """

    name: str
    writes: tuple[int | str, ...]
    views: bool
    by_shape: bool
    random: bool
    dynamic: bool
    unfilled: bool
    plain: bool
    asked: bool


BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"})
"""They write to arguments 3 and 4, the running statistics, while argument 5 says training; not all schemas tell."""
BY_MASK = frozenset({"index", "masked_select"})
PUT_BY_MASK = frozenset({"index_put", "index_put_", "_index_put_impl_"})
"""How many elements these read, or write, may depend on the values of masks."""
_BY_SHAPE = frozenset(
    {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
    | {"new_zeros", "new_ones", "new_full"}
)
_UNFILLED = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})


_known_traits: dict[int, Traits] = {}


def traits(func: Any) -> Traits:
    """What a kind of operation does to tensors, from its schema."""
    known = _known_traits.get(id(func))  # operations live as long as torch does; their own hash is slow
    if known is None:
        known = _known_traits[id(func)] = _traits(func)
    return known


def is_operator(func: Any) -> "TypeGuard[torch._ops.OpOverload]":
    """Whether an operation is one of torch's, which has a schema, and no Python function."""
    return isinstance(func, torch._ops.OpOverload)


def is_plain(func: Any) -> bool:
    """Whether it is one of torch's operations that only computes, see `Traits`."""
    return is_operator(func) and traits(func).plain


def is_by_shape(func: Any) -> bool:
    """Whether only the shapes of its arguments matter to it."""
    return is_operator(func) and traits(func).by_shape


def only_views(func: Any) -> bool:
    """Whether it only gives memory another shape: autograd keeps nothing of what it is given."""
    return is_operator(func) and (traits(func).views or traits(func).name == "_unsafe_view")


def splits_unsafely(func: Any) -> bool:
    """Whether it gives parts of the same memory, as views do, of which autograd counts writes each by itself."""
    return is_operator(func) and traits(func).name in ("unsafe_split", "unsafe_split_with_sizes")


def _traits(func: Any) -> Traits:
    schema = func._schema
    name = schema.name.split("::")[1]
    writes = tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    if writes_first(func):
        writes = (0,)
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    random, dynamic = torch.Tag.nondeterministic_seeded in func.tags, torch.Tag.dynamic_output_shape in func.tags
    gives = schema.returns and all("Tensor" in str(r.type) for r in schema.returns)
    unfilled = name in _UNFILLED
    aside = random or dynamic or unfilled or writes or name in BATCH_NORMS or name in BY_MASK or name in PUT_BY_MASK
    return Traits(
        name=name,
        writes=(3, 4) if name in BATCH_NORMS else writes,
        views=views,
        by_shape=name in _BY_SHAPE,
        random=random,
        dynamic=dynamic,
        unfilled=unfilled,
        plain=bool(gives) and not aside and func.namespace == "aten" and name != "detach",
        asked=bool(schema.arguments) and schema.arguments[-1].name == "output_mask",
    )


@cache
def functional_form(func: Any, kind: Traits) -> Any:
    """The overload that returns what an in-place one writes to its first argument; None where there is none."""
    if kind.writes != (0,) or not kind.name.endswith("_") or not func._schema.name.startswith("aten::"):
        return None
    if not func._schema.returns:  # on lists of tensors, of which the functional one returns as many
        return None
    if kind.name == "copy_":  # its functional overload has no derivative
        return overwritten
    packet = getattr(torch.ops.aten, kind.name[:-1], None)
    if packet is None:
        return None
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for overload in (func._overloadname, *packet.overloads()):  # transpose_.default is transpose.int
        found = getattr(packet, overload, None)
        if found is None or found._schema.is_mutable:
            continue
        if [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
            return found
    return None


def copied(source: Tensor, like: tuple[Any, ...], *before: Tensor) -> Tensor:
    """What a tensor of a given shape, strides, dtype and device holds once another one has been copied into it.

    Args:
        source: the other one.
        like: the shape and so on.
        before: what it held, where that has a slope, see `replaced_by_copy`.
    """
    shape, stride, dtype, device = like[:4]
    if source.is_complex():  # a state that was real when this was recorded
        dtype = source.dtype
    order = sorted(range(len(shape)), key=lambda d: (-stride[d], -shape[d]))
    back = [order.index(d) for d in range(len(shape))]
    turned = source.to(device, dtype).expand(shape).permute(order)
    return without_slope(turned.clone(memory_format=torch.contiguous_format).permute(back), *before)


def replaced_by_copy(target: Tensor) -> bool:
    """Whether a copy replaces all that has been computed: autograd reaches what that was of, with a slope of zero.

    What a view is of has its slope from the elements that are left, if any are.
    """
    return target.requires_grad and (target._base is None or target._base.numel() == target.numel())


def without_slope(result: Tensor, *given: Tensor) -> Tensor:
    """What has been drawn, or written, with a slope of zero in what it was drawn by, or has replaced."""
    for tensor in given:  # by `where`, as 0 * tensor is nan where that is infinite
        other = tensor if tensor.is_complex() else tensor.to(result.dtype)
        result = torch.where(torch.ones_like(result, dtype=torch.bool), result, other)
    return result


def overwritten(before: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What a tensor holds after `before.copy_(source)`."""
    return source.to(device=before.device, dtype=before.dtype).expand(before.shape).clone()


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to; of one that takes functions, those are seen as it calls them."""
    kind = traits(func) if is_operator(func) else None
    return tensors_at(kind, args, kwargs) if kind is not None and kind.writes else []


def tensors_at(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    if kind.name in BATCH_NORMS and not args[5]:
        return []
    found: list[Tensor] = []
    for where in kind.writes:
        arg = kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None
        found.extend((arg,) if isinstance(arg, Tensor) else tensors_in(arg))
    return found


def without_statistics(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a batch norm is given, but for the running statistics."""
    return (*args[:3], None, None, *args[5:])
