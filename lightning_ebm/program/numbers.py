"""Numbers that Python computes anew at every step, such as a schedule's factor: inputs of a program."""

from typing import Any, NamedTuple

import torch

from lightning_ebm.program.record import Node, Record, Value, eps_of

_aten = torch.ops.aten
_TAKEN_AS_TENSORS = frozenset({_aten.mul.Tensor, _aten.div.Tensor, _aten.add.Tensor, _aten.sub.Tensor})
"""Operations whose second argument may be a number, or a tensor of one element to the same effect."""


class Site(NamedTuple):
    """Where a number stands.

    Attributes:
        node: the operation that is given it.
        position: among its arguments.
    """

    node: Node
    position: int


class OtherNumbers(str):
    """That two records differ in these numbers alone, as a sentence says it and for whoever makes them inputs."""

    sites: list[Site]

    def __new__(cls, sites: list[Site]) -> "OtherNumbers":
        """The sentence."""
        node, position = sites[0]
        made = super().__new__(cls, f"a number, {node.args[position]} now")
        made.sites = sites
        return made


def may_differ(node: Node, position: int, old: Any, new: Any) -> bool:
    """Whether a number of an operation may be another one than before, and the program the same."""
    if node.func not in _TAKEN_AS_TENSORS or position != 1 or type(new) not in (int, float):
        return False
    if type(old) is Value:
        return old.number is type(new)
    first = node.args[0]
    return type(old) is type(new) and type(first) is Value and first.is_continuous and _holds_numbers(first)


def _holds_numbers(first: Value) -> bool:
    """Whether a tensor in place of a number beside this one holds as much of it as torch computes with.

    Beside one without dimensions it is of the same kind, and torch computes with numbers in float32 at least.
    """
    return bool(first.shape) or eps_of(first.meta[2]) <= eps_of(torch.float32)


def as_input(site: Site, record: Record) -> Value:
    """Makes a number of a record an input of it, a tensor of no dimensions."""
    node, position = site
    number = node.args[position]
    # Beside a tensor with dimensions one without decides no kind of number; beside one without it would.
    dtype = torch.float64 if node.args[0].shape else node.args[0].meta[2]
    value = Value(None, (torch.Size(()), (), dtype, torch.device("cpu"), False))
    value.number = type(number)
    hold(value, number, record)
    node.args = (*node.args[:position], value, *node.args[position + 1 :])
    return value


def hold(value: Value, number: complex, record: Record) -> None:
    """Notes which number an input is in this record."""
    record.inputs[value] = torch.tensor(number, dtype=value.meta[2])
