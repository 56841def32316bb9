"""What parts of an algorithm are handed and hand over: one of the user's own may write to it, or give back anything."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.weak import TensorWeakRef

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.network.network import Network
from lightning_ebm.network.settings import is_own
from lightning_ebm.relaxers import Relaxation, Relaxer
from lightning_ebm.relaxers.base import Coordinates, Status
from lightning_ebm.updates import End, Update


@contextmanager
def unwritten(part: object, method: str, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Refuses a part that writes, within it, to tensors that others read after it.

    Raises:
        ConfigurationError: it has, as torch's own counters tell.
    """
    handed = [(TensorWeakRef(tensor), tensor._version) for tensor in tensors]
    del tensors  # nobody may need them any more on the way
    raised = None
    try:
        yield
    except RuntimeError as error:  # torch's own, where autograd had saved what was written to
        raised = error
    if any((tensor := found()) is not None and tensor._version != before for found, before in handed):
        raise ConfigurationError(
            f"{type(part).__name__}.{method} wrote in place to tensors that it was given (-=, add_, copy_): they are"
            " those of the network, which other phases and the update read after it. Make new ones, x = x - step, or"
            " begin with copies, [x.clone() for x in start]."
        ) from raised
    if raised is not None:
        raise raised


class Relaxing:
    """Calls relaxers; refuses what one of the user's own would write over, or would be read as nan into an update.

    Args:
        network: whose states move.
    """

    def __init__(self, network: Network) -> None:
        self._network, self._shapes = network, [x.shape for x in network.free]

    def one(
        self, relaxer: Any, landscape: Landscape, strength: complex, start: Sequence[Tensor] | None = None
    ) -> Relaxation:
        """`Relaxer.relax`, without a graph.

        Args:
            relaxer: whose strength may be complex where the parts of the algorithm fit.
            landscape: what it is to ask.
            strength: of the nudge.
            start: where it begins; None is the equilibrium, which the network may then let go of on the way.

        Raises:
            ConfigurationError: what is returned is no relaxation of these states.
            RelaxationDivergedError: its residual is not finite, as the next question tells.
        """
        if not _is_own(relaxer):
            with torch.no_grad():
                made: Relaxation = relaxer.relax(landscape, self._begin(start), strength)
            return made
        with torch.no_grad(), unwritten(relaxer, "relax", self._begin(start)):
            found = relaxer.relax(landscape, self._begin(start), strength)
        return self._looked_at(relaxer, found)

    def all(self, relaxer: Relaxer, landscape: Landscape, strengths: Sequence[complex]) -> list[Relaxation]:
        """The same of `Relaxer.relax_all`, from the equilibrium."""
        if not _is_own(relaxer):
            with torch.no_grad():
                return relaxer.relax_all(landscape, self._begin(None), strengths)
        with torch.no_grad(), unwritten(relaxer, "relax_all", self._begin(None)):
            found: Any = relaxer.relax_all(landscape, self._begin(None), strengths)
        if not isinstance(found, Sequence) or len(found) != len(strengths):
            _refuse(relaxer, "relax_all", checked.shown(found), f"a list of {len(strengths)}, one for each strength")
        return [self._looked_at(relaxer, one) for one in found]

    def _begin(self, start: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return self._network.equilibrium if start is None else start

    def _looked_at(self, relaxer: Relaxer, found: Any) -> Relaxation:
        owner = type(relaxer).__name__
        if not isinstance(found, Relaxation):
            wanted = "an ebm.Relaxation(point, coordinates, status, steps, residual)"
            _refuse(relaxer, "relax", type(found).__name__, wanted)
        whose = f"{owner}.relax: Relaxation"
        checked.choice(whose, "coordinates", found.coordinates, get_args(Coordinates))
        checked.choice(whose, "status", found.status, get_args(Status))
        checked.count(whose, "steps", found.steps, least=0)
        if _shapes(found.point) != self._shapes:
            wanted = f"one tensor a layer, of the shapes {_listed(self._shapes)}"
            _refuse(relaxer, "relax", f"a point of the shapes {_listed(_shapes(found.point))}", wanted)
        if _shapes([found.residual]) != [torch.Size([self._network.batch_size])]:
            wanted = f"a tensor: the force left over that at the start, of each of {self._network.batch_size} samples"
            _refuse(relaxer, "relax", f"residual={checked.shown(found.residual)}", wanted)
        if get_proxy_mode() is None:  # a graph that is being made of it has no numbers yet
            total = found.residual.detach().sum().reshape(1)
            self._network.questions.later(total, lambda sums: _refuse_runaway(owner, found.steps, sums[0]))
        return found


def _is_own(relaxer: Relaxer) -> bool:
    """Whether it is of a class of the user's, or holds one that is."""
    held = [tuple(v.values()) if isinstance(v, Mapping) else v for v in vars(relaxer).values()]
    parts = [part for v in held for part in (v if isinstance(v, list | tuple) else (v,))]
    return is_own(relaxer) or any(_is_own(part) for part in parts if isinstance(part, Relaxer))


def held_by(rule: Update, network: Network, ends: Sequence[End]) -> Sequence[End]:
    """`Update.hold`.

    Raises:
        ConfigurationError: what it returns are no ends of phases, or it wrote to those that it was given.
    """
    if not is_own(rule):
        return rule.hold(network, ends)
    with unwritten(rule, "hold", [x for end in ends for x in end.found.point]):
        held: Any = rule.hold(network, ends)
    if not isinstance(held, Sequence) or not all(isinstance(end, End) for end in held):
        _refuse(rule, "hold", checked.shown(held), "a list of ebm.updates.End, such as the ends that it was given")
    return held


def _refuse(part: object, method: str, got: str, wanted: str) -> NoReturn:
    raise ConfigurationError(f"{type(part).__name__}.{method} returned {got}; expected {wanted}.")


def _refuse_runaway(owner: str, steps: int, total: float) -> None:
    if not abs(total) < float("inf"):
        raise RelaxationDivergedError(
            f"{owner} ran away: after {steps} steps its residual is not finite, and an update read there would be nan."
            " Take smaller steps, a smaller nudge, or let it raise ebm.RelaxationDivergedError itself."
        )


def _shapes(tensors: Any) -> list[Any]:
    if not isinstance(tensors, Sequence):
        return [type(tensors).__name__]
    return [x.shape if isinstance(x, Tensor) else type(x).__name__ for x in tensors]


def _listed(shapes: Sequence[Any]) -> str:
    return ", ".join(str(tuple(s)) if isinstance(s, torch.Size) else str(s) for s in shapes)
