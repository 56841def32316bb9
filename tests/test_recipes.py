"""Recipes: what YAML and the command line say is what trains; loaders against bytes written by hand; sweeps by hand."""

import gzip
import itertools
import json
import logging
import pickle
import re
import struct
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml

import lightning_ebm as ebm
from lightning_ebm.recipes import arrays, data, mnist_1d, modules, nets, offered, options, sources, sweep, training

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import depth
import generative
import one_theory

RECIPES = Path(training.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore")
DIGITS = str(RECIPES / "configs" / "digits.yaml")
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, log = torch.get_num_threads(), logging.getLogger("lightning_ebm")
    level = log.level
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)


def run(*arguments):
    return training.main(
        ["fit", "--config", DIGITS, "--trainer.callbacks", "null", "--wandb", "off", *QUIET, *arguments]
    )


# The command line


def test_the_relaxer_may_be_left_to_the_first_batch(tmp_path):
    made = run("--trainer.fast_dev_run", "2", "--algorithm", "predictive-coding", "--relaxer", "auto")
    relaxer = made.trainer.strategy.algorithm.relaxer
    assert isinstance(relaxer, ebm.Cheapest)
    assert set(relaxer.chosen) == {"nudged"}
    file = tmp_path / "by-path.yaml"
    strategy = {"class_path": "lightning_ebm.EBMStrategy", "init_args": {"algorithm": {
        "class_path": "lightning_ebm.Algorithm", "init_args": {"relaxer": "auto"},
    }}}  # fmt: skip
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    line = ["fit", "--config", DIGITS, "--config", str(file), "--trainer.callbacks", "null", "--wandb", "off", *QUIET]
    assert yaml.safe_load(Path(DIGITS).read_text()).get("algorithm")
    made = training.main([*line, "--algorithm", "null", "--trainer.fast_dev_run", "2"])
    assert isinstance(made.trainer.strategy.algorithm.relaxer, ebm.Cheapest)


def test_a_recipe_trains_what_the_same_lines_of_python_train(tmp_path):
    made = run("--seed_everything", "3", "--trainer.max_epochs", "2", "--algorithm", "predictive-coding")
    L.seed_everything(3, verbose=False)
    module = modules.Classifier(nets.MLP((64, 128, 10)), optimizer=lambda p: torch.optim.Adam(p, lr=2e-3))
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy("predictive-coding"), max_epochs=2, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data.Digits(batch_size=64))
    for name, value in module.state_dict().items():
        assert torch.equal(value, made.model.state_dict()[name]), name
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert result["last"] == pytest.approx(float(trainer.callback_metrics["val/accuracy"]))
    assert result["best"] == max(result["values"])
    assert result["values"][result["best_epoch"] - 1] == result["best"]


PARTS = ["--algorithm", "pc-nudge", "--nudge", "Centered", "--nudge.strength", "0.1"]
RELAXER = ["--relaxer", "GradientDescent", "--relaxer.max_steps", "7"]


def test_parts_by_short_name_and_strategies_by_class_path_are_the_algorithm_they_name():
    wanted = ebm.algorithm("pc-nudge", nudge=ebm.Centered(0.1), relaxer=ebm.GradientDescent(max_steps=7))
    once = ["--trainer.fast_dev_run", "true"]
    assert run(*once, *PARTS, *RELAXER).trainer.strategy.algorithm == wanted
    written = {
        "class_path": "lightning_ebm.EBMStrategy",
        "init_args": {
            "algorithm": {
                "class_path": "lightning_ebm.Algorithm",
                "init_args": {
                    "energy": {"class_path": "lightning_ebm.PredictiveCoding"},
                    "nudge": {"class_path": "lightning_ebm.Centered", "init_args": {"strength": 0.1}},
                    "relaxer": {"class_path": "lightning_ebm.GradientDescent", "init_args": {"max_steps": 7}},
                },
            }
        },
    }
    Path("strategy.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": written}, "algorithm": None}))
    assert run("--config", "strategy.yaml", *once).trainer.strategy.algorithm == wanted


def test_a_part_named_by_class_path_alone_has_its_own_defaults():
    """Not those of `Algorithm`'s default part: a parser carries settings of that name over from a default instance."""
    parts = {"energy": "Hopfield", "nudge": "Centered", "relaxer": "FixedPoint"}
    init_args = {part: {"class_path": f"lightning_ebm.{name}"} for part, name in parts.items()}
    algorithm = {"class_path": "lightning_ebm.Algorithm", "init_args": init_args}
    strategy = {"class_path": "lightning_ebm.EBMStrategy", "init_args": {"algorithm": algorithm}}
    Path("strategy.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}, "algorithm": None}))
    made = run("--config", "strategy.yaml", "--trainer.fast_dev_run", "true", "--model.net.activation", "tanh")
    assert made.trainer.strategy.algorithm == ebm.Algorithm(ebm.Hopfield(), ebm.Centered(), ebm.FixedPoint())
    assert ebm.Algorithm() == ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(), ebm.ErrorCoordinates())


