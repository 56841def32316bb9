"""What a point is recognized by, though a relaxer may move its states in place."""

from collections.abc import Sequence

from torch import Tensor


class Version:
    """A tensor as it is now: equal to another version of the same tensor as long as nobody has written to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self._tensor is other._tensor and self._version == other._version


Versions = list[Version]


def versions(point: Sequence[Tensor]) -> Versions:
    """Of every tensor, which one it is and how often it has been written to."""
    return [Version(tensor) for tensor in point]
