"""That the contenders of the benchmark compute the same thing; how long they take is no test."""

import contextlib
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.evaluations import Around

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import asked
import automatic
import by_hand
import contenders
import networks
import other_libraries
import page
import peers
import roofline
import run
import steps
import sweeping
import timing

SMALL = networks.chain(16, 20, 12, 12, 12, 10)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_what_is_written_by_hand_is_what_the_library_does():
    torch.manual_seed(0)
    net = SMALL.make().double()
    x, y = SMALL.batch()
    x = x.double()
    found = ebm.Learner(net, contenders.euler(7, 0.2)).gradients(lambda: F.cross_entropy(net(x), y))
    by_hand.predictive_coding(net, x, y, 7, 0.2)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("widths", [(12,), (12, 12), (12, 12, 12, 12)])
def test_sweeps_written_by_hand_are_those_of_the_library(widths):
    torch.manual_seed(0)
    net = sweeping.bounded(20, *widths, 10).make().double()
    x, y = torch.randn(16, 20).double(), torch.arange(16) % 10
    found = ebm.Learner(net, contenders.sweeps(4, 3)).gradients(lambda: F.cross_entropy(net(x), y))
    by_hand.equilibrium_propagation(net, x, y, 4, 3)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_operations_of_a_step_are_counted_by_layer():
    """An Euler step of a layer has two products, the activation and its slope; the count does not know that."""
    layer, besides = asked.per_step_and_layer(contenders.euler, 1)
    assert sum(layer[name] for name in ("addmm", "mm")) / 24 == 2
    assert layer["relu"] / 24 == layer["threshold_backward"] / 24 == 1
    assert besides >= 4  # the loss and its slope, one each of two operations


@pytest.mark.parametrize(
    ("rule", "most"),
    [("PC, Euler steps", 8), ("error-pc", 8), ("predictive-coding, to a tolerance", 13), ("EP, sweeps", 4)],
)
def test_a_step_of_a_layer_takes_no_more_operations_than_its_formula_needs(rule, most):
    """What the least is beside: the sizes of error and force, and for a sweep the sum of what comes from two sides."""
    make, phases, least = asked.RULES[rule]
    layer, _ = asked.per_step_and_layer(make, phases)
    assert least <= layer.total() / 24 / phases <= most
    assert sum(layer[name] for name in ("addmm", "mm")) / 24 / phases == 2


def test_products_of_a_step_are_two_operations_a_multiplication_and_an_exact_rule_has_those_of_backprop():
    contest = timing.Contest(networks.chain(8, 20, 30, 40, 10, steps=2))
    contest.add("zero-divergence", "zero-divergence")
    for _ in range(3):
        contest.steps["zero-divergence"]()
    forward = 2 * 8 * (20 * 30 + 30 * 40 + 40 * 10)
    expected = 3 * forward - 2 * 8 * 20 * 30  # nobody asks for the slope in the input
    assert {name: roofline.products(step) for name, step in contest.steps.items()} == {
        "backprop": expected,
        "zero-divergence": expected,
    }


@pytest.mark.slow
def test_the_table_that_the_page_opens_with_has_trained_beside_fresh_and_what_is_refused(monkeypatch):
    monkeypatch.setattr(steps, "NETS", {"small": networks.chain(8, 784, 8, 8, 10, steps=2)})
    monkeypatch.setattr(steps, "COLUMNS", [(activation, n) for activation in (nn.Tanh, nn.ReLU) for n in (0, 2)])
    counts = []
    monkeypatch.setattr(steps, "threads", lambda count: contextlib.nullcontext(counts.append(count)))
    text = list(steps.steps(page.Settings(1, False, [])))
    rows = {cells[2].strip(): cells[3:-1] for cells in (line.split("|") for line in text[2:]) if len(cells) == 12}
    assert list(rows) == ["backprop", *contenders.rows(networks.chain(8, 784, 8, 8, 10, steps=2))]
    assert all(cell.endswith(" ms ") for cell in rows["backprop"])
    assert all(float(cell) > 0 for cell in rows["zero-divergence"])
    assert counts == [1] * 5 + [2] * 4  # the first is the machine's own rate
    shares = [line.split("|")[1:-1] for line in text if line.count("%") == 1 and line.startswith("| ")]
    assert {"backprop", "zero-divergence"} <= {name.strip() for name, _ in shares} <= set(rows)
    assert all(0 <= int(share.strip(" %")) <= 110 for name, share in shares)


