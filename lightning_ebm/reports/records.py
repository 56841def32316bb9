"""The lines of a run's file. Of a run that was killed, a full disk or another version some cannot be read: left out."""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Record = dict[str, Any]

_KINDS: dict[str, type] = {
    **dict.fromkeys(("run", "settings", "cost", "alignment", "layers", "angles", "dead", "regime", "curvature"), dict),
    "relaxation": dict, "step": int, "advice": str, "stopped": str,
}  # fmt: skip
_NEEDED = {
    "alignment": {"layers", "step"}, "angles": {"step"}, "relaxation": {"step"}, "regime": {"step"},
    "curvature": {"step"}, "stopped": {"step"}, "dead": {"step"},
}  # fmt: skip
"""What else stands in a record with such a part."""
_OF_RELAXATIONS = {"status", "steps", "layers", "phases"}


def read_records(path: Path) -> list[Record]:
    """Those that can be read, in the order of writing; how many could not is said."""
    if not path.exists():
        return []
    found, lost = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed while writing it
            record = None
        if _is_record(record):
            found.append(record)
        else:
            lost += bool(line.strip())
    if lost:
        log.warning("%s: %d of %d lines cannot be read and are left out.", path, lost, lost + len(found))
    return found


def _is_record(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    kinds = all(isinstance(found[name], kind) for name, kind in _KINDS.items() if name in found)
    whole = all(needed <= found.keys() for name, needed in _NEEDED.items() if name in found)
    return kinds and whole and ("relaxation" not in found or _is_relaxation(found["relaxation"]))


def _is_relaxation(found: Record) -> bool:
    whole = found.keys() >= _OF_RELAXATIONS
    return whole and ("residual" in found or found["status"] == "diverged")  # which was stopped before it had one
