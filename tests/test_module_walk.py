"""The walks of every step find what torch's own find."""

from torch import nn

from lightning_ebm.program.module_walk import modules_of, parameters_of


class Odd(nn.Module):
    """Shares a module, ties a weight, holds an empty place, and contains itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh())
        self.again, self.nothing = self.a, None
        self.register_module("empty", None)
        self.b[0].weight = self.a.weight
        self.register_parameter("none", None)
        self.circle = nn.ModuleList([self])


def test_the_same_modules_and_parameters_as_by_torch():
    odd = Odd()
    found = modules_of(odd)
    assert len(found) == len(set(found))
    assert set(found) == set(odd.modules())
    assert set(map(id, parameters_of(found))) == set(map(id, odd.parameters()))


def test_what_is_added_and_replaced_is_seen_at_once():
    odd = Odd()
    modules_of(odd)
    odd.b.append(nn.PReLU())
    odd.a.weight = nn.Parameter(odd.a.weight.detach())
    found = modules_of(odd)
    assert odd.b[2] in found
    assert any(p is odd.a.weight for p in parameters_of(found))
