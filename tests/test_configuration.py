"""Every argument of every public constructor, given what nobody can mean: refused where it is written, or it works."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from since import newer
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.equilibrium import Equilibrium

ABSTRACT = {"Energy", "Evaluation", "Nudge", "Relaxer", "Update", "Landscape"}
"""What users subclass; there is nothing to construct. Evaluations are questions of relaxers, made in code alone."""
RESULTS = {"LayerView", "Phase", "Relaxation", "Relaxed", "Spectrum", "Summary"}
"""What the library hands out, or a row of a user's table, which is checked when it is read."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


SHIPPED = {
    name: getattr(ebm, name)
    for name in ebm.__all__
    if inspect.isclass(getattr(ebm, name)) and not issubclass(getattr(ebm, name), Exception)
    and not issubclass(getattr(ebm, name), ebm.Evaluation) and name not in ABSTRACT | RESULTS
}  # fmt: skip
UPDATES = {name: getattr(ebm.updates, name) for name in ebm.updates.__all__ if name[0].isupper()}
MADE: dict[str, Callable[..., Any]] = {
    **SHIPPED,
    **{f"updates.{name}": kind for name, kind in UPDATES.items() if not inspect.isabstract(kind)},
    "metrics.Alignment": ebm.metrics.Alignment,
    "algorithm": ebm.algorithm,
}
del MADE["updates.End"], MADE["updates.Term"]
NEEDED: dict[str, dict[str, Any]] = {
    "Learner": {"module": net()},
    "Equilibrium": {"module": net(), "algorithm": "equilibrium-propagation"},
    "StateOptimizer": {"optimizer": torch.optim.SGD, "max_steps": 5, "lr": 0.1},
    "Cheapest": {},
    "algorithm": {"name": "predictive-coding"},
    "Gaussian": {"precision": {}},
    "PerLayer": {"energies": {}},
    **{name: {"relaxer": ebm.GradientDescent(0.1, 5)} for name in ("Feedback", "Noisy", "Quantized", "Saturated")},
}
"""Arguments without a default, which the others need."""
MORE = {
    "StateOptimizer": ("lr", "momentum"),
    "algorithm": tuple(f.name for f in dataclasses.fields(ebm.Algorithm)),
    "EBMDDPStrategy": ("find_unused_parameters", "static_graph", "start_method", "unknown"),
    "EBMFSDP2Strategy": (), "metrics.Alignment": ("sync_on_compute", "unknown"),
}  # fmt: skip
"""Names to try where a signature ends in ``**options``."""
NUMPY = (np.float32(0.5), np.float64(1.5), np.int64(3), np.bool_(True))
TENSORS = (torch.tensor(0.5), torch.tensor(3), torch.tensor([0.5, 2.0]), torch.tensor(0.5, requires_grad=True))
BAD: list[Any] = [
    math.nan, math.inf, -math.inf, 0, 0.0, -1, -0.5, 1, 2, 0.5, 1e300, -1e300, 1e-310, 10**30, 10**400, 1.0, 1 + 1j,
    "", "1e-3", "0.1", "nan", "auto", "both", "nonsense", b"x", None, True, False, [], [1], {}, {"a": "b"}, {"": None},
    {1, 2}, (), object(), object, int, ebm.PredictiveCoding, ebm.OneSided, ebm.FixedPoint, nn.ReLU, print, lambda: None,
    np.array([0.5, 2.0]), np.array(math.nan), np.float32(math.nan), torch.tensor(math.nan), torch.tensor([math.inf]),
    torch.tensor(1 + 1j), torch.tensor(True), torch.empty(0), torch.ones(2, device="meta"),
    *NUMPY, *TENSORS,
]  # fmt: skip


def arguments(name: str) -> list[str]:
    """Those that a constructor has by its signature."""
    found = []
    for parameter in inspect.signature(MADE[name]).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            found.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            found += MORE[name]
        else:
            found.append(parameter.name)
    return found


CASES = [(name, argument) for name in MADE for argument in arguments(name)]


def made(name: str, argument: str, value: Any) -> Any:
    if argument.startswith("*"):
        return MADE[name](value)
    return MADE[name](**{**NEEDED.get(name, {}), argument: value})


@pytest.mark.parametrize(
    ("name", "argument"),
    [pytest.param(*case, marks=newer if case[0] == "EBMFSDP2Strategy" else ()) for case in CASES],
    ids=lambda part: part,
)
def test_what_cannot_be_meant_is_refused_where_it_is_written(name: str, argument: str) -> None:
    raised = 0
    for value in BAD:
        try:
            found = made(name, argument, value)
        except ebm.ConfigurationError as error:
            raised += 1
            said = str(error)
            assert argument in said or argument == "name" or f"{name}(" in said, (value, said)
            continue
        if dataclasses.is_dataclass(found):
            kept = getattr(found, argument, None)
            # What is kept is of the kind that the default is of, and what is made of it once more is the same.
            assert not isinstance(kept, np.generic), (value, kept)
            if isinstance(kept, float):
                assert math.isfinite(kept), value
                assert kept == float(value), value
            if not isinstance(kept, torch.Tensor):
                assert dataclasses.replace(found) == found, value
    assert raised, "nothing at all was refused"