def test_momentum_finds_the_equilibrium_it_is_compared_at():
    torch.manual_seed(0)
    net = SMALL.make().double()
    x, y = SMALL.batch()
    closure = lambda: F.cross_entropy(net(x.double()), y)  # noqa: E731
    heavy = contenders.HeavyBall(0.8, 0.2, 1e-9)
    found = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=heavy)).gradients(closure)
    expected = ebm.Learner(net, contenders.settled(1e-9)).gradients(closure)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("net", networks.NETS.values(), ids=networks.NETS)
def test_every_row_takes_a_step_on_every_network(net):
    """Of the smallest batch; each from the same weights, and none leaves them where they were."""
    contest = timing.Contest(networks.Net(net.make, (1, *net.shape[1:]), 2, net.lr))
    for name, (algorithm, options) in contenders.rows(net).items():
        contest.add(name, algorithm, **options)
    assert list(contest.medians(1)) == ["backprop", *contest.learners]
    for learner in contest.learners.values():
        ended = [p.detach() for p in learner.module.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(ended, contest.module.parameters(), strict=True))


def test_a_library_that_is_not_installed_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr(other_libraries, "NETS", dict.fromkeys(list(networks.NETS)[:2], SMALL))
    monkeypatch.setattr(peers, "PEERS", ("no_such_library",))
    monkeypatch.setattr(other_libraries, "threads", contextlib.nullcontext)
    text = "\n".join(other_libraries.other_libraries(page.Settings(1, False, [sys.executable])))
    assert "Not installed here, and so not measured: no_such_library." in text
    assert text.count("| this library |") == text.count("| torch by hand |") == 4


def test_a_peer_is_timed_where_it_runs(tmp_path, monkeypatch):
    """A stand-in that says how many milliseconds it took: what it says is what is measured."""
    (tmp_path / "peer_fake.py").write_text(
        "import json, sys\n"
        "steps = ['backprop', 'PC, 20 Euler steps']\n"
        "print(json.dumps({'versions': ' '.join(sys.argv[1:]), 'steps': steps, 'compares': False}), flush=True)\n"
        "for line in sys.stdin: print(len(line.strip()), flush=True)\n"
    )
    (tmp_path / "fake.py").write_text("")
    (tmp_path / "optax.py").write_text("")
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "peers.py"))
    monkeypatch.setattr(peers, "PEERS", ("fake",))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with peers.peers(SMALL, [sys.executable]) as (found, absent):
        assert not absent
        assert found["fake"].versions == "20-12-12-12-10 16 20 1"
        assert timing.medians(found["fake"].steps, 3) == {"backprop": 8.0, "PC, 20 Euler steps": 18.0}
    assert found["fake"]._process.returncode == 0


def test_parts_of_the_page_are_replaced_one_by_one(tmp_path, monkeypatch):
    texts = {"a": "red", "b": "green", "c": "blue"}
    parts = {name: lambda given, name=name: iter([f"## {name}\n\n{texts[name]}"]) for name in texts}
    monkeypatch.setattr(run, "SECTIONS", parts)
    page = tmp_path / "page.md"
    run.main(["--only", "a", "b", "--page", str(page)])
    texts["b"] = "yellow"
    run.main(["--only", "b", "c", "--page", str(page)])
    text = page.read_text()
    assert [word in text for word in ("red", "green", "yellow", "blue")] == [True, False, True, True]
    assert text.index("## a") < text.index("## b") < text.index("## c")
    assert text.count("# Benchmarks\n") == 1


def test_the_columns_that_count_passes_count_them():
    plain = automatic.needed(SMALL, 1.0, 0.1, ebm.ErrorCoordinates(tol=1e-3))
    contest = timing.Contest(SMALL)
    calls = types.SimpleNamespace(count=0)

    class Counting(Around):
        def answer(self, *given):
            calls.count += 1
            return super().answer(*given)

    contest.add("counted", contenders.settled(1e-3, 0.1))
    contest.learners["counted"].observer = Counting
    contest.steps["counted"]()
    assert plain == (calls.count, "converged")
    assert automatic.shown((12, "kink")) == (False, 12, "12*")
    assert automatic.shown((100, "max_steps"))[2] == "-"


def test_everybody_takes_one_turn_in_each_round_and_follows_others():
    turns = []
    steps = {name: lambda name=name: turns.append(name) or 1.0 for name in "abcd"}
    assert timing.medians(steps, 20) == dict.fromkeys("abcd", 1.0)
    rounds = [turns[k : k + 4] for k in range(0, len(turns), 4)]
    assert len(rounds) == 20 + timing.WARM_UP
    assert all(sorted(one) == list("abcd") for one in rounds)
    before = {one[one.index("b") - 1] for one in rounds if one[0] != "b"}
    assert before == {"a", "c", "d"}
