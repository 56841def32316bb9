"""Several processes over gloo do what one process does on the joined batches, and decide together."""

import functools
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from since import NEWER

import lightning_ebm as ebm

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(450)]
HERE = Path(__file__).parent
UNEVEN = "fit/uneven/converged"
EVERYWHERE = ("predictive-coding", "equilibrium-propagation", "holomorphic-ep")
FITS = [f"fit/{flags}/{name}" for flags, name in itertools.product(ranks.FLAGS, EVERYWHERE) if flags != "uneven"]
FITS += [f"fit/plain/{name}" for name in ranks.ALGORITHMS if name not in EVERYWHERE]
FITS.append(UNEVEN)
TWO = [*FITS, "collectives", "choice", "equals_stock", "alignment", "monitored", "evaluation", "overflow", "errors"]
FOUR = [f"fit/{flags}/{name}" for flags, name in itertools.product(("plain", "accumulation"), EVERYWHERE)]
FOUR += ["fit/unused/predictive-coding"]
FOUR += [UNEVEN, *["fit/sharded/predictive-coding"] * NEWER, "errors"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(world, out, cases, accelerator="cpu", script="ranks.py"):
    """Runs the cases with torchrun, as on a cluster's node; what each rank left."""
    path = f"{Path(ebm.__file__).parents[1]}:{HERE}"
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "EBM_TEST_ACCELERATOR": accelerator}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)),
        *("--master_port", str(free_port()), str(HERE / script), str(out), *cases),
    ]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    names = {case: case.replace("/", ".") for case in cases}
    left = {case: [torch.load(out / f"{name}.{rank}.pt") for rank in range(world)] for case, name in names.items()}
    return left, done.stderr


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("two"), TWO)


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    return launch(4, tmp_path_factory.mktemp("four"), FOUR)


@functools.cache
def alone(case):
    _, flags, algorithm = case.split("/")
    return ranks.fit(flags, algorithm)


