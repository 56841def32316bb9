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
Update = Callable[[str, str], None]
"""Reads weights, as torch has them, `x` and `y` from one .npz file, and writes its update to another."""


def asked() -> tuple[Widths, int, int]:
    """Widths of the layers, batch, relaxation steps: from the command line; the fourth word there is for `serve`."""
    return tuple(map(int, sys.argv[1].split("-"))), int(sys.argv[2]), int(sys.argv[3])


def serve(versions: str, steps: dict[str, Callable[[], Any]], update: Update | None = None) -> None:
    """Answers each name on a line with the milliseconds that this process took for that step.

    They are of CPU time at one thread, else of wall time. "update A B" is answered once B holds the update at the
    weights and the batch in A, if the script knows how.
    """
    clock = time.process_time if sys.argv[4] == "1" else time.perf_counter
    print(json.dumps({"versions": versions, "steps": list(steps), "compares": update is not None}), flush=True)
    for line in sys.stdin:
        start = clock()
        if update is not None and line.startswith("update "):
            update(*line.split()[1:])
        else:
            steps[line.strip()]()
        print(1e3 * (clock() - start), flush=True)
