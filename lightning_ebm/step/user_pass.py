"""The user's own pass of one step: what recorded it, what is known of it, and what a batch that spoils it is told."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.program.autograd_graph import named_gradients
from lightning_ebm.program.recorder import Recorder, TakesCare
from lightning_ebm.questions import Questions
from lightning_ebm.step.arithmetic import Arithmetic
from lightning_ebm.step.blame import blamed, floating_tensors, spoils, total_of
from lightning_ebm.step.closure import check_finite
from lightning_ebm.step.phases import Phases
from lightning_ebm.step.recorded import Recorded
from lightning_ebm.step.setup import Setup


class UserPass:
    """One pass of a module.

    Args:
        module: the user's.
        recorder: of a pass that has begun already, as under manual optimization.
        batch: what the module is trained on; what it is called with if None.

    Attributes:
        owns_recorder: whether the pass began with this step, so that what it holds may be let go of with it.
        recorded: what is known of the pass, once it is over; None before, and of the control.
        coded: whether code had been made of its program before.
    """

    def __init__(self, module: nn.Module, recorder: Recorder | None, batch: Any) -> None:
        self._module = module
        self._recorder = recorder
        self._batch = batch
        self._graph: tuple[Tensor, float] | None = None
        self.owns_recorder = recorder is None
        self.recorded: Recorded | None = None
        self.coded = False

    def begin(self, on_backward: TakesCare | None) -> Recorder:
        """What is to record the pass; `on_backward` is told of `backward` calls within."""
        self._recorder = Recorder(undoes=self._module.buffers())
        self._recorder.on_backward = on_backward
        return self._recorder

    @property
    def recorder(self) -> Recorder:
        """What records, or has recorded, the pass."""
        assert self._recorder is not None
        return self._recorder

    @property
    def known(self) -> Recorded:
        """`recorded`, of a pass that is over."""
        assert self.recorded is not None
        return self.recorded

    @property
    def given(self) -> Any:
        """What the module is trained on, as far as that is known."""
        if self._batch is not None or self.recorded is None:
            return self._batch
        return self.recorded.program.record.arguments

    def phases(self, setup: Setup, arithmetic: Arithmetic) -> Phases:
        """The phases of its network, before any of them; what they do not need is let go of."""
        recorded = self.known
        self.coded = bool(recorded.known.traced.codes)
        fast = recorded.is_fast(setup)
        self.recorded = recorded = recorded.thinned(self.coded) if fast else recorded._replace(held={})
        self.let_go()
        return Phases(setup, recorded.network(setup, arithmetic, self.given), self.given)

    def unrelaxed(self, loss: Tensor, scale: float) -> Tensor:
        """The loss in its own graph, for a step without relaxation: the control's, or one that is thrown away."""
        self._graph = loss, scale
        return loss

    def true_gradients(self) -> dict[str, Tensor]:
        """Backprop's gradient of this very pass."""
        if self._graph is not None:
            loss, scale = self._graph
            found = named_gradients(self._module, loss, retain_graph=True)
            return {name: gradient / scale for name, gradient in found.items()}
        with torch.enable_grad():
            return named_gradients(self._module, self.known.program.uncut())

    # A batch that cannot be trained on

    def check_finite(self, questions: Questions, loss: Tensor | None) -> None:
        """Refuses a loss that is nan or infinite, and such a batch if no gradient survives it: it may be meant so."""
        questions.gathers = questions.rarely
        suspects = [*floating_tensors(self.given), *([] if loss is None else [loss.detach()])]
        if not suspects:
            return

        def refuse(finite: list[float]) -> None:
            if loss is not None and not finite[-1]:
                check_finite(loss)
            if not all(finite) and spoils(self.true_gradients()):
                raise RelaxationDivergedError(
                    "The batch holds numbers that are not finite, and no gradient survives them."
                )

        home = suspects[-1].device  # a batch may hold tensors that stay on the host
        finite = [torch.isfinite(total_of(s)).to(home, non_blocking=True) for s in suspects]
        questions.later(torch.stack(finite), refuse)

    @contextmanager
    def blaming(self, loss: Tensor | None, graph: Tensor | None = None) -> Iterator[None]:
        """Within it, a divergence is traced to what caused it, by us and not by autograd's own detection of anomalies.

        Relaxers try points at which nothing is finite and take other ones, and nan tells which samples see each other.

        Args:
            loss: of the forward pass, if there is one yet, without its graph.
            graph: the loss in its graph, where the user has turned detection on: if the gradient of the pass is nan,
                torch names the operation, and the line of the user's that it stands in.
        """
        try:
            with torch.autograd.set_detect_anomaly(False):
                yield
        except RelaxationDivergedError as error:
            if graph is not None:
                named_gradients(self._module, graph)
            backprop = None if self.recorded is None else self._backprop
            raise blamed(error, self._module, self._buffers(), self.given, loss, backprop) from error

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """What buffers held before the pass."""
        before = None if self._recorder is None else self._recorder.contents.before
        buffers = self._module.named_buffers()
        return [(name, tensor if before is None else before.content_of(tensor)) for name, tensor in buffers]

    def _backprop(self) -> Mapping[str, Tensor]:
        """`true_gradients`, or none where the failed step has let go of what they are computed from."""
        try:
            return self.true_gradients()
        except RuntimeError:
            return {}

    # Its end

    def undo(self) -> None:
        """Puts back what the pass wrote to (running statistics), as its step is refused."""
        if self._recorder is not None and self.owns_recorder:
            self._recorder.contents.undo()

    def let_go(self) -> None:
        """The pass is over, and what is needed of it has been taken."""
        if self._recorder is not None and self.owns_recorder:
            self._recorder.contents.release()

    def free(self) -> None:
        """Frees what the pass computed; the program is still there."""
        if self.recorded is not None:
            self.recorded = self.recorded._replace(held={}, loss=None)

    def release(self) -> None:
        """Frees all but the program: `true_gradients` still works."""
        self._graph = None
        self.free()
        self.let_go()
