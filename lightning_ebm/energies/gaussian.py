"""Layers whose units' errors are correlated."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.energies.base import Energy, LayerView
from lightning_ebm.errors import ConfigurationError


class Gaussian(Energy):
    """`I = sum_l 1/2 e_l' P_l e_l`, e_l = x_l - mu_l with its units in a row, P_l a precision matrix, per sample.

    The inverse of P_l is the covariance of the layer's errors. The best response is mu + P^-1 pull.

    Args:
        precision: by the name of a layer, P_l, ``(n, n)`` for a layer of n units, symmetric and positive definite;
            layers not named have the identity.

    Raises:
        ConfigurationError: a matrix that is no precision; (in use) one of another size than its layer.
    """

    divergence: ClassVar[bool] = True
    reads_drive: ClassVar[bool] = False

    def __init__(self, precision: Mapping[str, Tensor]) -> None:
        wanted = "a mapping from names of layers to matrices"
        checked.instance(self, "precision", precision, Mapping, wanted)
        for name, matrix in precision.items():
            checked.instance(self, "precision", name, str, wanted)
            checked.instance(self, "precision", matrix, Tensor, wanted)
        self.precision = {name: matrix.detach() for name, matrix in precision.items()}
        for name, matrix in self.precision.items():
            square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
            if not square or not torch.allclose(matrix, matrix.T) or int(torch.linalg.cholesky_ex(matrix).info):
                raise ConfigurationError(
                    f"Gaussian(precision={{{name!r}: ...}}): expected a symmetric positive definite matrix, the inverse"
                    f" of a covariance; got shape {tuple(matrix.shape)}. With any other the energy has no minimum."
                )

    def __repr__(self) -> str:
        return f"Gaussian(precision of {', '.join(self.precision)})"

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        error = (state - layer.prediction).flatten(1)
        matrix = self._matrix(layer, error)
        return 0.5 * error.square() if matrix is None else 0.5 * error * (error @ matrix)

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        matrix = self._matrix(layer, pull.flatten(1))
        if matrix is None:
            return layer.prediction + pull
        moved: Tensor = torch.linalg.solve(matrix, pull.flatten(1).T).T.reshape(pull.shape)
        return layer.prediction + moved

    def _matrix(self, layer: LayerView, rows: Tensor) -> Tensor | None:
        matrix = self.precision.get(layer.name)
        if matrix is None:
            return None
        if len(matrix) != rows.shape[1]:
            raise ConfigurationError(
                f"Gaussian: the precision of layer {layer.name!r} is {len(matrix)} x {len(matrix)}, and the layer has"
                f" {rows.shape[1]} units a sample."
            )
        return matrix.to(rows)
