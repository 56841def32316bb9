"""Settings files by name, found without importing the library."""

import difflib
from importlib.util import find_spec
from pathlib import Path


class UnknownNameError(LookupError):
    """A name that nothing has, with the nearest one that something has."""


def folder(kind: str) -> Path:
    """Where the library keeps its settings files.

    Args:
        kind: "configs", "sweeps" or "leaderboards".
    """
    found = find_spec("lightning_ebm")
    assert found is not None
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "recipes" / kind


def names(kind: str) -> list[str]:
    """Of all settings files of a kind."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def path_of(kind: str, name: str) -> Path:
    """The file that a name or a path means.

    Raises:
        UnknownNameError: there is neither such a file nor such a name.
    """
    if Path(name).is_file():
        return Path(name)
    known = folder(kind) / f"{name}.yaml"
    if known.is_file():
        return known
    raise UnknownNameError(f"There is no {_WORDS[kind]} {name!r}.{did_you_mean(name, names(kind))}{_listing(kind)}")


def description(path: Path) -> str:
    """Its first line of comment."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            return line.removeprefix("# ")
    return ""


def did_you_mean(word: str, known: list[str]) -> str:
    """A sentence with the nearest of the known words; nothing if none is near."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


_WORDS = {"configs": "recipe", "sweeps": "sweep file", "leaderboards": "leaderboard file"}


def _listing(kind: str) -> str:
    if kind == "configs":
        return " lightning-ebm recipes list shows all of them."
    return f" Give a path, or one of: {', '.join(names(kind))}."
