"""Part of a record as straight-line code: what depends on the batch alone is computed once, the rest at every point.

Stages, by what a value depends on: `once` a batch (transposed weights; whatever the first pass has computed already is
taken from there), once a `phase` (multiples of the nudge), at every `point` the relaxer asks for, and in the `update`,
which is the only one to compute gradients of parameters. The last sums of the `energy` wait until somebody asks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.abreast import Abreast
from lightning_ebm.capture.contrast import Contrast
from lightning_ebm.capture.lowering import Lines
from lightning_ebm.capture.order import most_held, orders
from lightning_ebm.capture.pair_rules import in_pairs
from lightning_ebm.capture.rows import in_rows
from lightning_ebm.capture.simplify import needed, simplified
from lightning_ebm.capture.tape import Tape
from lightning_ebm.capture.values import CONSTANT, PHASE, SEED, STATE, Value
from lightning_ebm.capture.writing import Names, Op, renamed, source

Rewrite = Callable[[bool, Sequence[Op], Iterable[Value]], list[Op]]
"""From whether they are for a compiler, the operations of a stage, and the values that must still be computed, to
faster operations."""

Compiler = Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]]
"""From code written for it, and the same code as it would run without, to faster code."""

_ENERGY = SEED + 1
"""The stage that finishes the energy."""


@dataclass
class Program:
    """Code for one kind of evaluation.

    Attributes:
        bound: the values to be taken from the first pass.
        turned: those of them whose transposes are wanted too, in rows.
        once: from the bound values and these to the rest of what a batch fixes.
        phase: from these and the nudge to what a phase fixes.
        point: from these and the point to the outputs, what the update wants kept, and what the energy is made of. The
            point is a list, which may be emptied: whoever has no other use for its tensors does not hold them.
        energy: from that to the energy of each sample, for the points that are asked for it.
        update: from all of these and a scale to the gradients of the parameters. What was kept is a list, and emptied.
        fixed: bound values that do not come from the pass: tensors of the energy itself.
    """

    bound: list[Value]
    turned: list[Value]
    once: Callable[..., tuple[Any, ...]]
    phase: Callable[..., tuple[Any, ...]]
    point: Callable[..., Sequence[Sequence[Tensor]]]
    energy: Callable[[Sequence[Tensor]], Tensor]
    update: Callable[..., tuple[Any, ...]]
    fixed: dict[Value, Tensor]
    sources: dict[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """What was recorded of one kind of evaluation.

    Attributes:
        tape: the record.
        known: the values that the comparison with another first pass covers.
        first_pass: how many of the recorded operations belong to the first pass.
        point: the inputs that move: states, or errors.
        strength: the nudge, an input.
        scale: what the gradients of parameters are multiplied by, an input.
        energy: of each sample; None if the evaluation gives none.
        outputs: what every evaluation gives besides.
        slopes: what the update gives.
        defined: inputs that are the sum of two other values: states, in error coordinates.
        still: inputs that are where the forward pass left them, and what they are then equal to.
        phases: how many phases the update sums over, or there are outputs of, each with a point, a strength and a
            scale of its own.
        repeated: whether a batch is evaluated at many points.
    """

    tape: Tape
    known: Set[Value]
    first_pass: int
    point: Sequence[Value]
    strength: Value
    scale: Value
    energy: Value | None
    outputs: Sequence[Value]
    slopes: Sequence[Value]
    defined: Mapping[Value, tuple[Value, Value]]
    still: Mapping[Value, Value] = field(default_factory=dict)
    phases: int = 1
    repeated: bool = False


def compiled_program(
    record: Record,
    rewrite: Rewrite | None = None,
    compiler: Compiler | None = None,
) -> Program:
    """Sorts what the outputs depend on into stages, and writes the code.

    Args:
        record: of the evaluation.
        rewrite: makes faster operations of those of a stage, on a processor; None leaves all as they were recorded.
        compiler: makes faster code of the code of a point.

    Raises:
        NotRepeatable: an operation cannot be repeated at other states.
    """
    lines = Lines(record.tape, record.known, record.first_pass, record.defined, record.still)
    energy = [] if record.energy is None else [record.energy]
    wanted = [*energy, *record.outputs, *record.slopes]
    recorded = lines.of(wanted)
    ops, found = simplified(*in_pairs(recorded, [lines.plain(v) for v in wanted]))
    outputs, slopes = found[: len(wanted) - len(record.slopes)], found[len(wanted) - len(record.slopes) :]
    inputs: list[list[Value]] = [lines.bound, [record.strength], list(record.point), [record.scale], []]
    if record.phases > 1:
        own = [{v: v.like() for level in inputs[PHASE:] for v in level} for _ in range(record.phases)]
        if slopes:
            contrast = Contrast(ops, own)
            slopes = [contrast.sum(value) for value in slopes]
            ops = needed(contrast.ops, slopes)
        else:
            abreast = Abreast(ops, own)
            outputs = [v for phase in zip(*map(abreast.parts, outputs), strict=True) for v in phase]
            ops = needed(abreast.ops, outputs)
        inputs[PHASE:] = [[names[v] for names in own for v in level] for level in inputs[PHASE:]]
    turned: dict[Value, Value] = {}
    if rewrite is not None:
        weights = [v for v in lines.bound if v not in lines.fixed] if record.repeated else []
        # A compiler has a tanh of its own that is faster than oneDNN's.
        ops, turned = in_rows(ops, weights, () if compiler else (torch.ops.aten.tanh.default,))
        ops = needed(ops, [*outputs, *slopes])
        inputs[CONSTANT] = [*lines.bound, *turned.values()]
    outputs = _owned(ops, outputs)
    energy, outputs = outputs[: len(energy)], outputs[len(energy) :]
    stages = _staged(ops, energy, outputs, slopes)
    stages[SEED] = _made_again(stages, inputs[STATE])
    used = [set().union(*(op.reads() for op in stage)) for stage in stages]
    used[STATE] |= set(outputs)
    used[SEED] |= set(slopes)
    used[_ENERGY] |= set(energy)

    def handed(level: int, *later: int) -> list[Value]:
        """What a stage makes and later ones use, in the order in which it is made."""
        wanted = set().union(*(used[k] for k in later))
        order = [*inputs[level], *(v for op in stages[level] for v in op.results if v is not None)]
        return [v for v in order if v in wanted]

    parts = [v for level in (CONSTANT, PHASE, STATE) for v in handed(level, _ENERGY)]
    used[STATE] |= set(parts)
    once, phase, kept = handed(CONSTANT, PHASE, STATE, SEED), handed(PHASE, STATE, SEED), handed(STATE, SEED)
    names = Names()
    sources: dict[str, str] = {}

    def code(
        name: str,
        level: int,
        arguments: list[list[Value]],
        results: list[list[Value]],
        taken: int | None = None,
        to_compile: bool = False,
    ) -> Callable[..., Any]:
        wanted = [v for r in results for v in r]
        found = [o if rewrite is None else rewrite(to_compile, o, set(wanted)) for o in orders(stages[level], wanted)]
        given = () if taken is None else arguments[taken]
        given = [v for v in given if level == STATE or v not in inputs[STATE]]  # its end is held as long as its update
        stage = min(found, key=lambda ops: most_held(ops, wanted, given))  # of equals the first
        text = source(name, stage, arguments, results, names, taken)
        sources[f"compiled {name}" if to_compile else name] = text
        space = dict(names.constants)
        exec(compile(text, f"<lightning_ebm {name}>", "exec"), space)
        function: Callable[..., Any] = space[name]
        return function

    given, made = [once, phase, inputs[STATE]], [outputs, kept, parts]
    evaluate = code("point", STATE, given, made, taken=2)
    if compiler is not None:
        evaluate = compiler(code("point", STATE, given, made, to_compile=True), evaluate)
    return Program(
        bound=lines.bound,
        turned=list(turned),
        once=code("once", CONSTANT, [inputs[CONSTANT]], [once]),
        phase=code("phase", PHASE, [once, inputs[PHASE]], [phase]),
        point=evaluate,
        energy=partial(_first_of, code("energy", _ENERGY, [parts], [energy])),
        update=code("update", SEED, [once, phase, kept, inputs[SEED]], [slopes], taken=2),
        fixed=lines.fixed,
        sources=sources,
    )


def _first_of(function: Callable[..., tuple[Any, ...]], parts: Sequence[Tensor]) -> Tensor:
    return function(parts)[0]  # type: ignore[no-any-return]


def _staged(
    ops: Sequence[Op], energy: Sequence[Value], outputs: Sequence[Value], slopes: Sequence[Value]
) -> list[list[Op]]:
    """The operations of each stage."""
    at_points = {id(op) for op in needed(ops, [*energy, *outputs])}
    besides = {id(op) for op in needed(ops, [*outputs, *slopes])}
    room = math.prod(energy[0].shape or ()) if energy else 0
    stages: list[list[Op]] = [[] for _ in range(_ENERGY + 1)]
    late: set[Value] = set()  # what is finished from numbers that are cheaper to hold than to add up
    for op in ops:
        if op.level < STATE or id(op) not in at_points:
            stages[op.level if op.level < STATE else SEED].append(op)
        elif id(op) not in besides and all(v in late or _size(v) <= room for v in op.reads()):
            stages[_ENERGY].append(op)
            late |= {v for v in op.results if v is not None}
        else:
            stages[STATE].append(op)
    return stages


_CHEAP = frozenset({torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor})


def _made_again(stages: Sequence[Sequence[Op]], point: Sequence[Value]) -> list[Op]:
    """The operations of the update, and before them those sums of what it reads anyway that are not worth keeping.

    x - mu takes as much memory as x, which the point holds, or mu, which slopes of activations are made of.
    """
    update, reads = stages[SEED], {v for op in stages[SEED] for v in op.reads()}
    at_hand = reads.union(point, *(op.results for op in (*stages[CONSTANT], *stages[PHASE])))
    again: list[Op] = []
    names: dict[Value, Value] = {}
    for op in stages[STATE]:
        (result, *_) = op.results
        if result in reads and op.func in _CHEAP and op.reads() <= at_hand:
            assert result is not None
            names[result] = result.like()
            again.append(Op(op.func, renamed(op.args, names), op.kwargs, [names[result]], True, SEED))
    return [*again, *(Op(op.func, renamed(op.args, names), op.kwargs, op.results, op.single, SEED) for op in update)]


def _size(value: Value) -> float:
    return math.inf if value.shape is None else value.shape.numel()


def _owned(ops: list[Op], outputs: Sequence[Value]) -> list[Value]:
    """Outputs that whoever asked for them may write to: not shared between points, or with each other."""
    made = {v for op in ops if op.level >= STATE for v in op.results}
    owned: list[Value] = []
    for value in outputs:
        if value not in made or value in owned:
            copy = value.like()
            copy.level = STATE
            ops.append(Op(torch.clone, (value,), {}, [copy], True, STATE))
            value = copy
        owned.append(value)
    return owned
