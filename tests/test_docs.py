"""The documentation runs: every Python block of a page, in order, in one namespace; every file it names exists."""

import html
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning_modules import Template

import lightning_ebm as ebm

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page, language):
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_recipe_that_a_page_names_exists(page):
    for name in re.findall(r"recipes/[\w/.-]+\.(?:py|yaml)", page.read_text()):
        assert (ROOT / name).exists(), name


def test_every_preset_that_the_decision_page_names_exists():
    text = (ROOT / "docs" / "choose.md").read_text()
    named = set(re.findall(r'`"([a-z-]+)"`', text)) | set(re.findall(r'ebm\.algorithm\("([a-z-]+)"', text))
    assert named
    assert named <= {*ebm.algorithms(), "auto"}  # of relaxers, what finds one


@pytest.mark.filterwarnings("ignore")
def test_the_panels_on_the_page_are_those_that_are_logged():
    """Every scalar that a fit logs is named on the page, and every scalar named there is logged."""
    callbacks = [
        ebm.GradientAlignment(1, reference=["backprop", "equilibrium"]),
        ebm.RelaxationMonitor(1, regime_every_n_steps=1),
    ]
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy("predictive-coding"), callbacks=callbacks, max_epochs=1, accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Template(batch_norm=False, dropout=0.0))
    logged = {name for name in trainer.callback_metrics if name.startswith(("alignment", "ebm/"))}
    text = (ROOT / "docs" / "panels.md").read_text().partition("## In Weights & Biases alone")[0]
    named = set(re.findall(r"`((?:alignment|ebm)/[\w/.]+)`", text))
    overall = {name for name in logged if len(name.split("/")) == 2}
    assert {name.replace("alignment_equilibrium/", "alignment/") for name in overall} == {
        name for name in named if len(name.split("/")) == 2
    }
    for kind in ("ebm/residual/layer/", "ebm/way/layer/", "alignment/layer/cosine/", "alignment/cosine/net/"):
        assert kind in text
        assert any(name.startswith(kind) for name in logged), sorted(logged)


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert {next(iter(entry.values())) for entry in nav} == {page.name for page in PAGES}


def shown_of(page):
    """The text of a built page as a reader sees it, without blanks: lines break elsewhere there."""
    return "".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())


def test_the_site_builds_strictly_and_documents_every_public_name(tmp_path):
    """A broken link, a missing page or an unknown name in the reference fails the build; no formula is lost in it."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    documented = {path.rsplit(".", 1)[1] for path in re.findall(r'id="(lightning_ebm\.[\w.]+)"', reference)}
    modules = {"metrics", "reference", "regime", "testing"}
    assert set(ebm.__all__) - modules <= documented
    text, lost = shown_of(reference), []
    for path in sorted(set(re.findall(r'id="(lightning_ebm\.[\w.]+)"', reference))):
        owner, _, name = path.rpartition(".")
        docstring = inspect.getdoc(getattr(pkgutil.resolve_name(owner), name, None)) or ""  # attributes have none
        # Scalar products are eaten as HTML, stars as emphasis.
        plain = re.sub(r"(?<![\w)])\*+[\w ]+\*+", "", docstring)  # without what is meant to be emphasised
        for formula in re.findall(r"<(?![-=\s])[^<>]+>|[\w)]\*\S*", plain):
            if "".join(formula.replace("`", "").split()) not in text:
                lost.append((path, formula))
    assert not lost, "Put these into code spans: " + "; ".join(f"{formula} in {path}" for path, formula in lost)
