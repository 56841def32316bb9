"""Random programs against oracles, see `scripts/fuzz_programs.py`; and what it has found, one by one."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

_PATH = Path(__file__).parents[1] / "scripts" / "fuzz_programs.py"
sys.path.append(str(_PATH.parent))
_SPEC = importlib.util.spec_from_file_location("fuzz_programs", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
fuzz = importlib.util.module_from_spec(_SPEC)
sys.modules["fuzz_programs"] = fuzz
_SPEC.loader.exec_module(fuzz)

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(8) % 3


@pytest.mark.parametrize("seed", range(1, 201, 10))
def test_random_programs(seed):
    counts, done = fuzz.fuzzed(5, 3, seed)
    assert done == 5
    assert not counts.wrong, "\n".join(counts.wrong)
    compared = sum(counts.equal.values())
    assert compared > 40
    assert counts.baseless() < compared / 10  # one way of five programs, at most


@pytest.mark.parametrize("way", ["Drawn.by_viewed", "Made.by_slope_of_weights", "Written.by_expo", "Caught.by_views"])
def test_one_way_alone(way):
    counts, done = fuzz.each(3, 1, only=way)
    assert done == 1
    assert not counts.wrong, "\n".join(counts.wrong)
    assert counts.equal["against autograd"] == 3
    assert not counts.baseless()


def both_ways(module, closure_of, algorithm, steps=4, **options):
    """The gradients of every step by traced code, and by the interpreter."""
    found = []
    for capture in (True, False):
        net = copy.deepcopy(module)
        learner = ebm.Learner(net, algorithm, capture=capture, **options)
        found.append([learner.gradients(closure_of(net)) for _ in range(steps)])
    return found


class Writes(nn.Module):
    """Writes to what a layer returned, through a view or by copying into one."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act, self.other = nn.GELU(), nn.Tanh()

    def forward(self, x):
        a = self.first(x)
        if self.how == "view":
            a.view(-1).mul_(1.5)
        elif self.how == "copy":
            a[:, 0] = a[:, 1] * 0.5
        elif self.how == "copy of fewer":
            a[:, 1:3] = a[:, :1] * 0.5
        elif self.how == "renamed":
            a.unsqueeze(0).squeeze(0).add_(0.3)
        h = self.act(a)
        if self.how == "activation":
            h.view(-1)[:3].mul_(2.0)
        return self.last(self.other(self.second(h)))


@pytest.mark.parametrize("how", ["view", "copy", "copy of fewer", "renamed", "activation"])
@pytest.mark.parametrize("layers", [None, nn.Linear])
def test_writing_to_what_a_layer_returned(how, layers):
    module = Writes(how).double()
    closure_of = lambda net: lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    truth = ebm.reference.backprop(module, closure_of(module))
    for algorithm in ("zero-divergence", "predictive-coding", fuzz.DESCENT):
        fast, plain = both_ways(module, closure_of, algorithm, layers=layers)
        for one, other in zip(fast, plain, strict=True):
            assert fuzz.difference(one, other)[0] < 1e-10
        if algorithm == "zero-divergence":
            assert fuzz.difference(plain[-1], truth)[0] < 1e-10


class Beside(nn.Module):
    """Called with a tensor that nothing is computed from, whose size may be taken for that of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, extra, x):
        return self.net(x)


def test_code_is_of_one_size_of_the_batch():
    module = Beside().double()
    extra = torch.zeros(6)
    closure = lambda: F.cross_entropy(module(extra, X), Y)  # noqa: E731
    used = ebm.Learner(module, "predictive-coding")
    for size in (6, 6, 6, 5, 6):
        extra = torch.zeros(size)
        fresh = ebm.Learner(module, "predictive-coding", capture=False).gradients(closure)
        assert fuzz.difference(used.gradients(closure), fresh)[0] < 1e-10


def test_a_parameter_given_other_memory_by_its_data_is_read_as_it_was():
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    teacher = nn.Linear(4, 3).double().requires_grad_(False)

    def closure():
        loss = F.cross_entropy(module(X), Y) + F.mse_loss(module(X), teacher(X))
        teacher.weight.data = teacher.weight.data * 0.5
        return loss

    for capture in (True, False):
        learner = ebm.Learner(module, "zero-divergence", capture=capture)
        for _ in range(4):
            kept = teacher.weight.detach().clone()
            module.zero_grad()
            learner.backward(closure)
            found = {name: p.grad.clone() for name, p in module.named_parameters()}
            with torch.no_grad():
                teacher.weight.copy_(kept)
            assert fuzz.difference(found, ebm.reference.backprop(module, closure))[0] < 1e-10
            teacher.weight.data = kept * 0.9


def test_the_same_module_in_other_kinds_of_numbers():
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    used = {name: ebm.Learner(module, name) for name in ("zero-divergence", "predictive-coding")}
    for dtype in (torch.float64, torch.float64, torch.float32, torch.float32, torch.float64, torch.float32):
        module.to(dtype)
        closure = lambda dtype=dtype: F.cross_entropy(module(X.to(dtype)), Y)  # noqa: E731
        for name, learner in used.items():
            fresh = ebm.Learner(module, name, capture=False).gradients(closure)
            found = learner.gradients(closure)
            assert all(g.dtype == dtype for g in found.values())
            assert fuzz.difference(found, fresh)[0] < (1e-10 if dtype == torch.float64 else 2e-4)
