"""How far the loss has been felt: states that no signal has reached yet are not computed.

From the forward pass of a divergence energy, E = sum_l I_l + lambda L with I_l = 0 there, nothing but the loss pulls at
first: layers that it is computed from move at the first step of descent, those next to them at the second, and so on
(first arrival: Song et al., NeurIPS 2020). Ahead of that front every state is its prediction of the forward pass, every
error exactly 0 and every product known. In a chain of L layers that saves half of the first L steps.
"""

from collections.abc import Collection

from lightning_ebm.wiring import Plan

_WORTH_IT = 0.5
"""Passes through the network that a set must spare: each is code of its own."""


class Front:
    """The sets of states that can have moved after 0, 1, 2, 4, 8, ... steps; all but all of them.

    Args:
        plan: the wiring.
    """

    def __init__(self, plan: Plan) -> None:
        self._parents = [frozenset(row.parents) for row in plan.rows]
        self._pulled = frozenset(plan.loss_parents)
        self._moved: list[frozenset[int]] = []
        moved: frozenset[int] = frozenset()
        steps, served, count = 0, -1, len(plan.rows)
        while len(moved) < count:
            spared = (steps - served) * (1 - len(moved) / count)  # passes, by the one set for the steps since the last
            if steps & (steps - 1) == 0 and spared >= _WORTH_IT:
                self._moved.append(moved)
                served = steps
            further = moved | self.reached(moved)
            if further == moved:
                break
            moved, steps = further, steps + 1

    def around(self, moved: Collection[int]) -> frozenset[int] | None:
        """The smallest of the sets that holds all these states; None where that would be all."""
        return next((known for known in self._moved if known.issuperset(moved)), None)

    def reached(self, moved: Collection[int]) -> frozenset[int]:
        """The states that feel a force when these are not where the forward pass left them."""
        wrong = self.wrong(moved)
        return self._pulled.union(wrong, *(self._parents[k] for k in wrong))

    def wrong(self, moved: Collection[int]) -> frozenset[int]:
        """The states that can then differ from their predictions."""
        layers = enumerate(self._parents)
        return frozenset(k for k, parents in layers if k in moved or not parents.isdisjoint(moved))
