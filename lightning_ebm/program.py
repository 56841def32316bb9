"""Part of a record as straight-line code: what depends on the batch alone is computed once, the rest at every point.

Four stages, by what a value depends on: `once` a batch (transposed weights; whatever the first pass has computed
already is taken from there), once a `phase` (multiples of the nudge), at every `point` the relaxer asks for, and in
the `update`, which is the only one to compute gradients of parameters.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.contrast import Contrast
from lightning_ebm.lowering import Lines
from lightning_ebm.packing import packed_once
from lightning_ebm.simplify import needed, simplified
from lightning_ebm.tape import CONSTANT, PHASE, SEED, STATE, Tape, Value
from lightning_ebm.writing import Names, Op, source

Rewrite = Callable[[Sequence[Op], Iterable[Value]], tuple[list[Op], list[Op]]]
"""From operations, and the values that must still be computed, to preparations and faster operations; empty if none."""


@dataclass
class Program:
    """Code for one kind of evaluation.

    Attributes:
        bound: the values to be taken from the first pass.
        once: from the bound values to the rest of what a batch fixes.
        phase: from these and the nudge to what a phase fixes.
        point: from these and the point to the outputs, and to what the update wants kept.
        prepare: from what a batch fixes to what `fast` needs besides; None if there is no faster code.
        fast: `point`, for those who ask for more than a few points.
        update: from all of these and a scale to the gradients of the parameters.
        fixed: bound values that do not come from the pass: tensors of the energy itself.
    """

    bound: list[Value]
    once: Callable[..., tuple[Any, ...]]
    phase: Callable[..., tuple[Any, ...]]
    point: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]
    prepare: Callable[..., tuple[Any, ...]] | None
    fast: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]
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
        outputs: what every evaluation gives.
        slopes: what the update gives.
        defined: inputs that are the sum of two other values: states, in error coordinates.
        phases: how many phases the update sums over, each with a point, a strength and a scale of its own.
    """

    tape: Tape
    known: Set[Value]
    first_pass: int
    point: Sequence[Value]
    strength: Value
    scale: Value
    outputs: Sequence[Value]
    slopes: Sequence[Value]
    defined: Mapping[Value, tuple[Value, Value]]
    phases: int = 1


def compiled_program(
    record: Record,
    rewrite: Rewrite | None = None,
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Program:
    """Sorts what the outputs depend on into stages, and writes the code.

    Args:
        record: of the evaluation.
        rewrite: makes faster operations of those of a point.
        compiler: makes faster code of the code of a point.

    Raises:
        NotRepeatable: an operation cannot be repeated at other states.
    """
    lines = Lines(record.tape, record.known, record.first_pass, record.defined)
    ops = lines.of([*record.outputs, *record.slopes])
    ops, found = simplified(ops, [lines.plain(v) for v in (*record.outputs, *record.slopes)])
    outputs, slopes = found[: len(record.outputs)], found[len(record.outputs) :]
    inputs: list[list[Value]] = [lines.bound, [record.strength], list(record.point), [record.scale]]
    if record.phases > 1:
        own = [{v: Value(None, v.level) for level in inputs[PHASE:] for v in level} for _ in range(record.phases)]
        contrast = Contrast(ops, own)
        slopes = [contrast.sum(value) for value in slopes]
        ops = needed(contrast.ops, slopes)
        inputs[PHASE:] = [[names[v] for names in own for v in level] for level in inputs[PHASE:]]
    outputs = _owned(ops, outputs)
    inner = {id(op) for op in needed(ops, outputs)}
    stages: dict[int, list[Op]] = {CONSTANT: [], PHASE: [], STATE: [], SEED: []}
    for op in ops:
        stages[SEED if op.level >= STATE and id(op) not in inner else op.level].append(op)
    made = [{v for op in stages[level] for v in op.results if v is not None} | {*inputs[level]} for level in range(4)]
    used = [set().union(*(op.reads() for op in stages[level])) for level in range(4)]
    used[STATE] |= set(outputs)
    used[SEED] |= set(slopes)

    def handed(level: int) -> list[Value]:
        """What a stage makes and later ones use, in the order in which it is made."""
        later = set().union(*(used[k] for k in range(level + 1, 4)))
        order = [*inputs[level], *(v for op in stages[level] for v in op.results if v is not None)]
        return [v for v in order if v in made[level] & later]

    once, phase, kept = handed(CONSTANT), handed(PHASE), handed(STATE)
    names = Names()
    sources: dict[str, str] = {}

    def code(name: str, level: int, arguments: list[list[Value]], results: list[list[Value]]) -> Callable[..., Any]:
        sources[name] = source(name, stages[level], arguments, results, names)
        space = dict(names.constants)
        exec(compile(sources[name], f"<lightning_ebm {name}>", "exec"), space)
        function: Callable[..., Any] = space[name]
        return function

    first = code("once", CONSTANT, [lines.bound], [once])
    second = code("phase", PHASE, [once, inputs[PHASE]], [phase])
    third = code("point", STATE, [once, phase, inputs[STATE]], [outputs, kept])
    stages[SEED] = packed_once(stages[SEED])
    last = code("update", SEED, [once, phase, kept, inputs[SEED]], [slopes])
    ready: list[Op] = []
    faster: list[Op] = []
    if rewrite is not None:
        ready, faster = rewrite([*stages[CONSTANT], *stages[PHASE], *stages[STATE]], {*outputs, *kept})
        if faster:
            stages[STATE] = [op for op in faster if op.level == STATE]
    prepare, fast = None, third
    if faster or compiler is not None:
        prepared = [v for op in ready for v in op.results if v is not None]
        stages[CONSTANT] = ready
        prepare = code("prepare", CONSTANT, [once], [prepared])
        fast = code("fast", STATE, [once, phase, inputs[STATE], prepared], [outputs, kept])
        fast = fast if compiler is None else compiler(fast)
    return Program(
        bound=lines.bound,
        once=first,
        phase=second,
        point=third,
        update=last,
        prepare=prepare,
        fast=fast,
        fixed=lines.fixed,
        sources=sources,
    )


def _owned(ops: list[Op], outputs: Sequence[Value]) -> list[Value]:
    """Outputs that whoever asked for them may write to: not shared between points, or with each other."""
    made = {v for op in ops if op.level >= STATE for v in op.results}
    owned: list[Value] = []
    for value in outputs:
        if value not in made or value in owned:
            copy = Value(None, STATE)
            ops.append(Op(torch.clone, (value,), {}, [copy], True, STATE))
            value = copy
        owned.append(value)
    return owned
