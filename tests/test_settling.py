"""How descent ends on the networks people have: samples that see each other, and kinks at which no force vanishes."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), activation()]
    cut = 2 if norm else 1
    return nn.Sequential(*layers[:-cut]).double()


def contrast(out: Tensor) -> Tensor:
    """Each of the first half against all of the second."""
    a, b = F.normalize(out, dim=1).chunk(2)
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def equilibrium(net: nn.Sequential, x: Tensor, loss, lam: float) -> tuple[float, dict[str, Tensor]]:
    """Energy and update by L-BFGS on explicit errors, autograd alone: 1e-6 of the force is left at most."""
    with torch.no_grad():
        shapes, h = [], x
        for module in net:
            h = module(h)
            shapes += [h.shape] if isinstance(module, nn.Tanh) else []
    errors = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def energy() -> Tensor:
        h, left = x, iter(errors)
        for module in net:
            h = module(h)
            h = h + next(left) if isinstance(module, nn.Tanh) else h
        return 0.5 * sum(e.square().sum() for e in errors) + lam * len(x) * loss(h)

    optimizer = torch.optim.LBFGS(
        errors, max_iter=3000, tolerance_grad=1e-10, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = energy()
        found.backward()
        return found

    optimizer.step(closure)
    left = torch.autograd.grad(energy(), errors)
    assert sum(float(g.square().sum()) for g in left) ** 0.5 < 1e-6, "the oracle itself has not settled"
    total, h, rest = torch.zeros((), dtype=torch.float64), x, iter(e.detach() for e in errors)
    for module in net:
        h = module(h)
        if isinstance(module, nn.Tanh):
            error = next(rest)
            total, h = total - (error * h).sum(), h.detach() + error
    total = (total + lam * len(x) * loss(h)) / (lam * len(x))
    slopes = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
    names = [name for name, _ in net.named_parameters()]
    found = {n: s for n, s in zip(names, slopes, strict=True) if s is not None}
    return float(energy().detach()), found


def settled(lam: float, tol: float = 1e-3) -> ebm.Algorithm:
    return ebm.algorithm(
        "predictive-coding", nudge=ebm.OneSided(lam), relaxer=ebm.ErrorCoordinates(max_steps=2000, tol=tol)
    )


@pytest.mark.parametrize(
    "seed", [0, 1, 2, 4, 5, 6, 8, 9]
)  # at 3 there are two minima, at 7 an output without direction
def test_under_a_loss_across_the_batch_the_update_is_that_of_a_second_solver(seed):
    torch.manual_seed(seed)
    net, u = mlp(4, 6, 6, 4), torch.randn(6, 4, dtype=torch.float64)
    x = torch.cat([u, u + 0.3 * torch.randn(6, 4, dtype=torch.float64)])
    learner = ebm.Learner(net, settled(0.3))
    update = learner.gradients(lambda: contrast(net(x)))
    energy, expected = equilibrium(net, x, contrast, 0.3)
    assert learner.report["result"] == "converged"
    assert learner.report["energy_nudged"] == pytest.approx(energy, rel=1e-4)
    assert ebm.metrics.alignment(update, expected)["relative_error"] < 3e-3


@pytest.mark.parametrize("lam", [0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_under_batchnorm_the_update_is_that_of_a_second_solver(seed, lam):
    torch.manual_seed(seed)
    net, x, y = mlp(4, 8, 8, 3, norm=True), torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))

    def loss(out: Tensor) -> Tensor:
        return F.cross_entropy(out, y)

    learner = ebm.Learner(net, settled(lam))
    update = learner.gradients(lambda: loss(net(x)))
    energy, expected = equilibrium(net, x, loss, lam)
    assert learner.report["result"] == "converged"
    assert learner.report["energy_nudged"] == pytest.approx(energy, rel=1e-5)
    assert ebm.metrics.alignment(update, expected)["relative_error"] < 4e-3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.act, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.GELU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 4))
        return self.out(self.act(self.attention(x, x, x, need_weights=False)[0])).mean(1)


def hinge(out: Tensor) -> Tensor:
    """Pairs of samples are pushed apart within a margin that none of them is in."""
    return out.square().mean() + torch.relu(1e-9 - torch.cdist(out, out) - torch.eye(len(out))).sum()


def hardest(out: Tensor) -> Tensor:
    """Hard examples: the largest losses of a batch."""
    return F.cross_entropy(out, torch.arange(len(out)) % 3, reduction="none").topk(2).values.mean()


def easiest(out: Tensor) -> Tensor:
    """As networks that teach each other on noisy labels do."""
    each = F.cross_entropy(out, torch.arange(len(out)) % 3, reduction="none")
    return each[each.argsort()[:4]].mean()


def worst(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.arange(len(out)) % 3, reduction="none").max()


def weighted(out: Tensor) -> Tensor:
    """A weight of its own for every sample."""
    return (torch.arange(1, len(out) + 1) * out.square().mean(1)).mean()


NETS = {
    "the hardest of a batch": (lambda: mlp(8, 6, 6, 3), hardest, True),
    "the easiest of a batch": (lambda: mlp(8, 6, 6, 3), easiest, True),
    "the worst of a batch": (lambda: mlp(8, 6, 6, 3), worst, True),
    "weights of samples": (lambda: mlp(8, 6, 6, 3), weighted, False),
    "linear layers": (lambda: mlp(8, 6, 6, 3), None, False),
    "BatchNorm": (lambda: mlp(8, 6, 6, 3, norm=True), None, True),
    "BatchNorm in evaluation": (lambda: mlp(8, 6, 6, 3, norm=True).eval(), None, False),
    "LayerNorm": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).double(), None, False,
    ),
    "attention": (lambda: Attention().double(), None, False),
    "contrastive loss": (lambda: mlp(8, 6, 6, 3), contrast, True),
    "a hinge that is not active": (lambda: mlp(8, 6, 6, 3), hinge, True),
    "max pooling": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.MaxPool1d(2), nn.Linear(4, 3)).double(), None, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_samples_that_see_each_other_are_told_by_the_program_and_not_by_its_numbers(name):
    make, loss, interact = NETS[name]
    torch.manual_seed(0)
    net, x = make(), torch.randn(6, 8, dtype=torch.float64)
    seen = []

    class Asks(ebm.ErrorCoordinates):
        def relax(self, landscape, start, strength):
            seen.append(landscape.samples_interact)
            return super().relax(landscape, start, strength)

    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=Asks(max_steps=3)))
    for _ in range(3):  # plainly, and by code
        learner.gradients(lambda: loss(net(x)) if loss else net(x).square().mean())
    assert seen == [interact] * 3


def lowest(net: nn.Module, x: Tensor, y: Tensor, layers: type[nn.Module] | list[str], lam: float = 1.0) -> float:
    """The energy that momentum descent on the errors of these layers reaches in 2,000 steps, by hooks and autograd."""
    errors: list[Tensor] = []

    def displaced(module: nn.Module, args: object, out: Tensor) -> Tensor:
        if len(errors) <= index[0]:
            errors.append(torch.zeros_like(out, requires_grad=True))
        index[0] += 1
        return out + errors[index[0] - 1]

    index = [0]
    named = layers if isinstance(layers, list) else [n for n, m in net.named_modules() if isinstance(m, layers)]
    carry = [m for name, m in net.named_modules() if name in named]
    handles = [m.register_forward_hook(displaced) for m in carry]

    def energy() -> Tensor:
        index[0] = 0
        loss = lam * len(x) * F.cross_entropy(net(x), y)
        return 0.5 * sum(e.square().sum() for e in errors) + loss

    energy()
    speeds, best = [torch.zeros_like(e) for e in errors], float("inf")
    for _ in range(2000):
        now = energy()
        best = min(best, float(now.detach()))
        with torch.no_grad():
            for e, v, g in zip(errors, speeds, torch.autograd.grad(now, errors), strict=True):
                e += v.mul_(0.95).sub_(g, alpha=0.02)
    for handle in handles:
        handle.remove()
    return best


def conv(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), activation(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), activation(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    ).double()  # fmt: skip


@pytest.mark.parametrize("kind", ["ReLU MLP", "ReLU and max pooling", "GELU and max pooling"])
def test_at_kinks_it_ends_where_no_energy_is_left_to_gain_and_says_so(kind):
    torch.manual_seed(0)
    activation = nn.GELU if kind.startswith("GELU") else nn.ReLU
    net = mlp(64, 48, 48, 10, activation=nn.ReLU) if kind == "ReLU MLP" else conv(activation)
    x, y = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (16,))
    x = x.flatten(1) if kind == "ReLU MLP" else x
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=ebm.ErrorCoordinates(max_steps=64)))
    learner.gradients(lambda: F.cross_entropy(net(x), y))
    report = learner.report
    start, end = (report["phases"][0]["energies"][k] for k in (0, -1))
    best = lowest(net, x, y, activation)
    assert report["result"] == "kink"
    assert max(report["residual"]) > 1e-2, "forces did vanish: this net has no kinks where it ended"
    assert end - best < 2e-3 * (start - best)
    assert report["steps"] < 40


def test_the_default_costs_no_more_than_its_budget_and_says_when_that_was_too_little():
    torch.manual_seed(0)
    net, x, y = conv(nn.ReLU), torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (16,))
    learner = ebm.Learner(net, "predictive-coding")
    learner.gradients(lambda: F.cross_entropy(net(x), y))
    assert learner.report["steps"] <= 12
    assert learner.report["result"] in ("kink", "max_steps")
    start, end = (learner.report["phases"][0]["energies"][k] for k in (0, -1))
    if learner.report["result"] == "kink":
        assert end - lowest(net, x, y, nn.ReLU) < 2e-3 * (start - end)


def normed_conv() -> nn.Sequential:
    """Kinks of ReLU and pooling under BatchNorm: samples see each other, and steps do not shrink."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    ).double()  # fmt: skip


