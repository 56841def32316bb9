"""Updates that the library does not ship, as the page on them builds them, against explicit formulas."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_ebm as ebm

PAGE = Path(__file__).parents[1] / "docs" / "own-update.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)

X = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def written(name):
    """A class as a reader of the page would copy it, into a file of its own."""
    block = next(block for block in BLOCKS if f"class {name}(" in block)
    space = {}
    preamble = "import torch\nfrom torch import nn\nimport lightning_ebm as ebm\n" if "import" not in block else ""
    exec(compile(preamble + block, name, "exec"), space)
    return space[name], block


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def squared(module):
    return lambda: 0.5 * (module(X) - Y).square().sum(1).mean()


def outer(error, activity):
    """<error, activity> of a layer's weight and bias, averaged over the samples."""
    return error.T @ activity / len(activity), error.mean(0)


def by_name(layers):
    names = ("0", "2", "4")
    return {
        f"{name}.{kind}": value
        for name, pair in zip(names, layers, strict=True)
        for kind, value in zip(("weight", "bias"), pair, strict=True)
    }


def off(found, true):
    return ebm.metrics.alignment(found, true)["relative_error"]


@pytest.mark.parametrize("name", ["ForwardUpdate", "DifferenceTargets"])
def test_each_is_one_file_of_at_most_forty_lines(name):
    assert len(written(name)[1].strip().splitlines()) <= 40


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_forward_updates_are_relaxed_errors_times_activities_of_the_forward_pass(strength, capture):
    module = net()
    first, _, second, _, last = module
    with torch.no_grad():
        h1 = torch.tanh(first(X))
        h2 = torch.tanh(second(h1))
        output = last(h2)
        x1, x2 = h1.clone(), h2.clone()
        for _ in range(4000):  # dE/dx of 1/2 |x1 - mu1|^2 + 1/2 |x2 - mu2(x1)|^2 + strength 1/2 |W3 x2 + b3 - y|^2
            mu2 = torch.tanh(second(x1))
            e1, e2 = x1 - h1, x2 - mu2
            slope2 = e2 + strength * (last(x2) - Y) @ last.weight
            slope1 = e1 - (e2 * (1 - mu2**2)) @ second.weight
            x1, x2 = x1 - 0.2 * slope1, x2 - 0.2 * slope2
        assert max(slope1.abs().max(), slope2.abs().max()) < 1e-13
        expected = by_name(
            [
                outer(-e1 * (1 - h1**2) / strength, X),
                outer(-e2 * (1 - h2**2) / strength, h1),
                outer(output - Y, h2),
            ]
        )
    rule = written("ForwardUpdate")[0]()
    algorithm = ebm.Algorithm(nudge=ebm.OneSided(strength), relaxer=ebm.FixedPoint(200, tol=1e-14), update=rule)
    learner = ebm.Learner(module, algorithm, capture=capture)
    for _ in range(3):  # recorded, examined, and as code
        assert off(learner.gradients(squared(module)), expected) < 1e-10


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("step", [1.0, 0.1])
def test_difference_target_propagation_is_the_formula(step, capture):
    module = net()
    first, _, second, _, last = module
    rule = written("DifferenceTargets")[0](step)
    learner = ebm.Learner(module, ebm.Algorithm(update=rule), capture=capture)
    for _ in range(3):
        found = learner.gradients(squared(module))
    with torch.no_grad():
        v = rule.inverses[0]
        h1 = torch.tanh(first(X))
        h2 = torch.tanh(second(h1))
        output = last(h2)
        target2 = h2 - step * (output - Y) @ last.weight
        target1 = h1 + torch.tanh(target2 @ v) - torch.tanh(h2 @ v)
        expected = by_name(
            [
                outer(-(target1 - h1) * (1 - h1**2) / step, X),
                outer(-(target2 - h2) * (1 - h2**2) / step, h1),
                outer(output - Y, h2),
            ]
        )
    assert off(found, expected) < 1e-13


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_by_sum_scales_target_propagation_as_it_scales_backprop(reduction):
    module, rule = net(), written("DifferenceTargets")[0](0.3)
    scale = 1 if reduction == "mean" else len(X)
    mean = ebm.Learner(module, ebm.Algorithm(update=rule)).gradients(squared(module))
    learner = ebm.Learner(module, ebm.Algorithm(update=rule), loss_reduction=reduction)
    found = learner.gradients(lambda: scale * squared(module)())
    assert off({name: g / scale for name, g in found.items()}, mean) < 1e-13


