"""The relaxer that chooses itself: against counts made by hand, and against each candidate alone, bit by bit."""

import itertools
import logging

import lightning as L
import pytest
import torch
from landscapes import ByHand
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.evaluations import ErrorForces, Slope
from lightning_ebm.network.recording import Recording
from lightning_ebm.relaxers import Relaxation

INF = float("inf")


class Line(ByHand):
    """E = 1/2 x^2 for each sample; how far away a candidate ends, and what it asks on the way, is up to it."""

    def __init__(self, batch=2):
        self.names, self.batch_size, self.rounding = ["x"], batch, 2.0**-52
        self.no_errors = [torch.zeros(batch, 1, dtype=torch.float64)]
        self.asked = 0

    def forces(self, states, strength):
        self.asked += 1
        return Slope(0.5 * states[0].square().sum(1), torch.zeros((), dtype=torch.float64), [states[0]])

    def per_sample(self, tensors):
        return tensors[0].sum(1)

    def norms(self, tensors):
        return self.per_sample([tensors[0].square()]).sqrt()


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
            landscape.evaluate(ErrorForces(), start, strength)
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
    assert chooser.tried == {("nudged",): [[9.0, 5.0, INF]]}
    chooser.relax(Line(), START, 1.0)
    assert [c.runs for c in (slow, fast, cut_off)] == [1, 2, 1]
    assert "Scripted(5)" in repr(chooser)


def test_a_candidate_is_given_up_once_it_has_cost_half_more_than_the_best():
    landscape = Line()
    chooser = ebm.Cheapest(Scripted(4), Scripted(1000), Scripted(3))
    chooser.relax(landscape, START, 1.0)
    assert landscape.asked == 4 + 6 + 3  # the seventh question would have cost more than 1.5 * 4, and is not answered
    assert chooser.tried["nudged",] == [[4.0, 7.0, 3.0]]


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


def test_equal_costs_are_not_told_apart_by_how_they_round():
    """.1 + .1 + .1 + 1 and 1 + .1 + .1 + .1 differ in their last digit; whoever comes first is taken."""

    class Sums(Scripted):
        def relax(self, landscape, start, strength):
            for asked in self.order:
                landscape.evaluate(ErrorForces(), start, strength) if asked == "f" else landscape.norms(start)
            return super().relax(landscape, start, strength)

    def asking(order):
        made = Sums(0)
        made.order = order
        return made

    for first, second in itertools.permutations(("sssf", "fsss")):
        chooser = ebm.Cheapest(asking(first), asking(second))
        chooser.relax(Line(), START, 1.0)
        assert len(set(chooser.tried["nudged",][0])) == 2
        assert chooser.chosen["nudged"] is chooser.candidates[0]


# Phases decided together


class Signed(ebm.Relaxer):
    """Costs, ends and statuses of its own for either sign: `ahead` at positive strengths, `behind` at negative ones."""

    def __init__(self, ahead, behind, tol=1e-3):
        self.ahead, self.behind = (Scripted(*(x if isinstance(x, tuple) else (x,))) for x in (ahead, behind))
        self.tol = tol

    @property
    def runs(self):
        return self.ahead.runs, self.behind.runs

    def relax(self, landscape, start, strength):
        return (self.ahead if strength > 0 else self.behind).relax(landscape, start, strength)


def both(chooser, landscape=None):
    return chooser.relax_all(landscape or Line(), START, [0.5, -0.5])


def test_both_signs_take_the_one_whose_sum_is_least_though_neither_would_alone():
    chooser = ebm.Cheapest(Signed(2, 9), Signed(9, 2), Signed(4, 5))
    ahead, behind = both(chooser)
    assert (ahead.steps, behind.steps) == (4, 5)
    assert chooser.chosen == dict.fromkeys(("nudged", "negative"), chooser.candidates[2])
    assert chooser.tried == {("nudged", "negative"): [[2, 9, 4], [9, 2, 5]]}
    both(chooser)
    assert [c.runs for c in chooser.candidates] == [(1, 1), (1, 1), (2, 2)]
    alone = ebm.Cheapest(*chooser.candidates)
    for strength in (0.5, -0.5):
        alone.relax(Line(), START, strength)
    assert list(alone.chosen.values()) == list(chooser.candidates[:2])


FAILS = {
    "runs away": "diverged",
    "still moving": "max_steps",
    "at a kink": "stalled",
    "ends higher": ("converged", 0.9),
}


