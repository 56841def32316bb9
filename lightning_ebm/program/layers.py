"""Finding the layers: which calls of which modules carry a state.

The wiring is read from the record of the user's own pass, not from the module tree: it says which states each layer's
drive is computed from, which parameters stand in between, and what enters the loss.

Longer than 300 lines, as a third of it says why a choice is made and what is told of it.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import nn

from lightning_ebm.errors import LayerDiscoveryError
from lightning_ebm.program.acting import Acting, acting_in, may_act
from lightning_ebm.program.candidates import (
    ACTIVATIONS,
    MAXIMUM_POOLING,
    Layers,
    asked_for,
    chosen_by,
    found_in,
    multiplying,
)
from lightning_ebm.program.locality import Judged, Locality, Products, self_gates
from lightning_ebm.program.missing_layers import absent_from, is_read, refuse_all, refuse_output, shown, skipped_in
from lightning_ebm.program.module_walk import clean, modules_of, parameters_of
from lightning_ebm.program.nonlocal_weights import what_goes_around, what_is_left_in_one_drive
from lightning_ebm.program.record import Mark, Record, StateKey, Value
from lightning_ebm.program.wiring import Plan, Region, Wiring

log = logging.getLogger(__name__)

Output = Literal["auto", "readout", "state"]

_USUAL = ("activations", "blocks", "inner blocks")
_ENOUGH = 0.4
"""Of m, see `LayerFinder`: an update goes through two and a half weights, as in the blocks of a Transformer at most."""
_AS_MUCH = 0.02
"""Of m: a difference that a read-out of another width makes."""
_TOO_MANY = 0.5
"""Of the weights with l(w) = 0."""


class _Option(NamedTuple):
    """One choice of layers.

    Attributes:
        what: in words.
        candidates: modules, and their names.
        calls: how many calls of them there were.
        cut: those that carry states.
        why_not: why modules that were asked for carry none.
        locality: of the weights' updates.
        heads: whether a call returns the output.
    """

    what: str
    candidates: Mapping[nn.Module, str]
    calls: int
    cut: list[Mark]
    why_not: Mapping[str, str]
    locality: Locality
    heads: bool = True

    def told(self) -> str:
        return "".join(f"; {name!r}: {why}" for name, why in list(self.why_not.items())[:3])


def _most_local(options: Sequence[_Option]) -> _Option | None:
    """The one whose updates are the most local; of nearly equal ones that with the fewest states, then more so."""
    least = max((option.locality.mean for option in options), default=0.0) - _AS_MUCH
    near = [option for option in options if option.locality.mean >= least]
    return max(near, key=lambda option: (-len(option.cut), round(option.locality.mean, 6)), default=None)


def check_layers(layers: Any) -> None:
    """Refuses what names no layers of any module; what names none of a certain module is refused at its first step.

    Raises:
        ConfigurationError: it is no list of names, type, tuple of types, or predicate.
    """
    if layers is not None:
        asked_for(layers)


class LayerFinder:
    """Chooses the layers of a module among the calls that one record has marked.

    What was asked for; else by how local the updates of the network's weights are with states there,

        m = sum_w |w| l(w) / sum_w |w|,    l(w) = 1 / chain(w), 0 for w around the states or through itself,

    over the matrices and kernels w, with |w| elements each. chain(w) is the number of weighted operations, its own
    included, on the longest way from w to a state or the loss that crosses no state: 1 in a multilayer perceptron
    or a ResNet with states at its activations, 1/4 for the queries of a Transformer with states at its
    blocks. A weight is trained *around* the states if it reaches a state and the loss past all of them, as a residual
    stream does that passes by the activations within its blocks; *through itself* if it reaches another use of w
    without a state between, as recurrent weights do through time: so that the length of a sequence decides nothing.

    Of activations, blocks (the outermost repeated modules), and inner blocks (the innermost) the largest m is taken, of
    those with l(w) = 0 for less than half of the weights. If that is below 0.4, so that a typical update goes through
    more than two and a half weights, or if there is none, any set may be: also activations and blocks, activations with
    those weighted modules that are left behind others, and all weighted modules. Ties, to 0.02, go to fewer states. An
    activation that only multiplies what it was computed from, x * g(x) as in squeeze-and-excite, is a gate, no layer.

    Activations are modules of torch's kinds and, where `pooled`, people's own, see `acting_in`.

    Where `pooled`, a maximum pooling takes the place of the activation that it alone reads. At the many zeros that ReLU
    leaves, a state before it lies at a kink from the start: which of several equal units is the largest changes with
    the smallest error, and no force would ever vanish.

    Args:
        module: the user's module.
        layers: as in `Learner`.
        output: as in `Learner`.
        also: names, as of states, of inputs and outputs that carry states besides.
        like: a finder for the same module, whose latest choice is kept where it can be.
        pooled: whether states may stand behind a maximum pooling: not for energies of drives and activations.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Layers,
        output: Output,
        also: Collection[str] = (),
        like: "LayerFinder | None" = None,
        pooled: bool = False,
    ) -> None:
        self._module = module
        self._pooled = pooled and layers is None
        self._also = frozenset(also)
        self._layers = layers
        self._output: Output = output
        self._like = like
        self._acting = Acting((), ())
        self._carried: set[str] = set()
        self._latest: str | None = None
        self._told: set[str] = set() if like is None else like._told

    def watched(self) -> set[nn.Module]:
        """The modules whose calls may carry states; those with parameters of their own are watched anyway."""
        named = {m for name, m in self._module.named_modules() if clean(name) in {_module_of(k) for k in self._also}}
        if self._layers is not None:
            return named | set(chosen_by(self._module, self._layers))
        pools = {m for m in self._module.modules() if self._pooled and isinstance(m, MAXIMUM_POOLING)}
        return named.union(pools, *found_in(self._module).values())

    def suspects(self) -> set[nn.Module]:
        """Modules that may act as activations: not for energies of drives, which know torch's own."""
        return {m for m in modules_of(self._module)[1:] if self._pooled and may_act(m)}

    def find(
        self, record: Record, loss: Value, partial: bool | None = False, zero: bool = False
    ) -> tuple[Plan, list[Mark]]:
        """The calls that carry states, and the wiring between them.

        Args:
            record: of the pass.
            loss: what it returned.
            partial: whether the loss is one of several of a step, and need not reach every layer that was asked for;
                None says nothing of those that it does not.
            zero: whether the loss is 0. Where no layer was called it says that this batch has nothing to learn from.

        Raises:
            ConfigurationError: `layers` or `output` name nothing.
            LayerDiscoveryError: no call could carry a state, or one that was asked for carries none.
        """
        products = Products(self._module, record)
        self._acting = acting_in(record, self.suspects())
        if self._layers is not None:
            option = self._option("asked for", chosen_by(self._module, self._layers), record, loss, products)
            compared = [option]
        else:
            compared = self._compared(record, loss, products)
            option = self._best(compared)
        if not option.cut and (
            (zero and not record.marks)
            or self._leaves_all_out(option, record)
            or self._is_local_already(record, loss, products, partial)
        ):
            return replace(Wiring(self._module, record, [], loss).plan(), chosen="nothing"), []
        if not option.cut:
            told = [f"{o.what}: {len(o.candidates)}, called {o.calls} times{o.told()}" for o in compared]
            refuse_all(self._module, told, any(o.calls for o in compared), record)
        plan = Wiring(self._module, record, option.cut, loss).plan()
        if self._output == "state" and not option.heads and products.after(option.cut, loss):
            refuse_output(self._module)
        judged = [(o.what, len(o.cut), *o.locality[:2]) for o in compared if o.cut and self._layers is None]
        plan = replace(plan, locality=option.locality, compared=tuple(Judged(*j) for j in judged), chosen=option.what)
        self._say("around", what_goes_around(plan, self._module))
        if self._layers is None:
            self._say("drive", what_is_left_in_one_drive(plan, self._module))
        self._carried |= {key.name for key in plan.states}
        skipped = skipped_in(self._module, record) if self._layers is not None else ()
        asked = {m: name for m, name in option.candidates.items() if name not in skipped}
        missing = absent_from(asked, self._layers, plan, option.why_not)
        self._latest = option.what
        if partial is not None:
            self._complain({n: why for n, why in missing.items() if n not in self._carried}, partial)
        return plan, option.cut

    def _leaves_all_out(self, option: "_Option", record: Record) -> bool:
        """Whether a pass calls none of the layers that were asked for, of which others have called some."""
        if self._layers is None or not self._carried or option.calls or is_read(option.candidates, record):
            return False
        self._say(
            "all left out",
            f"This pass of {type(self._module).__name__} has left out every layer that was asked for: nothing relaxes,"
            " and what it did call learns by the loss's own gradient.",
        )
        return True

    def _is_local_already(self, record: Record, loss: Value, products: Products, partial: bool | None) -> bool:
        """Whether nothing need carry a state here: no weight is behind another, and `dL/dtheta` is the update.

        So it is of the read-out while all below it is frozen, and of those losses of a step that reach a multiplier or
        a temperature alone. A network that never has another weight is refused: nothing of it would ever relax.
        """
        reached = {id(leaf) for leaf in Region([loss], {}, record.leaves).leaves}
        held = parameters_of(modules_of(self._module))
        elsewhere = bool(partial or self._carried) or any(not p.requires_grad and p.ndim > 1 for p in held)
        ours = any(p.requires_grad and id(p) in reached for p in held)
        local = elsewhere and ours and products.locality([], loss).share == 1
        if local:
            self._say(
                "local",
                f"This pass of {type(self._module).__name__} reaches no weight through another one: nothing relaxes,"
                " and the update is the loss's own gradient, which every rule would give.",
                logging.INFO,
            )
        return local

    def _option(
        self, what: str, candidates: Mapping[nn.Module, str], record: Record, loss: Value, products: Products
    ) -> "_Option":
        """What states at some modules' calls come to."""
        calls = {mark for mark in record.marks if mark.module in candidates}
        if self._layers is None:
            calls = calls.difference(self._acting.parts)
            calls -= self_gates(record, [mark for mark in calls if self._acts(mark.module)])
        if self._pooled:
            calls = self._behind_pooling(calls, record, loss)
        marks = [mark for mark in record.marks if mark in calls or str(mark.key) in self._also]
        wiring = Wiring(self._module, record, marks, loss)
        named = self._named(wiring)
        states = named | (self._carrying(wiring, products, loss) - {mark.key for mark in marks if mark not in calls})
        why_not = wiring.why_not(candidates.values() if self._layers is not None else (), states)
        cut = [mark for mark in record.marks if mark.key in states]
        heads = bool(self._heads(wiring, products, loss))
        return _Option(what, candidates, len(calls), cut, why_not, products.locality(cut, loss), heads)

    def _acts(self, module: nn.Module) -> bool:
        return isinstance(module, ACTIVATIONS) or module in self._acting.modules

    def _behind_pooling(self, calls: set[Mark], record: Record, loss: Value) -> set[Mark]:
        """The calls, with a maximum pooling in the place of the activation that it alone reads."""
        pools = {mark for mark in record.marks if isinstance(mark.module, MAXIMUM_POOLING)} - calls
        if not pools:
            return calls
        marks = [mark for mark in record.marks if mark in calls or mark in pools]
        plan = Wiring(self._module, record, marks, loss).plan()
        read = Counter(
            parent for parents in (*(row.parents for row in plan.rows), plan.loss_parents) for parent in parents
        )
        for mark, row in zip(marks, plan.rows, strict=True):
            alone = mark in pools and len(row.parents) == 1 and not row.parameters and read[row.parents[0]] == 1
            if alone and self._acts((below := marks[row.parents[0]]).module) and below in calls:
                calls = calls - {below} | {mark}
        return calls

    def _compared(self, record: Record, loss: Value, products: Products) -> list["_Option"]:
        """The sets of modules that may be chosen, in order of preference; the first alone if it leaves nothing."""
        found = found_in(self._module)
        options: list[_Option] = []

        def add(what: str, candidates: Mapping[nn.Module, str]) -> "_Option":
            options.append(self._option(what, candidates, record, loss, products))
            return options[-1]

        activations = found.pop("activations", {}) | {
            m: clean(name) for name, m in self._module.named_modules() if m in self._acting.modules
        }
        if activations:
            option = add("activations", activations)
            if option.cut and option.locality.share == 1 and self._trained() in (None, option.what):
                return options
        weighted = multiplying(self._module, found.pop("weighted modules", {}), products.matrices())
        embeddings = found.pop("embeddings", {})
        for what, candidates in found.items():
            add(what, candidates)
        blocks = found.get("inner blocks") or found.get("blocks")
        if activations and blocks:
            add("activations and blocks", {**activations, **blocks})
        if activations and weighted:
            behind = products.behind(options[0].cut, loss)
            some = {m: name for m, name in weighted.items() if any(id(p) in behind for p in m.parameters())}
            if some and len(some) < len(weighted):
                add("activations, and weighted modules behind others", {**activations, **some})
        if weighted:
            add("weighted modules", weighted)
        if embeddings and not any(option.cut for option in options):
            add("embeddings", embeddings)
        if not options:  # a single weighted module: its output may still be a state
            add("the output", {})
        return options

    def _trained(self) -> str | None:
        """What had the states when the module was trained, for passes that only look at it."""
        return None if self._like is None else self._like._latest

    def _best(self, options: list["_Option"]) -> "_Option":
        carrying = [option for option in options if option.cut]
        carrying = [option for option in carrying if option.what == self._trained()] or carrying
        usual = [option for option in carrying if option.what in _USUAL and option.locality.none < _TOO_MANY]
        best = _most_local(usual)
        if best is None or best.locality.mean < _ENOUGH:
            best = _most_local(carrying)
        nothing = _Option("nothing", {}, 0, [], {}, Locality(0.0, 0.0))
        return best or (options[0] if options else nothing)

    def _carrying(self, wiring: Wiring, products: Products, loss: Value) -> set[StateKey]:
        """The calls that are to carry a state."""
        states = wiring.useful()
        if self._output == "state":
            return states | self._heads(wiring, products, loss)
        hidden = products.after(wiring.marks, loss)  # also in front of weights of no module that is called
        return states - (wiring.ends(but_activations=self._output == "auto") - hidden)

    def _heads(self, wiring: Wiring, products: Products, loss: Value) -> set[StateKey]:
        """The calls that return the output."""
        heads = wiring.heads()
        return {head.key for head in heads} - products.after(heads, loss)

    def _named(self, wiring: Wiring) -> set[StateKey]:
        """Inputs that were named, which nothing predicts but what is given, and outputs that are to be held."""
        names = () if self._layers is None else asked_for(self._layers).names
        inputs = {key for key in wiring.inputs() if key.name in names or str(key) in self._also}
        ends = wiring.ends() | {head.key for head in wiring.heads()}
        return inputs | {key for key in ends if str(key) in self._also}

    def _say(self, what: str, text: str | None, level: int = logging.WARNING) -> None:
        """Once of a module, however many programs it has: one for every length of a sequence, say."""
        if text is not None and what not in self._told:
            self._told.add(what)
            log.log(level, "%s (Said once.)", text)

    def _complain(self, absent: Mapping[str, str], partial: bool) -> None:
        """Of layers that were asked for and carry no state."""
        if not absent:
            return
        told = "; ".join(f"{name!r}: {why}" for name, why in absent.items())
        # What is frozen may be thawed, and other closures of the step may reach what this one does not.
        if partial or not all(p.requires_grad for p in parameters_of(modules_of(self._module))):
            text = f"Layers that were asked for carry no state as things are, and no error. {told}."
            self._say(f"absent: {', '.join(sorted(absent))}", text)
            return
        raise LayerDiscoveryError(
            f"layers={shown(self._layers)}: what was asked for carries no state. {told}. States move, and their errors"
            " train what lies below; a layer without one would silently be a part of the next. Leave it out of"
            " layers=...; under closures that reach different parts of a module, take a learner for each."
        )


def _module_of(state: str) -> str:
    """The name of the module, of that of a state."""
    return state.partition("#")[0].partition("[")[0]