def test_forward_updates_pass_the_checks_and_tend_to_backprop():
    rule = written("ForwardUpdate")[0]()
    algorithm = ebm.Algorithm(nudge=ebm.Centered(0.1), update=rule)
    assert ebm.testing.check_algorithm(algorithm)["cosine"] > 0.99
    slopes = ebm.testing.check_limit(algorithm)
    assert slopes["1"] == pytest.approx(2, abs=0.1)
    assert slopes["readout"] == float("inf")  # at the forward pass


def test_target_propagation_passes_the_checks_and_has_no_limit():
    rule = written("DifferenceTargets")[0]()
    assert ebm.testing.check_algorithm(ebm.Algorithm(update=rule))["cosine"] > 0
    with pytest.raises(AssertionError, match="layer '1'"):
        ebm.testing.check_limit(ebm.Algorithm(update=rule))


def test_an_update_that_reads_what_is_not_local_is_caught():
    class Backward(ebm.Update):
        """Backprop's gradient, in terms."""

        def phases(self, nudge):
            return ()

        def read(self, network, ends):
            loss = network._run(lambda key, prediction: None).loss  # no state is cut
            return [ebm.updates.Term(loss, network.loss_scale * torch.ones_like(loss))]

    module = net()
    algorithm = ebm.Algorithm(update=Backward())
    found = ebm.Learner(module, algorithm).gradients(squared(module))
    assert off(found, ebm.reference.backprop(module, squared(module))) < 1e-12
    with pytest.raises(AssertionError, match="not present at its own layer"):
        ebm.testing.check_algorithm(algorithm)


EXACT = "zero-divergence", "fixed-prediction", "infinitesimal", "recurrent-backprop"


class Mine(ebm.Update):
    def read(self, network, ends):
        return network.terms_of(ends)


class ByResidual(ebm.Update):
    """Weighs each sample's share by what was left of its force: a number that is another at every step."""

    def read(self, network, ends):
        factor = sum(1 + float(end.found.residual.sum()) for end in ends)
        return [ebm.updates.Term(term.output, factor * term.seed) for term in network.terms_of(ends)]


class AtEquilibrium(ebm.Update):
    """The loss at the free equilibrium, asked for when it is read."""

    def read(self, network, ends):
        return network.loss_terms(network.at_states(network.equilibrium), 1.0) + network.terms_of(ends)


@pytest.mark.parametrize("rule", [ByResidual(), AtEquilibrium()], ids=repr)
@pytest.mark.parametrize("energy", [ebm.PredictiveCoding(), ebm.Hopfield()], ids=repr)
def test_what_differs_from_step_to_step_is_not_kept_in_code(rule, energy):
    """Parameters move between batches; run as code or not, the update is the same."""
    found = []
    for capture in (True, False):
        module = net()
        algorithm = ebm.Algorithm(energy, ebm.OneSided(0.5), ebm.FixedPoint(6), update=rule)
        learner = ebm.Learner(module, algorithm, capture=capture)
        for step in range(4):
            gradients = learner.gradients(squared(module))
            with torch.no_grad():
                for k, p in enumerate(module.parameters()):
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k)).double()
        found.append(gradients)
    assert off(*found) < 1e-12


def test_an_update_of_ones_own_is_called_by_its_name():
    algorithm = ebm.Algorithm(update=Mine())
    assert algorithm.describe()["update"] == "Mine"
    assert repr(algorithm.rule) == "Mine()"
    module = net()
    learner = ebm.Learner(module, algorithm)
    same = ebm.Learner(module, ebm.Algorithm(update="contrast")).gradients(squared(module))
    assert off(learner.gradients(squared(module)), same) < 1e-12
    assert learner.report["algorithm"]["update"] == "Mine"


def test_a_relaxer_may_bring_its_update():
    rule = Mine()

    class Eager(ebm.GradientDescent):
        update = rule

    assert ebm.Algorithm(relaxer=Eager()).rule is rule
    with pytest.raises(
        ebm.ConfigurationError, match=r"'contrast' does not fit Eager, whose result is to be read as 'Mine'"
    ):
        ebm.Algorithm(relaxer=Eager(), update="contrast")
    with pytest.raises(ebm.ConfigurationError, match=r"Mine.*Sweep"):
        ebm.Algorithm(relaxer=ebm.Sweep(), update=rule)
    with pytest.raises(ebm.ConfigurationError, match="'Mine'"):
        ebm.Algorithm(ebm.PredictiveCoding(), ebm.Infinitesimal(), ebm.FixedPoint(10), update=rule)
    with pytest.raises(ebm.ConfigurationError, match="holds the output"):
        ebm.Algorithm(ebm.Hopfield(), ebm.Clamped(), ebm.FixedPoint(10), update=rule)