@pytest.mark.parametrize("lam", [0.02, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_where_energy_is_level_at_kinks_that_are_crossed_it_ends_and_the_energy_is_the_least(seed, lam):
    torch.manual_seed(seed)
    net = normed_conv()
    x, y = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (16,))
    relaxer = ebm.ErrorCoordinates(max_steps=6, tol=1e-2)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", nudge=ebm.OneSided(lam), relaxer=relaxer))
    learner.gradients(lambda: F.cross_entropy(net(x), y))
    report = learner.report
    start, *_, end = report["phases"][0]["energies"]
    best = lowest(net, x, y, report["layers"], lam)
    assert report["steps"] <= 6
    assert report["result"] != "max_steps" or lam > 0.02
    if report["result"] == "converged":
        assert max(report["residual"]) <= 1e-2
    if report["result"] != "max_steps":
        assert end - best < 1e-3 * (start - best)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_line_search_does_not_outrun_the_number_of_evaluations(steps):
    torch.manual_seed(0)
    net = mlp(4, 8, 8, 3, norm=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4.0)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    relaxer = ebm.ErrorCoordinates(max_steps=steps, tol=1e-6)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=relaxer))
    learner.gradients(lambda: F.cross_entropy(net(x), y))
    assert learner.report["steps"] == steps
    assert len(learner.report["phases"][0]["energies"]) == steps + 1


