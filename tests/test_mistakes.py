"""Typical mistakes. Each is answered by one error, or one line of the command, that says the cause and the remedy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from lightning_modules import Template
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm_cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {
    "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip((4, *widths), (*widths, 3), strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1])


def step(loss: Callable[[nn.Module], Any], algorithm: Any = "predictive-coding", module: Any = None, **options: Any):
    module = net(8) if module is None else module
    ebm.Learner(module, algorithm, **options).backward(lambda: loss(module))


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).argmax(1)


def strategy_and_learner() -> None:
    class Both(Template):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.learner = ebm.Learner(self.net)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.learner.step(lambda: F.cross_entropy(self.net(batch[0]), batch[1]), self.optimizers())

    L.Trainer(strategy=ebm.EBMStrategy(), **QUIET).fit(Both())


def nested() -> nn.Sequential:
    return nn.Sequential(net(8))  # its modules are 0, and 0.0 to 0.2


def inferred(module: nn.Module, **options: Any) -> None:
    ebm.Learner(module).relax(lambda: module(X), **options)


class Once:
    """A loss that is there for one run only."""

    there = True

    def __call__(self, module: nn.Module) -> torch.Tensor:
        if not self.there:
            raise KeyError("taken")
        self.there = False
        return usual(module)


def usual(module: nn.Module) -> torch.Tensor:
    return F.cross_entropy(module(X), Y)


def squared(module: nn.Module) -> torch.Tensor:
    return 0.5 * (module(X) - 1).square().sum(1).mean()


def too_high_a_learning_rate() -> None:
    module = net(8, 8)
    learner, optimizer = ebm.Learner(module, "pc-nudge"), torch.optim.SGD(module.parameters(), lr=1e3)
    for _ in range(30):
        optimizer.zero_grad()
        learner.backward(lambda: squared(module))
        optimizer.step()


def too_high_for_equilibria() -> None:
    module = net(8, 8)
    learner, optimizer = (
        ebm.Learner(module, "equilibrium-propagation"), torch.optim.SGD(module.parameters(), lr=1e4),
    )  # fmt: skip
    for _ in range(30):
        learner.step(lambda: squared(module), optimizer)


def backward_in_the_closure(module: nn.Module) -> torch.Tensor:
    loss = usual(module)
    loss.backward()
    return loss


def fit(strategy: Any, callbacks: Any = (), **options: Any) -> None:
    L.Trainer(strategy=strategy, callbacks=list(callbacks), **(QUIET | options)).fit(Template())


class OwnForwardOnly(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(8)


@dataclass(frozen=True)
class Mistake:
    """What somebody does, and what the answer must say: the cause, and what to do."""

    what: str
    do: Callable[[], Any]
    cause: str
    remedy: str


EULER = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=3.0, max_steps=10))
NEGATIVE = ebm.algorithm("pc-nudge", nudge=ebm.OneSided(-5.0), relaxer=ebm.ErrorCoordinates(200, tol=1e-6))

MISTAKES = [
    Mistake("a preset is misspelt", lambda: ebm.EBMStrategy("pc-nugde"), "no algorithm 'pc-nugde'", "mean 'pc-nudge'"),
    Mistake("a part is misspelt", lambda: ebm.algorithm("pc-nudge", relaxor=ebm.Sweep()), "relaxor", "relaxer"),
    Mistake("the nudge is zero", lambda: ebm.OneSided(0.0), "divides by the nudge", "0"),
    Mistake("the closure returns nothing", lambda: step(lambda m: None), "None", "return loss"),
    Mistake("the loss is a Python number", lambda: step(lambda m: float(usual(m))), "float", "tensor"),
    Mistake(
        "the loss is not reduced",
        lambda: step(lambda m: F.cross_entropy(m(X), Y, reduction="none")), "shape (5,)", "mean",
    ),
    Mistake("the loss is detached", lambda: step(lambda m: usual(m).detach()), "does not depend", "detach"),
    Mistake("the loss is nan", lambda: step(lambda m: usual(m) * math.nan), "nan", "learning rate"),
    Mistake("the closure calls another", lambda: step(lambda m: usual(net(8))), "was called", "inside the closure"),
    Mistake("the closure calls backward", lambda: step(backward_in_the_closure), "backward()", "learner.backward once"),
    Mistake("a network without hidden layers", lambda: step(usual, module=net()), "carry a state", 'output="state"'),
    Mistake("a layer is misspelt", lambda: step(usual, layers=["O"]), "no module 'O'", "Nearest: ['0'"),
    Mistake("a layer's name is not in a list", lambda: step(usual, layers="1"), "'1'", "layers=['1']"),
    Mistake("the states' step is too large", lambda: step(squared, EULER), "diverged", "learning rate of the states"),
    Mistake(
        "the learning rate of the weights explodes", too_high_a_learning_rate, "weights",
        "lower the learning rate of the parameters",
    ),
    Mistake(
        "the same of equilibrium propagation", too_high_for_equilibria, "finds no equilibrium",
        "lower the learning rate of the parameters",
    ),
    Mistake(
        "the states' step is absurd",
        lambda: step(squared, ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(1e30, 10))),
        "outgrew what numbers hold", "learning rate of the states",
    ),
    Mistake("a negative nudge is too strong", lambda: step(squared, NEGATIVE), "no minimum", "smaller nudge"),
    Mistake("the reduction is misspelt", lambda: step(usual, loss_reduction="average"), "average", "mean"),
    Mistake("the report is read too early", lambda: ebm.Learner(net(8)).report, "no report", "backward()"),
    Mistake("many devices by a strategy for one", lambda: fit("ebm", devices=2), "one device", "ebm_ddp"),
    Mistake(
        "alignment of a stock run", lambda: fit("auto", [ebm.GradientAlignment()]), "only the latter", "EBMStrategy",
    ),
    Mistake("a monitor of a stock run", lambda: fit("auto", [ebm.RelaxationMonitor()]), "none do", "EBMStrategy"),
    Mistake("every zeroth step", lambda: ebm.GradientAlignment(every_n_steps=0), "every_n_steps=0", "at least 1"),
    Mistake(
        "the table of a module without forward", lambda: ebm.summary(OwnForwardOnly(), X), "no forward", "module.net",
    ),
    Mistake(
        "states by LBFGS", lambda: ebm.StateOptimizer(torch.optim.LBFGS, max_steps=3), "closure", "torch.optim",
    ),
    Mistake("a preset by its initials", lambda: ebm.algorithm("ep"), "no algorithm 'ep'", "'equilibrium-propagation'?"),
    Mistake("a preset in other letters", lambda: ebm.algorithm("PC_Nudge"), "'PC_Nudge'", "mean 'pc-nudge'"),
    Mistake(
        "a setting of the relaxer is given to the algorithm", lambda: ebm.algorithm("pc-nudge", max_steps=20),
        "no part 'max_steps'", "relaxer=ebm.ErrorCoordinates(max_steps=...)",
    ),
    Mistake(
        "the nudge by its letter", lambda: ebm.algorithm("equilibrium-propagation", beta=0.5), "no part 'beta'",
        "nudge=ebm.Centered(strength=...)",
    ),
    Mistake("the nudge is a number", lambda: ebm.algorithm("pc-nudge", nudge=0.1), "not float", "ebm.OneSided(...)"),
    Mistake(
        "a part is a class", lambda: ebm.algorithm("pc-nudge", relaxer=ebm.GradientDescent), "the class",
        "an instance of ebm.Relaxer",
    ),
    Mistake("a number is text", lambda: ebm.OneSided("1e-3"), "not text", "Write 1.0e-3"),
    Mistake("no steps at all", lambda: ebm.GradientDescent(0.1, max_steps=0), "max_steps=0", "at least 1."),
    Mistake(
        "the loss in place of the closure", lambda: ebm.Learner(net(8)).backward(usual(net(8))), "closure is Tensor",
        "lambda: loss_function(module(x), y)",
    ),
    Mistake(
        "the loss in place of the closure, for states", lambda: ebm.Learner(net(8)).relax(usual(net(8))),
        "closure is Tensor", "lambda:",
    ),
    Mistake(
        "an optimizer by its class", lambda: ebm.Learner(net(8)).step(lambda: None, torch.optim.SGD),
        "the class SGD", "torch.optim.Adam(net.parameters()",
    ),
    Mistake("net and algorithm in the other order", lambda: ebm.Learner("pc-nudge", net(8)), "'pc-nudge'", "nn.Module"),
    Mistake("the table without an input", lambda: ebm.summary(net(8)), "missing a required", "ebm.summary(net, x)"),
    Mistake("layers by their numbers", lambda: step(usual, layers=[1]), "layers=[1]", "a list of names"),
    Mistake("compile is a word", lambda: ebm.EBMStrategy("pc-nudge", compile="yes"), "compile='yes'", "True or False"),
    Mistake(
        "data that are not finite", lambda: step(lambda m: F.cross_entropy(m(X * math.nan), Y)), "not finite",
        "Clean the data",
    ),
    Mistake(
        "a batch of no samples", lambda: step(lambda m: F.cross_entropy(m(X[:0]), Y[:0])), "no sample", "Leave it out",
    ),
    Mistake(
        "no target that counts", lambda: step(lambda m: F.cross_entropy(m(X), Y * 0 - 100)), "a mean over nothing",
        "ignore_index",
    ),
    Mistake(
        "a table of what returns classes", lambda: ebm.summary(Deciding(), X), "nothing that can be differentiated",
        "argmax",
    ),
    Mistake(
        "everything is frozen", lambda: step(usual, module=net(8).requires_grad_(False)), "all are frozen",
        "requires_grad_(True)",
    ),
    Mistake("layers of an inner module", lambda: step(usual, module=nested(), layers=["1"]), "'1'", "['0.1']"),
    Mistake("layers of an outer module", lambda: step(usual, layers=["net.1"]), "'net.1'", "Nearest: ['1']"),
    Mistake(
        "states held by an inner name",
        lambda: inferred(nested(), clamp={"1": torch.zeros(8)}), "'1'", "0.1",
    ),
    Mistake(
        "a learner within the closure of another", lambda: step(lambda m: (step(usual), usual(m))[1]),
        "another learner's", "one after the other",
    ),
    Mistake("a learner within a strategy's step", strategy_and_learner, "is recorded", "self.manual_backward(loss)"),
    Mistake(
        "draws of Dirichlet with a slope",
        lambda: step(lambda m: torch.distributions.Dirichlet(m(X).exp()).rsample().square().mean()), "_Dirichlet",
        "Kumaraswamy",
    ),
    Mistake(
        "a second run that fails", lambda: step(Once(), "equilibrium-propagation", net(8, 8)), "KeyError: 'taken'",
        "that the first run has changed",
    ),
    Mistake(
        "an option of DDP is misspelt", lambda: ebm.EBMDDPStrategy(find_unused_paramters=True),
        "no option 'find_unused_paramters'", "mean 'find_unused_parameters'",
    ),
    Mistake("DDP's option is text", lambda: ebm.EBMDDPStrategy(find_unused_parameters="no"), "'no'", "True or False"),
    Mistake("a way to start that is none", lambda: ebm.EBMDDPStrategy(start_method="forked"), "'forked'", '"fork"'),
    Mistake(
        "gradients of two modules are compared",
        lambda: ebm.metrics.alignment({"net.0.weight": X}, {"0.weight": X}), "no name is of both", "Take both of one",
    ),
    Mistake(
        "the optimizer of another module",
        lambda: ebm.Learner(net(8)).step(lambda: None, torch.optim.SGD(net(8).parameters(), 0.1)),
        "not one of the parameters", "torch.optim.Adam(module.parameters())",
    ),
    Mistake("an energy by its name", lambda: ebm.Algorithm(energy="pc"), "'pc'", "ebm.Energy"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_is_answered_with_cause_and_remedy(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ebm.EBMError) as caught:
        mistake.do()
    assert mistake.cause in str(caught.value), str(caught.value)
    assert mistake.remedy in str(caught.value), str(caught.value)


COMMANDS = {
    "recipes run digitz": ("no recipe 'digitz'", "mean 'digits'"),
    "recipes rum digits": ("no command 'rum'", "mean 'run'"),
    "fit": ("needs settings", "--config FILE"),
    "fit --config nothing.yaml": ("does not exist", "nothing.yaml"),
    "recipes run digits --algorithm pc": ("no algorithm 'pc'", "pc-nudge"),
    "recipes run digits --relaxer Gradient --wandb off": ("no such class", "GradientDescent"),
    "recipes run digits --trainer.strategy ddp --wandb off": ("would not use --algorithm", "ebm_ddp"),
    "recipes run digits --relaxer.max_steps 5": ("no class is named", "--relaxer CLASS --relaxer.max_steps 5"),
    "recipes run digits --nudge 0.1": ("expected the name of a class", "--nudge Centered --nudge."),
    "recipes run digits --trainer.max_epochs five": ("trainer.max_epochs=five", "expected a whole number or null"),
    "recipes run digits --relaxer GradientDescent --relaxer.lr high": ("lr=high", "expected a number."),
    "recipes run digits --layers net.1": ("layers=net.1: expected a list", 'layers="[net.1]"'),
    "recipes run digits --trainer.precision fp16": ("trainer.precision=fp16: expected", "16-mixed"),
    "recipes run digits --trainer.devices 0 --wandb off": ("devices='0'", "not a valid input"),
    "recipes run digits --model.net.widths [32,10] --wandb off": ("inputs of shape (64, 1, 8, 8)", "under --model.net"),
    "recipes run digits --model.net.widths [64,5] --wandb off": ("outputs of shape (64, 5)", "--model.classes"),
    "recipes run digits --model.net.widths [64,5] --model.classes 5 --wandb off": ("have 10 classes", "10 outputs"),
    "recipes run shakespeare-backprop --data.dir . --model.net.vocabulary 5 --wandb off": ("(64, 64)", "--model.net"),
    "fit --algorithm pc-nudge": ("needs --model", "--config FILE"),
    "report a_file": ("a_file is a file", "the directory of a run"),
    "report nowhere": ("no directory nowhere", "nowhere"),
    "report .": ("holds no run", "lightning_logs/version_0"),
    "sweep digit": ("no sweep file 'digit'", "digits-relaxer"),
    "leaderboard mine": ("no leaderboard file 'mine'", "digits"),
    "": ("COMMAND: missing", "lightning-ebm --help"),
    "recipes run": ("name: missing", "lightning-ebm recipes run --help"),
    "--versoin": ("no option --versoin", "mean '--version'"),
    "report runs/x --out y": ("no option --out", "lightning-ebm report --help"),
    "report runs/x --outptu y": ("no option --outptu", "mean '--output'"),
    "doctor all": ("no place for all", "lightning-ebm doctor --help"),
    "sweep digits-relaxer --count -1": ("--count=-1", "at least 1"),
    "sweep digits-relaxer --count 0": ("--count=0", "at least 1"),
    "leaderboard digits --no-train": ("no results of digits.yaml", "leave --no-train out"),
    "leaderboard digits --no-train --page a/page.md": ("no results of digits.yaml", "--root"),
    "fit --config nothing_in_it": ("no settings by name", "recipes show digits"),
    "fit --config list": ("no settings by name", "recipes show digits"),
    "fit --config binary": ("is no text", "YAML file"),
    "recipes run digits --wandb off --trainer.devices -3": ("could not be built", "int > 0"),
    "recipes run digits --trainer.callbacks Foo": ("callbacks=Foo: expected a list", "a class by its path"),
    "recipes run digits --model.optimizer.lr fast": ("lr=fast: expected a number", "a class by its path"),
    "recipes run digits --relaxer Feedback": ("needs a value for relaxer", "--relaxer.relaxer VALUE"),
    "recipes run digits --relaxer lightning_ebm.reference.Settled": ("Settled is internal", "GradientDescent"),
    "recipes run digits --relaxer lightning_ebm.relaxers.wrapper.Wrapper": ("Wrapper is internal", "GradientDescent"),
    "recipes run digits --model os.system": ("model=os.system", "a class of the kind LightningModule"),
    "recipes run digits --relaxer lightning_ebm.Relaxer": ("this one is abstract", "to be subclassed"),
    "recipes run digits --trainer.logger 5x": ("logger=5x: expected true or false", "a class by its path"),
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_mistaken_command_is_answered_in_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "a_file": b"",
        "nothing_in_it": b"",
        "list": b"- 1\n- 2\n",
        "binary": bytes(range(256)),
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "input.txt").write_text("to be or not to be " * 2000)
    try:
        status = main(words.split())
    except SystemExit as ended:
        status = ended.code
    assert status in (1, 2)
    said = capsys.readouterr().err.splitlines()[-1]
    cause, remedy = COMMANDS[words]
    assert said.startswith("error: ")
    assert cause.lower() in said.lower()
    assert remedy in said


def test_there_are_at_least_twenty():
    assert len(MISTAKES) + len(COMMANDS) >= 20


@pytest.mark.parametrize("layers", [nn.Tanh(), [nn.Tanh()]])
def test_a_module_is_not_a_layer_by_name_or_type(layers):
    with pytest.raises(ebm.ConfigurationError, match=r"not a module itself: .*layers=nn\.Tanh"):
        ebm.Learner(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), layers=layers)


def test_nothing_is_compiled_without_code():
    with pytest.raises(ebm.ConfigurationError, match="capture"):
        ebm.Learner(nn.Linear(2, 2), compile=True, capture=False)


def test_alignment_of_what_is_no_gradient():
    found = {"w": torch.ones(3)}
    for wrong in (None, [torch.ones(3)], 3):
        with pytest.raises(ebm.ConfigurationError, match="estimate"):
            ebm.metrics.alignment(wrong, found)
        with pytest.raises(ebm.ConfigurationError, match="reference"):
            ebm.metrics.alignment(found, wrong)
    with pytest.raises(ebm.ConfigurationError, match="module=3"):
        ebm.reference.backprop(3, lambda: torch.ones(()))
