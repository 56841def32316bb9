"""The documentation runs: every Python block of a page, in order, in one namespace; every file it names exists."""

import functools
import html
import http.server
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning_modules import Template
from since import newer

import lightning_ebm as ebm
from lightning_ebm.energies import CONJUGATES

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def blocks(page, language):
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks={"deploy": pytest.mark.slow, "multi-gpu": newer}.get(page.stem, ()))
        for page in PAGES
        if blocks(page, "python")
    ],
    ids=lambda page: page.stem,
)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registered = dict(CONJUGATES)  # a page adds one, which other tests must not see
    monkeypatch.setattr("lightning_ebm.energies.conjugates.CONJUGATES", registered)
    monkeypatch.setattr("lightning_ebm.energies.CONJUGATES", registered)
    space: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_of_python_is_too_long_for_the_site(page):
    """100 characters are what the column of text holds at 1300 pixels, see site.css."""
    long = [line for block in blocks(page, "python") for line in block.splitlines() if len(line) > 100]
    assert not long


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
        ebm.RelaxationMonitor(1, regime_every_n_steps=1, curvature_every_n_steps=1),
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
    for kind in (
        "ebm/residual/layer/",
        "ebm/toward_equilibrium/layer/",
        "alignment/layer/cosine/net/",  # dots of names are slashes
        "alignment/cosine/net/",
    ):
        assert kind in text
        assert any(name.startswith(kind) for name in logged), sorted(logged)


def test_every_page_is_in_the_navigation():
    """And in a group with others: nobody finds a way through seventeen in a row."""
    settings = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text())
    groups = [next(iter(entry.values())) for entry in yaml.safe_load(settings)["nav"]]
    found = [page if isinstance(page, str) else next(iter(page.values())) for group in groups for page in group]
    assert sorted(found) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)
    assert len(groups) == 5


def shown_of(page):
    """The text of a built page as a reader sees it, without blanks: lines break elsewhere there."""
    return "".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A broken link, a missing page or an unknown name in the reference fails the build."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT, capture_output=True,
        text=True, env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "true", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_examples_of_the_reference_stand_as_code(site):
    """Under a heading that Google's style does not know, `>>>` is a quote in a quote in a quote."""
    pages = [page.read_text() for page in (site / "reference").rglob("index.html")]
    assert not any("<blockquote>" in page for page in pages)
    assert sum(page.count('<span class="gp">&gt;&gt;&gt; </span>') for page in pages) > 10


def test_every_public_name_is_documented_and_no_formula_is_lost(site):
    pages = {page: page.read_text() for page in (site / "reference").rglob("index.html")}
    ids = {path for text in pages.values() for path in re.findall(r'id="(lightning_ebm\.[\w.]+)"', text)}
    documented = {path.rsplit(".", 1)[1] for path in ids}
    modules = {"depth", "evaluations", "metrics", "reference", "regime", "testing", "updates"}
    assert set(ebm.__all__) - modules <= documented
    assert {
        "lightning_ebm.relaxers.Relaxer.relax",
        "lightning_ebm.reports.runs.read",
        "lightning_ebm.step.report.Report",
    } <= ids
    lost = []
    for page in pages.values():
        text = shown_of(page)
        for path in sorted(set(re.findall(r'id="(lightning_ebm\.[\w.]+)"', page))):
            owner, _, name = path.rpartition(".")
            docstring = inspect.getdoc(getattr(pkgutil.resolve_name(owner), name, None)) or ""  # attributes have none
            # Scalar products are eaten as HTML, stars as emphasis.
            plain = re.sub(r"(?<![\w)])\*+[\w ]+\*+", "", docstring)  # without what is meant to be emphasised
            for formula in re.findall(r"<(?![-=\s])[^<>]+>|[\w)]\*\S*", plain):
                if "".join(formula.replace("`", "").split()) not in text:
                    lost.append((path, formula))
    assert not lost, "Put these into code spans: " + "; ".join(f"{formula} in {path}" for path, formula in lost)


def formulas(page):
    """What stands between the marks of a formula, outside code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", text, re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if formulas(page)], ids=lambda page: page.stem)
def test_no_formula_of_a_page_is_lost_on_its_way_to_html(site, page):
    name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
    text = shown_of((site / name).read_text())
    for formula in formulas(page):
        assert "".join("".join(formula).split()) in text, formula


def test_pages_have_neighbors_a_dark_mode_and_ask_no_other_server(site):
    for page in site.rglob("index.html"):
        text = page.read_text()
        assert "md-footer__link" in text
        assert 'data-md-color-scheme="slate"' in text
        assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', text), page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium to see the pages in a browser")
def test_formulas_are_set_as_mathematics_in_a_real_browser(site):
    """Every one of them, and none with an error."""
    page = ROOT / "docs" / "algorithms.md"
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={site.parent / 'profile'}",
            "--virtual-time-budget=8000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/algorithms/",
        ]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        server.shutdown()
    assert dom.count('<span class="katex">') == len(formulas(page)) > 40
    assert "katex-error" not in dom
    marks = re.findall(r"\\\)([,.;:]+)(?=\s)", page.read_text())  # none of them may begin a line of its own
    assert len(re.findall(r"[,.;:]</span></span></span></span>", dom)) == len(marks) > 5
