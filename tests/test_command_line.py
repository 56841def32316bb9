"""The command line: it answers quickly, and a misspelt word is answered with the right one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_ebm import doctor
from lightning_ebm.recipes import leaderboard
from lightning_ebm.reports import runs
from lightning_ebm_cli import catalog, main, parser

ROOT = Path(__file__).parents[1]
COMMANDS = [
    [], ["recipes"], ["recipes", "list"], ["recipes", "show"], ["recipes", "run"], ["recipes", "run", "digits"],
    ["fit"],
    ["report"], ["compare"], ["workspace"], ["sweep"], ["leaderboard"], ["doctor"],
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_needs_neither_torch_nor_lightning(words):
    """Which is what makes it quick; and it fits a terminal of 100 columns."""
    code = (
        "import sys\nfrom lightning_ebm_cli import main\n"
        f"try: main({[*words, '--help']!r})\nexcept SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'lightning', 'lightning_ebm', 'numpy'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: lightning-ebm")
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_listing_and_showing_need_no_library_either(capsys):
    assert main(["recipes", "list"]) == 0
    shown = capsys.readouterr().out
    for path in (ROOT / "lightning_ebm" / "recipes" / "configs").glob("*.yaml"):
        assert re.search(rf"^{path.stem} +\w", shown, re.MULTILINE)
    assert main(["recipes", "show", "digits"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["algorithm"] == "predictive-coding"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["reprot", "x"], "'report'"),
        (["recipes", "lst"], "'list'"),
        (["recipes", "run", "digit"], "'digits'"),
        (["sweep", "digits-relax"], "'digits-relaxer'"),
        (["leaderboard", "digit"], "'digits'"),
        (["compare", "a", "--outptu", "x"], "'--output'"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_one_that_exists(words, meant, capsys):
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    assert status
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert f"Did you mean {meant}?" in said


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("lightning-ebm ")


def test_settings_of_a_fit_are_told_apart_from_our_own_words():
    assert parser._split(["recipes", "run", "digits", "--name", "x"]) == (["recipes", "run", "digits"], ["--name", "x"])
    assert parser._split(["fit", "--config", "a.yaml"]) == (["fit"], ["--config", "a.yaml"])
    assert parser._split(["fit", "--config", "a", "--help"]) == (["fit", "--help"], [])
    assert parser._split(["report", "a", "-o", "b"]) == (["report", "a", "-o", "b"], [])


def test_names_and_paths_of_files(tmp_path):
    assert catalog.path_of("configs", "digits").parent.name == "configs"
    (tmp_path / "digits").write_text("mine")
    assert catalog.path_of("configs", "digits").read_text() == "mine"  # a file that is there is what is meant


@pytest.mark.slow
def test_a_recipe_on_two_processes(tmp_path):
    """Only the first process writes what run it is; asking for it must not wait for the other one."""
    words = ["recipes", "run", "digits", "--wandb", "off", "trainer.devices=2", "trainer.strategy=ebm_ddp"]
    words += ["trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "lightning_ebm_cli", *words], check=True, env=environment, timeout=240)
    run = runs.read("runs/digits")
    assert run.facts["device"].startswith("2 x cpu")
    assert run.seconds is not None
    assert [len(step) for step in run.alignment_by_layer] == [2] * len(run.alignment_by_layer)
    assert Path("runs/digits/result.json").exists()


# The doctor


def test_the_doctor_knows_the_versions_of_the_constraints():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED


def test_the_doctor_says_which_version_is_untested(monkeypatch):
    monkeypatch.setitem(doctor.TESTED, "torch", "1.0.0")
    (line,) = [line for line in doctor.versions() if line[1] == "torch"]
    assert line[0] == "note"
    assert "tested with 1.0.0" in line[2]


def project() -> dict:
    """What pyproject.toml says; Python 3.10 cannot read it."""
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_doctor_knows_the_lowest_versions_that_are_promised():
    written = project()
    lowest = dict(re.fullmatch(r"([\w-]+)(?:\[.*\])?>=(.*)", line).groups() for line in written["dependencies"])
    assert {name: lowest[name] for name in doctor.PROMISED} == doctor.PROMISED
    assert set(doctor.PROMISED) >= set(doctor.TESTED) & set(lowest)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [("2.5.1", "wrong"), ("2.6.0rc1+cu126", "note"), ("2.13.9", "ok"), ("2.14.0", "note"), ("10.0", "note")],
)
def test_the_doctor_tells_versions_that_are_too_old_from_those_that_are_untested(found, verdict, monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: found if name == "torch" else real(name))
    (line,) = [line for line in doctor.versions() if line[1] == "torch"]
    assert line[0] == verdict
    assert {"wrong": "2.6 is the lowest", "note": "is untested", "ok": found}[verdict] in line[2]


def test_the_doctor_says_that_another_python_is_untested(monkeypatch):
    assert next(doctor.versions())[0] == ("ok" if sys.version_info[:2] == (3, 11) else "note")
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.13.2")
    assert next(doctor.versions())[::2][0] == "note"


def test_the_doctor_finds_a_rule_that_is_wrong(monkeypatch, capsys):
    assert doctor.main() == 0
    assert "nothing is wrong" in capsys.readouterr().out
    true = doctor.reference.backprop

    def doubled(net, closure):
        return {name: 1.01 * value for name, value in true(net, closure).items()}

    monkeypatch.setattr(doctor.reference, "backprop", doubled)
    assert doctor.main() == 1
    shown = capsys.readouterr().out
    assert "WRONG  exact rule, cpu" in shown
    assert "WRONG  weak nudge, cpu" in shown


# Leaderboards


BOARD = {
    "seeds": [0, 1],
    "algorithms": [
        "backprop", "zero-divergence",
        {"name": "runaway", "algorithm": "predictive-coding",
         "relaxer": {"class_path": "GradientDescent", "init_args": {"lr": 3.0}}},
    ],
    "networks": {"small": {"class_path": "lightning_ebm.recipes.nets.MLP", "init_args": {"widths": [64, 16, 10]}}},
    "data": {"digits": {"class_path": "lightning_ebm.recipes.data.Digits"}},
    "fit": {"trainer.max_epochs": 1, "trainer.accelerator": "cpu"},
}  # fmt: skip


def test_a_leaderboard_trains_each_cell_once_and_tells_what_it_found(tmp_path, monkeypatch):
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump(BOARD))
    assert main(["leaderboard", str(file)]) == 0
    rows = leaderboard.main(file)
    words = backprop, exact, runaway = [row.words() for row in rows]
    assert backprop[:3] == ("digits", "small", "backprop")
    # An exact rule trains to the same accuracy from the same seeds, and points the same way.
    assert exact[3] == backprop[3]
    assert exact[4].startswith("1.0000")
    assert backprop[6] == "1.0"
    assert exact[8] == "converged 100%"
    assert runaway[3] == "diverged"
    assert runaway[-1] == "0 of 2"
    page = (tmp_path / "runs" / "leaderboards" / "board" / "leaderboard.md").read_text()
    for line in words:
        assert f"| {' | '.join(line[2:])} |" in page
    assert f"**runaway**: {rows[2].because}" in page
    assert "ran away" in rows[2].because or "diverged" in rows[2].because
    monkeypatch.setattr(leaderboard.training, "main", lambda words: pytest.fail("trained again"))
    assert [row.words() for row in leaderboard.main(file)] == words
    # Another setting is another cell: that one is trained again.
    file.write_text(yaml.safe_dump(BOARD | {"fit": BOARD["fit"] | {"trainer.max_epochs": 2}}))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        leaderboard.main(file)


def test_a_board_has_refusals_in_words_stock_lightning_and_leaves_out_data_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = BOARD | {
        "seeds": [0],
        "algorithms": [
            {"name": "backprop"}, {"algorithm": "backprop", "name": "control"},
            {"algorithm": "holomorphic-ep", "name": "refused"}, {"name": "later", "seeds": [1]},
        ],
        "networks": {
            "small": {"net": BOARD["networks"]["small"], "on": ["digits"], "without": ["later"],
                      "fit": {"monitor": "val/loss"}},
            "other": {"net": BOARD["networks"]["small"], "on": ["away"]},
        },
        "data": BOARD["data"] | {"away": {"class_path": "lightning_ebm.recipes.data.MNIST"}},
    }  # fmt: skip
    file, page = tmp_path / "board.yaml", tmp_path / "docs" / "page.md"
    file.write_text(yaml.safe_dump(board))
    monkeypatch.setattr("lightning_ebm.recipes.sources.urllib.request.urlopen", no_network)
    page.parent.mkdir()
    assert main(["leaderboard", str(file), "--dir", f"away={tmp_path}", "--page", str(page)]) == 0
    stock, control, refused = leaderboard.main(file, trains=False)
    assert stock.values == control.values  # the control is stock Lightning
    assert stock.monitor == "val/loss"
    assert refused.words()[3] == "refused"
    assert "is no analytic function" in page.read_text()
    assert "away" not in page.read_text()
    assert (page.parent / "images" / "page.png").stat().st_size > 1000


def no_network(*_, **__):
    raise OSError("no network here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"algorithm": []}, "Did you mean 'algorithms'"),
        ({"networks": {}}, "networks must name at least one"),
        ({"algorithms": ["pc-nugde"]}, "Did you mean 'pc-nudge'"),
        ({"networks": {"small": {"net": {}, "onn": ["digits"]}}}, "'networks.small.onn'"),
        ({"networks": {"small": {"net": {}, "on": ["digit"]}}}, "Did you mean 'digits'"),
        ({"networks": {"small": {"net": {}, "without": ["backpropp"]}}}, "Did you mean 'backprop'"),
    ],
)
def test_a_board_that_cannot_be_meant_is_refused(tmp_path, change, said, capsys):
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump(BOARD | change))
    assert main(["leaderboard", str(file)]) == 1
    assert said in capsys.readouterr().err


def test_the_script_of_the_package_is_this_one():
    assert project()["scripts"] == {"lightning-ebm": "lightning_ebm_cli:main"}


FILES = {
    "sweep": {"metric": {"name": "val/accuracy"}, "parameters": {"trainer.max_epochs": {"value": 1}}},
    "leaderboard": {"algorithms": ["backprop"], "networks": {"mlp": {"net": "MLP"}}, "data": {"digits": {}}},
}
WRONG = [
    ("sweep", "metric"), ("sweep", "parameters"), ("leaderboard", "algorithms"), ("leaderboard", "networks"),
    ("leaderboard", "data"), ("leaderboard", "fit"), ("leaderboard", "seeds"), ("leaderboard", "compare_every"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "key"), WRONG)
@pytest.mark.parametrize("value", [None, "x", 1.5, {"a": 3}])
def test_a_file_with_a_value_that_nobody_means_is_one_line(command, key, value, tmp_path, capsys):
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(FILES[command] | {key: value}))
    if key == "fit" and isinstance(value, dict):
        return  # settings, which the fit itself reads
    assert main([command, str(file), "--root", str(tmp_path), *(["--no-train"] if command == "leaderboard" else [])])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert key in said or "a=3" in said


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize("text", ["", "- 1", "3", "hello", "a: [1", "\x00"])
def test_a_file_that_is_no_mapping_is_one_line(command, text, tmp_path, capsys):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    assert main([command, str(file), "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}")
    assert said.count("\n") == 1
