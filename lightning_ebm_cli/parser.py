"""What the command line understands, and what it says about itself. The work is in `lightning_ebm_cli.commands`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from lightning_ebm_cli import commands
from lightning_ebm_cli.catalog import did_you_mean

OVERRIDES = """settings on the command line, each as --name value or name=value:
  --algorithm pc-nudge             what replaces backprop; leave it out for stock Lightning
  --nudge Centered --nudge.strength 0.1
  --relaxer GradientDescent --relaxer.max_steps 20 --relaxer.lr 0.1
  --energy, --free_relaxer         the other parts of an algorithm
  --layers "[net.0,net.2]"         where the states are
  --trainer.max_epochs 5           everything that Lightning's Trainer takes
  --trainer.devices 4 --trainer.strategy ebm_ddp
  --data.batch_size 32 --data.dir ~/mnist
  --model.net.widths "[64,256,10]" --model.optimizer.lr 0.001
  --wandb offline|online|off       Weights & Biases on this disk, on the server, or none (then a CSV file)
  --name my-run                    files go to runs/my-run
  --seed_everything 1
  --help-all                       every option there is, several hundred lines
"""


class Wide(argparse.RawDescriptionHelpFormatter):
    """Names and what they mean on one line each."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest word that exists."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; what is left over is answered by the command that it was given to."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            _asked(self, vars(found)).error(f"unrecognized arguments: {' '.join(left)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        _, found, rest = message.partition("invalid choice: '")
        if found:
            word = rest.partition("'")[0]
            known = [name for action in self._actions for name in action.choices or ()]
            message = f"there is no command {word!r}.{did_you_mean(word, known)} Commands: {', '.join(known)}."
        elif message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            kind, hint = ("option ", did_you_mean(word, _options(self))) if word.startswith("-") else ("place for ", "")
            message = f"there is no {kind}{word}.{hint} See {self.prog} --help."
        elif message.startswith("the following arguments are required: "):
            missing = message.removeprefix("the following arguments are required: ")
            message = f"{missing}: missing. See {self.prog} --help."
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _asked(made: "Parser", found: Mapping[str, Any]) -> "Parser":
    """The parser of the command that was found."""
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            return _asked(action.choices[found[action.dest]], found)
    return made


def _options(made: argparse.ArgumentParser) -> list[str]:
    """Of this parser and of all the commands under it."""
    inner = [sub for a in made._actions if isinstance(a, argparse._SubParsersAction) for sub in a.choices.values()]
    return [o for action in made._actions for o in action.option_strings] + [o for sub in inner for o in _options(sub)]


def parser() -> Parser:
    """The whole tree of commands."""
    made = Parser(
        prog="lightning-ebm",
        description="Train networks with local, energy-based rules in place of backpropagation, and see how it went.",
        epilog="lightning-ebm COMMAND --help tells more of each.",
        allow_abbrev=False,
        formatter_class=Wide,
    )
    made.add_argument("--version", action="version", version=f"lightning-ebm {_version()}", help="which one this is")
    tree = made.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    _add_recipes(tree)
    fit = _add(tree, "fit", "train any LightningModule on any data, from a YAML file", epilog=OVERRIDES)
    fit.usage = "lightning-ebm fit --config FILE [settings]"
    report = _add(tree, "report", "one HTML page about a run: a verdict, curves, alignment, settings")
    report.add_argument("run", type=Path, help="runs/digits, lightning_logs/version_0, wandb/offline-run-..., ...")
    report.add_argument("-o", "--output", type=Path, help="where the page goes; report.html in the run if not given")
    compare = _add(tree, "compare", "one HTML page about several runs, side by side")
    compare.add_argument("run", type=Path, nargs="+", help="directories; runs that differ by their seed alone are one")
    compare.add_argument("-o", "--output", type=Path, default=Path("comparison.html"), help="where the page goes")
    workspace = _add(tree, "workspace", "a saved view of a project in Weights & Biases: few charts, grouped runs")
    workspace.add_argument(
        "project", type=_project, metavar="TEAM/PROJECT", help="whose; the runs need not be there yet"
    )
    workspace.add_argument(
        "--metric", action="append", metavar="KEY",
        help="what your module logs, as a chart of its own; may be given again; that of the recipes if not given",
    )  # fmt: skip
    sweep = _add(tree, "sweep", "the trials of a sweep file, here, by Optuna")
    sweep.add_argument("file", help="a sweep file of Weights & Biases, or the name of a ready-made one")
    sweep.add_argument("--count", type=int, help="at most so many trials")
    sweep.add_argument("--seed", type=int, default=0, help="of the search")
    _add_results(sweep, "runs/sweeps")
    board = _add(tree, "leaderboard", "algorithms x networks x data from one YAML file, as a table")
    board.add_argument("file", help="a leaderboard file, or the name of a ready-made one")
    board.add_argument(
        "--dir", action="append", type=_folder, default=[], metavar="DATA=PATH",
        help="where the files of a data set are, by the name that the board gives it; may be given again",
    )  # fmt: skip
    board.add_argument("--page", type=Path, help="where the page goes; among the results if not given")
    board.add_argument("--no-train", action="store_true", help="tell of the results that are there, and add none")
    _add_results(board, "runs/leaderboards")
    doctor = _add(tree, "doctor", "versions, devices, which kernels run, and a self-test of a second")
    doctor.add_argument("--no-test", action="store_true", help="leave out the self-test")
    return made


def _version() -> str:
    """Of the installed package; of a clone that is not installed the one that it is a clone of is not known."""
    try:
        return metadata.version("lightning-ebm")
    except metadata.PackageNotFoundError:
        return "(a clone, not installed)"


def _add_recipes(tree: "argparse._SubParsersAction[Parser]") -> None:
    recipes = _add(tree, "recipes", "ready-made training runs: list them, show one, run one")
    inner = recipes.add_subparsers(dest="action", metavar="list | show NAME | run NAME", required=True)
    _add(inner, "list", "their names, and what each of them trains")
    _add(inner, "show", "the YAML file of one").add_argument("name")
    run = _add(inner, "run", "train one, with any setting replaced", epilog=OVERRIDES)
    run.usage = "lightning-ebm recipes run NAME [settings]"
    run.add_argument("name")


def _add(tree: "argparse._SubParsersAction[Parser]", name: str, what: str, epilog: str | None = None) -> Parser:
    made = tree.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=epilog, allow_abbrev=False,
        formatter_class=Wide,
    )  # fmt: skip
    assert isinstance(made, Parser)
    return made


