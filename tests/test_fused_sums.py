"""Sums with products of matrices as one operation: the same values, and only where they are the same."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.program import code
from lightning_ebm.program.fused_sums import fuse_sums
from lightning_ebm.program.stage import Stage
from lightning_ebm.program.tracer import traced_graph

aten = torch.ops.aten


def run(graph, constants, inputs):
    return Stage(graph, constants)(list(inputs))


def fused(evaluate, inputs, moving=()):
    """The targets of what is left, and the largest difference to what was traced."""
    traced, expected = traced_graph(lambda point, given: evaluate(*point), inputs, [])
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    depends = {placeholders[k] for k in moving}
    for node in traced.graph.nodes:
        if node.op != "output" and depends.intersection(node.all_input_nodes):
            depends.add(node)
    fuse_sums(traced.graph, depends)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    found = run(traced.graph, traced.constants, inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    return targets


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((4, 3), (4, 5), (5, 3))]


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda x, a, b: [x + a @ b],
        lambda x, a, b: [a @ b + x],
        lambda x, a, b: [x - a @ b],
        lambda x, a, b: [torch.add(x, a @ b, alpha=0.3)],
        lambda x, a, b: [torch.sub(x, a @ b, alpha=0.3)],
        lambda x, a, b: [x, (x * x) + a @ b],
        lambda x, a, b: [(a * 2) @ b + a @ b.tanh()],
    ],
)
def test_a_sum_with_a_product_is_one_operation(evaluate):
    targets = fused(evaluate, matrices())
    assert targets.count(aten.addmm.default) == 1
    assert aten.add.Tensor not in targets
    assert aten.sub.Tensor not in targets


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda x, a, b: [x + (p := a @ b), p],  # somebody else reads the product
        lambda x, a, b: [x + (p := a @ b), p.tanh()],
        lambda x, a, b: [a @ b - x],
        lambda x, a, b: [torch.add(a @ b, x, alpha=0.3)],
        lambda x, a, b: [x[0] + a @ b],  # it is added to every row
        lambda x, a, b: [x[:, :1] + a @ b],
        lambda x, a, b: [x[None] + a @ b],
        lambda x, a, b: [torch.stack([x, x]) + a @ b],
        lambda x, a, b: [x.float() + a @ b],  # and what is added is another kind of number
        lambda x, a, b: [x + a.float() @ b.float()],
        lambda x, a, b: [1.0 + a @ b],
        lambda x, a, b: [(p := a @ b) + p],
        lambda x, a, b: [x + (a @ b).tanh()],
    ],
)
def test_other_sums_are_left_as_they_are(evaluate):
    assert aten.addmm.default not in fused(evaluate, matrices())


def test_a_product_that_only_the_batch_fixes_is_not_computed_at_every_point():
    assert aten.addmm.default not in fused(lambda x, a, b: [x + a @ b], matrices(), moving=[0])
    for moving in ([1], [0, 2], [0, 1, 2], []):
        assert aten.addmm.default in fused(lambda x, a, b: [x + a @ b], matrices(), moving=moving)


def learned(algorithm, capture=True):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Hardtanh(0, 1), nn.Linear(5, 7), nn.Hardtanh(0, 1), nn.Linear(7, 4)]
    net = nn.Sequential(*layers).double()
    x, y = torch.rand(8, 6, dtype=torch.float64), torch.randint(0, 4, (8,))
    learner = ebm.Learner(net, algorithm, capture=capture)
    for _ in range(3):
        found = learner.gradients(lambda: F.cross_entropy(net(x), y))
    return found, learner


EP = ebm.algorithm("equilibrium-propagation", free_relaxer=ebm.FixedPoint(20), relaxer=ebm.FixedPoint(10))


@pytest.mark.parametrize("algorithm", [EP, "predictive-coding", "contrastive-hebbian", "dual-propagation"])
def test_code_with_such_sums_gives_the_update_of_the_plain_way_and_of_code_without(algorithm, monkeypatch):
    plain, _ = learned(algorithm, capture=False)
    one, _ = learned(algorithm)
    monkeypatch.setattr(code, "fuse_sums", lambda graph, moving: None)
    two, _ = learned(algorithm)
    for name, wanted in plain.items():
        torch.testing.assert_close(one[name], wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(two[name], wanted, rtol=1e-10, atol=1e-12)


def test_a_sweep_adds_what_comes_from_above_within_the_product():
    _, learner = learned(EP)
    sweeps = [one for key, one in learner._programs.latest.traced.codes.items() if str(key[0]).startswith("Swept")]
    assert len(sweeps) == 3  # free, and at both signs
    for one in sweeps:
        targets = [node.target for node in one._point.graph.nodes if node.op == "call_function"]
        assert aten.addmm.default in targets
        assert aten.add.Tensor not in targets
        assert operator.add not in targets