@pytest.mark.parametrize("how", FAILS)
@pytest.mark.parametrize("sign", [1, -1])
def test_who_fails_at_one_sign_does_not_win_over_who_arrives_at_both(how, sign):
    fails = (20, *(FAILS[how] if isinstance(FAILS[how], tuple) else (FAILS[how],)))
    chooser = ebm.Cheapest(Signed(*(1, fails)[::sign]), Signed(24, 7))
    assert [one.steps for one in both(chooser)] == [24, 7]
    assert set(chooser.chosen.values()) == {chooser.candidates[1]}
    assert sorted(cost for row in chooser.tried["nudged", "negative"] for cost in row) == [1, 7, 24, INF]


def test_where_none_arrives_at_both_each_sign_chooses_by_itself():
    first, second, third = Signed(3, (1, "max_steps")), Signed((1, "diverged"), 7), Signed((1, "diverged"), 6)
    chooser = ebm.Cheapest(first, second, third)
    for _ in range(3):
        assert [one.steps for one in both(chooser)] == [3, 6]
    assert chooser.chosen == {"nudged": first, "negative": third}
    assert (first.runs, second.runs, third.runs) == ((3, 1), (1, 1), (1, 3))
    assert not chooser.state_dict()["failures"]


def test_where_nothing_arrives_the_nearest_is_taken_at_each_sign():
    near, far = (1, "max_steps", 0.1), (1, "max_steps", 0.5)
    assert [float(one.point[0][0]) for one in both(ebm.Cheapest(Signed(near, far), Signed(far, near)))] == [0.1, 0.1]
    chooser = ebm.Cheapest(Signed(1, far), Signed(30, near))
    both(chooser)
    assert set(chooser.chosen.values()) == {chooser.candidates[1]}


def test_who_is_given_up_is_given_up_by_what_both_signs_cost_and_never_wins():
    landscape = Line()
    chooser = ebm.Cheapest(Signed(4, 4), Signed(9, 3), Signed(9, 50), Signed(1000, 1))
    both(chooser, landscape)
    assert landscape.asked == 8 + 12 + 12 + 12  # of the second 9 + 3, as many as may be asked
    assert chooser.chosen["nudged"] is chooser.candidates[0]
    wrong = Signed((2, "converged", 0.9), (2, "converged", 0.9))  # cuts the third off, and is out itself
    chooser = ebm.Cheapest(Signed(8, 3), wrong, Signed(5, 50))  # of which 5 + 2 are asked for, less than 8 + 3
    both(chooser)
    assert set(chooser.chosen.values()) == {chooser.candidates[0]}


def test_a_failure_at_one_sign_makes_both_choose_anew():
    fast, sure = Signed(2, 2), Signed(6, 6)
    chooser = ebm.Cheapest(fast, sure)
    both(chooser)
    fast.behind.status = "diverged"
    assert [one.steps for one in both(chooser)] == [6, 6]
    assert set(chooser.chosen.values()) == {sure}
    sure.ahead.status = sure.behind.status = "max_steps"
    fast.behind.status = "converged"
    assert [one.steps for one in both(chooser)] == [2, 2]


def test_both_signs_are_compared_together_again_at_powers_of_ten():
    first, second = Signed(4, 4), Signed(5, 5)
    chooser = ebm.Cheapest(first, second)
    for batch in range(1, 101):
        both(chooser)
        second.behind.passes = 2 if batch == 50 else second.behind.passes  # 5 + 2 < 4 + 4, though 5 > 4
        assert set(chooser.chosen.values()) == {first if batch < 100 else second}
    assert (first.runs, second.runs) == ((100, 100), (3, 3))


def test_a_choice_for_each_sign_from_an_earlier_checkpoint_is_kept_until_it_is_due_again():
    candidates = [Scripted(4), Scripted(5)]
    chooser = ebm.Cheapest(*candidates)
    chosen = {"nudged": "Scripted(5)", "negative": "Scripted(4)"}
    chooser.load_state_dict({"chosen": chosen, "failures": {}, "counts": {"nudged": 7, "negative": 7}})
    assert [[one.steps for one in both(chooser)] for _ in range(3)] == [[5, 4], [5, 4], [4, 4]]


