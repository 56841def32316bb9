"""How far an estimate is from the true gradient: one pure function, and the same as a `torchmetrics.Metric`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError

NAMES = ("cosine", "angle_deg", "norm_ratio", "relative_error", "sign_agreement")


def moments(estimate: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`<g, r>, |g|^2, |r|^2, |g - r|^2`, equal signs, elements: what alignment is computed from, ``(6,)`` a parameter.

    Sums, so that those of several parameters, micro-batches or devices add up. A name that only one side has counts as
    zero on the other: an update that a rule leaves out is an error of that rule, not a gap in the figure.

    Raises:
        ConfigurationError: both have a gradient of a name, in other shapes; or not one name is of both; or one is no
            mapping.
    """
    found = {}
    for argument, given in (("estimate", estimate), ("reference", reference)):
        checked.instance("", argument, given, Mapping, "gradients by the names of parameters, {name: tensor}")
    if estimate and reference and not set(estimate) & set(reference):
        raise ConfigurationError(
            f"The estimate has gradients of {_some(estimate)}, and the reference of {_some(reference)}: no name is of"
            " both, so that there is nothing to compare. Take both of one module: gradients of `module.net` are named"
            ' "0.weight", and those of `module` "net.0.weight".'
        )
    for name in [*reference, *(name for name in estimate if name not in reference)]:
        r, g = reference.get(name), estimate.get(name)
        some = r if r is not None else g
        assert some is not None
        r = torch.zeros_like(some) if r is None else r
        g = torch.zeros_like(some) if g is None else g
        if g.shape != r.shape:
            raise ConfigurationError(
                f"The estimate of {name!r} has the shape {tuple(g.shape)}, and the reference {tuple(r.shape)}:"
                " alignment compares two gradients of one parameter, element by element. Compare those of one module."
            )
        # float64: the angle of two vectors with cosine 1 - 1e-10 is lost in float32
        r, g = r.detach().to_dense().double(), g.detach().to_dense().double()
        same = (g.sign() == r.sign()).sum()
        parts = [(g * r).sum(), g.square().sum(), r.square().sum(), (g - r).square().sum(), same]
        found[name] = torch.stack([*parts, torch.as_tensor(g.numel(), device=g.device)]).double()
    return found


def _some(names: Iterable[str]) -> str:
    first, *others = (repr(name) for name in names)
    return ", ".join([first, *others[:1], *["..."] * (len(others) > 1)])


