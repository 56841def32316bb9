"""Maximum pooling: where errors alone make the energy, the state stands behind it, and forces vanish there."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm


def net(activation: type[nn.Module] = nn.ReLU, channels: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), activation(), nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1), activation(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * channels, 10),
    ).double()  # fmt: skip


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 1, 8, 8, dtype=torch.float64), torch.arange(size) % 10


def by_hand(module: nn.Sequential, x: torch.Tensor, y: torch.Tensor, strength: float) -> dict[str, torch.Tensor]:
    """`1/lambda dE/dtheta` at argmin E, E = sum_l 1/2 |x_l - pool(rho(conv(x_{l-1})))|^2 + lambda L, by L-BFGS."""
    first, second, head = module[:3], module[3:6], module[6:]
    with torch.no_grad():
        start = [first(x), second(first(x))]
    states = [state.clone().requires_grad_() for state in start]
    solver = torch.optim.LBFGS(
        states, max_iter=800, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def energy() -> torch.Tensor:
        below, above = states
        internal = (below - first(x)).square().sum() + (above - second(below)).square().sum()
        return 0.5 * internal + strength * len(x) * F.cross_entropy(head(above), y)

    def closure() -> torch.Tensor:
        solver.zero_grad()
        value = energy()
        value.backward(inputs=states)
        return value

    solver.step(closure)
    names = dict(module.named_parameters())
    slopes = torch.autograd.grad(energy() / (strength * len(x)), list(names.values()))
    return dict(zip(names, slopes, strict=True))


def test_the_update_is_that_of_states_behind_the_pooling():
    module, (x, y), strength = net(nn.Tanh), batch(), 0.01
    algorithm = ebm.algorithm(
        "predictive-coding", nudge=ebm.OneSided(strength), relaxer=ebm.ErrorCoordinates(400, tol=1e-11)
    )
    expected = by_hand(module, x, y, strength)
    learner = ebm.Learner(module, algorithm)
    found = learner.gradients(lambda: F.cross_entropy(module(x), y))
    assert learner.report["layers"] == ["2", "5"]
    assert ebm.metrics.alignment(found, expected)["relative_error"] < 3e-6
    before = ebm.Learner(module, algorithm, layers=nn.Tanh).gradients(lambda: F.cross_entropy(module(x), y))
    assert ebm.metrics.alignment(before, expected)["relative_error"] > 1e-3


def test_where_a_layer_is_silent_under_its_pooling_forces_vanish_behind_it_and_not_before():
    """Of equal zeros, each error makes another one the largest: a state before the pooling begins at that kink."""
    x, y = batch(16)
    result = {}
    for layers in (None, nn.ReLU):
        module = net(channels=8)
        with torch.no_grad():
            module[0].bias.sub_(0.5)  # most windows are zeros
        learner = ebm.Learner(
            module, ebm.algorithm("pc-nudge", relaxer=ebm.ErrorCoordinates(12, tol=1e-3)), layers=layers
        )
        learner.gradients(lambda module=module: F.cross_entropy(module(x), y))
        result[layers] = learner.report["result"], max(learner.report["residual"])
    assert result[None][0] == "converged"
    assert result[None][1] < 1e-3 < 0.1 < result[nn.ReLU][1]


class Net(nn.Module):
    """One activation and one pooling for all layers; what lies between them, and what else reads an activation."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.second = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.act, self.pool, self.drop = nn.ReLU(), nn.MaxPool1d(2), nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.first(x))
        if self.kind == "a skip reads it too":
            return self.head((self.pool(h) + F.avg_pool1d(h, 2)).flatten(1))
        if self.kind == "a weight between":
            return self.head(self.pool(self.second(h)).flatten(1))
        if self.kind == "dropout between":
            return self.head(self.pool(self.drop(h)).flatten(1))
        if self.kind == "an average":
            return self.head(F.avg_pool1d(h, 2).flatten(1))
        h = self.act(self.second(self.pool(h)))  # two layers, one pooling
        return self.head(F.avg_pool1d(h, 1).flatten(1)[:, :16])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("two layers, one pooling", ["pool", "act#1"]),
        ("dropout between", ["pool"]),
        ("a skip reads it too", ["act"]),
        ("a weight between", ["act"]),
        ("an average", ["act"]),
    ],
)
def test_a_pooling_takes_the_place_of_the_activation_that_it_alone_reads(kind, expected):
    module = Net(kind).double()
    x, y = torch.randn(5, 1, 8, dtype=torch.float64), torch.arange(5) % 3
    closure = lambda: F.cross_entropy(module(x), y)  # noqa: E731
    assert [row.name + f"#{row.call}" * bool(row.call) for row in ebm.summary(module, x).layers] == expected
    module.eval()  # no dropout, for the comparison
    learner = ebm.Learner(module, "zero-divergence")
    found = learner.gradients(closure)
    assert learner.report["layers"] == expected
    for name, gradient in ebm.reference.backprop(module, closure).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("contrastive-hebbian", {}),
        ("dual-propagation", {}),
        ("predictive-coding", {"layers": ["1", "4"]}),
        ("predictive-coding", {"on_divergence": "dual-propagation"}),
    ],
)
def test_states_stay_at_activations_where_an_energy_is_of_drives_and_where_they_were_asked_for(algorithm, options):
    module, (x, y) = net(nn.Hardtanh), batch()
    learner = ebm.Learner(module, algorithm, **options)
    learner.gradients(lambda: F.cross_entropy(module(x), y))
    assert learner.report["layers"][:2] == ["1", "4"]
