"""What each command does. The library is imported where it is needed, as that takes seconds."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from lightning_ebm_cli import catalog


def run(options: argparse.Namespace, settings: list[str]) -> int:
    """Does what was asked for.

    Args:
        options: our own, parsed.
        settings: of a fit, as they were given.

    Returns:
        The exit status: 0, or 1 where it could not be done; the reason is then on stderr, in one line.
    """
    if options.command == "recipes" and options.action != "run":
        return _guarded(_list if options.action == "list" else lambda: _show(options.name))
    return _guarded(lambda: _COMMANDS[options.command](options, settings))


def _guarded(work: Callable[[], int]) -> int:
    """Errors that speak to the user are one line, without a traceback."""
    try:
        return work()
    except (catalog.UnknownNameError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, LookupError) else error}", file=sys.stderr)
        return 1
    except Exception as error:
        from lightning_ebm.errors import EBMError

        if isinstance(error, EBMError):
            print(f"error: {error}", file=sys.stderr)
            return 1
        raise


def _list() -> int:
    paths = [catalog.path_of("configs", name) for name in catalog.names("configs")]
    width = max(len(path.stem) for path in paths)
    print("\n".join(f"{path.stem:{width}}  {catalog.description(path)}" for path in paths))
    print("\nlightning-ebm recipes run digits trains one; digits and mnist1d-* need no download.")
    return 0


def _show(name: str) -> int:
    print(catalog.path_of("configs", name).read_text(encoding="utf-8"), end="")
    return 0


def _recipes(options: argparse.Namespace, settings: list[str]) -> int:
    path = catalog.path_of("configs", options.name)
    return _train(["--config", str(path), *settings])


def _fit(options: argparse.Namespace, settings: list[str]) -> int:
    if not settings:
        print(
            "error: a fit needs settings: lightning-ebm fit --config FILE. See lightning-ebm fit --help.",
            file=sys.stderr,
        )
        return 2
    return _train(settings)


def _train(settings: list[str]) -> int:
    """Settings as Lightning's parser reads them: name=value becomes --name=value."""
    from lightning_ebm.recipes import training

    words = [f"--{word}" if _ASSIGNMENT.match(word) else word for word in settings]
    return training.command(["fit", *("--help" if word == "--help-all" else word for word in words)])


_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")


def _report(options: argparse.Namespace, settings: list[str]) -> int:
    from lightning_ebm.reports import runs
    from lightning_ebm.reports.advice import verdict
    from lightning_ebm.reports.html import page

    found = runs.read(options.run)
    target: Path = options.output or found.path / "report.html"
    target.write_text(page(found), encoding="utf-8")
    print(f"{': '.join(verdict(found.records))}\n{target}")
    return 0


def _compare(options: argparse.Namespace, settings: list[str]) -> int:
    from lightning_ebm.reports import runs
    from lightning_ebm.reports.comparison import page, text

    found = [runs.read(directory) for directory in options.run]
    options.output.write_text(page(found), encoding="utf-8")
    print(text(found))
    print(options.output)
    return 0


def _workspace(options: argparse.Namespace, settings: list[str]) -> int:
    from wandb.errors import Error

    from lightning_ebm.reports.workspace import TASK, workspace

    entity, project = options.project
    made = workspace(entity, project, options.metric or TASK)
    try:
        made.save()  # tells where it is
    except Error as error:
        print(f"error: Weights & Biases did not save the workspace: {error}", file=sys.stderr)
        return 1
    return 0


def _sweep(options: argparse.Namespace, settings: list[str]) -> int:
    from lightning_ebm.recipes import sweep

    done = sweep.main(catalog.path_of("sweeps", options.file), options.count, options.seed, root=options.root)
    return int(all("failed" in trial for trial in done))


def _leaderboard(options: argparse.Namespace, settings: list[str]) -> int:
    from lightning_ebm.recipes import leaderboard

    file = catalog.path_of("leaderboards", options.file)
    leaderboard.main(file, options.root, dict(options.dir), options.page, trains=not options.no_train)
    return 0


def _doctor(options: argparse.Namespace, settings: list[str]) -> int:
    from lightning_ebm import doctor

    return doctor.main(self_test=not options.no_test)


_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
    "recipes": _recipes,
    "fit": _fit,
    "report": _report,
    "compare": _compare,
    "workspace": _workspace,
    "sweep": _sweep,
    "leaderboard": _leaderboard,
    "doctor": _doctor,
}
