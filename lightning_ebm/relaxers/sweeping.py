"""Relaxers that move by sweeps: every layer to its best response, one group of layers after another."""

from abc import abstractmethod
from collections.abc import Generator, Sequence

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_ebm.evaluations import Landscape, Swept
from lightning_ebm.relaxers.base import Relaxation, Relaxer, as_complex

Sweeps = Generator[list[Tensor], list[Tensor], Relaxation]
"""Yields where a sweep is to begin, is sent where it ended, and returns how it all ended."""


class SweepingRelaxer(Relaxer):
    """What is done between sweeps, by `sweeps`; the sweeps themselves are made here, for several phases at once.

    Attributes:
        max_steps: how many sweeps at most.
        damping: how much of the old state stays.
    """

    max_steps: int
    damping: float = 0.0

    @property
    def goes_into_graphs(self) -> bool:
        return True

    @abstractmethod
    def sweeps(self, landscape: Landscape, point: list[Tensor], strength: complex) -> Sweeps:
        """One relaxation from `point`, see `Sweeps`."""

    def groups(self, landscape: Landscape) -> list[list[int]]:
        """The layers that move together, in turn."""
        return halves_of(landscape.depths)

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: complex) -> Relaxation:
        if get_proxy_mode() is not None:  # a graph is being made
            return self._unrolled(landscape, as_complex(start, strength), strength)
        run, sweep = self.sweeps(landscape, as_complex(start, strength), strength), self.plain_sweep(landscape)
        point = next(run)
        while True:
            try:
                swept, point = landscape.evaluate(sweep, point, strength), []
                point = run.send(swept)  # who decides how long to hold where the sweep began, and where it ended
                del swept
            except StopIteration as end:
                found: Relaxation = end.value
                return found

    def plain_sweep(self, landscape: Landscape) -> Swept:
        """See `Relaxer.plain_sweep`."""
        return Swept(tuple(map(tuple, self.groups(landscape))), self.damping)

    def _unrolled(self, landscape: Landscape, point: list[Tensor], strength: complex) -> Relaxation:
        """All steps, whatever the tolerance, for a graph: it cannot ask how it goes."""
        sweep = self.plain_sweep(landscape)
        for _ in range(self.max_steps):
            point = landscape.evaluate(sweep, point, strength)
        unknown = landscape.per_sample(point).new_full((landscape.batch_size,), float("nan"))
        return Relaxation(point, "states", "fixed", self.max_steps, unknown)


def halves_of(depths: Sequence[int]) -> list[list[int]]:
    """The layers that move together, in turn: those at odd depth, then those at even depth."""
    layers = range(len(depths))
    odd, even = [k for k in layers if depths[k] % 2], [k for k in layers if depths[k] % 2 == 0]
    return [odd, even] if even else [odd]