@pytest.mark.parametrize("lam", [0.03, 0.1])
@pytest.mark.parametrize("seed", [*range(7), 8, 9, 10])  # at 7 an output of the contrasted net is without direction
@pytest.mark.parametrize("kind", ["contrast", "BatchNorm", "tanh"])
def test_at_a_hundredth_of_the_force_the_update_of_smooth_nets_is_as_near(kind, seed, lam):
    """Against L-BFGS, ten seeds; "converged" is said where the forces of all samples say so, "kink" nowhere."""
    torch.manual_seed(seed)
    net = mlp(4, 8, 8, 4, norm=kind == "BatchNorm")
    u = torch.randn(6, 4, dtype=torch.float64)
    x, y = torch.cat([u, u + 0.3 * torch.randn(6, 4, dtype=torch.float64)]), torch.randint(0, 4, (12,))
    loss = contrast if kind == "contrast" else lambda out: F.cross_entropy(out, y)
    learner = ebm.Learner(net, settled(lam, tol=1e-2))
    update = learner.gradients(lambda: loss(net(x)))
    energy, expected = equilibrium(net, x, loss, lam)
    assert learner.report["result"] == "converged"
    assert max(learner.report["residual"]) <= 1e-2
    assert learner.report["energy_nudged"] == pytest.approx(energy, rel=1e-3)
    assert ebm.metrics.alignment(update, expected)["relative_error"] < 2e-2


@pytest.mark.parametrize("choose", [hardest, worst])
@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_a_loss_that_chooses_among_samples_relaxes_though_others_come_in(choose, lam):
    """A sample without a force at the start has one when the loss of others has fallen: no runaway."""
    torch.manual_seed(0)
    net, x = mlp(4, 8, 6, 3), torch.randn(8, 4, dtype=torch.float64)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", nudge=ebm.OneSided(lam)))
    learner.gradients(lambda: choose(net(x)))
    report = learner.report
    with torch.no_grad():
        start = lam * 8 * float(choose(net(x)))
    assert report["energy_nudged"] < start


def normed(width: int) -> nn.Sequential:
    parts = [nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, width), nn.BatchNorm1d(width)]
    return nn.Sequential(*parts, nn.Tanh(), nn.Linear(width, 5)).double()


