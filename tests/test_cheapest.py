"""The relaxer that chooses itself: against counts made by hand, and against each candidate alone, bit by bit."""

import itertools
import logging

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.relaxers import Cheapest, Forces, Relaxation


class Line:
    """E = 1/2 x^2 for each sample; how far away a candidate ends, and what it asks on the way, is up to it."""

    def __init__(self, batch=2):
        self.names, self.batch_size, self.rounding = ["x"], batch, 2.0**-52
        self.no_errors = [torch.zeros(batch, 1, dtype=torch.float64)]
        self.asked = 0

    def forces(self, states, strength):
        self.asked += 1
        return Forces(0.5 * states[0].square().sum(1), torch.zeros((), dtype=torch.float64), [states[0]])

    def error_forces(self, errors, strength):
        return self.forces(errors, strength)

    def per_sample(self, tensors):
        return tensors[0].sum(1)

    def squares(self, tensors):
        return self.per_sample([tensors[0].square()])


class Scripted(ebm.Relaxer):
    """Asks `passes` times, then ends at `end` with `status`, or runs away."""

    def __init__(self, passes, status="converged", end=0.0, tol=1e-3):
        self.passes, self.status, self.end, self.tol = passes, status, end, tol
        self.runs = 0

    def __repr__(self):
        return f"Scripted({self.passes})"

    def relax(self, landscape, start, strength):
        self.runs += 1
        for _ in range(self.passes):
            landscape.error_forces(start, strength)
        if self.status == "diverged":
            raise ebm.RelaxationDivergedError("ran away")
        point = [torch.full_like(start[0], self.end)]
        energies = [0.5 * start[0].square().sum(), 0.5 * point[0].square().sum()]
        return Relaxation(point, "states", self.status, self.passes, point[0].abs()[:, 0], energies)


START = [torch.ones(2, 1, dtype=torch.float64)]


def test_the_cheapest_that_arrives_is_taken_and_kept():
    slow, fast, cut_off = Scripted(9), Scripted(5), Scripted(2, "max_steps")
    chooser = ebm.Cheapest(slow, fast, cut_off)
    assert float(chooser.relax(Line(), START, 1.0).point[0].abs().max()) == 0
    assert chooser.chosen == {"nudged": fast}
    assert chooser.tried == {"nudged": [9.0, 5.0, float("inf")]}
    chooser.relax(Line(), START, 1.0)
    assert [c.runs for c in (slow, fast, cut_off)] == [1, 2, 1]
    assert "Scripted(5)" in repr(chooser)


def test_a_candidate_is_given_up_once_it_has_cost_half_more_than_the_best():
    landscape = Line()
    chooser = ebm.Cheapest(Scripted(4), Scripted(1000), Scripted(3))
    chooser.relax(landscape, START, 1.0)
    assert landscape.asked == 4 + 6 + 3  # the seventh question would have cost more than 1.5 * 4, and is not answered
    assert chooser.tried["nudged"] == [4.0, 7.0, 3.0]


def test_a_higher_stationary_point_does_not_win_however_cheap():
    descends, jumps = Scripted(10), Scripted(1, end=0.9)
    chooser = ebm.Cheapest(descends, jumps)
    chooser.relax(Line(), START, 1.0)
    assert chooser.chosen["nudged"] is descends


def test_what_was_given_up_never_wins_over_what_arrived():
    """The first, cheap and wrong, cuts the second off; the third, which is right, costs more than the second did."""
    chooser = ebm.Cheapest(Scripted(2, end=0.9), Scripted(50), Scripted(3))
    chooser.relax(Line(), START, 1.0)
    assert chooser.chosen["nudged"] is chooser.candidates[2]


def test_stalled_counts_where_nothing_converges():
    chooser = ebm.Cheapest(Scripted(2, "max_steps"), Scripted(7, "stalled"), Scripted(8, "stalled", end=0.5))
    chooser.relax(Line(), START, 1.0)
    assert chooser.chosen["nudged"] is chooser.candidates[1]
    assert ebm.Cheapest(Scripted(1, "stalled"), Scripted(9)).relax(Line(), START, 1.0).steps == 9


def test_free_nudged_and_negative_phases_choose_apart():
    chooser = ebm.Cheapest(Scripted(3), Scripted(4))
    for strength in (0.0, 0.5, -0.5):
        chooser.relax(Line(), START, strength)
    assert set(chooser.chosen) == {"free", "nudged", "negative"}


def test_a_failure_makes_it_choose_anew_and_is_said_once(caplog):
    fast, sure = Scripted(2), Scripted(6)
    chooser = ebm.Cheapest(fast, sure)
    chooser.relax(Line(), START, 1.0)
    fast.status = "diverged"
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        assert chooser.relax(Line(), START, 1.0).steps == 6
        assert chooser.chosen["nudged"] is sure
        sure.status, fast.status = "max_steps", "converged"
        assert chooser.relax(Line(), START, 1.0).steps == 2
    assert sum("no longer settles" in record.message for record in caplog.records) == 1