@pytest.mark.parametrize("seed", range(20))
def test_all_ranks_take_what_costs_all_ranks_and_both_signs_least(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(2, 12, (3, 4, 2), generator=generator)  # (rank, candidate, sign)
    fails = torch.rand(3, 4, 2, generator=generator) < 0.2
    fails[:, 1] = False
    ranks = []
    for cost, fail in zip(costs.tolist(), fails.tolist(), strict=True):
        ends = [
            [(c, "max_steps" if f else "converged", 0.5 * f) for c, f in zip(*x, strict=True)]
            for x in zip(cost, fail, strict=True)
        ]
        ranks.append(ebm.Cheapest(*(Signed(*x) for x in ends)))
        both(ranks[-1])
    told = [rank.tried for rank in ranks]
    tables = torch.tensor([one["nudged", "negative"] for one in told], dtype=torch.float64)  # (rank, sign, candidate)
    expected = int(tables.sum((0, 1)).argmin())
    assert not bool(fails[:, expected].any())
    for rank in ranks:
        rank.agree(told)
        assert set(rank.chosen.values()) == {rank.candidates[expected]}
        assert not rank.tried


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        # by sign and candidate, rank after rank: the first is everywhere ahead, the second behind, and none at both
        (([[2, 9, INF], [INF, 9, 3]], [[2, INF, 4], [INF, 8, INF]]), (0, 1)),
        # behind, each fails on one rank
        (([[2, 9, INF], [INF, 9, 3]], [[2, 3, 4], [5, INF, INF]]), (0, 2)),
        # ahead, the first fails on two ranks of three
        (([[INF, 9], [1, INF]], [[INF, 9], [1, INF]], [[1, INF], [1, 1]]), (1, 0)),
    ],
)
def test_ranks_agree_where_no_candidate_arrives_on_all_of_them(tables, expected):
    kinds = "nudged", "negative"
    told = [{kinds: table} for table in tables]
    for before in (0, 1):
        rank = ebm.Cheapest(*(Scripted(1) for _ in tables[0][0]))
        rank._chosen = dict.fromkeys(kinds, rank.candidates[before])
        rank.agree(told)
        assert tuple(rank.candidates.index(rank.chosen[kind]) for kind in kinds) == expected


def test_ranks_that_had_nothing_to_compare_follow_the_one_that_had():
    ranks = [ebm.Cheapest(Signed(2, 2), Signed(6, 6)) for _ in range(2)]
    for rank in ranks:
        both(rank)
        rank.tried = {}
    ranks[0].candidates[0].behind.status = "diverged"
    for rank in ranks:
        both(rank)
    told = [rank.tried for rank in ranks]
    assert not told[1]
    for rank in ranks:
        rank.agree(told)
        assert set(rank.chosen.values()) == {rank.candidates[1]}


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


@pytest.mark.crossed(2)
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
    assert set(settled) <= {"converged", "kink"}
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


@pytest.mark.slow
@pytest.mark.parametrize("capture", [True, False])
def test_both_signs_take_one_way_where_each_alone_would_take_its_own(capture):
    """A strong nudge on large weights: ahead Anderson's is cheapest, behind the accelerated sweep, and in all that."""

    def chosen(nudge):
        net = mlp(5, 10, 10, 10, 3, gain=1.5)
        algorithm = ebm.algorithm("equilibrium-propagation", nudge=nudge, relaxer="auto")
        learner = ebm.Learner(net, algorithm, capture=capture)
        torch.manual_seed(1)
        x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 3, (8,))
        for _ in range(3):  # chosen by the plain way, then kept by code
            learner.gradients(lambda: F.cross_entropy(net(x), y))
        return [algorithm.relaxer.chosen.get(kind) for kind in ("nudged", "negative")]

    ahead, behind = chosen(ebm.OneSided(2.0))[0], chosen(ebm.OneSided(-2.0))[1]
    assert (type(ahead), type(behind)) == (ebm.Anderson, ebm.AcceleratedFixedPoint)
    assert chosen(ebm.Centered(2.0)) == [behind, behind]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nudge", "watched"),
    [(ebm.Centered(0.3), False), (ebm.Centered(2.0), True), (ebm.Holomorphic(0.3, points=6), False)],
    ids=str,
)
def test_the_choice_is_the_same_whichever_way_steps_run(nudge, watched):
    found = []
    for capture in (True, False):
        net = mlp(5, 10, 10, 10, 3, gain=1.2)
        algorithm = ebm.algorithm("equilibrium-propagation", nudge=nudge, relaxer="auto")
        learner = ebm.Learner(net, algorithm, capture=capture)
        learner.observer = Recording if watched else None
        torch.manual_seed(1)
        for _ in range(11):
            x = torch.randn(8, 5, dtype=torch.float64)
            learner.gradients(lambda x=x, net=net: F.cross_entropy(net(x), torch.arange(8) % 3))
        rows = {kinds: torch.tensor(rows) for kinds, rows in algorithm.relaxer.tried.items()}
        found.append((algorithm.relaxer.state_dict(), rows))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert ("nudged", "negative") in found[0][1]
    for kinds, rows in found[0][1].items():
        torch.testing.assert_close(rows, found[1][1][kinds])


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

    from lightning_ebm.reports import runs

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
