"""Whatever functions are given and return is opened, and put together again with others in the place of its leaves."""

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lightning_ebm as ebm
from lightning_ebm.program.tensors import opened, tensors_in

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Plain:
    hidden: Any
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: Any
    missing: Any = dataclasses.field(init=False, repr=False)


@dataclasses.dataclass
class Both(OrderedDict):  # as the outputs of language models are
    hidden: Any = None

    def __post_init__(self):
        self["hidden"] = self.hidden

    def __setattr__(self, name, value):
        super().__setitem__(name, value)
        super().__setattr__(name, value)


def packed() -> PackedSequence:
    return pack_sequence([torch.arange(3.0), torch.arange(2.0)])


WAYS = {
    "a tensor": lambda t: t,
    "a list": lambda t: [t, 3],
    "a named tuple": lambda t: Pair(t, None),
    "a mapping": lambda t: {"a": t, "b": ("c", 2.0)},
    "a dataclass": lambda t: Plain(t),
    "a frozen dataclass with a field that is not set": lambda t: Frozen(t),
    "a dataclass that is a mapping": lambda t: Both(t),
    "dataclasses in a list": lambda t: [Plain(t), Plain({"x": Frozen(Pair(1, t))})],
    "a packed sequence": lambda t: PackedSequence(t, torch.ones(len(t), dtype=torch.int64)),
    "packed sequences in a dataclass": lambda t: Plain((packed(), PackedSequence(t, torch.ones(len(t)).long()))),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_opened_is_put_together_with_others_in_the_place_of_its_leaves(way):
    tensor = torch.randn(4)
    held = WAYS[way](tensor)
    leaves, rebuilt = opened(held)
    assert any(leaf is tensor for leaf in leaves)
    assert any(found is tensor for found in tensors_in(held))
    again = rebuilt([2 * leaf if leaf is tensor else leaf for leaf in leaves])
    assert type(again) is type(held)
    expected = WAYS[way](2 * tensor)
    for one, other in zip(opened(again)[0], opened(expected)[0], strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert any(leaf is tensor for leaf in opened(held)[0])  # what was opened is as it was
    if isinstance(again, dict) and "hidden" in again:
        assert torch.equal(again["hidden"], 2 * tensor)
        assert torch.equal(again.hidden, 2 * tensor)


def test_a_dataclass_that_holds_itself_is_a_leaf_there():
    tensor = torch.randn(2)
    root = Plain(tensor)
    root.name = [root, {"again": Plain(2 * tensor)}]
    leaves, rebuilt = opened(root)
    assert [leaf is root for leaf in leaves] == [False, True, False, False]
    again = rebuilt([leaf + 1 if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    assert torch.equal(again.hidden, tensor + 1)
    assert again.name[0] is root
    assert torch.equal(again.name[1]["again"].hidden, 2 * tensor + 1)


class Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(5, 5), way

    def forward(self, x: Tensor) -> Any:
        return WAYS[self.way](torch.tanh(self.linear(x)))


@pytest.mark.parametrize("way", [way for way in WAYS if "packed" not in way])
def test_what_a_block_returns_carries_states_however_it_is_packed(way):
    """Under the energy of predictive coding with one state the update of the block is as of the plain tensor."""
    torch.manual_seed(0)
    block, head = Block(way).double(), nn.Linear(5, 1).double()
    net = nn.ModuleList([block, head])
    x = torch.randn(6, 5, dtype=torch.float64)

    def step():
        hidden = next(t for t in tensors_in(block(x)) if t.is_floating_point())
        return (head(hidden) - 1).square().mean()

    found = ebm.Learner(net, "predictive-coding", layers=["0"]).gradients(step)
    block.way = "a tensor"
    expected = ebm.Learner(net, "predictive-coding", layers=["0"]).gradients(step)
    true = ebm.reference.backprop(net, step)
    for name in true:
        assert torch.allclose(found[name], expected[name], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found["0.linear.weight"], true["0.linear.weight"], rtol=1e-3)  # states do relax