def test_where_nothing_settles_it_does_not_try_everything_every_time():
    first, second = Scripted(3, "max_steps", end=0.5), Scripted(3, "max_steps", end=0.2)
    chooser = ebm.Cheapest(first, second)
    found = [chooser.relax(Line(), START, 1.0) for _ in range(41)]  # the first compares, and so does the tenth
    assert {f.status for f in found} == {"max_steps"}
    assert {float(f.point[0][0]) for f in found} == {0.2}  # least force left
    assert first.runs == 2 + 6  # and failures 1, 2, 4, 8, 16, 32


def test_what_training_makes_cheaper_is_found_at_the_next_power_of_ten():
    first, second = Scripted(4), Scripted(5)
    chooser = ebm.Cheapest(first, second)
    for batch in range(1, 101):
        chooser.relax(Line(), START, 1.0)
        second.passes = 3 if batch == 50 else second.passes
        assert chooser.chosen["nudged"] is (first if batch < 100 else second)
    assert (first.runs, second.runs) == (100, 3)


def test_where_all_run_away_it_refuses_and_names_them():
    chooser = ebm.Cheapest(Scripted(2, "diverged"), Scripted(3, "diverged"))
    with pytest.raises(ebm.RelaxationDivergedError, match=r"None of 2 relaxers.*Scripted\(2\): ran away"):
        chooser.relax(Line(), START, 1.0)


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ((), "nothing to choose from"),
        ((ebm.Sweep(), ebm.ErrorCoordinates()), "Sweep"),
        ((ebm.Cheapest(ebm.ErrorCoordinates()),), "Cheapest"),
        ((ebm.ErrorCoordinates(tol=1e-2), ebm.Anderson()), "tolerances"),
        ((ebm.GradientDescent(),), "tolerances"),
        ((ebm.ErrorCoordinates, ebm.Anderson()), "expected relaxers"),
    ],
)
def test_candidates_that_cannot_stand_in_for_each_other_are_refused(candidates, said):
    with pytest.raises(ebm.ConfigurationError, match=said):
        ebm.Cheapest(*candidates)


# "auto"


def mlp(*widths, activation=nn.Tanh, seed=0, gain=1.0):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), activation())]
    net = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(gain)
    return net


def gradients(net, algorithm, seed=1, capture=True):
    torch.manual_seed(seed)
    x, y = torch.randn(8, net[0].in_features, dtype=torch.float64), torch.randint(0, 3, (8,))
    learner = ebm.Learner(net, algorithm, capture=capture)
    return learner.gradients(lambda: F.cross_entropy(net(x), y)), learner


class Sigmoid01(nn.Hardtanh):
    def __init__(self):
        super().__init__(0.0, 1.0)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    ("preset", "parts", "net"),
    [
        ("predictive-coding", {}, lambda: mlp(5, 12, 12, 3)),
        ("predictive-coding", {}, lambda: mlp(5, *[10] * 12, 3, gain=2.0)),
        ("predictive-coding", {"nudge": ebm.Centered(0.1)}, lambda: mlp(5, 12, 12, 3, activation=nn.ReLU)),
        ("predictive-coding", {"nudge": ebm.Coupled(0.1)}, lambda: mlp(5, 12, 12, 3)),
        ("predictive-coding", {"energy": ebm.FenchelYoung()}, lambda: mlp(5, 12, 12, 3)),
        ("pc-nudge", {}, lambda: mlp(5, 12, 12, 3)),
        ("equilibrium-propagation", {}, lambda: mlp(5, 12, 12, 3, activation=Sigmoid01)),
        ("equilibrium-propagation", {}, lambda: mlp(5, *[10] * 3, 3, gain=0.8)),
        ("holomorphic-ep", {}, lambda: mlp(5, 12, 12, 3)),
        ("contrastive-hebbian", {}, lambda: mlp(5, 12, 12, 3)),
        ("recurrent-backprop", {}, lambda: mlp(5, 12, 12, 3)),
    ],
)
def test_auto_finds_what_its_choice_finds_by_itself(preset, parts, net, capture):
    """On the batch of the choice, and on the next; bit by bit, phase by phase."""
    net = net()
    algorithm = ebm.algorithm(preset, relaxer="auto", **parts)
    settled = [phase["status"] for phase in gradients(net, algorithm, capture=capture)[1].report["phases"]]
    assert set(settled) <= {"converged", "stalled"}
    chosen = algorithm.relaxer.chosen
    assert chosen, "nothing was relaxed"
    by_itself = ebm.algorithm(algorithm, relaxer=_ByKind(dict(chosen)))
    for seed in (1, 2):
        again, learner = gradients(net, algorithm, seed, capture)
        alone, reference = gradients(net, by_itself, seed, capture)
        assert learner.report["phases"] == reference.report["phases"]
        for name, value in alone.items():
            assert torch.equal(again[name], value), name
    fresh = ebm.algorithm(preset, relaxer="auto", **parts)
    first, _ = gradients(net, fresh, 1, capture)
    alone, _ = gradients(net, by_itself, 1, capture)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("max_steps", [100, 3], ids=["settles", "never settles"])
