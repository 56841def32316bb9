"""Which modules may carry states: those that were asked for, or sets of them that are commonly chosen."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.module_walk import clean

ChosenLayers = list[str] | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]
Layers = ChosenLayers | None
# Softmax and LogSoftmax are links of a read-out to its loss, not nonlinearities of neurons: name them to give them one.
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
WEIGHTED: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip
_TABLES = (nn.Embedding, nn.EmbeddingBag)
MAXIMUM_POOLING: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip


class Asked(NamedTuple):
    """What `layers=` asks for: modules by name, by type, or by a predicate; of a list with several of these, all."""

    names: tuple[str, ...] = ()
    kinds: tuple[type, ...] = ()
    matches: Callable[[nn.Module], bool] | None = None


def asked_for(layers: Any) -> Asked:
    """Reads `layers=`.

    Raises:
        ConfigurationError: it is no list of names, type, tuple of types, or predicate.
    """
    if isinstance(layers, str):
        raise ConfigurationError(f"layers={layers!r}: expected a list of names; write layers=[{layers!r}].")
    if callable(layers) and not isinstance(layers, type | nn.Module):
        return Asked(matches=layers)
    parts = layers if isinstance(layers, list | tuple | set | frozenset) else (layers,)
    names = tuple(str(part) for part in parts if isinstance(part, str))
    kinds = tuple(part for part in parts if isinstance(part, type))
    if len(names) + len(kinds) < len(parts):
        wanted = "a list of names of modules, a type of modules or a tuple of them, a function of a module, or None"
        if given := [type(part).__name__ for part in parts if isinstance(part, nn.Module)]:
            wanted += f"; not a module itself: give its name, or its type, layers=nn.{given[0]}"
        checked.refuse("", "layers", layers, wanted)
    return Asked(names, kinds)


def chosen_by(module: nn.Module, layers: ChosenLayers) -> dict[nn.Module, str]:
    """The modules that `layers=` asks for, and their names.

    Raises:
        ConfigurationError: it names nothing.
    """
    named = {clean(name): m for name, m in module.named_modules() if name}
    asked = asked_for(layers)
    if unknown := [name for name in asked.names if name not in named]:
        close = checked.nearest(unknown[0], named) or list(named)[:5]
        raise ConfigurationError(
            f"layers={list(asked.names)!r}: {type(module).__name__} has no module {unknown[0]!r}. Nearest: {close}."
        )
    chosen = {named[name]: name for name in asked.names}
    for name, m in named.items():
        if isinstance(m, asked.kinds) or (asked.matches is not None and asked.matches(m)):
            chosen[m] = name
    if not chosen and (asked.kinds or asked.matches):
        raise ConfigurationError(
            f"layers={layers!r} matches none of the {len(named)} modules of {type(module).__name__}."
            f" It has: {sorted({type(m).__name__ for m in named.values()})}."
        )
    return chosen


def found_in(module: nn.Module) -> dict[str, dict[nn.Module, str]]:
    """The sets of modules at which states commonly sit, in order of preference: of each module its name.

    "activations"; "blocks", repeated modules, the outermost rows of them, of those with parts of their own if there are
    any; "inner blocks", the innermost rows of modules with parts of their own, where these are others; "weighted
    modules"; "embeddings", where nothing else can carry one.
    """
    named = {m: clean(name) for name, m in module.named_modules() if name}
    rows = list(_repeated(module))
    composite = [row for row in rows if any(True for _ in row[0].children())]
    outer = {child for row in composite or rows for child in row}
    inner = {child for children in _innermost(module) for child in children}
    found: dict[str, set[nn.Module]] = {
        "activations": {m for m in named if isinstance(m, ACTIVATIONS)},
        "blocks": outer,
        "inner blocks": inner if inner != outer else set(),
        "weighted modules": {m for m in named if isinstance(m, WEIGHTED)},
        "embeddings": {m for m in named if isinstance(m, _TABLES)},
    }
    return {what: {m: name for m, name in named.items() if m in chosen} for what, chosen in found.items() if chosen}


def multiplying(
    module: nn.Module, weighted: Mapping[nn.Module, str], matrices: Collection[int]
) -> dict[nn.Module, str]:
    """Weighted modules, with those of other libraries' kinds: innermost ones that hold a matrix, and multiply by it.

    Args:
        module: the user's.
        weighted: those of torch's kinds.
        matrices: identities of the parameters that a pass multiplies by.
    """

    def is_kind_of_linear(m: nn.Module) -> bool:
        if isinstance(m, _TABLES):  # a table, though a read-out may multiply by it as well
            return False
        own = {id(p) for p in m.parameters(recurse=False)}
        return any(key in matrices for key in own) and all(id(p) in own for p in m.parameters())

    named = ((m, clean(name)) for name, m in module.named_modules() if name)
    return {m: name for m, name in named if m in weighted or is_kind_of_linear(m)}


def _repeated(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Blocks of one kind, one after the other: the outermost rows of them."""
    outer: list[str] = []
    for name, container in module.named_modules():
        if not name.startswith(tuple(outer)) and (children := _row(container)):
            parts = [part for part, child in container.named_children() if child in children]
            outer += [f"{name}.{part}." if name else f"{part}." for part in parts]
            yield children


def _innermost(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Rows of blocks with parts of their own, none of which holds another such row."""
    rows = {m: row for m in module.modules() if (row := _row(m)) and any(True for _ in row[0].children())}
    for container, row in rows.items():
        if not any(m in rows for m in container.modules() if m is not container):
            yield row


def _row(container: nn.Module) -> list[nn.Module]:
    """Several children of one kind with parameters: all that have some, or the most frequent with parts of its own."""
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        return []
    children = [child for child in container.children() if any(True for _ in child.parameters())]
    kinds = [type(child) for child in children]
    blocks = [type(child) for child in children if any(True for _ in child.children())]
    if len(set(kinds)) > 1:
        kind = max(blocks, key=blocks.count, default=None)
        children = [child for child in children if type(child) is kind]
    return children if len(children) > 1 else []
