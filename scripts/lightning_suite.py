"""Lightning's own tests, with this library as the strategy of every Trainer on one device that asks for none.

    git clone --depth 1 --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning /tmp/lightning
    bash scripts/with-venv python scripts/lightning_suite.py /tmp/lightning

The checkout should be of the version that is installed, or the nearest. The tests run twice, in stock and by the
algorithm "zero-divergence", whose update is the gradient of backprop, so that what a test expects of numbers stays
true. What passes in stock has to pass, but for what `EXPECTED` lists with reasons. Tests of many devices and of other
strategies never meet this library and are left out. About half an hour on one core; `--only loops core` runs a part.
"""

import argparse
import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

FOLDERS = (
    "core", "loops", "trainer", "models", "callbacks", "checkpointing", "tuner", "loggers", "overrides", "profilers",
    "serve", "utilities", "plugins/precision", "plugins/test_amp_plugins.py", "plugins/test_checkpoint_io_plugin.py",
    "strategies/test_single_device.py", "strategies/test_custom_strategy.py",
)  # fmt: skip
LEFT_OUT = (
    "callbacks/test_spike.py",  # starts processes
    "checkpointing/test_legacy_checkpoints.py",  # of files that are no part of a checkout
    "trainer/connectors/test_accelerator_connector.py",  # asserts the type of the default strategy, test by test
)
"""Files that say nothing about this library."""

MANY_PROCESSES = re.compile(
    r"ddp|fsdp|deepspeed|[\"']spawn|[\"']fork|devices=[2-9]|num_nodes=[2-9]|_ScriptExec|Process\("
)
"""In the source of a test: it starts processes, which do not meet this library, and take most of the time."""

_ONE_MORE_ENTRY = "the test lists the entries of a checkpoint; ours holds one more, from which runs resume bit by bit"
_WITHIN_ITSELF = (
    "the test puts the strategy's backward in the place of its base class's, so that every backward runs within itself"
)
_ONE_MORE_CALLBACK = "the test lists the callbacks of the Trainer; the strategy has added its own, for resuming"
_GOES_ON = "a resumed run goes on with the next batch of a loader that does not keep its place; stock begins again"
_SWA = "callbacks/test_stochastic_weight_avg.py::test_swa"
EXPECTED: dict[str, str] = {
    "loops/test_loops.py::test_fit_loop_save_and_restore_dataloaders": _GOES_ON,
    "trainer/optimization/test_manual_optimization.py::test_multiple_optimizers_manual_call_counts": _WITHIN_ITSELF,
    "trainer/optimization/test_manual_optimization.py::test_multiple_optimizers_manual_log": _WITHIN_ITSELF,
    "trainer/optimization/test_manual_optimization.py::test_step_with_optimizer_closure": _WITHIN_ITSELF,
    "trainer/optimization/test_manual_optimization.py::test_step_with_optimizer_closure_2": _WITHIN_ITSELF,
    "models/test_hooks.py::test_trainer_model_hook_system_fit_no_val_and_resume_max_epochs": _ONE_MORE_ENTRY,
    "models/test_hooks.py::test_trainer_model_hook_system_fit_no_val_and_resume_max_steps": _ONE_MORE_ENTRY,
    "callbacks/test_callbacks.py::test_configure_callbacks_hook_multiple_calls": _ONE_MORE_CALLBACK,
    "callbacks/test_callbacks.py::test_callbacks_configured_in_model": _ONE_MORE_CALLBACK,
    "tuner/test_lr_finder.py::test_trainer_reset_correctly": _ONE_MORE_CALLBACK,
    "tuner/test_scale_batch_size.py::test_trainer_reset_correctly": _ONE_MORE_CALLBACK,
    f"{_SWA}_callback": _WITHIN_ITSELF,
    f"{_SWA}_callback_scheduler_step": _WITHIN_ITSELF,
    f"{_SWA}_resume_training_from_checkpoint": _WITHIN_ITSELF,
    f"{_SWA}_resume_training_from_checkpoint_custom_scheduler": _WITHIN_ITSELF,
    "checkpointing/test_trainer_checkpoint.py::test_trainer_save_checkpoint_storage_options": (
        "the test replaces what writes the file, so that there is none beside to be renamed"
    ),
    "profilers/test_profiler.py::test_pytorch_profiler_trainer_fit": (
        "the test looks for the name of the stock strategy's class in what was profiled"
    ),
}
"""Tests that may fail by this library where they pass in stock, each with the reason; parameters are left out."""


# ------------------------------------------------------------------------------------------ within pytest, as a plugin


