"""Which of this library's classes a command line or a file may name: public ones, in its help and in what it takes."""

import importlib
import re
from argparse import Action
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import DefaultHelpFormatter

import lightning_ebm as ebm
from lightning_ebm import presets

_OURS = re.compile(r"lightning_ebm(?:\.\w+)+")


class Offering(DefaultHelpFormatter):
    """Help whose lists of known classes leave out what only this library makes."""

    def _expand_help(self, action: Action) -> str:
        text: str = super()._expand_help(action)
        before, found, classes = text.partition("known subclasses: ")
        kept = re.sub(rf", ({_OURS.pattern})", lambda one: one[0] if is_offered(one[1]) else "", classes)
        return before + found + kept


def is_offered(path: str) -> bool:
    """Whether it is the path of something public: a name of `lightning_ebm`, an update, a preset, or of the recipes."""
    home, _, name = path.rpartition(".")
    if home.startswith("lightning_ebm.recipes."):
        return True
    try:
        meant = getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError):
        return True  # what is not there is refused by the parser
    public = [getattr(space, one) for space in (ebm, ebm.updates) for one in space.__all__]
    return any(meant is one for one in (*public, *presets.PRESETS.values()))


def is_internal(value: Any) -> bool:
    """Whether it is the path of something that this library alone makes."""
    return isinstance(value, str) and _OURS.fullmatch(value) is not None and not is_offered(value)


def internals(settings: Any) -> Iterator[str]:
    """Paths of this library's own among the classes that settings name, which nobody may choose."""
    for key, value in settings.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from internals(value)
        elif isinstance(value, list | tuple):
            yield from internals({number: one for number, one in enumerate(value) if hasattr(one, "items")})
        elif str(key).rpartition(".")[2] == "class_path" and is_internal(value):  # a namespace's keys are whole paths
            yield value