@pytest.mark.parametrize("wrong", [Mine, "contrastive", None, 3])
def test_what_is_no_update_is_refused(wrong):
    with pytest.raises(ebm.ConfigurationError, match=r"ebm\.Update, or one of contrast, cross-derivative"):
        ebm.Algorithm(update=wrong)


@pytest.mark.parametrize("name", ebm.updates.updates())
def test_a_shipped_update_is_the_same_by_name_and_as_an_object(name):
    corrected = ebm.Feedback(ebm.FixedPoint(50), corrected=True)
    preset = {
        "contrast": "pc-nudge", "cross-derivative": "infinitesimal", "first-arrival": "zero-divergence",
        "fixed-prediction": "fixed-prediction", "multipliers": "augmented-lagrangian-pc", "dyadic": "dual-propagation",
        "incremental": "incremental-pc", "continual": "incremental-pc", "backprop": "backprop",
        "displacement": ebm.Algorithm(ebm.Hopfield(), ebm.Centered(0.1), corrected),
    }[name]  # fmt: skip
    module = net()
    kind = type(ebm.updates.named(name))
    given = [ebm.algorithm(preset, update=update) for update in (name, kind())]
    found = [ebm.Learner(module, algorithm).gradients(squared(module)) for algorithm in given]
    assert off(*found) == 0


@pytest.mark.parametrize(
    ("given", "order"),
    [
        (ebm.PredictiveCoding(), 1),
        (ebm.PredictiveCoding({"1": 3.0, "3": 0.5}), 1),
        (ebm.FenchelYoung(), 1),
        (ebm.Hopfield(), 1),
        (ebm.algorithm("equilibrium-propagation"), 2),
        (ebm.algorithm("equilibrium-propagation-one-sided"), 1),
        (ebm.algorithm("holomorphic-ep"), 4),
        (ebm.algorithm("pc-nudge", nudge=ebm.Centered(1e-3)), 2),
        (ebm.algorithm("predictive-coding"), 1),
        (ebm.algorithm("dual-propagation"), 2),
    ],
    ids=str,
)
def test_the_error_falls_as_the_theorem_says(given, order):
    slopes = ebm.testing.check_limit(given)
    hidden = [slope for layer, slope in slopes.items() if layer != "readout"]
    assert len(hidden) == 2
    assert hidden == pytest.approx([order] * 2, abs=0.15)
    assert slopes["readout"] > order - 0.2


@pytest.mark.parametrize(
    "name", ["zero-divergence", "fixed-prediction", "infinitesimal", "recurrent-backprop", "backprop"]
)
def test_exact_updates_have_no_error_to_fall(name):
    assert set(ebm.testing.check_limit(name).values()) == {float("inf")}


@pytest.mark.parametrize("name", ["coupled-learning", "contrastive-hebbian"])
def test_what_descends_another_cost_has_no_such_limit(name):
    with pytest.raises(AssertionError, match="falls with a slope"):
        ebm.testing.check_limit(name)


class LogCosh(ebm.Energy):
    """A user's own: a divergence without a best response."""

    divergence = True

    def layer_energy(self, state, layer):
        error = state - layer.prediction
        return error + nn.functional.softplus(-2 * error) - torch.log(torch.tensor(2.0))


class Leaning(ebm.Energy):
    """Says that its free equilibrium is the forward pass, where it has a force."""

    divergence = True

    def layer_energy(self, state, layer):
        return 0.5 * (state - layer.prediction).square() + 0.1 * state.square()


class Softer(ebm.Hopfield):
    """A best response of another energy than its own."""

    def layer_energy(self, state, layer):
        return super().layer_energy(state, layer) + 0.2 * state.square()

    def best_response(self, pull, layer):
        return super().best_response(pull, layer)


@pytest.mark.parametrize("nudge", [ebm.OneSided(1.0), ebm.Centered(1.0)], ids=str)
def test_a_users_energy_has_the_slopes_of_the_theorem(nudge):
    slopes = ebm.testing.check_limit(ebm.Algorithm(LogCosh(), nudge, ebm.GradientDescent(0.5, 100, tol=1e-3)))
    order = len([phase for phase in nudge.phases() if phase.strength])
    assert [slopes["1"], slopes["3"]] == pytest.approx([order] * 2, abs=0.15)
    if order == 1:
        assert slopes == pytest.approx(ebm.testing.check_limit(LogCosh()), abs=1e-3)


@pytest.mark.parametrize(
    ("energy", "message"),
    [(Leaning(), r"falls with a slope of .* promise is false"), (Softer(), r"Softer\.best_response of layer '1'")],
    ids=["divergence", "best response"],
)
def test_a_false_promise_is_found_out(energy, message):
    with pytest.raises(AssertionError, match=message):
        ebm.testing.check_limit(energy)
