"""Each piece of advice is given where it is due, names the remedy, and is not given where it is not."""

import pytest
import torch
from torch import nn

import lightning_ebm as ebm
from lightning_ebm.reports import advice


def euler(nudge):
    return ebm.Algorithm(nudge=ebm.OneSided(nudge), relaxer=ebm.GradientDescent(0.1, 20))


def test_a_nudge_under_the_floor_of_float32():
    (text,) = advice.before_training(euler(1e-4), [1e-3], torch.float32)
    assert "0.001 of the error" in text
    assert "ebm.ErrorCoordinates()" in text
    assert not advice.before_training(euler(1e-4), [1e-3], torch.float64)
    assert not advice.before_training(euler(1e-2), [1e-3], torch.float32)
    assert not advice.before_training(ebm.algorithm("pc-nudge"), [1e-3], torch.float32)
    assert not advice.before_training(ebm.algorithm("backprop"), [1.0], torch.float32)


def test_the_floor_is_where_the_advice_says():
    """In states, float32: the first layer's update at 1e-5 against the one in error coordinates."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    x, y = torch.randn(16, 6), torch.randn(16, 3)

    def error(nudge):
        def closure():
            return 0.5 * (net(x) - y).square().sum(1).mean()

        states = ebm.Algorithm(nudge=ebm.OneSided(nudge), relaxer=ebm.GradientDescent(0.1, 400))
        exact = ebm.algorithm("pc-nudge", nudge=ebm.OneSided(nudge), relaxer=ebm.ErrorCoordinates(200, tol=1e-6))
        pair = [ebm.Learner(net, algorithm).gradients(closure) for algorithm in (states, exact)]
        return ebm.metrics.alignment(*({"w": side["0.weight"]} for side in pair))["relative_error"]

    assert error(1e-5) > 10 * 1e-7 / 1e-5 / 10  # of the order that the text says, and far above what 1e-2 leaves
    assert error(1e-5) > 20 * error(1e-2)


def test_a_learning_rate_scaled_by_the_nudge():
    (text,) = advice.before_training(ebm.algorithm("pc-nudge"), [1e-4, 1.0], torch.float32)
    assert "use 0.0001" in text
    assert not advice.before_training(ebm.algorithm("predictive-coding"), [1.0], torch.float32)


def relaxation(step, residual, status="converged", left=1e-4, **more):
    phase = {"nudge": 1.0, "residual": residual, "step_size": [0.1] * (len(residual) - 1)}
    entry = {"status": status, "steps": len(residual) - 1, "layers": ["a", "b"], "residual": left, "phases": [phase]}
    return {"step": step, "relaxation": entry | more}


SETTLES = [[1.0, 2.0], [0.1, 0.2]]
GROWS = [[1.0, 2.0], [0.1, 2.5]]
FED_BY_ITS_NEIGHBOUR = [[0.0, 2.0], [0.5, 0.2]]


def test_a_layer_that_stops_relaxing_is_named_with_the_step_since_when():
    records = [relaxation(0, GROWS), relaxation(99, SETTLES), relaxation(199, GROWS), relaxation(299, GROWS)]
    (text,) = advice.findings(records)
    assert text.startswith("Layer b has stopped relaxing at step 199: its residual grew.")
    assert advice.verdict(records)[0] == "diverged"
    assert advice.findings(records[:2]) == []  # it recovered
    assert advice.findings([relaxation(0, FED_BY_ITS_NEIGHBOUR)]) == []


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ([relaxation(0, SETTLES)], "sound"),
        ([relaxation(0, SETTLES, "stalled", 0.4)], "stalled"),
        ([relaxation(k, SETTLES, "stalled", 0.4) for k in range(8)] + [relaxation(9, SETTLES)], "stalled"),
        ([relaxation(k, SETTLES) for k in range(8)] + [relaxation(9, SETTLES, "stalled", 0.4)], "sound"),
        ([relaxation(k, SETTLES, "max_steps", 0.4) for k in range(4)] + [relaxation(9, SETTLES)] * 8, "cut off"),
        ([relaxation(0, SETTLES, "kink", 0.4)], "sound"),
        ([relaxation(0, SETTLES, "fixed", 0.01)], "sound"),
        ([relaxation(0, SETTLES, "fixed", 0.6)], "cut off"),
        ([relaxation(0, SETTLES, "max_steps", 0.01)], "cut off"),
        ([relaxation(0, SETTLES, "max_steps", 0.01, cut_off=True)], "cut off"),
        ([relaxation(0, SETTLES, "max_steps", 0.4, cut_off=False)], "sound"),
        ([{"step": 3, "stopped": "RelaxationDivergedError: it ran away"}], "diverged"),
        ([{"step": 3, "stopped": "KeyboardInterrupt: "}], "stopped"),
        ([{"step": 0, "alignment": {}, "layers": {}, "dead": {"w": "both"}}], "dead"),
        ([{"step": 0, "alignment": {}, "layers": {}, "dead": {}}], "sound"),
        ([], "unknown"),
    ],
)
def test_one_word_for_a_run(records, word):
    assert advice.verdict(records)[0] == word


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("a", "a has a gradient of exactly zero"),
        ("abcd", "a, b, c, d have a gradient of exactly zero"),
        ("abcde", "a, b, c, d and 1 more parameter have a gradient of exactly zero"),
        ("abcdef", "a, b, c, d and 2 more parameters have a gradient of exactly zero"),
    ],
)
def test_as_many_parameters_are_told_as_there_are(names, sentence):
    records = [{"step": 0, "alignment": {}, "layers": {}, "dead": dict.fromkeys(names, "both")}]
    assert advice.verdict(records) == ("dead", sentence)


def test_findings_are_said_once_and_with_a_remedy():
    records = [
        {"step": 9, "advice": "something"},
        {"step": 19, "advice": "something"},
        {"step": 0, "regime": {"unreached": ["a", "b"]}},
    ]
    found = advice.findings(records)
    assert found[0].startswith("No signal reaches layers a, b at step 0")
    assert found[1:] == ["something"]
    dead = {"step": 0, "alignment": {}, "layers": {}, "dead": {"net.0.bias": "both"}}
    found = advice.findings([*records, dead])
    assert "net.0.bias" in found[0]
    assert found[1:] == ["something"]
