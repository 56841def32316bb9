"""What ranks decide together takes one reduction an optimizer step, and no failure leaves a rank waiting."""

import pytest
import torch
from test_distributed import difference, launch

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(450)]
CASES = (
    "broken_while_accumulating", "broken_step_while_accumulating", "lost", "other_algorithm_fails_too",
    "before_the_pass", "own_parts",
)  # fmt: skip


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("deciding"), CASES, script="ranks_deciding.py")[0]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Under torch's profiler, which takes many times as long as all else here."""
    return launch(2, tmp_path_factory.mktemp("asked"), ["asked"], script="ranks_deciding.py")[0]["asked"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["steps", "to a tolerance", "skips", "falls back", "chooses"])
def test_one_reduction_an_optimizer_step_and_none_while_gradients_accumulate(case, asked):
    """Beside the reducer's own of a bucket; without a barrier. By torch's profiler, which sees what C++ asks too."""
    for rank in asked:
        for count in (1, 4):
            names = rank[case, count]
            assert len(names) == 12
            # After the first step DDP agrees on its buckets, in the next pass. Relaxers are compared again at batch 10.
            again = (9 if count == 1 else 11,) if case == "chooses" else ()
            for k, calls in list(enumerate(names))[count + 1 :]:
                steps = (k + 1) % count == 0
                wanted = ["c10d::allgather_"] * (2 * (k in again)) + ["c10d::allreduce_"] * (2 * steps)
                assert calls == wanted, (k, calls)


@pytest.mark.slow
def test_a_rank_that_fails_while_gradients_accumulate_goes_along_until_they_are_reduced(left):
    """So that collectives of the user's own steps still meet."""
    healthy, failed = left["broken_while_accumulating"]
    assert failed["error"] == ("ValueError", "broken in mid-relaxation")
    kind, text = healthy["error"]
    assert kind == "EBMError"
    assert "rank 1: ValueError: broken in mid-relaxation" in text
    assert healthy["taken"] == failed["taken"] == 4


@pytest.mark.slow
def test_an_error_of_the_users_own_step_while_gradients_accumulate_is_raised_on_all(left):
    healthy, failed = left["broken_step_while_accumulating"]
    assert failed == ("KeyError", '"in the user\'s step"')
    assert healthy[0] == "EBMError"
    assert "rank 1: KeyError" in healthy[1]


@pytest.mark.parametrize("case", ["first", "second", "both", "everywhere"])
def test_a_lost_micro_batch_adds_nothing_and_ranks_stay_equal(case, left):
    """Its rank's share alone where gradients accumulate, all ranks' at the one after which the optimizer steps.

    The oracle gives the same samples a loss of weight 0; where nobody gave anything, there is no step at all.
    """
    first, second = (rank[case] for rank in left["lost"])
    names = [name for name in first["weights"] if "running" not in name and "batches" not in name]
    for found in (first, second):
        off = max(float((found["weights"][n] - found["plain"][n]).abs().max()) for n in names)
        assert off < 1e-6
        assert found["counts"] == {"skipped": 2 if case in ("both", "everywhere") else 1, "fallbacks": 0}
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in names)


@pytest.mark.slow
def test_where_the_other_algorithm_fails_as_well_all_ranks_say_so(left):
    healthy, failed = left["other_algorithm_fails_too"]
    assert healthy[0] == failed[0] == "RelaxationDivergedError"
    assert "rank 1: RelaxationDivergedError" in healthy[1]
    assert "no minimum" in failed[1]


@pytest.mark.parametrize("count", [1, 2])
def test_a_free_phase_that_runs_away_before_the_users_pass_is_left_out(count, left):
    first, second = (rank[count] for rank in left["before_the_pass"])
    assert difference(first["weights"], second["weights"]) == 0
    assert first["counts"] == second["counts"] == {"skipped": 1, "fallbacks": 0}


@pytest.mark.slow
def test_what_a_users_own_parts_find_out_is_agreed_upon_as_what_those_that_are_shipped_do(left):
    """A nudge and a relaxer that no class here knows; each rank alone would keep what it found by itself."""
    for sizes in left["own_parts"]:
        assert len(sizes) == 4
        assert set(sizes) == {(0.25, 0.1)}
