"""What evaluations have in common whose result is a list of tensors."""

from torch import Tensor

from lightning_ebm.evaluations.base import Evaluation


class TensorsEvaluation(Evaluation[list[Tensor]]):
    """An evaluation that gives tensors, and nothing beside them."""

    def flat(self, found: list[Tensor]) -> list[Tensor]:
        return found

    def built(self, tensors: list[Tensor], layers: int) -> list[Tensor]:
        return tensors
