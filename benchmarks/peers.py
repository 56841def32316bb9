"""Other libraries, each in an interpreter of its own, asked for one step at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from networks import Net
from timing import Timed

PEERS = ("jax", "fabricpc", "pcx")
"""What to import; ``peer_<name>.py`` serves it. jax: by hand, with no library on top."""

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Peer:
    """A process that takes steps of another library on request.

    Args:
        name: one of `PEERS`.
        python: the interpreter that has it.
        net: a chain.
    """

    def __init__(self, name: str, python: str, net: Net) -> None:
        assert net.widths is not None
        script = Path(__file__).with_name(f"peer_{name}.py")
        command = [python, str(script), "-".join(map(str, net.widths)), str(net.shape[0]), str(net.steps)]
        variables = {**os.environ, "XLA_FLAGS": _ONE_THREAD, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=variables)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, {min(os.sched_getaffinity(0))})
        greeting = json.loads(self._answer())
        self.versions: str = greeting["versions"]
        self.steps: dict[str, Timed] = {step: partial(self._take, step) for step in greeting["steps"]}

    def _take(self, step: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{step}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended:\n{self._process.stderr.read()[-3000:]}")
        return line

    def close(self) -> None:
        """Lets the process end."""
        self._process.communicate()


@contextmanager
def peers(net: Net, pythons: Sequence[str]) -> Iterator[tuple[dict[str, Peer], list[str]]]:
    """Those that are installed in one of the interpreters, and the names of those that are not."""
    found: dict[str, Peer] = {}
    absent = []
    try:
        for name in PEERS:
            python = next((python for python in pythons if _has(python, name)), None)
            if python is None:
                absent.append(name)
            else:
                found[name] = Peer(name, python, net)
        yield found, absent
    finally:
        for peer in found.values():
            peer.close()


def _has(python: str, name: str) -> bool:
    needs = f"import optax, {name}"
    return subprocess.run([python or sys.executable, "-c", needs], capture_output=True, check=False).returncode == 0
