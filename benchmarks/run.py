"""What a training step costs: this library against backprop, against plain torch, and against other libraries.

    python benchmarks/run.py --page docs/benchmarks.md

About 25 minutes on one CPU core; what is measured at two threads needs two that nobody else uses. All contenders of a
table take turns, so that what else the machine does falls on all of them. Other libraries live in interpreters of their
own, ``--python venv/bin/python``, any number of them: one with jax, optax and fabricpc, one with pcx.
"""

import argparse
import datetime
import logging
import sys
import warnings
from pathlib import Path

import torch
from page import Settings
from sections import SECTIONS
from timing import machine

HEAD = """# Benchmarks

Whole training steps in float32 unless a section says otherwise, medians of up to {repeats} turns, with all
contenders in an order that changes. "Backprop steps" is the ratio to backprop on the same network with the same
optimizer in the same run. At one thread it is CPU time of the process, at two wall time. On a machine that others
use, ratios are to be trusted more than milliseconds. Each section says when it was measured, and where. Made by
`python benchmarks/run.py --page docs/benchmarks.md`."""


def main(arguments: list[str] | None = None) -> None:
    """Prints the page, or writes it; `arguments` instead of the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="parts of the page")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also through torch.compile: in ep, peers and first, some 7 minutes of compiling",
    )
    parser.add_argument("--python", action="append", default=[], help="an interpreter that has another library")
    parser.add_argument("--page", type=Path, help="where the page is; of its parts, those of this run are replaced")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_ebm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings = Settings(given.repeats, given.compile, [sys.executable, *given.python])
    parts = _parts(given.page)
    for name in given.only:
        torch.manual_seed(0)
        when = f"{datetime.date.today()}, {machine()}"
        lines = []
        for text in SECTIONS[name](settings):
            print(text, flush=True)
            lines.append(text)
        title, _, rest = "\n".join(lines).partition("\n")
        parts[name] = f"{title}\n\n*{when}*\n{rest}"
    if given.page is not None:
        whole = "".join(f"\n\n<!-- {name} -->\n{parts[name]}" for name in SECTIONS if name in parts)
        given.page.write_text(HEAD.format(repeats=given.repeats) + whole + "\n")


def _parts(page: Path | None) -> dict[str, str]:
    text = page.read_text() if page is not None and page.exists() else ""
    pieces = text.split("\n\n<!-- ")[1:]
    return {name: body.strip("\n") for name, _, body in (piece.partition(" -->\n") for piece in pieces)}


if __name__ == "__main__":
    main()