def difference(a, b):
    assert list(a) == list(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def check_fit(case, left):
    one = alone(case)
    first, *others = left
    sharded = "sharded" in case
    for other in others:  # weights of sharded modules are put together on rank 0
        assert sharded or difference(first["weights"], other["weights"]) == 0
        assert other["loss"] == first["loss"]
    # Samples stop within their tolerance, where in it depends a little on the others of their batch.
    near = 5e-5 if case == UNEVEN else 2e-5
    assert difference(first["weights"], one["weights"]) < near
    assert first["loss"] == pytest.approx(one["loss"], abs=near)
    assert first["steps"] == one["steps"]
    assert sharded or first["gradients"] == one["gradients"]


@pytest.mark.parametrize("case", FITS)
def test_two_ranks_end_equal_and_where_one_process_ends(case, two):
    check_fit(case, two[0][case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FOUR if case.startswith("fit")])
def test_four_ranks_end_equal_and_where_one_process_ends(case, four):
    check_fit(case, four[0][case])


@pytest.mark.parametrize("case", [case for case in FITS if ranks.FLAGS[case.split("/")[1]][3]])
def test_one_reduction_for_each_parameter_and_optimizer_step(case, two):
    for left in two[0][case]:
        counted = [step for step in left["reductions"] if step]
        assert len(counted) == left["steps"]
        assert all(step == dict.fromkeys(left["gradients"], 1) for step in counted)


WORLDS = ["two", pytest.param("four", marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_take_as_many_relaxation_steps_as_their_batches_need(world, request):
    relaxed = [left["relaxed"] for left in request.getfixturevalue(world)[0][UNEVEN]]
    assert sum(len(set(batch)) > 1 for batch in zip(*relaxed, strict=True)) >= 4


def test_no_collective_runs_inside_a_relaxation(two):
    """By torch's profiler. Whole weights: one reduction of a bucket and one of a flag, however long the relaxation.

    Sharded: each of three layers is gathered once and its gradient reduced once, one phase or three.
    """
    for left in two[0]["collectives"]:
        for sharded, algorithm, steps in left:
            if steps == 12:
                assert left[sharded, algorithm, 12] == left[sharded, algorithm, 2]
        for algorithm in ("descent", "contrastive"):
            assert left[False, algorithm, 12].count("c10d::allreduce_") == 2
            if NEWER:
                assert left[True, algorithm, 12].count("c10d::_allgather_base_") == 3
                assert left[True, algorithm, 12].count("c10d::_reduce_scatter_base_") == 3


def test_ranks_that_would_choose_different_relaxers_agree_on_what_costs_them_least_together(two):
    """At the first step, in one exchange; no rank tries anything again."""
    first, second = two[0]["choice"]
    assert (first["own"], second["own"]) == ([1.0], [0.9])
    assert set(first["together"]) == set(second["together"]) == {0.9}
    assert len(first["together"]) == len(second["together"]) == 4
    assert len(first["gathered at"]) == len(second["gathered at"]) == 1


def test_equals_stock_ddp_on_shuffled_padded_batches_with_metrics_and_buffers(two):
    for stock, control, exact, nudged in two[0]["equals_stock"]:
        assert difference(stock["weights"], control["weights"]) == 0
        assert difference(stock["weights"], exact["weights"]) < 1e-5
        assert difference(stock["weights"], nudged["weights"]) < 1e-3  # off by O(lambda)
        for ours in (control, exact, nudged):
            assert ours["metrics"] == pytest.approx(stock["metrics"], abs=1e-3)
            assert ours["steps"] == stock["steps"]


def test_validation_at_the_free_equilibrium_is_that_of_one_process(two):
    one = ranks.evaluation(1, 0)
    for left in two[0]["evaluation"]:
        assert left["valid"] == pytest.approx(one["valid"], abs=1e-5)
        assert difference(left["weights"], one["weights"]) < 1e-5


def test_alignment_is_of_all_ranks_micro_batches(two):
    """Against gradients computed here, batch by batch, and laid end to end."""
    module = ranks.Net()
    learner = ebm.Learner(module.net, "predictive-coding")
    batches = [list(ranks.Net(2, rank).train_dataloader()) for rank in (0, 1)]
    for name, count in {"one": 1, "accumulated": 2}.items():
        pairs = []
        for x, y in (batch for rank in batches for batch in rank[:count]):
            closure = lambda x=x, y=y: torch.nn.functional.cross_entropy(module.net(x[:, :6]), y)  # noqa: E731
            pairs.append((learner.gradients(closure), ebm.reference.backprop(module.net, closure)))
        update, true = (torch.cat([g.flatten() for pair in pairs for g in pair[side].values()]) for side in (0, 1))
        cosine = float(torch.nn.functional.cosine_similarity(update, true, dim=0))
        first, second = (torch.cat([pair[side]["0.weight"].flatten() for pair in pairs]) for side in (0, 1))
        ratio = float(first.norm() / second.norm())
        for logged in two[0]["alignment"]:
            assert logged[name]["alignment/cosine"] == pytest.approx(cosine, abs=1e-5)
            assert logged[name]["alignment/norm_ratio/net/0/weight"] == pytest.approx(ratio, rel=1e-5)


def test_figures_of_relaxations_are_means_over_ranks(two):
    first, second = two[0]["monitored"]
    same = {key for key, value in first["own"].items() if value == second["own"][key]}  # of which a mean tells nothing
    assert same <= {"ebm/steps", "ebm/relaxed"}
    for key, value in first["own"].items():
        for left in (first, second):
            assert left["logged"][key] == pytest.approx((value + second["own"][key]) / 2, rel=1e-5)


def test_a_step_that_overflows_on_one_rank_is_skipped_by_all(two):
    one, other = two[0]["overflow"]
    assert one["scale"] == other["scale"] == 2.0**9
    for a, b in zip(one["weights"], other["weights"], strict=True):
        assert torch.equal(a, b)
        assert bool(torch.isfinite(a).all())
    first, second, third, _ = one["weights"]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("world", WORLDS)
def test_an_error_on_one_rank_is_raised_on_all(world, request):
    left, output = request.getfixturevalue(world)
    *healthy, failed = left["errors"]
    own = {
        "mid-relaxation": ("ValueError", "broken in mid-relaxation"),
        "accumulation": ("ValueError", "broken in mid-relaxation"),
        "first pass": ("KeyError", "first pass"),
        "manual": ("ValueError", "broken in mid-relaxation"),
        "diverged": ("RelaxationDivergedError", "diverged"),
    }
    for name, (kind, text) in own.items():
        assert failed[name][0] == kind
        assert text in failed[name][1]
        for rank in healthy:
            assert rank[name][0] == ("RelaxationDivergedError" if name == "diverged" else "EBMError")
            assert f"rank {len(healthy)}: {kind}" in rank[name][1]
            assert text in rank[name][1]
    assert failed["none"][0] == "RuntimeError"  # Lightning's own
    assert all("training_step returned None" in rank["none"][1] for rank in healthy)
    # What ranks gather is gathered once a step, and is a constant of it.
    assert all(rank["gathers"] is None for rank in left["errors"])
    assert all(rank["none fails"] is None for rank in left["errors"])
    assert f"Rank {len(healthy)} of {len(healthy) + 1} failed: ValueError: broken in mid-relaxation" in output
