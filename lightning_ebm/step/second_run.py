"""Steps that run twice: quietly, to find the free equilibrium, and then with its states in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ebm.errors import EBMError, UnsupportedModuleError
from lightning_ebm.program.at_value import at_value
from lightning_ebm.program.calls import Replace
from lightning_ebm.program.check import told_to_hooks
from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.record import Mark, Value
from lightning_ebm.program.recorder import Recorder
from lightning_ebm.step.recorded import Recorded


def in_place_of_layers(program: Program, states: Sequence[Tensor], recorder: Recorder) -> Replace:
    """Gives the states that are to stand for what the layers return in the second run."""
    by_key = {mark.key: x for mark, x in zip(program.marks, states, strict=True)}

    def state_of(mark: Mark, output: Tensor) -> Tensor | None:
        if (state := by_key.get(mark.key)) is None:
            return None
        with recorder.pausing():  # whose graph goes on to what the layer returned, for whoever follows it
            return at_value(output, torch.empty_like(output).copy_(state))

    return state_of


def repeated(module: nn.Module, first: Recorded, recorder: Recorder, loss: Tensor) -> tuple[Recorded, list[Mark]]:
    """The second run and its marks, in the order of the first run's: it must be the program that was relaxed.

    Raises:
        UnsupportedModuleError: it is another one.
    """
    value, record = recorder.contents.value(loss), recorder.settled()
    found = first.known.outline.repeated_by(record, value)
    if not isinstance(found, str):
        second = Recorded(
            Program(record, found[0], value),
            first.known,
            found[1],
            recorder.contents.held,
            loss.detach().reshape(()),
            first.shapes,
        )
        if _fix_the_same(first, second):
            if record.has_hooks:
                with recorder.pausing():
                    told_to_hooks(module, record, loss)
            return second, list(found[0])
        found = "what they were given"
    raise UnsupportedModuleError(
        "For this energy the step runs twice: quietly, to find the free equilibrium, and then with its states"
        f" in place. The two runs differ in {found}: the step depends on values of its layers (by detach(), no_grad,"
        " .item(), a draw or a branch), or on something outside of the module that each run changes, so that the states"
        " are of another network. Let the flow depend on the batch alone, or take a divergence energy such as"
        " ebm.PredictiveCoding()."
    )


def _fix_the_same(first: Recorded, second: Recorded) -> bool:
    """Whether two passes of one known program were given the same numbers: parameters are the same tensors."""
    before, now = first.program, second.program
    for known in first.known.traced.values:
        value = known if first.binding is None else first.binding[known]
        other: Value | None = known if second.binding is None else second.binding.get(known)
        if other is None or _same_leaf(before.record.leaves.get(value), now.record.leaves.get(other)):
            continue
        one, another = before.content(value), now.content(other)
        if not _is_same(one, another):
            return bool(one.is_floating_point() and one.isnan().any())
    return True


def _same_leaf(one: Tensor | None, another: Tensor | None) -> bool:
    return one is not None and one is another


def _is_same(one: Tensor, another: Tensor) -> bool:
    if one.layout is not torch.strided:
        return not bool((one - another).to_sparse_coo().coalesce().values().any())
    return one.data_ptr() == another.data_ptr() or torch.equal(one, another)


@contextmanager
def told_of_states_in_place() -> Iterator[None]:
    """Says what is special about a run that fails where the quiet one before did not."""
    try:
        yield
    except EBMError:
        raise
    except Exception as error:
        raise UnsupportedModuleError(
            "For this energy the step runs twice: quietly, to find the free equilibrium, and then with its states in"
            f" place. The second run raised {type(error).__name__}: {error}. The first did not. Either the step takes a"
            " derivative through its layers, which does not exist there, as states are values of their own; or it hangs"
            " on something that the first run has changed. Take a divergence energy such as ebm.PredictiveCoding(),"
            " under which the step runs once and uncut."
        ) from error
