"""Scripts as users start them, by Lightning's launchers: killed, broken, resumed, forked, spawned."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from since import reads_wandb

import lightning_ebm as ebm

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(450)


def run(out, resume="no", harm="no", strategy="ebm_ddp", seconds=400):
    out.mkdir(exist_ok=True)
    path = f"{Path(ebm.__file__).parents[1]}:{HERE}"
    command = [sys.executable, str(HERE / "stopped.py"), str(out), str(resume), harm, strategy]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            told = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the other ranks are its children
            raise
        return subprocess.CompletedProcess(command, process.returncode, *told)


def ends(out):
    return [torch.load(out / f"end.{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Where a run left its end that nothing has come to."""
    out = tmp_path_factory.mktemp("whole")
    done = run(out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_a_killed_process_loses_nothing_up_to_the_last_checkpoint(whole_run, tmp_path):
    """SIGKILL in mid-epoch, in mid-relaxation; resumed from the checkpoint, the run ends bit by bit where it would."""
    killed = run(tmp_path / "killed", harm="kill")
    assert killed.returncode != 0
    kept = tmp_path / "killed" / "at-step=8.ckpt"
    assert kept.exists()
    assert not (tmp_path / "killed" / "at-step=12.ckpt").exists()
    resumed = run(tmp_path / "resumed", resume=kept)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    check_same_end(whole_run, tmp_path / "resumed")


def check_same_end(whole, resumed):
    for expected, found in zip(ends(whole), ends(resumed), strict=True):
        for name, weight in expected["weights"].items():
            assert torch.equal(weight, found["weights"][name]), name
        assert torch.equal(expected["random"], found["random"])
        assert {k: float(v) for k, v in found["alignment"].items()} == {
            k: float(v) for k, v in expected["alignment"].items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["terminate@01", "terminate@0", "terminate late@1"])
def test_preemption_ends_all_ranks_after_one_and_the_same_step(harm, whole_run, tmp_path):
    """SIGTERM in mid-relaxation, to all ranks (scancel, torchrun) or to one: nobody waits, and nothing is lost."""
    stopped = run(tmp_path / "stopped", harm=harm, seconds=100)
    assert stopped.returncode == 0, stopped.stderr[-3000:]  # SIGTERMException is a SystemExit
    assert not list((tmp_path / "stopped").glob("end.*"))
    kept = tmp_path / "stopped" / "on_exception.ckpt"
    assert torch.load(kept)["global_step"] == 9  # the step that was running has been taken, by both
    resumed = run(tmp_path / "resumed", resume=kept)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    check_same_end(whole_run, tmp_path / "resumed")


@pytest.mark.slow
def test_an_error_in_a_relaxation_ends_the_job_and_is_shown(tmp_path):
    began = time.monotonic()
    done = run(tmp_path / "broken", harm="raise")
    assert time.monotonic() - began < 350  # the process group's time-out is 30 minutes
    assert done.returncode != 0
    assert "Rank 1 of 2 failed: ValueError: it broke here" in done.stderr
    assert "ValueError: it broke here" in done.stderr.replace("failed: ValueError: it broke here", "")
    assert "No rank takes this step, as 1 of 2 failed. rank 1: ValueError: it broke here" in done.stderr


@reads_wandb
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ebm_ddp_fork", "ebm_ddp_spawn"])
def test_a_launched_run_is_one_whole_offline_run(strategy, tmp_path):
    """Forked processes end without what Python does at its exit, and W&B would lose the end of its file."""
    done = run(tmp_path, strategy=strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    read = subprocess.run(command, capture_output=True, text=True, timeout=200)
    records = [json.loads(line) for line in read.stdout.splitlines()]
    assert records[-1]["type"] == "exit"
    assert records[-1]["exit"]["exit_code"] == 0
    history = str(records)
    assert history.count("alignment/cosine/net/0/weight") >= 18  # three epochs of six steps
    assert torch.load(tmp_path / "end.0.pt")["weights"]