def _folder(word: str) -> tuple[str, Path]:
    name, separator, path = word.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{word!r}: expected DATA=PATH, for instance mnist=~/mnist.")
    return name, Path(path).expanduser()


def _project(word: str) -> tuple[str, str]:
    entity, _, name = word.partition("/")
    if not entity or not name or "/" in name:
        raise argparse.ArgumentTypeError(f"{word!r}: expected TEAM/PROJECT, for instance my-team/lightning-ebm.")
    return entity, name


def _add_results(made: Parser, root: str) -> None:
    made.add_argument("--root", type=Path, default=Path(root), help="folder of the results; what is there is kept")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, settings = _split(given)
    made = parser()
    if own and own[0].startswith("-") and own[0] not in made._option_string_actions:
        made.error(f"unrecognized arguments: {own[0]}")
    options = made.parse_args(own)
    try:
        return commands.run(options, settings)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    """Our own words, and the settings of a fit, which Lightning's parser reads."""
    own = {"fit": 1, "recipes": 3}.get(given[0], len(given)) if given else 0
    if given[:1] == ["recipes"] and given[1:2] != ["run"]:
        own = len(given)
    settings = given[own:]
    if {"-h", "--help"} & set(settings):
        return [*given[:own], "--help"], []
    return given[:own], settings
