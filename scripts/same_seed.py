"""Trains every preset in fresh processes, and says whether their weights are equal bit by bit.

    python scripts/same_seed.py --processes 10 --threads 1 2 --steps 5

Every process hashes text by another seed and lies at other addresses, as it does anyway. Two networks: a convolution
with hidden layers wide enough for several threads to share, and a narrow ReLU perceptron with BatchNorm, whose samples
see each other. What a preset cannot train (holomorphic nudges on ReLU) is told by its error, which must be the same
everywhere as well. Between numbers of threads weights differ, as sums are added in another order.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm


def networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """By name a network, a batch and its labels; those of the seed."""
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 10),
    )  # fmt: skip
    narrow = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
    narrow.append(nn.Linear(16, 3))
    return {
        "wide": (wide, torch.randn(64, 256), torch.arange(64) % 10),
        "narrow": (narrow, torch.randn(32, 12), torch.arange(32) % 3),
    }


def trained(preset: str, steps: int) -> dict[str, str]:
    """By network the digest of its weights after some steps of Adam, and how many relaxation steps there were."""
    found = {}
    for name, (net, x, y) in networks().items():
        learner = ebm.Learner(net, preset)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        relaxed = 0
        try:
            for _ in range(steps):
                learner.step(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y), optimizer)  # type: ignore[misc]
                relaxed += learner.report["steps"]
        except ebm.EBMError as error:
            found[name] = f"{type(error).__name__}: {error}"
            continue
        weights = torch.cat([value.detach().double().flatten() for value in net.state_dict().values()])
        found[name] = f"{hashlib.sha256(weights.numpy().tobytes()).hexdigest()} {relaxed}"
    return found


def in_new_process(threads: int, steps: int, hash_seed: int) -> dict[str, dict[str, str]]:
    """By preset what a process of its own comes to."""
    command = [sys.executable, __file__, "--threads", str(threads), "--steps", str(steps), "--print-digests"]
    # Threads that wait asleep: on a busy machine those that spin take the time of the one they wait for.
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    environment = {**os.environ, **quiet, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def differing(runs: list[dict[str, dict[str, str]]]) -> dict[str, list[int]]:
    """By preset and network how many processes came to each result, where it is not one and the same."""
    return {
        f"{preset}, {net}": sorted(counts.values(), reverse=True)
        for preset, nets in runs[0].items()
        for net in nets
        if len(counts := Counter(run[preset][net] for run in runs)) > 1
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--print-digests", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.print_digests:
        torch.set_num_threads(options.threads[0])
        print(json.dumps({preset: trained(preset, options.steps) for preset in ebm.algorithms()}))
        return
    parted = 0
    for threads in options.threads:
        runs = [in_new_process(threads, options.steps, seed) for seed in range(options.processes)]
        found = differing(runs)
        parted += len(found)
        results = [result for nets in runs[0].values() for result in nets.values()]
        refused = sum("Error" in result for result in results)
        print(f"{threads} threads, {options.processes} processes: {len(results) - refused} trainings and {refused}"
              f" refusals, {len(found)} of them not equal everywhere")  # fmt: skip
        for what, counts in found.items():
            print(f"  {what}: {' and '.join(map(str, counts))} processes agree")
    sys.exit(parted > 0)


if __name__ == "__main__":
    main()
