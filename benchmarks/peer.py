"""What a benchmark of another library consists of: one step on demand, timed where it runs. Knows no torch.

A script of that library's own interpreter calls `serve` with its steps; `peers.Peer` asks for them one at a time, so
that they take turns with everybody else's.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Widths = tuple[int, ...]


def asked() -> tuple[Widths, int, int]:
    """Widths of the layers, batch, relaxation steps: from the command line."""
    return tuple(map(int, sys.argv[1].split("-"))), int(sys.argv[2]), int(sys.argv[3])


def serve(versions: str, steps: dict[str, Callable[[], Any]]) -> None:
    """Answers each name on a line with the milliseconds of CPU that this process took for that step."""
    print(json.dumps({"versions": versions, "steps": list(steps)}), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        steps[line.strip()]()
        print(1e3 * (time.process_time() - start), flush=True)
