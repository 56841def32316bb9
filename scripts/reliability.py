"""Everything that is tried before this library is trusted, by one command, and the page with the figures.

    bash scripts/with-venv python scripts/reliability.py                            # all parts, some hours on one core
    bash scripts/with-venv python scripts/reliability.py --only faults soak         # these, and the page
    bash scripts/with-venv python scripts/reliability.py --only suite --lightning /tmp/lightning
    bash scripts/with-venv python scripts/reliability.py --only nothing             # the page alone

Each part leaves a JSON file in `docs/reliability`, from which `docs/reliability.md` is written between its marks; what
has not been run is said not to have been.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

Result = dict[str, Any]


class Part(NamedTuple):
    """What is tried.

    Attributes:
        title: in the table.
        command: its words after the interpreter, the file for the result left out; None takes `tests`.
        tests: files of the test suite.
        says: the figures, from the result.
    """

    title: str
    command: tuple[str, ...] | None
    tests: tuple[str, ...]
    says: Callable[[Result], str]


def of_fuzz(found: Result) -> str:
    equal = sum(found["equal"].values()) if isinstance(found["equal"], dict) else found["equal"]
    return (
        f"{found['programs']:,} programs, {found['steps']:,} steps: {equal:,} comparisons equal, {found['refused']:,}"
        f" steps refused in words, **{found['wrong']} wrong**"
    )


def of_mutants(found: Result) -> str:
    noticed = found["noticed"]
    survivors = [name for name, caught in noticed.items() if not caught]
    rest = f"; not yet: {', '.join(survivors)}" if survivors else ""
    return f"{sum(noticed.values())} of {len(noticed)} tried are noticed (of {found['listed']} listed){rest}"


def of_soak(found: Result) -> str:
    return (
        f"{found['steps']:,} steps, {found['lives']:,} networks made and dropped, {found['gone']:,} objects gone;"
        f" memory {found['rss_early']:.0f} MiB in the second fifth, {found['rss_late']:.0f} in the last; Python's"
        f" blocks {found['blocks_early']:.0f} and {found['blocks_late']:.0f} thousand; at most {found['most_programs']}"
        f" programs kept; left behind: {', '.join(found['faults']) or 'nothing'}"
    )


def of_tests(found: Result) -> str:
    failed = f", **{found['failed']} failed**" if found["failed"] else ""
    skipped = f", {found['skipped']} skipped" if found["skipped"] else ""
    return f"{found['passed']} cases passed{failed}{skipped}"


def of_suite(found: Result) -> str:
    return (
        f"Lightning {found['version']}: {found['passed']:,} of the {found['passed_in_stock']:,} tests that pass in"
        f" stock pass; {len(found['expected'])} are expected not to, {len(found['wrong'])} are wrong"
    )


def of_numerics(found: Result) -> str:
    rows = found["precisions"]
    near = {kind: sum(row[kind]["cosine"] > 0.999 for row in rows.values()) for kind in ("bf16-mixed", "16-mixed")}
    worst = max(row["float32"]["relative_error"] for row in rows.values())
    return (
        f"{len(rows)} algorithms: float32 moves an update by at most {worst:.0e} of its size; the cosine to float64"
        f" is above 0.999 for {near['bf16-mixed']} of them in bf16-mixed, and for {near['16-mixed']} in 16-mixed:"
        " [which](numerics.md)"
    )


PARTS = {
    "fuzz": Part(
        "Random programs against four oracles",
        ("scripts/fuzz_programs.py", "--programs", "3000", "--steps", "5"), (), of_fuzz,
    ),
    "mutants": Part("Sabotages of the package", ("scripts/mutation_test.py",), (), of_mutants),
    "soak": Part("Many steps in one process", ("scripts/soak.py", "--steps", "100000"), (), of_soak),
    "configuration": Part("Arguments that mean nothing", None, ("configuration", "mistakes"), of_tests),
    "faults": Part(
        "Batches, processes, disks and loggers that fail", None,
        ("faults", "stopped", "resume", "bad_input", "observers", "lost_processes"), of_tests,
    ),
    "processors": Part("Processors imitated on one machine", None, ("processors",), of_tests),
    "numerics": Part("Numbers of 32 and 16 bits", ("scripts/numerics.py",), (), of_numerics),
    "suite": Part("Lightning's own tests", ("scripts/lightning_suite.py",), (), of_suite),
}  # fmt: skip


def tested(files: tuple[str, ...]) -> Result:
    """What became of these files of the test suite."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        names = [str(ROOT / "tests" / f"test_{name}.py") for name in files]
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", f"--junitxml={report}", *names]
        subprocess.run(command, cwd=ROOT)
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped}


def run(part: Part, file: Path, lightning: Path | None) -> None:
    """Runs a part, and leaves what came of it, on what, in a file."""
    began = time.monotonic()
    if part.command is None:
        found = tested(part.tests)
    else:
        script, *words = part.command
        given = [str(lightning)] if script.endswith("lightning_suite.py") else []
        subprocess.run([sys.executable, script, *given, *words, "--json", str(file)], cwd=ROOT)
        found = json.loads(file.read_text())
    found |= {"minutes": round((time.monotonic() - began) / 60), **machine()}
    file.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> dict[str, str]:
    """What it ran on."""
    names = {"Python": platform.python_version(), "torch": version("torch"), "lightning": version("lightning")}
    return {"on": f"{platform.machine()}, " + ", ".join(f"{name} {number}" for name, number in names.items())}


def figures(folder: Path) -> str:
    """The table, from what lies in a folder."""
    rows = ["| what is tried | what came of it | on |", "| --- | --- | --- |"]
    for name, part in PARTS.items():
        file = folder / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text())
            rows.append(f"| {part.title} | {part.says(found)} | {found.get('on', 'unknown')} |")
        else:
            rows.append(f"| {part.title} | not run for this page | |")
    return "\n".join(rows)


def with_figures(page: str, table: str) -> str:
    """The page with the table between its marks."""
    between = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    if not between.search(page):
        raise SystemExit(f"{PAGE} has no place for the figures, between {BEGIN} and {END}.")
    return between.sub(lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "nothing"], help="parts to run")
    parser.add_argument("--lightning", type=Path, help="a checkout of Lightning, for the part `suite`")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability", help="where results lie")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    for name, part in PARTS.items():
        if options.only is not None and name not in options.only:
            continue
        if name == "suite" and options.lightning is None:
            print("suite: left out, as no --lightning PATH is given")
            continue
        print(f"{name}: {part.title}", flush=True)
        run(part, options.out / f"{name}.json", options.lightning)
    PAGE.write_text(with_figures(PAGE.read_text(), figures(options.out)))


if __name__ == "__main__":
    main()
