"""Nothing but the seed decides: fresh processes end at the same bits, at one and at two threads, by every preset."""

import importlib.util
from pathlib import Path

import pytest

import lightning_ebm as ebm

pytestmark = pytest.mark.timeout(600)
SCRIPT = Path(__file__).parents[1] / "scripts" / "same_seed.py"


def script():
    spec = importlib.util.spec_from_file_location("same_seed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_three_processes_train_every_preset_to_the_same_bits(threads):
    same_seed = script()
    runs = [same_seed.in_new_process(threads, 3, seed) for seed in (1, 2, 3)]
    assert same_seed.differing(runs) == {}
    assert set(runs[0]) == set(ebm.algorithms())
    trained = {preset for preset, nets in runs[0].items() if "Error" not in nets["wide"]}
    assert trained == set(ebm.algorithms())


def test_processes_that_part_are_found():
    same_seed = script()
    one, other = {"a": {"wide": "0", "narrow": "1"}}, {"a": {"wide": "0", "narrow": "2"}}
    assert same_seed.differing([one, one, other]) == {"a, narrow": [2, 1]}
