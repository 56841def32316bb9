"""Finding the layers: which calls of which modules carry a state.

The wiring is read from one pass of the user's own code, not from the module tree: a probe cuts the graph at every
candidate call, so that what is left of it says which states each layer's drive is computed from, which parameters
stand in between, and what enters the loss.
"""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ebm.closure import Closure, checked_loss
from lightning_ebm.errors import ConfigurationError, LayerDiscoveryError, UnsupportedModuleError
from lightning_ebm.purity import Snapshot
from lightning_ebm.substitution import Pass, StateKey, at_prediction, clean, substituted
from lightning_ebm.tree import modules_of, parameters_of
from lightning_ebm.wiring import Plan, Wiring, sum_of_ends

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
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention,
)  # fmt: skip


Probe = Callable[[Mapping[nn.Module, str], frozenset[StateKey] | None], Pass]
"""Runs one pass without side effects, cut at every call of the candidates, or only at the given ones."""


class LayerFinder:
    """Keeps the layers of a module, and finds them again when its modes or trainable parameters change.

    Args:
        module: the user's module.
        layers: as in `Learner`.
        output: as in `Learner`.
        quiet: silences what only the caller knows how to silence, in the passes made here.
        lossless: the closures return no loss, as at evaluation: the network ends in whatever nothing else consumes.
        partial: the closures are one of several that a step consists of, and need not reach every layer named.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Layers,
        output: Output,
        quiet: Callable[[], AbstractContextManager[Any]],
        lossless: bool = False,
        partial: bool = False,
    ) -> None:
        self.lossless = lossless
        self._partial = partial
        self._carried: set[str] = set()
        self.plan: Plan | None = None
        self.covered: Plan | None = None
        """The plan for which every parameter is known to be reached by the energy."""
        self.asked_of_reduction: Plan | None = None
        """The plan for which it is known whether the loss sums over the batch."""
        self._module = module
        self._layers = layers
        self._output: Output = output
        self._quiet = quiet
        self._signature: tuple[list[bool], list[bool]] = ([], [])

    def look(self, closure: Closure, snapshot: Snapshot | None = None) -> Plan:
        """The plan for this module as it is now."""
        modules = modules_of(self._module)
        signature = [m.training for m in modules], [p.requires_grad for p in parameters_of(modules)]
        if self.plan is None or signature != self._signature:
            self.search(closure, snapshot or Snapshot(self._module))
            self._signature = signature
        assert self.plan is not None
        return self.plan

    def search(self, closure: Closure, snapshot: Snapshot) -> Plan:
        """Finds the layers by passes that start from the snapshot and leave no trace."""
        written: set[str] = set()

        def probe(candidates: Mapping[nn.Module, str], keep: frozenset[StateKey] | None) -> Pass:
            state_of = at_prediction(keep)
            with snapshot.replaying(None) as changed, self._quiet(), torch.enable_grad():
                with substituted(self._module, candidates, state_of, lambda key: True, find_weighted=True) as observed:
                    returned = _probed(closure)
                    observed.loss = sum_of_ends(observed) if self.lossless else checked_loss(returned)
                written.update(changed())
            return observed

        plan, absent = discover(self._module, self._layers, self._output, probe)
        self._carried |= {key.name for key in plan.states}
        if not self.lossless:  # evaluation has branches of its own
            self._complain({name: why for name, why in absent.items() if name not in self._carried})
        self.plan = dataclasses.replace(plan, written=frozenset(written))
        return self.plan

    def _complain(self, absent: Mapping[str, str]) -> None:
        """Of layers that were asked for and carry no state."""
        if not absent:
            return
        told = "; ".join(f"{name!r}: {why}" for name, why in absent.items())
        # What is frozen may be thawed, and other closures of the step may reach what this one does not.
        if self._partial or not all(p.requires_grad for p in parameters_of(modules_of(self._module))):
            log.warning("Layers that were asked for carry no state as things are, and no error. %s.", told)
            return
        raise LayerDiscoveryError(
            f"layers={_shown(self._layers)}: what was asked for carries no state. {told}. States move, and their errors"
            " train what lies below; a layer without one would silently be a part of the next. Leave it out of"
            " layers=...; under closures that reach different parts of a module, take a learner for each."
        )


def _probed(closure: Closure) -> Tensor:
    try:
        return closure()
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error):
            raise
        raise UnsupportedModuleError(
            "The step differentiates its own outputs (a gradient penalty, torch.autograd.grad in training_step). With"
            " states in place of layers an output no longer depends on the input through the network: there is no such"
            ' gradient. Use the algorithm "backprop" for this module, or drop the penalty.'
        ) from error


def discover(module: nn.Module, layers: Layers, output: Output, probe: Probe) -> tuple[Plan, dict[str, str]]:
    """Finds the layers of a module by running it.

    Args:
        module: the user's module.
        layers: names, types or a predicate; None tries activation modules, then repeated blocks, then the outputs of
            modules with weights.
        output: what to do with the network's end, see `Learner`.
        probe: runs a pass.

    Returns:
        The plan; and what was asked for by name or type and carries no state, with the reason.

    Raises:
        ConfigurationError: `layers` or `output` name nothing.
        LayerDiscoveryError: no call could carry a state.
    """
    tiers = [_chosen(module, layers)] if layers is not None else list(_found(module)) or [{}]
    tried = []
    for candidates in tiers:
        plan, why_not = _planned(module, candidates, output, probe, explain=layers is not None)
        if plan.states:
            _say_what_goes_around(plan, module)
            if layers is None:
                _say_what_is_left_in_one_drive(plan, module)
            return plan, _absent(candidates, layers, plan, why_not)
        told = "".join(f"; {name!r}: {why}" for name, why in list(why_not.items())[:3])
        tried.append(f"{len(candidates)} modules called {len(plan.calls)} times{told}")
    scripted = [name for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedModuleError(
            f"No layer of {type(module).__name__} can carry a state, as {clean(scripted[0]) or 'it'!r} is compiled by"
            " torch.jit.script: calls inside of it cannot be seen. Train the module as it was before scripting."
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
        group[0]: why_not.get(group[0], "further passes call it otherwise")
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
    blocks: dict[nn.Module, str] = {}
    for name, container in module.named_modules():
        children = [child for child in container.children() if any(True for _ in child.parameters())]
        repeated = isinstance(container, nn.ModuleList | nn.Sequential) and len(children) > 1
        nested = any(name.startswith(f"{outer}.") for outer in blocks.values())
        if repeated and not nested and len({type(child) for child in children}) == 1:
            blocks |= {m: n for n, m in named.items() if any(m is child for child in children)}
    if blocks:
        yield blocks
    weighted = {m: name for name, m in named.items() if isinstance(m, _WEIGHTED)}
    if weighted:
        yield weighted


def _planned(
    module: nn.Module, candidates: Mapping[nn.Module, str], output: Output, probe: Probe, explain: bool
) -> tuple[Plan, dict[str, str]]:
    """The plan; and, where it is to be explained, why each candidate without a state has none."""
    wiring = Wiring(module, probe(candidates, None))
    asked = candidates.values() if explain else ()
    candidates, states = _carrying(wiring, candidates, output)
    why_not = wiring.why_not(asked, states)
    del wiring  # and the graph of its pass
    # Once more, cut at the states alone, so that parents and drives are those of the passes to come.
    return Wiring(module, probe(candidates, frozenset(states))).plan(candidates), why_not


def _carrying(
    wiring: Wiring, candidates: Mapping[nn.Module, str], output: Output
) -> tuple[Mapping[nn.Module, str], set[StateKey]]:
    """The modules to watch, and those of their calls that are to carry a state."""
    states = wiring.useful()
    if output == "readout":
        states -= wiring.ends()
    elif output == "auto":
        states -= wiring.ends(but_activations=True)
    else:
        heads = wiring.heads()
        candidates = {**candidates, **{head.module: head.key.name for head in heads}}
        states |= {head.key for head in heads}
    return candidates, states


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
