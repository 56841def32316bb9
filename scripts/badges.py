"""README's badges, from what they tell of: pyproject.toml and the figures of docs/reliability.

    bash scripts/with-venv python scripts/badges.py

Pictures in the repository, so that a page asks no other server for them; a test holds each to its source.
"""

import json
import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "images"
WIDTH, PAD = 6.6, 7
"""Pixels of a letter of 11 pixels, and beside a word."""


def facts() -> dict[str, tuple[str, str]]:
    """By file what is told, and how it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line).groups() for line in project["dependencies"])
    mutants = json.loads((ROOT / "docs" / "reliability" / "mutants.json").read_text())
    return {
        "badge_python": ("Python", project["requires-python"].replace(">=", "≥ ")),
        "badge_torch": ("torch", f"≥ {lowest['torch']}"),
        "badge_lightning": ("lightning", f"≥ {lowest['lightning']}"),
        "badge_license": ("license", project["license"]),
        "badge_sabotages": ("sabotages noticed", f"{sum(mutants['noticed'].values())} of {mutants['listed']}"),
    }


def badge(label: str, value: str) -> str:
    """Two words side by side."""
    left, right = (round(len(word) * WIDTH + 2 * PAD) for word in (label, value))
    whole = left + right
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="20" role="img" aria-label="{label}: {value}">'
        f'<clipPath id="round"><rect width="{whole}" height="20" rx="3"/></clipPath><g clip-path="url(#round)">'
        f'<rect width="{left}" height="20" fill="#555"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="#2b6cb0"/></g>'
        '<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f'<text x="{left / 2:g}" y="14">{label}</text><text x="{left + right / 2:g}" y="14">{value}</text></g></svg>\n'
    )


def main() -> None:
    for name, told in facts().items():
        (FOLDER / f"{name}.svg").write_text(badge(*told), encoding="utf-8")


if __name__ == "__main__":
    main()
