"""python -m lightning_ebm report RUN_DIR: one HTML file about a run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_ebm import html_report, runs
from lightning_ebm.advice import verdict
from lightning_ebm.errors import EBMError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_ebm", description="What a run left behind.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="writes one self-contained HTML file about a run")
    report.add_argument("run_dir", type=Path, help="lightning_logs/version_0, wandb/offline-run-..., ...")
    report.add_argument("-o", "--output", type=Path, help="where to; RUN_DIR/report.html if not given")
    options = parser.parse_args(arguments)
    try:
        run = runs.read(options.run_dir)
        target = options.output or options.run_dir / "report.html"
        target.write_text(html_report.page(run), encoding="utf-8")
    except (EBMError, ModuleNotFoundError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{': '.join(verdict(run.records))}\n{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
