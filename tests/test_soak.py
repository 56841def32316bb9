"""A few hundred steps of `scripts/soak.py`: what is dropped is gone, nothing is left behind, caches are bounded."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("soak", Path(__file__).parents[1] / "scripts" / "soak.py")
assert _SPEC is not None
assert _SPEC.loader is not None
soak = importlib.util.module_from_spec(_SPEC)
sys.modules["soak"] = soak
_SPEC.loader.exec_module(soak)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_left_of_what_was_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    found = soak.soaked(300, float("inf"), seed=1)
    assert found["faults"] == []
    assert found["gone"] >= 3 * found["lives"]
    assert found["most_programs"] <= 16
    assert {"backward", "step", "gradients", "relax", "free phase", "eval", "frozen"} <= set(found["did"])


def test_a_leak_is_found() -> None:
    """The same checks, of a life that somebody holds and of a hook that was forgotten."""
    left = soak.Left()
    held = soak.NETS["tanh"]()
    left.drop(module=held)
    left.check()
    assert left.faults == ["module is still held"]
    before = soak.hooks_of(held)
    held[0].register_forward_hook(lambda *_: None)
    assert soak.hooks_of(held) == before + 1
    growing = [soak.Sample(k, (100 + k) * 2**20, 10_000 + 1000 * k, 0) for k in range(10)]
    assert soak.drift(growing)["rss_late"] - soak.drift(growing)["rss_early"] == 6
