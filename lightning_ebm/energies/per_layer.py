"""An energy of its own for each layer that is named."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.energies.base import Energy, LayerView, best_response, is_divergence
from lightning_ebm.energies.predictive_coding import PredictiveCoding
from lightning_ebm.errors import ConfigurationError


class PerLayer(Energy):
    """`I = sum_l e_l(x_l, a_l)` with e_l as given for the layer's name: Bernoulli pixels above Gaussian hidden layers.

    It is a divergence where all of its parts are. Relaxers of states take it; error coordinates are for
    `PredictiveCoding` alone, whose precision may differ from layer to layer by itself.

    Args:
        energies: by the name of a layer.
        others: for layers not named; `PredictiveCoding()` if not given.

    Raises:
        ConfigurationError: parts that are no energies, or (in use) a name of no layer.
    """

    def __init__(self, energies: Mapping[str, Energy], others: Energy | None = None) -> None:
        checked.instance(self, "energies", energies, Mapping, "a mapping from names of layers to energies")
        for name in energies:
            checked.instance(self, "energies", name, str, "a mapping from names of layers to energies")
        self.energies = dict(energies)
        self.others = PredictiveCoding() if others is None else others
        for part in (*self.energies.values(), self.others):
            if not isinstance(part, Energy):
                raise ConfigurationError(
                    f"PerLayer(energies, others): {checked.shown(part)} is no energy; expected instances such as"
                    " ebm.Bernoulli() or ebm.Huber(1.0)."
                )

    @property
    def divergence(self) -> bool:  # type: ignore[override]  # each one's own here, its class's elsewhere
        return all(map(is_divergence, (*self.energies.values(), self.others)))

    def __repr__(self) -> str:
        return f"PerLayer({self.energies!r}, others={self.others!r})"

    def _of(self, layer: LayerView) -> Energy:
        return self.energies.get(layer.name, self.others)

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        return self._of(layer).layer_energy(state, layer)

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return best_response(self._of(layer), pull, layer)

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        return self._of(layer).feasible(state, layer)

    def tangent(self, gradient: Tensor, state: Tensor, layer: LayerView) -> Tensor:
        return self._of(layer).tangent(gradient, state, layer)

    def check_layers(self, names: Collection[str]) -> None:
        for name in self.energies:
            if name not in names:
                close = checked.nearest(name, names) or list(names)[:3]
                raise ConfigurationError(
                    f"PerLayer({{{name!r}: ...}}): no layer of that name carries a state, so this energy would be used"
                    f" nowhere. Nearest: {close}; ebm.summary lists the layers."
                )
        self.others.check_layers([name for name in names if name not in self.energies])

    def observe(self, errors: Callable[[], Mapping[str, Tensor]]) -> None:
        self.others.observe(errors)