@pytest.mark.parametrize("kind", ["tanh", "ReLU", "steep ReLU", "samples that see each other"])
def test_the_energy_still_to_be_gained_is_estimated_to_its_order(kind):
    """Against what a relaxation to 1e-12, which goes on from there, gains in fact: a fifth to twenty times of it.

    Quasi-Newton steps, as where samples see each other, cross plateaus, on which it is as little as a fiftieth.
    """
    torch.manual_seed(0)
    activation = nn.Tanh if kind == "tanh" else nn.ReLU
    net = normed(24) if kind.startswith("samples") else mlp(8, 24, 24, 24, 5, activation=activation)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3.0 if kind == "steep ReLU" and parameter.ndim > 1 else 1.0)
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 5

    def phase(steps: int) -> dict:
        relaxer = ebm.ErrorCoordinates(max_steps=steps, tol=1e-12)
        learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=relaxer))
        learner.gradients(lambda: F.cross_entropy(net(x), y))
        return learner.report["phases"][0]

    lowest_known = phase(3000)["energies"][-1]
    for steps in (2, 4, 6, 8):
        found = phase(steps)
        start, *_, end = found["energies"]
        to_gain = (end - lowest_known) / (start - end)
        if to_gain > 1e-9:  # below, energies are rounded
            least = 0.02 if kind.startswith("samples") else 0.2
            assert least * to_gain < found["gain_left"] < 20 * to_gain


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_device_that_is_asked_rarely_is_told_the_same_estimate(activation, monkeypatch):
    torch.manual_seed(0)
    net, x, y = mlp(8, 24, 24, 5, activation=activation), torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 5
    told = []
    for rarely in (False, True):
        monkeypatch.setattr("lightning_ebm.network.network.runs_behind", lambda device, rarely=rarely: rarely)
        learner = ebm.Learner(
            net, ebm.algorithm("predictive-coding", relaxer=ebm.ErrorCoordinates(max_steps=64, tol=1e-3))
        )
        learner.gradients(lambda: F.cross_entropy(net(x), y))
        told.append(learner.report["phases"][0])
    assert told[0]["status"] == told[1]["status"] != "max_steps"
    assert told[1]["gain_left"] == pytest.approx(told[0]["gain_left"], rel=1e-6)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_a_budget_that_ends_where_hardly_any_energy_is_left_is_no_reason_for_a_warning(activation, caplog):
    """A thousandth of what was gained, against where 3,000 steps end; `result` says that a sample is still moving."""
    torch.manual_seed(0)
    net = mlp(8, 24, 24, 5, activation=activation)
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 5
    closure = lambda: F.cross_entropy(net(x), y)  # noqa: E731

    def phase(steps: int) -> dict:
        caplog.clear()
        relaxer = ebm.ErrorCoordinates(max_steps=steps, tol=1e-12)
        learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=relaxer))
        learner.gradients(closure)
        return learner.report["phases"][0]

    lowest_known = phase(3000)["energies"][-1]
    quiet = []
    for steps in range(1, 10):
        found = phase(steps)
        assert found["status"] == "max_steps"
        start, *_, end = found["energies"]
        left = found["gain_left"]
        quiet.append("still moving" not in caplog.text)
        assert quiet[-1] == (left <= 1e-3)
        assert not quiet[-1] or (end - lowest_known) / (start - end) < 5e-3  # of an estimate from the last steps
        assert quiet[-1] or f"some {100 * left:.2g} % of the energy gained" in caplog.text
    assert quiet[0] is False
    assert quiet[-1] is True


def test_relaxers_that_make_no_estimate_say_none():
    net, x = mlp(8, 6, 6, 3), torch.randn(6, 8, dtype=torch.float64)
    learner = ebm.Learner(net, "error-pc")
    learner.gradients(lambda: F.cross_entropy(net(x), torch.arange(6) % 3))
    assert learner.report["phases"][0]["gain_left"] is None


def test_states_that_have_not_moved_at_all_are_not_said_to_be_still_moving(caplog):
    """A softmax of very large logits behind a norm of very small ones: no step that is tried goes down."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    learner = ebm.Learner(net, "pc-nudge")
    found = learner.gradients(lambda: F.cross_entropy(1e6 * F.normalize(1e-6 * net(x)), y))
    assert found["0.weight"].norm() < 1e-9 * found["2.weight"].norm()  # the read-out alone learns
    assert "have not moved: none of 2 steps" in caplog.text
    assert "still moving" not in caplog.text


@pytest.mark.parametrize("preset", ["zero-divergence", "predictive-coding", "equilibrium-propagation", "infinitesimal"])
def test_looking_for_nan_in_backward_passes_is_another_matter(preset):
    """Autograd's detection of anomalies is about the user's code: samples do not see each other because of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 6).double(), torch.randint(3, (16,))
    before = ebm.Learner(net, preset).gradients(lambda: F.cross_entropy(net(x), y))
    with torch.autograd.detect_anomaly(), torch.autograd.set_detect_anomaly(True):
        found = ebm.Learner(net, preset).gradients(lambda: F.cross_entropy(net(x), y))
        assert torch.is_anomaly_enabled()
    assert all(torch.equal(found[name], gradient) for name, gradient in before.items())
