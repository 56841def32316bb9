"""Pages about runs: templates, tables, and figures that need no network. Everything from a run is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_ebm.reports import interactive

COLORS = {
    "sound": "#2f855a",
    "cut off": "#c05621",
    "stalled": "#b7791f",
    "diverged": "#c53030",
    "stopped": "#c53030",
    "dead": "#553c9a",
}
"""Of the words that `advice.verdict` has."""

UNKNOWN_COLOR = "#4a5568"


@dataclass
class Table:
    """Rows of text; the first column is a name, the next `numbers` are figures.

    Attributes:
        bad: indices of the rows that stand out.
    """

    headers: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    numbers: int = 99
    bad: set[int] = field(default_factory=set)

    @property
    def columns(self) -> list[int]:
        """Indices of those that hold anything: what was not recorded takes no room."""
        return [index for index in range(len(self.headers)) if any(row[index] for row in self.rows)]


def render(template: str, **values: Any) -> str:
    """A whole page.

    Args:
        template: its name in the folder of templates.
        values: what it shows; texts are escaped, figures (see `drawn`) are not.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(script=Markup(interactive.script()), **values)


def drawn(figure: Any) -> Markup:
    """A figure of `lightning_ebm.reports.interactive`, for a template."""
    return Markup(interactive.html(figure))


def number(value: float | None) -> str:
    """Four digits, nothing for None."""
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """In the unit that people would use."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def degrees(angle: float) -> str:
    """Three digits, down to what the axis of angles shows."""
    least = interactive.SMALLEST_ANGLE
    return f"{angle:.3g}°" if angle >= least else f"under {least:g}°"
