"""Landscapes written out by hand: what they know by name, asked by the one question that relaxers ask."""

from lightning_ebm.evaluations import BestResponses, Energy, ErrorForces, Forces
from lightning_ebm.questions import Questions


class ByHand:
    """Sends each kind of question to the method that a subclass has for it."""

    conservative = True
    questions = Questions()

    @property
    def unwatched(self):
        return self

    def begin(self, strengths, held=False):
        pass

    def evaluate(self, what, point, strength):
        if what.composed:
            return what.at(self, point, strength)
        if isinstance(what, BestResponses):
            return self.answers(point, strength, what.layers)
        return {Forces: self.forces, ErrorForces: self.error_forces, Energy: self.energy_of}[type(what)](
            point, strength
        )

    def forces(self, states, strength):
        raise NotImplementedError

    def error_forces(self, errors, strength):
        return self.forces(errors, strength)

    def answers(self, states, strength, layers):
        raise NotImplementedError

    def energy_of(self, states, strength):
        raise NotImplementedError