def test_phases_side_by_side_choose_count_and_fail_as_one_after_the_other(max_steps, monkeypatch):
    """Twelve batches, over the comparison that is due at the tenth; with too few steps, by way of failures."""

    def train():
        net = mlp(5, 12, 12, 3, gain=0.8)
        sweeping = (ebm.FixedPoint(max_steps, tol=1e-5), ebm.AcceleratedFixedPoint(max_steps, tol=1e-5))
        algorithm = ebm.Algorithm(ebm.Hopfield(0.5), ebm.Centered(0.3), Cheapest(*sweeping))
        generator, found = torch.Generator().manual_seed(2), []
        learner = ebm.Learner(net, algorithm)
        for _ in range(12):
            x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
            found.append(learner.gradients(lambda x=x: F.cross_entropy(net(x), torch.arange(8) % 3)))
        phases = [mode.phases for mode in learner._captures[0]._kept[0].programs if mode.kind == "answers"]
        return found, algorithm.relaxer.state_dict(), learner.report["phases"], phases

    together, state, report, phases = train()
    one_by_one = lambda self, landscape, start, strengths: [self.relax(landscape, start, s) for s in strengths]  # noqa: E731
    monkeypatch.setattr(Cheapest, "relax_abreast", one_by_one)
    alone, expected, expected_report, expected_phases = train()
    assert state == expected
    assert state["counts"] == {"free": 12, "nudged": 12, "negative": 12}
    assert bool(state["failures"]) is (max_steps == 3)
    assert [(p["status"], p["steps"]) for p in report] == [(p["status"], p["steps"]) for p in expected_report]
    for one, other in zip(together, alone, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-11, atol=1e-13)
    assert 2 in phases
    assert 2 not in expected_phases


class _ByKind(ebm.Relaxer):
    """What was chosen, written out."""

    complex_states = True

    def __init__(self, chosen):
        self.chosen = chosen

    def relax(self, landscape, start, strength):
        kind = "free" if strength == 0 else "negative" if complex(strength).real < 0 else "nudged"
        return self.chosen[kind].relax(landscape, start, strength)


def test_the_choice_is_the_one_that_asks_least_counted_from_outside():
    """A deep net with large weights, where acceleration is worth most: 16 layers, weights doubled, lambda = .1."""
    net = mlp(5, *[32] * 16, 3, gain=2.0)
    algorithm = ebm.algorithm("predictive-coding", nudge=ebm.OneSided(0.1), relaxer="auto")
    _, learner = gradients(net, algorithm)
    steps = {}
    for candidate in algorithm.relaxer.candidates:
        _, alone = gradients(net, ebm.algorithm(algorithm, relaxer=candidate))
        if alone.report["result"] == "converged":
            steps[candidate] = alone.report["steps"]
    assert len(steps) == 3
    assert learner.report["steps"] == min(steps.values())
    assert learner.report["steps"] < 0.7 * steps[algorithm.relaxer.candidates[0]]


def test_sweeps_are_accelerated_where_they_are_many():
    net, algorithm = mlp(5, 32, 32, 3, gain=2.0), ebm.algorithm("equilibrium-propagation", relaxer="auto")
    _, learner = gradients(net, algorithm)
    assert {type(chosen) for chosen in algorithm.relaxer.chosen.values()} == {ebm.AcceleratedFixedPoint}
    _, plain = gradients(net, ebm.algorithm(algorithm, relaxer=ebm.FixedPoint(1000, tol=1e-4)))
    assert learner.report["result"] == "converged"
    assert learner.report["steps"] < 0.7 * plain.report["steps"]


def test_auto_keeps_the_presets_tolerance_and_the_report_names_the_choice():
    algorithm = ebm.algorithm("contrastive-hebbian", relaxer="auto")
    assert {c.tol for c in algorithm.relaxer.candidates} == {1e-6}
    assert {c.tol for c in ebm.Algorithm(relaxer="auto").relaxer.candidates} == {1e-3}
    _, learner = gradients(mlp(5, 12, 3), algorithm)
    assert repr(algorithm.relaxer.chosen["free"]) in learner.report["algorithm"]["relaxer"]


