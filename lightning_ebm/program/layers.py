"""Finding the layers: which calls of which modules carry a state.

The wiring is read from the record of the user's own pass, not from the module tree: it says which states each layer's
drive is computed from, which parameters stand in between, and what enters the loss.
"""

import difflib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError, LayerDiscoveryError, UnsupportedModuleError
from lightning_ebm.program.calls import clean
from lightning_ebm.program.record import Mark, Record, StateKey, Value
from lightning_ebm.program.wiring import Plan, Wiring
from lightning_ebm.tree import modules_of, parameters_of

log = logging.getLogger(__name__)

ChosenLayers = list[str] | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]
Layers = ChosenLayers | None
Output = Literal["auto", "readout", "state"]

# Softmax and LogSoftmax are links of a read-out to its loss, not nonlinearities of neurons: name them to give them one.
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_WEIGHTED: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip


def check_layers(layers: Any) -> None:
    """Refuses what names no layers of any module; what names none of a certain module is refused at its first step.

    Raises:
        ConfigurationError: it is no list of names, type, tuple of types, or predicate.
    """
    if layers is None or callable(layers):
        return
    inside, kinds = (layers, (str, type)) if isinstance(layers, list | tuple | set | frozenset) else ((layers,), str)
    if not all(isinstance(part, kinds) for part in inside):
        wanted = "a list of names of modules, a type of modules or a tuple of them, a function of a module, or None"
        checked.refuse("", "layers", layers, wanted)


class LayerFinder:
    """Chooses the layers of a module among the calls that one record has marked.

    Args:
        module: the user's module.
        layers: as in `Learner`.
        output: as in `Learner`.
        also: names, as of states, of inputs and outputs that carry states besides.
    """

    def __init__(self, module: nn.Module, layers: Layers, output: Output, also: Collection[str] = ()) -> None:
        self._module = module
        self._also = frozenset(also)
        self._layers = layers
        self._output: Output = output
        self._carried: set[str] = set()

    def candidates(self) -> list[dict[nn.Module, str]]:
        """The modules whose calls may carry states, and their names: sets of them, the first that does being taken."""
        return [_chosen(self._module, self._layers)] if self._layers is not None else list(_found(self._module)) or [{}]

    def watched(self) -> set[nn.Module]:
        """The modules whose calls may carry states; those with parameters of their own are watched anyway."""
        named = {m for name, m in self._module.named_modules() if clean(name) in {_module_of(k) for k in self._also}}
        if self._layers is not None:
            return named | set(_chosen(self._module, self._layers))
        return named | {m for m in self._module.modules() if isinstance(m, ACTIVATIONS)}.union(*_repeated(self._module))

    def find(self, record: Record, loss: Value, partial: bool | None = False) -> tuple[Plan, list[Mark]]:
        """The calls that carry states, and the wiring between them.

        Args:
            record: of the pass.
            loss: what it returned.
            partial: whether the loss is one of several of a step, and need not reach every layer that was asked for;
                None says nothing of those that it does not.

        Raises:
            ConfigurationError: `layers` or `output` name nothing.
            LayerDiscoveryError: no call could carry a state, or one that was asked for carries none.
        """
        tried, called = [], False
        for candidates in self.candidates():
            marks = [mark for mark in record.marks if mark.module in candidates or str(mark.key) in self._also]
            wiring = Wiring(self._module, record, marks, loss)
            states = _carrying(wiring, self._output) | self._named(wiring)
            states -= {m.key for m in marks if m.module not in candidates and m.key not in self._named(wiring)}
            why_not = wiring.why_not(candidates.values() if self._layers is not None else (), states)
            if states:
                cut = [mark for mark in record.marks if mark.key in states]
                plan = Wiring(self._module, record, cut, loss).plan()
                _say_what_goes_around(plan, self._module)
                if self._layers is None:
                    _say_what_is_left_in_one_drive(plan, self._module)
                self._carried |= {key.name for key in plan.states}
                absent = _absent(candidates, self._layers, plan, why_not)
                if partial is not None:
                    self._complain({n: why for n, why in absent.items() if n not in self._carried}, partial)
                return plan, cut
            called = called or bool(marks)
            told = "".join(f"; {name!r}: {why}" for name, why in list(why_not.items())[:3])
            tried.append(f"{len(candidates)} modules called {len(marks)} times{told}")
        _refuse(self._module, tried, called)

    def _named(self, wiring: Wiring) -> set[StateKey]:
        """Inputs that were named, which nothing predicts but what is given, and outputs that are to be held."""
        listed = isinstance(self._layers, list | tuple) and all(isinstance(name, str) for name in self._layers)
        names = set(self._layers) if listed else set()  # type: ignore[arg-type]
        inputs = {key for key in wiring.inputs() if key.name in names or str(key) in self._also}
        ends = wiring.ends() | {head.key for head in wiring.heads()}
        return inputs | {key for key in ends if str(key) in self._also}

    def _complain(self, absent: Mapping[str, str], partial: bool) -> None:
        """Of layers that were asked for and carry no state."""
        if not absent:
            return
        told = "; ".join(f"{name!r}: {why}" for name, why in absent.items())
        # What is frozen may be thawed, and other closures of the step may reach what this one does not.
        if partial or not all(p.requires_grad for p in parameters_of(modules_of(self._module))):
            log.warning("Layers that were asked for carry no state as things are, and no error. %s.", told)
            return
        raise LayerDiscoveryError(
            f"layers={_shown(self._layers)}: what was asked for carries no state. {told}. States move, and their errors"
            " train what lies below; a layer without one would silently be a part of the next. Leave it out of"
            " layers=...; under closures that reach different parts of a module, take a learner for each."
        )