def alignment(estimate: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Alignment of two sets of gradients, taken as one long vector each: g the estimate, r the reference.

    `cosine = <g, r> / (|g| |r|)`; angle_deg, its angle in degrees; norm_ratio = |g| / |r|;
    relative_error = |g - r| / |r|, which resolves what is left when the cosine reads 1 (angles below 1e-6 degrees are
    rounding); sign_agreement, the fraction of elements with equal sign (0 has a sign of its own).

    A dead gradient has no direction, and nan would poison every mean: two zero vectors agree (cosine 1, ratio 1, error
    0); a zero estimate of a non-zero reference has cosine 0, ratio 0, error 1; a non-zero estimate of a zero reference
    has cosine 0, and ratio and error inf.

    Args:
        estimate: ``{parameter name: tensor}``; any shapes and dtypes.
        reference: the same names and shapes; a name missing on one side counts as zeros.

    Raises:
        ConfigurationError: both have a gradient of a name, in other shapes; or no name is of both; or both are empty.
    """
    found = moments(estimate, reference)
    if not found:
        raise ConfigurationError("There is nothing to align: both sets of gradients are empty.")
    return {name: float(value) for name, value in read(torch.stack(list(found.values())).sum(0)).items()}


def read(total: Tensor) -> dict[str, Tensor]:
    """Alignment from summed moments ``(..., 6)``; float64 tensors ``(...)``."""
    dot, gg, rr, difference, same, count = total.unbind(-1)
    dead_g, dead_r = gg == 0, rr == 0
    one, zero, inf = torch.ones_like(dot), torch.zeros_like(dot), torch.full_like(dot, math.inf)
    safe_rr = torch.where(dead_r, one, rr)
    both = dead_g & dead_r
    cosine = torch.where(both, one, torch.where(dead_g | dead_r, zero, dot / (gg.sqrt() * rr.sqrt()))).clamp(-1, 1)
    return {
        "cosine": cosine,
        "angle_deg": torch.rad2deg(torch.acos(cosine)),
        "norm_ratio": torch.where(both, one, torch.where(dead_r, inf, (gg / safe_rr).sqrt())),
        "relative_error": torch.where(both, zero, torch.where(dead_r, inf, (difference / safe_rr).sqrt())),
        "sign_agreement": same / count,
    }


def dead(names: Sequence[str], total: Tensor) -> dict[str, str]:
    """Parameters without a direction, and whose zero it is: "update", "reference" or "both".

    Their cosine, ratio and error are conventions (see `alignment`): nothing was measured there.

    Args:
        names: of the parameters.
        total: their summed `moments`, ``(len(names), 6)``.
    """
    words = {(True, False): "update", (False, True): "reference", (True, True): "both"}
    rows = total.detach().cpu()
    states = [(float(row[1]) == 0, float(row[2]) == 0) for row in rows]
    return {n: words[s] for n, row, s in zip(names, rows, states, strict=True) if row[5] > 0 and s in words}


class Alignment(Metric):
    """`alignment` over several batches and devices, overall and per parameter.

    The gradients of the batches are taken as one longer vector: sums of products are accumulated, a few numbers a
    parameter, never the gradients.

    `compute` gives ``{"cosine": ..., ...}`` and, per parameter, ``{"cosine/<name with dots as slashes>": ...}``.

    Args:
        names: of the parameters to expect; None takes those of the first update. Name them where a device may have to
            synchronize before it has seen one.
        kwargs: those of `torchmetrics.Metric`.

    Examples:
        >>> metric = Alignment()
        >>> metric.update({"weight": torch.tensor([1.0, 1.0])}, {"weight": torch.tensor([1.0, 0.0])})
        >>> round(float(metric.compute()["angle_deg"]), 6)
        45.0
    """

    full_state_update = False
    total: Tensor

    def __init__(self, names: Sequence[str] | None = None, **kwargs: Any) -> None:
        try:
            super().__init__(**kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"Alignment(**{kwargs!r}): {error}") from error
        self.set_dtype(torch.float64)
        self.names: list[str] = []
        if names is not None:
            wanted = "a list of the parameters' names, each once, or None"
            if not isinstance(names, list | tuple) or len({*map(repr, names)}) < len(names):
                checked.refuse(self, "names", names, wanted)
            self.expect([checked.instance(self, "names", name, str, wanted) for name in names])

    def expect(self, names: Iterable[str]) -> None:
        """Announces parameters, also ones that are made after others have been seen; on every device alike."""
        before = self.total if "total" in self._defaults else None
        self.names += [name for name in names if name not in self.names]
        self._index = {name: index for index, name in enumerate(self.names)}
        self.add_state("total", torch.zeros(len(self.names), 6, dtype=torch.float64), dist_reduce_fx="sum")
        if before is not None:
            self.total = torch.cat([before, self.total[len(before) :].to(before)])

    def update(self, estimate: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        """Adds one pair of gradients; names as in `alignment`.

        Raises:
            ConfigurationError: both have a gradient of a name, in other shapes; or one was not announced.
        """
        found = moments(estimate, reference)
        if "total" not in self._defaults:
            self.expect(found)
        unknown = [name for name in found if name not in self._index]
        if unknown:
            raise ConfigurationError(f"Alignment was made for {self.names} and got a gradient of {unknown[0]!r}.")
        for name, values in found.items():
            self.total[self._index[name]] += values.to(self.total.device)

    def compute(self) -> dict[str, Tensor]:
        """Overall values, and those of each parameter that had a gradient.

        Raises:
            ConfigurationError: there was no update yet, and no names either.
        """
        if "total" not in self._defaults:
            self.unsync(should_unsync=self._is_synced)  # the base class does not when compute raises
            raise ConfigurationError("There is nothing to align yet: update the metric with gradients first.")
        found = read(self.total.sum(0))
        for name, row in zip(self.names, self.total, strict=True):
            if row[5] > 0:
                found |= {f"{key}/{name.replace('.', '/')}": value for key, value in read(row).items()}
        return found

    def dead(self) -> dict[str, str]:
        """Parameters without a direction, see `lightning_ebm.metrics.dead`."""
        return dead(self.names, self.total) if "total" in self._defaults else {}
