"""A clean machine: the wheel in an empty environment, no clone; what the README promises works there."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`lightning-ebm` of an environment into which the wheel was installed; what it needs is lent by this one."""
    home = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(home), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = home.glob("*.whl")
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    site = next((home / "venv" / "lib").glob("python*/site-packages"))
    environment = {**os.environ, "PYTHONPATH": ""}
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, env=environment)
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages", "site"))]
    (site / "lent.pth").write_text("\n".join(lent or [sysconfig.get_path("purelib")]) + "\n")

    def run(*words, where):
        script = home / "venv" / "bin" / "lightning-ebm"
        quiet = {"PATH": "/usr/bin:/bin", "HOME": str(home), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        return subprocess.run([str(script), *words], cwd=where, env=quiet, capture_output=True, text=True)

    origin = subprocess.run(
        [str(python), "-c", "import lightning_ebm; print(lightning_ebm.__file__)"], cwd=home,
        env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert origin.stdout.startswith(str(home))  # the wheel, and not this checkout
    return run


@pytest.mark.slow
def test_recipes_report_and_compare_without_a_clone(command, tmp_path):
    small = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]
    for name in ("predictive-coding", "pc-nudge"):
        done = command("recipes", "run", "digits", *small, "--algorithm", name, "--name", name, where=tmp_path)
        assert done.returncode == 0, done.stderr
    done = command("report", "runs/pc-nudge", where=tmp_path)
    assert done.returncode == 0, done.stderr
    page = Path(tmp_path, done.stdout.split()[-1]).read_text()
    assert "val/accuracy" in page
    assert "OneSided(strength=0.0001)" in page
    done = command("compare", "runs/predictive-coding", "runs/pc-nudge", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pc-nudge" in (tmp_path / "comparison.html").read_text()


@pytest.mark.slow
def test_everything_else_is_in_the_wheel_too(command, tmp_path):
    for words in (["recipes", "list"], ["doctor", "--no-test"], ["recipes", "show", "mnist-ep"]):
        done = command(*words, where=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout
