"""Alignment against formulas written with NumPy, and its limits where a gradient is dead."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import lightning_ebm as ebm
from lightning_ebm.metrics import Alignment, alignment


def pair(seed: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"net.0.weight": (3, 4), "net.0.bias": (3,), "scale": ()}
    draw = lambda: {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}  # noqa: E731
    return draw(), draw()


def by_numpy(estimate, reference):
    g, r = (np.concatenate([t.double().numpy().ravel() for t in side.values()]) for side in (estimate, reference))
    cosine = g @ r / np.linalg.norm(g) / np.linalg.norm(r)
    return {
        "cosine": cosine,
        "angle_deg": np.degrees(np.arccos(cosine)),
        "norm_ratio": np.linalg.norm(g) / np.linalg.norm(r),
        "relative_error": np.linalg.norm(g - r) / np.linalg.norm(r),
        "sign_agreement": np.mean(np.sign(g) == np.sign(r)),
    }


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_formulas(seed, dtype):
    estimate, reference = pair(seed, dtype)
    assert alignment(estimate, reference) == pytest.approx(by_numpy(estimate, reference), rel=1e-9, abs=1e-9)


def test_small_angles_are_not_lost_to_rounding():
    """In float32 arccos(cosine) reads 0 below .02 degrees: a method that is nearly exact would look wholly exact."""
    r = torch.tensor([1.0, 0.0])
    for degrees in (1e-2, 1e-3, 1e-4):
        turn = math.radians(degrees)
        g = 3 * torch.tensor([math.cos(turn), math.sin(turn)])
        assert alignment({"w": g}, {"w": r})["angle_deg"] == pytest.approx(degrees, rel=1e-2)


@pytest.mark.parametrize(
    ("estimate", "reference", "expected"),
    [
        (0.0, 0.0, (1, 0, 1, 0, 1)),
        (0.0, 2.0, (0, 90, 0, 1, 0)),
        (2.0, 0.0, (0, 90, math.inf, math.inf, 0)),
        (-2.0, 2.0, (-1, 180, 1, 2, 0)),
    ],
)
def test_a_dead_gradient_has_values_not_nan(estimate, reference, expected):
    found = alignment({"w": torch.full((3,), estimate)}, {"w": torch.full((3,), reference)})
    assert tuple(found.values()) == pytest.approx(expected)


@pytest.mark.parametrize("other", [(3,), (1,), (2, 2), ()])
def test_gradients_of_other_shapes_are_refused_by_name(other):
    """Some of them could be compared by broadcasting, which would mean nothing."""
    estimate, reference = {"net.weight": torch.ones(2)}, {"net.weight": torch.ones(other)}
    wanted = re.escape(f"'net.weight' has the shape (2,), and the reference {other}")
    with pytest.raises(ebm.ConfigurationError, match=wanted):
        alignment(estimate, reference)
    with pytest.raises(ebm.ConfigurationError, match=wanted):
        Alignment().update(estimate, reference)


def test_a_missing_gradient_counts_as_zero():
    g = {"a": torch.ones(4)}
    r = {"a": torch.ones(4), "b": torch.ones(4)}
    assert alignment(g, r)["cosine"] == pytest.approx(math.sqrt(0.5))
    assert alignment(r, g)["norm_ratio"] == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="empty"):
        alignment({}, {})


def test_sparse_gradients_are_those_that_they_stand_for():
    """As `nn.Embedding(sparse=True)` gives them, a row that was looked up twice in two parts."""
    embedding = torch.nn.Embedding(6, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).square().sum().backward()
    sparse = embedding.weight.grad
    other = torch.randn(6, 3)
    for estimate, reference in ((sparse, other), (other, sparse), (sparse, sparse)):
        expected = alignment({"w": estimate.to_dense()}, {"w": reference.to_dense()})
        assert alignment({"w": estimate}, {"w": reference}) == expected
    assert alignment({"w": sparse}, {}) == alignment({"w": sparse.to_dense()}, {})


def test_batches_and_devices_add_up_to_one_longer_vector():
    pairs = [pair(seed) for seed in range(3)]
    names = list(pairs[0][0])
    whole = Alignment(names)
    parts = [Alignment(names) for _ in pairs]
    for (g, r), part in zip(pairs, parts, strict=True):
        whole.update(g, r)
        part.update(g, r)
    stacked = tuple({f"{i}.{k}": v for i, p in enumerate(pairs) for k, v in p[side].items()} for side in (0, 1))
    expected = by_numpy(*stacked)
    found = whole.compute()
    assert {k: float(found[k]) for k in expected} == pytest.approx(expected, rel=1e-12)
    # what a synchronisation does: states of the devices summed, as announced to torchmetrics
    joined = Alignment(names)
    joined.total = torch.stack([part.total for part in parts]).sum(0)
    assert joined._reductions["total"] is not None
    assert {k: float(v) for k, v in joined.compute().items()} == pytest.approx({k: float(v) for k, v in found.items()})
    one = tuple({f"{i}": p[side]["net.0.weight"] for i, p in enumerate(pairs)} for side in (0, 1))
    assert float(found["cosine/net/0/weight"]) == pytest.approx(by_numpy(*one)["cosine"], rel=1e-12)


def test_without_names_the_first_update_gives_them():
    estimate, reference = pair(0)
    metric = Alignment()
    with pytest.raises(ValueError, match="nothing to align"):
        metric.compute()
    metric.update(estimate, reference)
    assert float(metric.compute()["cosine"]) == pytest.approx(by_numpy(estimate, reference)["cosine"], rel=1e-12)
    metric.reset()
    metric.update(reference, reference)
    assert float(metric.compute()["cosine/net/0/bias"]) == pytest.approx(1)


def test_parameters_may_be_announced_later():
    one, other = pair(0), pair(1)
    metric, late = Alignment(["scale", "net.0.bias"]), ["net.0.weight", "scale"]
    short = [{k: v for k, v in side.items() if k != "net.0.weight"} for side in one]
    metric.update(*short)
    metric.expect(late)
    assert metric.names == ["scale", "net.0.bias", "net.0.weight"]
    metric.update(*other)
    whole = Alignment()
    whole.update(*other)
    whole.update(*short)
    assert {k: float(v) for k, v in metric.compute().items()} == pytest.approx(
        {k: float(v) for k, v in whole.compute().items()}
    )
    metric.reset()
    metric.update(*other)
    assert float(metric.compute()["cosine"]) == pytest.approx(alignment(*other)["cosine"])


def test_a_gradient_that_was_not_announced_is_refused():
    with pytest.raises(ValueError, match=r"net\.9"):
        Alignment(["net.0"]).update({"net.9": torch.ones(1)}, {"net.9": torch.ones(1)})


def test_reference_leaves_gradients_alone():
    net = torch.nn.Linear(2, 1)
    net.weight.grad = torch.ones(1, 2)
    found = ebm.reference.backprop(net, lambda: net(torch.ones(1, 2)).sum())
    assert torch.equal(found["weight"], torch.ones(1, 2))
    assert torch.equal(net.weight.grad, torch.ones(1, 2))