def test_without_an_algorithm_it_is_stock_lightning():
    assert not isinstance(
        run("--algorithm", "null", "--trainer.fast_dev_run", "true").trainer.strategy, ebm.EBMStrategy
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trainer.strategy", "ddp"], "would not use --algorithm"),
        (["--trainer.strategy", "ebm_pc_nudge"], "would not use --algorithm"),
        (["--algorithm", "null", "--nudge", "Centered"], "add --algorithm"),
        (["--algorithm", "pc-nugde"], "Did you mean 'pc-nudge'"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, said):
    with pytest.raises(ebm.ConfigurationError, match=re.escape(said)):
        run(*arguments)


MISSPELT = {
    "--relaxer GradientDecent": "Did you mean 'GradientDescent'?",
    "--nudge Centred": "Did you mean 'Centered'?",
    "--data MNIST1": "Did you mean 'MNIST1D'?",
    "--model.optimizer Adamm": "Did you mean 'Adam'?",
    "--relaxer GradientDescent --relaxer.max_step 3": "Did you mean 'max_steps'?",
    "--nudge Centered --nudge.strenght 3": "Did you mean 'strength'?",
    "--model.net.width 3": "Did you mean 'widths'?",
    "--data.dirr x": "no option 'dirr'",
    "--trainer.maxepochs 3": "Did you mean --trainer.max_epochs?",
    "--optimizer SGD": "Did you mean --model.optimizer?",
    "--model.net.activation rellu": "expected one of relu",
    "--model.optimizer.lr nan": "lr=nan: expected a number",
    "--algorithm.nudge OneSided": "--algorithm is one value, and has no setting 'nudge'. Write --nudge OneSided.",
    "stray": "'stray' stands alone",
    "--threads 0": "--threads=0: expected a whole number of at least 1",
    "--seed_everything -1": "--seed_everything=-1: expected a whole number of at least 0",
    "--data.batch_size 0": "Digits(batch_size=0): expected a whole number of at least 1",
    "--data.eval_batch_size -1": "Digits(eval_batch_size=-1)",
    "--data.num_workers -1": "Digits(num_workers=-1)",
    "--data.validation -5": "Digits(validation=-5)",
    "--data.limit 0": "Digits(limit=0)",
    "--data.std [0]": "Digits(std=0.0): expected a positive number",
    "--data.mean [0.1,0.2]": "Digits(mean=[0.1, 0.2]): expected one number, or one for each of the 1 channels",
    "--data.validation 99999": "expected fewer than the 1437 training samples",
    "--model.net.widths [64]": "widths=(64,): expected the inputs",
    "--model.net.widths [64,-1,10]": "expected whole numbers of at least 1",
    "--model.optimizer.lr -1": "The optimizer could not be built: Invalid learning rate: -1.0",
}


@pytest.mark.parametrize("words", MISSPELT)
def test_a_misspelt_setting_is_one_line_with_the_word_that_exists(words, capsys):
    """Classes, their options, the Trainer's, from the command line and under a class that the file names."""
    line = ["fit", "--config", DIGITS, "--wandb", "off", *QUIET, "--seed_everything", "0", *words.split()]
    try:
        status = training.command(line)
    except SystemExit as ended:
        status = ended.code
    assert status
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert MISSPELT[words] in said


def test_a_figure_that_nobody_logs_is_told_of(tmp_path, capsys):
    run("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--monitor", "val/accurcy")
    said = capsys.readouterr().err
    assert "--monitor val/accurcy: no validation logged that" in said
    assert "Did you mean 'val/accuracy'?" in said
    assert not list(tmp_path.rglob("result.json"))


def test_internals_are_not_offered():
    """A class that only this library makes is nobody's choice on a command line."""
    for option, classes in options.kinds().items():
        for name, kind in classes.items():
            assert kind.__module__.startswith("torch.") or not name.startswith("_"), (option, name)
            if option in ("--energy", "--nudge", "--relaxer", "--free_relaxer"):
                assert name in ebm.__all__


def test_internals_are_not_listed_by_the_help_either(capsys):
    with pytest.raises(SystemExit):
        training.command(["fit", "--help"])
    listed = "".join(capsys.readouterr().out.split())
    assert "lightning_ebm.GradientDescent" in listed
    for kind in (ebm.Energy, ebm.Nudge, ebm.Relaxer, ebm.Update):
        for made in kind.__subclasses__():
            if made.__module__.startswith("lightning_ebm.") and not offered.is_offered(path := path_of(made)):
                assert path not in listed


def path_of(kind):
    return f"{kind.__module__}.{kind.__name__}"


@pytest.mark.parametrize(
    ("part", "path", "settings", "is_public"),
    [
        ("energy", "energies.scaled.Scaled", {"energy": "Huber", "factors": {}}, False),
        ("relaxer", "relaxers.automatic.automatic", {"energy": "Huber", "nudge": "OneSided"}, False),
        ("relaxer", "relaxers.gradient_descent.GradientDescent", {}, True),
        ("update", "updates.Contrast", {}, True),
    ],
)
def test_files_do_not_reach_internals(part, path, settings, is_public, tmp_path, capsys):
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump({part: {"class_path": f"lightning_ebm.{path}", "init_args": settings}}))
    line = [
        "fit",
        "--config",
        DIGITS,
        "--config",
        str(file),
        "--wandb",
        "off",
        *QUIET,
        "--trainer.fast_dev_run",
        "true",
    ]
    try:
        status = training.command(line)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert (not status, "is internal" in said) == (is_public, not is_public), said