def _module_of(state: str) -> str:
    """The name of the module, of that of a state."""
    return state.partition("#")[0].partition("[")[0]


def _refuse(module: nn.Module, tried: list[str], called: bool) -> NoReturn:
    scripted = [name for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedModuleError(
            f"No layer of {type(module).__name__} can carry a state, as {clean(scripted[0]) or 'it'!r} is compiled by"
            " torch.jit.script: calls inside of it cannot be seen. Train the module as it was before scripting."
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


def _absent(
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


def _shown(layers: Layers) -> str:
    kinds = layers if isinstance(layers, tuple) else (layers,)
    if all(isinstance(kind, type) for kind in kinds):
        return ", ".join(kind.__name__ for kind in kinds)  # type: ignore[union-attr]
    return repr(layers)


def _chosen(module: nn.Module, layers: ChosenLayers) -> dict[nn.Module, str]:
    named = {clean(name): m for name, m in module.named_modules() if name}
    if isinstance(layers, str):
        raise ConfigurationError(f"layers={layers!r}: expected a list of names; write layers=[{layers!r}].")
    chosen: dict[nn.Module, str]
    if isinstance(layers, tuple) and all(isinstance(name, str) for name in layers):
        layers = [str(name) for name in layers]
    if isinstance(layers, type | tuple):
        kinds: Any = layers
        chosen = {m: name for name, m in named.items() if isinstance(m, kinds)}
    elif callable(layers):
        chosen = {m: name for name, m in named.items() if layers(m)}
    else:
        unknown = [name for name in layers if name not in named]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), named, n=3) or list(named)[:5]
            raise ConfigurationError(
                f"layers={list(layers)!r}: {type(module).__name__} has no module {unknown[0]!r}. Nearest: {close}."
            )
        return {named[name]: name for name in layers}
    if not chosen:
        raise ConfigurationError(
            f"layers={layers!r} matches none of the {len(named)} modules of {type(module).__name__}."
            f" It has: {sorted({type(m).__name__ for m in named.values()})}."
        )
    return chosen


def _found(module: nn.Module) -> Iterator[dict[nn.Module, str]]:
    named = {clean(name): m for name, m in module.named_modules() if name}
    activations = {m: name for name, m in named.items() if isinstance(m, ACTIVATIONS)}
    if activations:
        yield activations
    names = {m: name for name, m in named.items()}
    blocks = {child: names[child] for children in _repeated(module) for child in children}
    if blocks:
        yield blocks
    weighted = {m: name for name, m in named.items() if isinstance(m, _WEIGHTED)}
    if weighted:
        yield weighted


def _repeated(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Blocks of one kind, one after the other: the outermost rows of them."""
    outer: list[str] = []
    for name, container in module.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential) or any(name.startswith(o) for o in outer):
            continue
        children = [child for child in container.children() if any(True for _ in child.parameters())]
        if len(children) > 1 and len({type(child) for child in children}) == 1:
            outer += [f"{clean(name)}.{part}." if name else f"{part}." for part, _ in container.named_children()]
            yield children


def _carrying(wiring: Wiring, output: Output) -> set[StateKey]:
    """The calls that are to carry a state."""
    states = wiring.useful()
    if output == "readout":
        states -= wiring.ends()
    elif output == "auto":
        states -= wiring.ends(but_activations=True)
    else:
        states |= {head.key for head in wiring.heads()}
    return states


def _say_what_goes_around(plan: Plan, module: nn.Module) -> None:
    """One line where much of the network is trained past the states, as a residual stream past its activations."""
    if len(plan.around) > 2:  # one or two are tied weights, or a single skip
        log.warning(
            "%d weighted modules of %s reach the loss around the states as well (%s, ...): that part of their update is"
            " the loss's own gradient, through each other. States at whole blocks make it local: layers=BlockType or"
            " layers=[...]. ebm.summary shows the layers.",
            len(plan.around),
            type(module).__name__,
            ", ".join(plan.around[:3]),
        )


def _say_what_is_left_in_one_drive(plan: Plan, module: nn.Module) -> None:
    """One line where a stray activation takes the states and most weights stay between two of them."""
    weighted = {clean(name) for name, m in module.named_modules() if any(True for _ in m.parameters(recurse=False))}
    largest = max(plan.rows, key=lambda row: row.modules_between)
    if largest.activation is not None and 4 <= largest.modules_between > len(weighted) / 2:
        log.warning(
            "%d of %d weighted modules of %s lie in the drive of one layer, %s (%s): they learn by backprop through"
            " each other, as activations that are no modules (F.relu) carry no state. Put states into the body:"
            " layers=BlockType, layers=nn.Linear or layers=[...]. ebm.summary shows the layers.",
            largest.modules_between,
            len(weighted),
            type(module).__name__,
            largest.key,
            largest.activation,
        )
