"""What the parts of the page are made of: lines of Markdown."""

import dataclasses
from collections.abc import Iterator, Sequence

Lines = Iterator[str]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, and with whom."""

    repeats: int
    compile: bool
    pythons: Sequence[str]


def table(*columns: str) -> str:
    """The head of a table."""
    return f"\n| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|"


def line(*cells: object) -> str:
    """A row; numbers to one digit."""
    return f"| {' | '.join(f'{cell:.1f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"
