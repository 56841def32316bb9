"""Other libraries, each in an interpreter of its own, asked for one step at a time."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from networks import Net
from timing import Timed
from torch import Tensor, nn

PEERS = ("jax", "fabricpc", "pcx")
"""What to import; ``peer_<name>.py`` serves it. jax: by hand, with no library on top."""

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Peer:
    """A process that takes steps of another library on request.

    Args:
        name: one of `PEERS`.
        python: the interpreter that has it.
        net: a chain.
        threads: how many it computes on; at 1 it tells CPU time, else wall time, as `timing` does.
    """

    def __init__(self, name: str, python: str, net: Net, threads: int = 1) -> None:
        assert net.widths is not None
        script = Path(__file__).with_name(f"peer_{name}.py")
        command = [python, str(script), "-".join(map(str, net.widths)), str(net.shape[0]), str(net.steps)]
        command.append(str(threads))
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
        if threads == 1:
            variables["XLA_FLAGS"] = _ONE_THREAD
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=variables)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, sorted(os.sched_getaffinity(0))[:threads])
        greeting = json.loads(self._answer())
        self.versions: str = greeting["versions"]
        self.steps: dict[str, Timed] = {step: partial(self._take, step) for step in greeting["steps"]}
        self._compares: bool = greeting["compares"]

    def update(self, net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor] | None:
        """Its update at the weights of a chain, by the names of its parameters; None if it takes none but its own."""
        if not self._compares:
            return None
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder, "given.npz"), Path(folder, "found.npz")
            parameters = {name: p.detach().numpy() for name, p in net.named_parameters()}
            np.savez(given, *parameters.values(), x=x.numpy(), y=y.numpy())
            self._take(f"update {given} {found}")
            with np.load(found) as arrays:
                return {name: torch.from_numpy(arrays[f"arr_{k}"]) for k, name in enumerate(parameters)}

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
def peers(net: Net, pythons: Sequence[str], threads: int = 1) -> Iterator[tuple[dict[str, Peer], list[str]]]:
    """Those that are installed in one of the interpreters, and the names of those that are not."""
    found: dict[str, Peer] = {}
    absent = []
    try:
        for name in PEERS:
            python = next((python for python in pythons if _has(python, name)), None)
            if python is None:
                absent.append(name)
            else:
                found[name] = Peer(name, python, net, threads)
        yield found, absent
    finally:
        for peer in found.values():
            peer.close()


def _has(python: str, name: str) -> bool:
    needs = f"import optax, {name}"
    return subprocess.run([python or sys.executable, "-c", needs], capture_output=True, check=False).returncode == 0