def test_one_flag_decides_on_wandb(tmp_path):
    once = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    run(*once)
    assert list(tmp_path.glob("runs/digits/version_0/metrics.csv"))
    assert not list(tmp_path.rglob("*.wandb"))
    made = run(*once, "--wandb", "offline", "--project", "p")
    import wandb

    config = dict(made.trainer.logger.experiment.config)
    assert config["config"]["algorithm"] == "predictive-coding"
    assert config["config"]["model"]["init_args"]["net"]["init_args"]["widths"] == [64, 128, 10]
    wandb.teardown()
    assert list(tmp_path.rglob("*.wandb"))


def images(count, seed):
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (count, 28, 28)).astype(np.uint8), (np.arange(count) % 10).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Small made data where the recipes look for theirs."""
    (train_x, train_y), (test_x, test_y) = images(600, 0), images(100, 1)
    arrays = {"x_train": train_x, "y_train": train_y, "x_test": test_x, "y_test": test_y}
    np.savez(tmp_path / "mnist.npz", **arrays)
    np.savez(tmp_path / "fashion-mnist.npz", **arrays)
    random = np.random.RandomState(2)
    colour = {
        name: random.randint(0, 256, (len(a), 32, 32, 3)).astype(np.uint8) if "x" in name else a
        for name, a in arrays.items()
    }
    np.savez(tmp_path / "cifar10.npz", **colour)
    (tmp_path / "input.txt").write_text("".join(chr(33 + i) for i in range(65)) * 120)
    return tmp_path


def missing(text):
    """Names of this library that a file uses and this version does not have."""
    classes = set(re.findall(r"class_path: (?:lightning_ebm\.(?:recipes\.\w+\.)?)?(\w+)\b(?!\.)", text))
    known = {name for module in (data, modules, nets) for name in vars(module)}
    presets = re.findall(r"^algorithm: (\S+)", text, re.MULTILINE)
    return [c for c in classes if c not in known and not hasattr(ebm, c)] + [
        p for p in presets if p not in ebm.algorithms()
    ]


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_takes_a_step(path, folder):
    text = path.read_text()
    if lacking := missing(text):
        pytest.skip(f"{path.name} uses {', '.join(lacking)}, which this version of the library does not have")
    assert f"\n#   lightning-ebm recipes run {path.stem}\n" in text
    assert text.startswith("# ")  # the line that the list shows
    small = ["--trainer.fast_dev_run", "2", "--wandb", "off", "--trainer.accelerator", "cpu", *QUIET]
    if "ResNet18" in text:
        small += ["--model.net.width", "4"]
    if "VGG5" in text or "HopfieldConv" in text:
        small += ["--model.net.channels", "[4,4,4,4]"]
    if "HopfieldConv" in text:
        small += ["--free_relaxer.max_steps", "10", "--data.num_workers", "0"]
    where = [] if re.search(r"class_path: \S*data.(Digits|MNIST1D)\b", text) else ["--data.dir", str(folder)]
    made = training.main(["fit", "--config", str(path), *where, *small])
    relaxes = made.trainer.strategy.algorithm if hasattr(made.trainer.strategy, "algorithm") else None
    incremental = relaxes is not None and relaxes.rule.incremental
    # An incremental batch is as many optimizer steps as it has relaxation steps, and fast_dev_run counts steps too.
    assert made.trainer.global_step == (relaxes.relaxer.max_steps if incremental else 2)
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_the_unsupervised_recipe_infers_what_newtons_method_on_its_energy_does(tmp_path):
    """1/2 |z|^2 + sum of 1/2 |x - tanh(W x')|^2 + 1/2 |image - mu|^2 over all states, minimized by torch's LBFGS."""
    path = str(RECIPES / "configs" / "unsupervised.yaml")
    once = ["--wandb", "off", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", *QUIET]
    made = training.main(
        ["fit", "--config", path, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "20", *once]
    )
    net, seen = made.model.net.double(), torch.arange(64) < 32
    image = next(iter(made.trainer.datamodule.val_dataloader()))[0].flatten(1).double()

    def solved(known):
        """States, and where pixels are not known their prediction, which then costs nothing."""
        states = [torch.zeros(len(image), n, dtype=torch.float64, requires_grad=True) for n in (8, 64, 64)]
        optimizer = torch.optim.LBFGS(states, max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

        def energy():
            optimizer.zero_grad()
            z, low, high = states
            errors = [z, low - net[1:3](z), high - net[3:5](low), (image - net[5:](high))[:, known]]
            total = sum(0.5 * error.square().sum() for error in errors)
            total.backward()
            return total

        optimizer.step(energy)
        return net[5:](states[2]).detach()

    values = {name: float(value) for name, value in made.trainer.callback_metrics.items()}
    explained = 0.5 * (solved(torch.ones(64, dtype=torch.bool)) - image).square().sum(1).mean()
    assert values["val/loss"] == pytest.approx(float(explained), rel=1e-2)
    error = (solved(seen) - image)[:, ~seen].square().mean()
    assert values["val/lower_half"] == pytest.approx(float(error), rel=1e-2)
    blank = (made.model.mean.double() - image)[:, ~seen].square().mean()
    assert values["val/lower_half_share"] == pytest.approx(float(error / blank), rel=1e-2)
    train = made.trainer.datamodule.parts["train"]
    mean = torch.stack([train[k][0] for k in range(len(train))]).flatten(1).mean(0)
    assert torch.allclose(made.model.mean.float(), mean)
    with pytest.raises(Exception, match=r"64 pixels, and .*widths ends in 60"):
        training.main(["fit", "--config", path, "--model.widths", "[8,16,60]", "--layers", "[net.0,net.2]", *once])


@pytest.fixture
def clothes(tmp_path):
    """Fashion-MNIST as far as its file goes: 1100 training images of ten kinds that differ in brightness."""
    random, folder = np.random.RandomState(0), tmp_path / "clothes"
    folder.mkdir()
    labels = {"train": np.arange(1100) % 10, "test": np.arange(40) % 10}
    images = {k: (20 * y[:, None, None] + random.randint(0, 50, (len(y), 28, 28))) for k, y in labels.items()}
    arrays = {f"x_{k}": x.astype(np.uint8) for k, x in images.items()} | {
        f"y_{k}": y.astype(np.uint8) for k, y in labels.items()
    }
    np.savez(folder / "fashion-mnist.npz", **arrays)
    return folder, arrays


def test_the_depth_recipe_shows_every_rate_at_every_depth_and_keeps_the_best_of_the_smallest(clothes, monkeypatch):
    settings = {
        "data": "fashion-mnist", "data_dir": clothes[0], "out": Path("out"), "depths": (4, 6), "width": 8, "updates": 6,
        "batch": 16, "seeds": 1, "methods": ("backprop", "backprop, plain"),
    }  # fmt: skip
    depth.main(**settings, every_rate=True)
    runs = json.loads(Path("out/runs.json").read_text())
    table = Path("out/rates.md").read_text().splitlines()
    assert len(runs) == 2 * 2 * len(depth.RATES)
    assert len(table) == 2 + 2 * 2
    for line in table[2:]:
        name, layers, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        losses = [runs[f"{name}|{layers}|{lr:g}|0"]["loss"] for lr in depth.RATES]
        assert [cell.startswith("**") for cell in cells] == [loss == min(losses) for loss in losses]
        assert [float(cell.strip("*").partition(",")[0]) for cell in cells] == pytest.approx(losses, abs=5e-4)
    once = depth.run
    monkeypatch.setattr(depth, "run", lambda *given: pytest.fail("trained once more"))
    depth.main(**settings, every_rate=True)  # everything is there
    monkeypatch.setattr(depth, "run", once)
    depth.main(**settings)
    transferred = json.loads(Path("out/runs.json").read_text())["backprop|6|transferred|0"]
    assert transferred["lr"] == min(depth.RATES, key=lambda lr: runs[f"backprop|4|{lr:g}|0"]["loss"])


def test_the_generative_recipe_takes_fashion_mnist(clothes):
    folder, arrays = clothes
    images = generative.Images(data.FashionMNIST(folder))
    assert torch.equal(images.train, torch.as_tensor(arrays["x_train"][:-1000]).flatten(1).float() / 255)
    found = generative.main(folder, Path("out"), part="recall", data="fashion-mnist", share=0.002)["recall"]
    cue = torch.where(generative.UPPER, images.train[:64], 0.5)
    blank = (cue - images.train[:64]).square().mean()
    assert found["error of the cue, upper half"] == pytest.approx(float(blank), rel=1e-5)
    assert Path("out/generative_recall.png").exists()


# The convolutional Hopfield network


HOPFIELD = RECIPES / "configs" / "cifar10-hopfield-ep.yaml"


def through_time(net, x, y, steps):
    """Gradient of the loss by backpropagation through all sweeps of the free phase: an EP library is not needed for it.

    s_l <- clip(d/ds_l sum_k <s_k, pool(w_k * s_{k-1})>), all layers at once, from zeros.
    """
    convolutions = [m for m in net if isinstance(m, torch.nn.Conv2d)]

    def drive(k, below):
        return torch.nn.functional.max_pool2d(convolutions[k](below), 2)

    states, h = [], x
    for k in range(len(convolutions)):
        h = drive(k, h)
        states.append(torch.zeros_like(h, requires_grad=True))
    for _ in range(steps):
        drives = [drive(k, below) for k, below in enumerate([x, *states[:-1]])]
        phi = sum((s * d).sum() for s, d in zip(states, drives, strict=True))
        states = [slope.clamp(0, 1) for slope in torch.autograd.grad(phi, states, create_graph=True)]
    loss = torch.nn.functional.cross_entropy(net[-1](states[-1].flatten(1)), y)
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.slow
def test_the_convolutional_hopfield_recipe_relaxes_and_its_update_is_the_gradient_through_time():
    """The recipe's own phases; the nudge alone is made small, as at 1 the winners of the pooling change."""
    written = yaml.safe_load(HOPFIELD.read_text())
    free, nudged = (ebm.FixedPoint(**written[part]["init_args"]) for part in ("free_relaxer", "relaxer"))
    assert (free.max_steps, nudged.max_steps, free.order) == (250, 25, "synchronous")
    torch.manual_seed(0)
    net = nets.HopfieldConv((4, 4, 8, 8)).double()
    x, y = torch.randn(4, 3, 32, 32).double(), torch.randint(10, (4,))
    longer = ebm.FixedPoint(100, "synchronous")
    algorithm = ebm.algorithm(
        written["algorithm"], nudge=ebm.Centered(1e-3), free_relaxer=free, relaxer=longer, initial_state="zeros"
    )
    learner = ebm.Learner(net, algorithm, output="readout")

    def loss():
        return torch.nn.functional.cross_entropy(net(x), y)

    update = learner.gradients(loss)
    assert max(learner.report["phases"][0]["residual"]) < 1e-12  # the free phase is over after the published 250 sweeps
    assert ebm.metrics.alignment(update, through_time(net, x, y, 250))["relative_error"] < 1e-6
    # In the other order, whose equilibrium may be another where winners tie, against implicit differentiation there.
    ordered = ebm.algorithm(
        algorithm, free_relaxer=ebm.FixedPoint(500, tol=1e-11), relaxer=ebm.FixedPoint(500, tol=1e-9)
    )
    implicit = ebm.reference.equilibrium(net, loss, ordered, output="readout")
    found = ebm.Learner(net, ordered, output="readout").gradients(loss)
    assert ebm.metrics.alignment(found, implicit)["relative_error"] < 1e-6


@pytest.mark.slow
def test_the_convolutional_hopfield_recipe_learns_at_reduced_size(tmp_path):
    """Four colours, and so few channels that which of them are told apart depends on rounding: above one in four."""
    random = np.random.RandomState(0)
    colours = np.array([[40, 40, 40], [216, 40, 40], [40, 216, 40], [40, 40, 216]])

    def images(count):
        y = np.arange(count) % 4
        noise = random.normal(0, 25, (count, 32, 32, 3))
        return (colours[y][:, None, None, :] + noise).clip(0, 255).astype(np.uint8), y.astype(np.uint8)

    (train_x, train_y), (test_x, test_y) = images(160), images(40)
    np.savez(tmp_path / "cifar10.npz", x_train=train_x, y_train=train_y, x_test=test_x, y_test=test_y)
    small = ["--model.net.channels", "[8,8,16,16]", "--free_relaxer.max_steps", "10", "--relaxer.max_steps", "5"]
    small += ["--data.dir", str(tmp_path), "--data.batch_size", "16", "--data.num_workers", "0"]
    small += ["--trainer.max_epochs", "4", "--trainer.accelerator", "cpu", "--wandb", "off", *QUIET]
    made = training.main(["fit", "--config", str(HOPFIELD), *small])
    groups = made.trainer.optimizers[0].param_groups
    assert [group["initial_lr"] for group in groups] == [0.25, 0.15, 0.1, 0.08, 0.05]
    assert [len(group["params"]) for group in groups] == [2] * 5
    assert max(group["lr"] for group in groups) < 1e-9  # the cosine has ended with the last batch
    values = json.loads((tmp_path / "runs" / "cifar10-hopfield-ep" / "result.json").read_text())["values"]
    assert values[-1] > 0.45


# One theory


@pytest.mark.slow
def test_the_figure_of_one_theory_has_the_slopes_of_the_theory(tmp_path, monkeypatch):
    """Error O(lambda), O(beta), O(gamma), centred O(lambda^2); one step of PC reaches the last layer alone."""
    fewer = {"values": (1e-4, 1e-2, 0.1, 1.0), "shown": (1e-4, 1.0)}
    monkeypatch.setattr(one_theory, "THEORIES", tuple(replace(theory, **fewer) for theory in one_theory.THEORIES))
    found = one_theory.main(hidden=(16, 8), batch_size=8, steps=(1, 250), root=tmp_path)
    assert (tmp_path / "one_theory.png").stat().st_size > 20_000
    assert json.loads((tmp_path / "one_theory.json").read_text()).keys() == found.keys()

    def slope(entry, part, low, high):
        at = {v: e["relative_error"] for v, e in zip(entry["values"], entry[part], strict=False)}
        return np.log10(at[high] / at[low]) / np.log10(high / low)

    for entry in found.values():
        assert slope(entry, "equilibrium", 1e-4, 1e-2) == pytest.approx(1, abs=0.05)
        if entry["centered"]:
            assert slope(entry, "centered", 1e-2, 1e-1) == pytest.approx(2, abs=0.1)
        assert entry["course"][0][-1] == pytest.approx(1, abs=1e-5)
        assert all(e["cosine"] < 0.9999 for e in entry["equilibrium"][-2:])  # a finite perturbation stays elsewhere
    hebbian = found["contrastive Hebbian learning"]["equilibrium"]
    assert hebbian[0]["to_backprop"] == pytest.approx(1, abs=1e-6)
    assert found["equilibrium propagation"]["equilibrium"][0]["to_backprop"] < 0.9999  # another gradient, on purpose

    torch.manual_seed(0)
    net = nets.MLP((64, 16, 8, 10), activation="tanh").double()
    net[3].weight.data *= 0.5
    net[5].weight.data *= 0.5
    module = data.Digits()
    module.setup("fit")
    x, y = module.parts["train"].__getitems__(list(range(8)))
    target = torch.nn.functional.one_hot(y, 10).double()
    (0.5 * (net(x.flatten(1).double()) - target).square().sum(1).mean()).backward()
    norms = [p.grad.square().sum() for p in net.parameters()]
    share = float((sum(norms[-2:]) / sum(norms)).sqrt())
    for course in found["predictive coding"]["course"]:
        assert course[0] == pytest.approx(share, abs=1e-9)


# Data


def test_mnist_1d_is_the_published_set():
    split = mnist_1d.build()  # figures of the published generator, mnist1d 0.0.2, with which this agrees to the bit
    assert split.train_x.shape == (4000, 40)
    assert split.test_x.shape == (1000, 40)
    np.testing.assert_array_equal(split.train_y[:10], [2, 6, 4, 5, 6, 6, 6, 0, 3, 1])
    np.testing.assert_allclose(split.train_x[0, :4], [-0.33200567, -0.47191037, -0.77869708, -1.00974083], rtol=1e-7)
    np.testing.assert_allclose(split.test_x[-1, -3:], [0.65987565, 0.87773435, 1.19315184], rtol=1e-7)
    assert np.abs(split.train_x).sum() == pytest.approx(118338.29510719894, rel=1e-12)


def write_idx(path, array):
    raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("spelling", ["idx3-ubyte", "idx3-ubyte.gz", "npz", "dotted"])
def test_mnist_in_every_usual_format_is_the_same_data(tmp_path, spelling):
    (train_x, train_y), (test_x, test_y) = images(30, 0), images(20, 1)
    if spelling == "npz":
        np.savez(tmp_path / "mnist.npz", x_train=train_x, y_train=train_y, x_test=test_x, y_test=test_y)
    else:
        for name, array in zip(sources.IDX_NAMES, (train_x, train_y, test_x, test_y), strict=True):
            spelt = name.replace("-idx", ".idx") if spelling == "dotted" else name
            write_idx(tmp_path / (spelt + (".gz" if spelling.endswith(".gz") else "")), array)
    module = data.MNIST(dir=tmp_path, batch_size=7)
    module.prepare_data()
    module.setup("fit")
    found = list(module.test_dataloader())
    np.testing.assert_allclose(torch.cat([x for x, _ in found])[:, 0].numpy(), (test_x / 255 - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_array_equal(torch.cat([y for _, y in found]), test_y)
    seen = torch.cat([x for x, _ in module.train_dataloader()])
    assert seen.shape == (30, 1, 28, 28)
    assert sorted(seen.sum((1, 2, 3)).tolist()) == pytest.approx(
        sorted(((train_x / 255 - 0.5) / 0.5).sum((1, 2))), abs=1e-2
    )


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_as_its_authors_distribute_it(tmp_path, packed):
    random = np.random.RandomState(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = {name: random.randint(0, 256, (4, 3072)).astype(np.uint8) for name in names}
    for name, rows in pixels.items():
        with (folder / name).open("wb") as file:
            pickle.dump({b"data": rows, b"labels": [0, 1, 2, 9]}, file, protocol=2)
    if packed:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(folder, "cifar-10-batches-py")
        for name in names:
            (folder / name).unlink()
        folder.rmdir()
    module = data.CIFAR10(dir=tmp_path, augment=False, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    module.setup("fit")
    x, y = module.parts["train"].__getitems__([0, 5, 19])
    expected = np.stack([pixels[names[i // 4]][i % 4].reshape(3, 32, 32) for i in (0, 5, 19)])
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-3)
    assert y.tolist() == [0, 1, 9]


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({b"data": Bomb(), b"labels": []}))
    with pytest.raises(pickle.UnpicklingError):
        sources.read_cifar(folder)
    assert not (tmp_path / "ran").exists()


def test_augmentation_is_a_shift_and_a_reflection():
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 1
    torch.manual_seed(0)
    seen, places = arrays._augmented(x), set()
    for image, made in zip(x, seen, strict=True):
        padded = torch.nn.functional.pad(image, [4] * 4)
        crops = {
            (top, left, flipped): padded[:, top : top + 32, left : left + 32].flip(2) if flipped
            else padded[:, top : top + 32, left : left + 32]
            for top, left, flipped in itertools.product(range(9), range(9), (False, True))
        }  # fmt: skip
        matching = [where for where, crop in crops.items() if torch.equal(crop, made)]
        assert len(matching) == 1
        places.add(matching[0])
    assert len(places) > 20
    assert {flipped for *_, flipped in places} == {False, True}


def test_held_out_samples_are_not_trained_on():
    module = data.Digits(validation=300)
    module.setup("fit")
    rows = {part: {tuple(x.flatten().tolist()) for x in module.parts[part].x} for part in ("train", "val", "test")}
    assert len(module.parts["train"]) == 1137
    assert len(module.parts["val"]) == 300
    assert not rows["train"] & rows["val"]
    assert not rows["train"] & rows["test"]


def test_windows_of_text_are_one_apart(tmp_path):
    text = "".join(np.random.RandomState(0).choice(list("abcde "), 1000))
    (tmp_path / "t.txt").write_text(text)
    module = data.TinyShakespeare(dir=tmp_path / "t.txt", context=10, eval_batch_size=4)
    module.setup("fit")
    words = "".join(module.vocabulary[i] for x, _ in module.val_dataloader() for i in x.flatten())
    ahead = "".join(module.vocabulary[i] for _, y in module.val_dataloader() for i in y.flatten())
    assert words == text[900:990]
    assert ahead == text[901:991]


def test_missing_data_says_where_and_how(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(sources.urllib.request, "urlopen", refused)
    for module in (data.MNIST, data.FashionMNIST, data.CIFAR10, data.TinyShakespeare):
        with pytest.raises(sources.DataNotFoundError) as caught:
            module(dir=tmp_path / "none").prepare_data()
        for remote in module.remotes:
            assert f"curl -L --create-dirs -o {tmp_path / 'none' / remote.name} {remote.url}" in str(caught.value)


def test_a_download_is_what_was_published_or_is_not_kept(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "input.txt").write_text("good")
    good, bad = "755f85c2723bb39381c7379a604160d8", "0" * 32
    url = (tmp_path / "web" / "input.txt").as_uri()
    sources.fetch("It", [sources.Remote(url, good)], tmp_path / "a", "x")
    assert (tmp_path / "a" / "input.txt").read_text() == "good"
    with pytest.raises(sources.DataNotFoundError, match="not the published file"):
        sources.fetch("It", [sources.Remote(url, bad)], tmp_path / "b", "x")
    assert not list((tmp_path / "b").iterdir())


# Networks and schedule


def test_networks_are_the_published_ones_by_their_number_of_parameters():
    def count(net):
        return sum(p.numel() for p in net.parameters())

    assert count(nets.ResNet18()) == 11_173_962
    assert count(nets.MNIST1DConv()) == 5_210
    convolutions = sum(9 * a * b + b for a, b in ((3, 128), (128, 256), (256, 512), (512, 512)))
    assert count(nets.VGG5()) == convolutions + 2048 * 10 + 10
    assert count(nets.MLP((784, 128, 64, 10))) == 785 * 128 + 129 * 64 + 65 * 10
    logits = nets.CharTransformer(vocabulary=7, context=9)(torch.zeros(2, 5, dtype=torch.long))
    assert logits.shape == (2, 5, 7)


def test_the_character_model_sees_no_future():
    torch.manual_seed(0)
    net = nets.CharTransformer(vocabulary=11, context=8)
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5:], after[0, 5:])


def test_the_schedule_rises_by_a_tenth_and_falls_to_a_tenth():
    factors = [modules.warmup_cosine(step, 1000) for step in range(1001)]
    assert factors[0] == 1
    assert max(factors) == pytest.approx(1.1)
    assert factors.index(max(factors)) == 100
    assert factors[550] == pytest.approx((1.1 + 0.1) / 2)  # half way down the cosine
    assert factors[1000] == pytest.approx(0.1)


def test_squared_error_is_half_the_squared_distance_to_the_one_hot_label():
    module = modules.Classifier(torch.nn.Identity(), "squared-error", classes=3)
    output = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    assert float(module._loss(output, torch.tensor([0, 2]))) == pytest.approx((0.5 * 4 + 0.5 * 4) / 2)


# Sweeps


PROGRAM = """
import json, pathlib, sys
given = dict(word.lstrip('-').split('=') for word in sys.argv if '=' in word)
root = pathlib.Path(sys.argv[sys.argv.index('--trainer.default_root_dir') + 1])
a = float(given['model.a'])
(root / 'count').open('a').write('x')
if a > 2: sys.exit(1)
(root / 'result.json').write_text(json.dumps({'last': -(a - 1) ** 2, 'best': 0.0}))
"""


def sweep_file(folder, **changed):
    """A sweep of a program that ends at -(a - 1)^2, and fails beyond a = 2."""
    (folder / "program.py").write_text(PROGRAM)
    description = {
        "program": str(folder / "program.py"),
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": {"model": {"parameters": {"a": {"values": [0, 1, 2, 3]}}}, "b": {"value": [1, 2]}},
        "command": ["${env}", "${interpreter}", "${program}", "${args}"],
    }
    file = folder / "s.yaml"
    file.write_text(yaml.safe_dump(description | changed, sort_keys=False))
    return file


def test_a_grid_is_run_whole_once_and_ranked(tmp_path):
    file = sweep_file(tmp_path)
    for count in (1, None, None):  # in two goes, and once more for nothing
        done = sweep.main(file, count, root=tmp_path / "out")
    assert sorted(one["settings"]["model.a"] for one in done) == [0, 1, 2, 3]
    assert all(one["settings"]["b"] == [1, 2] for one in done)
    assert done[0]["settings"]["model.a"] == 1
    assert "exit code 1" in done[-1]["failed"]
    folder = tmp_path / "out" / "s"
    assert [path.read_text() for path in folder.glob("*/count")] == ["x"] * 4
    lines = (folder / "trials.csv").read_text().splitlines()
    assert lines[0] == "trial,model.a,b,last,best,seconds"
    assert lines[1].startswith(f'{done[0]["trial"]},1,"[1, 2]",')
    page = (folder / "study.html").read_text()
    assert "Every parameter alone" in page
    assert "cdn" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_a_search_goes_on_as_it_would_have_gone(tmp_path):
    """Draws by number, so that ten trials are ten trials in however many goes; one that was killed is run again."""
    parameters = {
        "model": {"parameters": {"a": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}}},
        "flat": {"min": 2.0, "max": 4.0},
        "whole": {"min": 1, "max": 3},
        "q": {"distribution": "q_uniform", "min": 0, "max": 10, "q": 5},
        "choice": {"values": ["x", [1, 2]]},
    }
    file = sweep_file(tmp_path, method="random", parameters=parameters)
    sweep.main(file, 3, root=tmp_path / "parts")
    study = sweep.study_of(yaml.safe_load(file.read_text()), tmp_path / "parts" / "s", 0)
    killed = study.ask()
    wanted = {name: sweep.suggested(killed, name, spec) for name, spec in sweep.flat(parameters).items()}
    parts = sweep.main(file, 6, root=tmp_path / "parts")
    at_once = sweep.main(file, 6, root=tmp_path / "once")
    assert len(parts) == len(at_once) == 6
    assert wanted in [one["settings"] for one in parts]

    def first(done):
        return [one["settings"] for one in sorted(done, key=lambda one: one["trial"]) if one["trial"] < 3]

    assert first(parts) == first(at_once)
    settings = [one["settings"] for one in at_once]
    assert len({one["model.a"] for one in settings}) == 6
    assert all(1e-4 <= one["model.a"] <= 1 and 2 <= one["flat"] <= 4 for one in settings)
    assert all(one["whole"] in (1, 2, 3) and one["q"] in (0, 5, 10) for one in settings)
    assert {one["choice"] for one in settings} <= {"x", "[1, 2]"}


def test_a_bayesian_search_draws_closer_to_what_was_good(tmp_path):
    """By the distance to the best of -(a - 1)^2, the last ten of twenty-five trials against ten at random."""
    file = {"metric": {"name": "m", "goal": "maximize"}, "parameters": {"a": {"min": -50.0, "max": 50.0}}}
    far = {}
    for method in ("bayes", "random"):
        study = sweep.study_of(file | {"method": method}, tmp_path / method, 0)
        drawn = []
        for number in range(25):
            study.sampler = sweep.sampler_of(file | {"method": method}, number)
            trial = study.ask()
            drawn.append(sweep.suggested(trial, "a", file["parameters"]["a"]))
            study.tell(trial, -((drawn[-1] - 1) ** 2))
        far[method] = np.mean(np.abs(np.array(drawn[-10:]) - 1))
    assert far["bayes"] < 0.5 * far["random"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "hyperband"}, "none of grid, random, bayes"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, "needs value"),
        ({"method": "random"}, "--count"),
        ({"method": "random", "run_cap": 1, "parameters": {"a": {"distribution": "beta", "min": 0, "max": 1}}}, "beta"),
        ({"method": "random", "run_cap": 1, "parameters": {"a": {"max": 1}}}, "min and max"),
        ({"parameters": {"a": {"values": [1, 2], "probabilities": [0.5, 0.5]}}}, "probabilities"),
    ],
)
def test_what_is_not_drawn_here_is_refused(changed, said, tmp_path):
    with pytest.raises(sweep.SweepError, match=said):
        sweep.main(sweep_file(tmp_path, **changed), root=tmp_path / "out")


def test_trials_of_another_version_of_a_file_are_not_gone_on_with(tmp_path):
    sweep.main(sweep_file(tmp_path), 1, root=tmp_path / "out")
    other = sweep_file(tmp_path, parameters={"model.a": {"values": [1, 2]}})
    with pytest.raises(sweep.SweepError, match="another version"):
        sweep.main(other, root=tmp_path / "out")


def test_without_optuna_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(sweep.SweepError, match=r"lightning-ebm\[sweep\]"):
        sweep.main(sweep_file(tmp_path), root=tmp_path / "out")


@pytest.mark.parametrize("path", sorted((RECIPES / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_trial_of_a_sweep_file_is_a_command_line_that_parses(path, tmp_path):
    file = yaml.safe_load(path.read_text())
    if lacking := missing(path.read_text()):
        pytest.skip(f"{path.name} uses {', '.join(lacking)}, which this version of the library does not have")
    study = sweep.study_of(file, tmp_path, 0)
    trial = study.ask()
    settings = {name: sweep.suggested(trial, name, spec) for name, spec in sweep.flat(file["parameters"]).items()}
    line = sweep.command(file, settings)
    assert line[:5] == [sys.executable, "-m", "lightning_ebm_cli", "recipes", "run"]
    recipe = str(RECIPES / "configs" / f"{line[5]}.yaml")
    once = ["--trainer.fast_dev_run", "true", "--wandb", "off", *QUIET]
    made = training.main(["fit", "--config", recipe, *line[6:], *once])
    for name, value in settings.items():
        if name.startswith(("nudge.", "relaxer.")):
            part = getattr(made.trainer.strategy.algorithm, name.split(".")[0])
            assert getattr(part, name.split(".")[1]) == pytest.approx(value)


@pytest.mark.parametrize(
    ("net", "sizes"),
    [
        (nets.MLP, {"widths": (4, 0, 2)}), (nets.MLP, {"widths": (4,)}), (nets.MNIST1DConv, {"channels": 0}),
        (nets.ConvNet, {"channels": (1, -1)}), (nets.ConvNet, {"side": 4}), (nets.HopfieldConv, {"channels": (3, 0)}),
        (nets.ResNet, {"blocks": (1, 0)}), (nets.CharTransformer, {"width": 10, "heads": 4}),
        (nets.CharTransformer, {"depth": 0}), (nets.ViT, {"patch": 0}), (nets.HopfieldMNIST, {"channels": (0, 1)}),
    ],
)  # fmt: skip
def test_a_network_of_sizes_that_nobody_means_is_refused(net, sizes):
    with pytest.raises(ValueError, match=r"=.*: "):
        net(**sizes)