def pytest_configure(config: Any) -> None:
    """Makes the strategy the default of every Trainer on one device, where the environment says so."""
    config.addinivalue_line("markers", "flaky(reruns, reruns_delay, only_rerun): of a plugin that need not be there")
    algorithm = os.environ.get("LIGHTNING_SUITE_ALGORITHM")
    if not algorithm:
        return
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    import lightning_ebm as ebm

    choose = _AcceleratorConnector._choose_strategy

    def ours(self: Any) -> Any:
        chosen = choose(self)
        if type(chosen) is SingleDeviceStrategy:
            return ebm.EBMStrategy(algorithm, output="state", device=chosen.root_device)
        return chosen

    _AcceleratorConnector._choose_strategy = ours  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leaves out what starts processes."""

    def alone(item: Any) -> bool:
        with contextlib.suppress(OSError, TypeError):
            if MANY_PROCESSES.search(inspect.getsource(item.function)):
                return False
        return not MANY_PROCESSES.search(item.name)

    items[:] = [item for item in items if not hasattr(item, "function") or alone(item)]


def pytest_runtest_logreport(report: Any) -> None:
    """Appends what came of each test to a file."""
    file = os.environ.get("LIGHTNING_SUITE_RESULTS")
    if file is None or (report.when != "call" and report.outcome == "passed"):
        return
    why = "" if report.outcome == "passed" else str(report.longrepr)[-4000:]
    with Path(file).open("a") as results:
        results.write(json.dumps([report.nodeid, report.outcome, report.duration, why]) + "\n")


# ------------------------------------------------------------------------------------------------------- as a command


def run(tests: Path, chosen: list[str], algorithm: str, seconds: int) -> dict[str, tuple[str, str]]:
    """What came of each test: passed, skipped or failed, and why."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        environment = {
            **os.environ, "LIGHTNING_SUITE_RESULTS": str(results), "LIGHTNING_SUITE_ALGORITHM": algorithm,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "scripts"), os.environ.get("PYTHONPATH", "")]),
            "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "NO_COLOR": "1",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "lightning_suite", "-o", "addopts=",
            "--strict-markers", "--disable-pytest-warnings", "--continue-on-collection-errors",
            "--tb=native",  # else pytest parses sources, and Python 3.11 may fail at that after a deep recursion
            "--timeout", str(seconds),
            "--rootdir", str(tests.parents[1]), "-c", str(tests.parents[1] / "pyproject.toml"),
            *(f"--ignore={tests / name}" for name in LEFT_OUT),
            *(str(tests / name) for name in chosen),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
        found: dict[str, tuple[str, str]] = {}
        for line in results.read_text().splitlines():
            name, outcome, _, why = json.loads(line)
            if found.get(name, ("",))[0] != "failed":  # by a teardown after a call that passed, it has failed
                found[name] = (outcome, why)
        if not found:
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        return found


def test_of(name: str) -> str:
    """The test without its folder and its parameters."""
    return re.sub(r"\[.*", "", name).split("tests_pytorch/")[-1]


def compared(stock: dict[str, tuple[str, str]], ours: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """What of stock's passed tests passes by this library, what does not for a known reason, and what is wrong."""
    passed = [name for name, (outcome, _) in stock.items() if outcome == "passed"]
    short = {name: ours.get(name, ("failed", "did not run")) for name in passed}
    short = {name: found for name, found in short.items() if found[0] != "passed"}
    wrong = {name: why for name, (_, why) in short.items() if test_of(name) not in EXPECTED}
    return {
        "stock": dict(Counter(outcome for outcome, _ in stock.values())),
        "passed_in_stock": len(passed),
        "passed": len(passed) - len(short),
        "expected": {name: EXPECTED[test_of(name)] for name in short if test_of(name) in EXPECTED},
        "wrong": wrong,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a checkout of Lightning")
    parser.add_argument("--only", nargs="+", default=list(FOLDERS), help="folders or files of tests/tests_pytorch")
    parser.add_argument("--algorithm", default="zero-divergence")
    parser.add_argument("--seconds", type=int, default=120, help="of one test, at most")
    parser.add_argument("--stock", type=Path, help="keeps stock's results there, and reads them if they are there")
    parser.add_argument("--json", type=Path, help="writes the result there")
    options = parser.parse_args()
    tests = options.path.resolve() / "tests" / "tests_pytorch"
    if not tests.is_dir():
        raise SystemExit(f"{options.path} is no checkout of Lightning: it has no tests/tests_pytorch.")
    began = time.monotonic()
    if options.stock is not None and options.stock.exists():
        stock = json.loads(options.stock.read_text())
    else:
        stock = run(tests, options.only, "", options.seconds)
        if options.stock is not None:
            options.stock.write_text(json.dumps(stock))
    result = compared(stock, run(tests, options.only, options.algorithm, options.seconds))
    result["seconds"] = round(time.monotonic() - began)
    version = (options.path / "src" / "version.info").read_text().strip()
    result["version"] = version
    for name, why in result["wrong"].items():
        print(f"WRONG {name}\n    {why.strip().splitlines()[-1] if why.strip() else 'no reason'}")
    for name, why in result["expected"].items():
        print(f"expected {name}: {why}")
    print(
        f"Lightning {version}: {result['passed']} of the {result['passed_in_stock']} tests that pass in stock pass;"
        f" {len(result['expected'])} are expected not to, {len(result['wrong'])} are wrong"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