def test_every_public_constructor_is_among_those_that_are_tried() -> None:
    assert len(CASES) >= 60
    assert not RESULTS & SHIPPED.keys()
    assert all(getattr(ebm, name) for name in ABSTRACT | RESULTS)


PARTS = [
    (name, argument) for name, argument in CASES
    if isinstance(MADE[name], type) and issubclass(MADE[name], ebm.Energy | ebm.Nudge | ebm.Relaxer)
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), PARTS, ids=lambda part: part)
def test_what_is_accepted_works_or_says_that_it_does_not(name: str, argument: str) -> None:
    """A step of training with it: finite gradients, or an error of this library."""
    x, y = torch.ones(2, 4), torch.tensor([0, 1])
    for value in BAD:
        if argument == "target" and callable(value):
            continue  # a function of the user's own, whose errors are the user's
        try:
            part = made(name, argument, value)
            if getattr(part, "max_steps", 0) > 1000 or getattr(part, "outer_steps", 0) > 1000:
                continue  # as long as it was asked for
            role = "energy" if isinstance(part, ebm.Energy) else "nudge" if isinstance(part, ebm.Nudge) else "relaxer"
            base = "predictive-coding"
            if isinstance(part, ebm.Hopfield | ebm.Holomorphic | ebm.Coupled | ebm.Clamped):
                base = "coupled-learning" if isinstance(part, ebm.Coupled | ebm.Clamped) else "equilibrium-propagation"
            if isinstance(part, ebm.Infinitesimal):
                base = "infinitesimal"
            if isinstance(part, ebm.FixedPoint | ebm.AcceleratedFixedPoint | ebm.Anderson | ebm.Dyadic):
                base = "equilibrium-propagation-one-sided"
            chosen = ebm.algorithm(base)
            parts = {f: getattr(chosen, f) for f in ("energy", "nudge", "relaxer")} | {role: part}
            if isinstance(part, ebm.Dyadic):
                parts["energy"] = ebm.FenchelYoung()
            module = net()
            learner = ebm.Learner(module, ebm.Algorithm(**parts))
            gradients = learner.gradients(lambda module=module: F.cross_entropy(module(x), y))
        except ebm.EBMError:
            continue
        assert all(bool(torch.isfinite(g).all()) for g in gradients.values()), (value, parts)


def test_text_that_yaml_makes_of_a_number_is_told_how_to_be_written() -> None:
    yaml = pytest.importorskip("yaml")
    wrong = yaml.safe_load("1e-3")
    assert wrong == "1e-3"
    with pytest.raises(ebm.ConfigurationError, match=r"GradientDescent\(lr='1e-3'\).*1\.0e-3 or 0\.001") as caught:
        ebm.GradientDescent(lr=wrong)
    for written in ("1.0e-3", "0.001"):
        assert written in str(caught.value)
        assert ebm.GradientDescent(lr=yaml.safe_load(written)) == ebm.GradientDescent(lr=0.001)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5).double()])
def test_numbers_of_other_libraries_become_floats(value: Any) -> None:
    for kind, argument in (
        (ebm.GradientDescent, "lr"), (ebm.FixedPoint, "damping"), (ebm.OneSided, "strength"), (ebm.Coupled, "eta"),
        (ebm.Hopfield, "feedback"), (ebm.PredictiveCoding, "precision"), (ebm.LearnedPrecision, "rate"),
    ):  # fmt: skip
        found = kind(**{argument: value})
        assert found == kind(**{argument: 0.5})
        assert type(getattr(found, argument)) is float
    for count in (np.int32(7), np.uint8(7), torch.tensor(7)):
        assert type(ebm.GradientDescent(max_steps=count).max_steps) is int
        assert ebm.Holomorphic(points=count) == ebm.Holomorphic(points=7)


def test_none_is_the_part_of_the_preset_and_not_that_of_another() -> None:
    plain = ebm.algorithm("equilibrium-propagation")
    assert ebm.algorithm("equilibrium-propagation", energy=None, nudge=None, relaxer=None) == plain
    assert isinstance(Equilibrium(net(), plain), nn.Module)


@pytest.mark.parametrize("given", [0, -1, math.nan, 2.5, "4", None, True])
def test_a_number_of_samples_that_a_function_gives_is_checked_as_well(given: Any) -> None:
    module = net()
    learner = ebm.Learner(module, batch_size=lambda batch: given)
    with pytest.raises(ebm.ConfigurationError, match="batch_size"):
        learner.gradients(lambda: F.cross_entropy(module(torch.ones(2, 4)), torch.tensor([0, 1])))