def test_small_nudges_are_never_relaxed_in_states():
    """lambda = 1e-4 in float32: states that stop at rounding would look cheap, and their update is noise."""
    algorithm = ebm.algorithm("pc-nudge", relaxer="auto")
    assert algorithm.relaxer.needs_error_coordinates
    net = mlp(5, 12, 12, 3).float()
    torch.manual_seed(1)
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    found = ebm.Learner(net, algorithm).gradients(lambda: F.cross_entropy(net(x), y))
    F.cross_entropy(net(x), y).backward()
    for name, parameter in net.named_parameters():
        assert F.cosine_similarity(found[name].flatten(), parameter.grad.flatten(), dim=0) > 0.9999, name


class NoResponse(ebm.Energy):
    divergence = True

    def layer_energy(self, state, layer):
        return 0.5 * (state - layer.prediction).square()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ebm.algorithm("zero-divergence", relaxer="auto"), "Sweep is what makes 'zero-divergence'"),
        (lambda: ebm.algorithm("dual-propagation", relaxer="auto"), "Dyadic"),
        (lambda: ebm.algorithm("incremental-pc", relaxer="auto"), "incremental"),
        (lambda: ebm.Algorithm(relaxer="auto", update="first-arrival"), "first-arrival"),
        (lambda: ebm.Algorithm(NoResponse(), ebm.Holomorphic(0.1, points=4), "auto"), "nothing fits"),
        (lambda: ebm.Algorithm(relaxer="automatic"), "expected an instance of ebm.Relaxer"),
        (lambda: ebm.Algorithm(ebm.Hopfield(), relaxer=ebm.Cheapest(ebm.ErrorCoordinates())), "prediction errors"),
        (lambda: ebm.Algorithm(ebm.Hopfield(), relaxer=ebm.Anderson(coordinates="errors")), "prediction errors"),
    ],
)
def test_what_cannot_be_chosen_for_is_refused_in_words(make, said):
    with pytest.raises(ebm.ConfigurationError, match=said):
        make()


def test_an_energy_of_ones_own_without_best_response_is_descended():
    algorithm = ebm.Algorithm(NoResponse(), ebm.OneSided(0.5), "auto")
    net = mlp(5, 12, 3)
    found, learner = gradients(net, algorithm)
    closely = ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(0.5), ebm.ErrorCoordinates(200, tol=1e-9))
    expected, _ = gradients(net, closely)
    assert learner.report["result"] == "converged"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-3 * float(value.abs().max()))


def test_a_loaded_choice_is_kept_and_nothing_is_tried_again():
    net = mlp(5, *[10] * 12, 3, gain=2.0)
    first = ebm.algorithm("predictive-coding", relaxer="auto")
    _, learner = gradients(net, first)
    state = learner.state_dict()
    resumed = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer="auto"))
    resumed.load_state_dict(state)
    assert repr(resumed.algorithm.relaxer) == repr(first.relaxer)
    assert not resumed.algorithm.relaxer.tried


# Under the Trainer


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = mlp(5, *[10] * 12, 3, gain=2.0)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        torch.manual_seed(3)
        data = torch.utils.data.TensorDataset(torch.randn(48, 5).double(), torch.randint(0, 3, (48,)))
        return torch.utils.data.DataLoader(data, 8)


def fit(tmp_path, **options):
    strategy = options.pop("strategy", None) or ebm.EBMStrategy(ebm.algorithm("predictive-coding", relaxer="auto"))
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    module = Digits()
    trainer.fit(module)
    return trainer, module


@pytest.mark.filterwarnings("ignore")
def test_the_monitor_records_the_chosen_relaxation_alone_and_settings_name_it(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from lightning_ebm import runs

    monitor = ebm.RelaxationMonitor(every_n_steps=1, regime_every_n_steps=None)
    trainer, _ = fit(tmp_path, max_steps=2, callbacks=[monitor], logger=CSVLogger(tmp_path))
    run = runs.read(trainer.logger.log_dir)
    chosen = trainer.strategy.algorithm.relaxer.chosen["nudged"]
    for _, relaxation in run.relaxations:
        (phase,) = relaxation["phases"]
        assert len(phase["loss"]) == relaxation["steps"] + 1
    assert repr(chosen) in run.settings["relaxer"]


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_stays_with_the_choice(tmp_path):
    options = {"enable_checkpointing": False, "logger": False}
    whole, trained = fit(tmp_path, max_steps=6, **options)
    half, _ = fit(tmp_path, max_steps=3, **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    strategy = ebm.EBMStrategy(ebm.algorithm("predictive-coding", relaxer="auto"))
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        max_steps=6, **options,
    )  # fmt: skip
    module = Digits()
    trainer.fit(module, ckpt_path=tmp_path / "half.ckpt")
    assert not strategy.algorithm.relaxer.tried
    assert repr(strategy.algorithm.relaxer) == repr(whole.strategy.algorithm.relaxer)
    for a, b in zip(module.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)
