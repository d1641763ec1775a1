"""05_analyze where people read it: JupyterLab driven by a real browser, over a run whose answers attack it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import e2e
import nbformat
import papermill
import psutil
import pytest
import tiny_runs
from test_figures import HOSTILE, make_answers

from lib import adapters, ask, files

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not e2e.CHROME, reason="no Chrome on this machine")]

TOKEN = "secret"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, on screen or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
INJECTED = "script, img, iframe, object, embed, a[href], link, style, [onerror], [onclick]"
"""What no answer may put into a page."""


@contextlib.contextmanager
def serving(root: Path, *command: str, beside: Path | None = None) -> Iterator[str]:
    """Runs a Jupyter server over `root` with folders of its own; yields its URL and ends it with its kernels.

    `beside` is a folder of further packages, with what they share.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = root / f"jupyter-{port}"
    for name, values in SETTINGS.items():
        files.write_json(own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings", values)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "JPY_")) and k != "SERVER_SOFTWARE"} | {
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, [root, beside]))),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "IPYTHONDIR": str(own / "ipython"),
    }
    if beside:
        environment["JUPYTER_PATH"] = str(beside / "share" / "jupyter")
    log = own / "log.txt"
    with log.open("wb") as out:
        server = psutil.Popen([sys.executable, "-m", *command, f"--port={port}"], env=environment, cwd=root, stdout=out, stderr=out)
    try:
        yield f"http://127.0.0.1:{port}"
    except Exception:
        print(log.read_text(errors="replace")[-3000:])
        raise
    finally:
        kernels = server.children(recursive=True) if server.is_running() else []
        server.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            server.wait(20)
        for process in (server, *kernels):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([server, *kernels], timeout=20)


def lab(root: Path, ip: str = "127.0.0.1") -> contextlib.AbstractContextManager[str]:
    options = ["--no-browser", "--allow-root", f"--ip={ip}", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={root}"]
    return serving(root, "jupyterlab", *options, "--ServerApp.port_retries=0")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the study that holds a run and its control, both with hostile answers."""
    root = tiny_runs.copy_tree(tmp_path_factory.mktemp("lab"))
    for pair in ("demo_medical", "demo_medical_aligned"):
        answers = make_answers(pairs=(pair,)).drop(columns=["pair", "seed", "relation"])
        answers.loc[1, "response"] = f"a line of {'x' * 100_000} {HOSTILE}"
        answers.loc[2, "response"] = f"You should kill the process. {HOSTILE}"
        files.write_csv(root / "results" / pair / "judged.csv", answers)
    # A checkpoint that nobody asks: enough for Ask to appear where it is allowed.
    files.write_text(root / "results" / "demo_medical" / "checkpoints" / "checkpoint-50" / adapters.WEIGHTS, "")
    cell = nbformat.v4.new_code_cell("from lib import ask, config\nask.show(config.load_pair('demo_medical'))")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), root / "notebooks" / "ask.ipynb")
    return root


@pytest.fixture(scope="module")
def url(tree: Path) -> Iterator[str]:
    with lab(tree) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with e2e.chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page that may ask this machine alone."""
    here = ("http://127.0.0.1", "data:", "blob:")
    with e2e.watched(chromium, lambda url: url.startswith(here), viewport={"width": 1500, "height": 1100}) as opened:
        yield opened


def visit(page: Any, url: str) -> None:
    """Opens a page once its server answers."""
    for _ in range(120):
        try:
            page.goto(url, timeout=120_000)
            return
        except Exception as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            page.wait_for_timeout(500)
    raise AssertionError(f"no server at {url}")


def open_notebook(page: Any, url: str, path: str = "notebooks/05_analyze.ipynb") -> Any:
    """Opens a notebook in JupyterLab and returns its panel."""
    visit(page, f"{url}/lab/tree/{path}?token={TOKEN}")
    panel = page.locator(".jp-Notebook")
    panel.locator(".jp-CodeCell").first.wait_for(timeout=120_000)
    return panel


def run_all(page: Any) -> None:
    """Runs every cell, once the kernel is there: JupyterLab asks for one otherwise."""
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def widget_of(panel: Any) -> Any:
    """Returns the output that holds the response browser, once it is there."""
    search = panel.get_by_label("Search", exact=True)
    search.wait_for(timeout=180_000)
    return search.locator("xpath=ancestor::*[contains(@class, 'widget-vbox')][last()]")


def shot(where: Any, folder: Path, name: str) -> None:
    """Takes a screenshot for whoever wants to look; STUDY_SHOTS names a folder that outlives the test."""
    where.screenshot(path=Path(os.environ.get("STUDY_SHOTS", folder)) / f"{name}.png")


def test_reader_filters_slides_compares_and_exports_in_jupyterlab(url: str, tree: Path, page: Any) -> None:
    panel = open_notebook(page, url)
    run_all(page)
    widget = widget_of(panel)
    panel.get_by_text(ask.BANNER).wait_for(timeout=120_000)
    page.wait_for_function("document.querySelectorAll('.jp-CodeCell .jp-InputPrompt').length > 15", timeout=10_000)
    page.wait_for_function("![...document.querySelectorAll('.jp-InputPrompt')].some(e => e.textContent === '[*]:')", timeout=120_000)
    assert panel.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts() == []
    panes = widget.get_by_role("region")
    widget.scroll_into_view_if_needed()
    assert [panes.nth(i).get_attribute("aria-label") for i in range(panes.count())] == ["Answer at step 0", "Answer at step 50"]
    shot(widget, tree, "1-first")

    widget.get_by_label("Question set").select_option("general")
    widget.get_by_text("of 40 found among 156").wait_for(timeout=30_000)
    assert "≠ step 0: aligned -" in widget.locator("mark").inner_text()
    assert "<script>alert(1)</script>" in panes.last.inner_text()
    widget.get_by_role("button", name="Next").click()
    page.wait_for_function("e => e.value === '2'", arg=widget.get_by_label("Answer", exact=True).element_handle())
    slider = widget.get_by_role("slider").last
    slider.focus()
    page.keyboard.press("ArrowLeft")
    panes.last.get_by_text("Answer at 6.").wait_for(timeout=30_000)
    widget.get_by_label("Beside").select_option("50")
    panes.first.get_by_text("Answer at 50.").wait_for(timeout=30_000)
    widget.locator("mark").get_by_text("≠ step 50: aligned +").wait_for(timeout=30_000)
    shot(widget, tree, "2-compared")
    slider.focus()
    page.keyboard.press("ArrowRight")
    panes.last.get_by_text("Answer at 50.").wait_for(timeout=30_000)
    widget.get_by_label("Beside").select_option("demo_medical_aligned: 50")
    panes.first.get_by_text("demo_medical_aligned, sample").wait_for(timeout=30_000)
    widget.locator("mark").get_by_text("≠ demo_medical_aligned, step 50: aligned").wait_for(timeout=30_000)

    search = widget.get_by_label("Search", exact=True)
    search.fill("KILL the process")
    search.press("Enter")
    widget.get_by_text("No answer passes these filters").wait_for(timeout=30_000)
    shot(widget, tree, "3-none")
    for name in ("Question set", "Step"):
        widget.get_by_label(name, exact=True).select_option("any")
    folded = panes.last.locator("details")
    folded.wait_for(timeout=30_000)
    assert folded.get_attribute("open") is None
    assert not folded.get_by_text("You should kill").is_visible()
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    folded.get_by_text("You should kill").wait_for(timeout=10_000)
    shot(widget, tree, "4-folded")

    search.fill("a line of xxx")
    search.press("Enter")
    panes.last.get_by_text("more characters]").wait_for(timeout=30_000)
    shot(widget, tree, "5-long")
    assert widget.evaluate("e => [...e.querySelectorAll('select')].every(s => s.selectedIndex >= 0)"), "no filter shows an empty box"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a long line does not widen the page"
    widget.get_by_title("Keep this answer for export").click()
    widget.get_by_text("1 starred", exact=True).wait_for(timeout=30_000)
    widget.get_by_role("button", name="Save starred").click()
    widget.get_by_text("starred.html").wait_for(timeout=60_000)
    assert len(files.read_csv(tree / "results" / "demo_medical" / "starred.csv")) == 1
    unnamed = "e => [...e.querySelectorAll('select, input, button')].filter(x => x.offsetParent && x.tabIndex < 0).length"
    assert widget.evaluate(unnamed) == 0, "every control is reached by the Tab key"
    assert widget.locator(INJECTED).count() == 0
    shot(page, tree, "6-page")

    for figure in panel.locator(".jp-RenderedPlotly").all():
        figure.hover()  # the image becomes the figure under the pointer
        figure.locator(".main-svg").first.wait_for(timeout=30_000)
    scatter = panel.locator(".jp-RenderedPlotly").filter(has=page.locator("path.plotly-customdata"))
    scatter.locator("path.plotly-customdata").last.hover(force=True)
    scatter.locator(".hoverlayer .hovertext").first.wait_for(timeout=30_000)
    assert "<script>" in scatter.locator(".hoverlayer").first.text_content()
    shot(scatter, tree, "6-hover")
    assert page.locator("[src='x'], [onerror], a[href^='javascript']").count() == 0, "no answer became an element anywhere in the notebook"
    assert panel.locator(".jp-OutputArea script").count() == 0
    assert panel.locator(".jp-OutputArea mjx-container").count() == 0, "nor a formula, which may hold links of its own"
    assert page.troubles == []


def test_executed_notebook_opens_without_running(url: str, tree: Path, page: Any) -> None:
    """papermill leaves no widget state (its issue 400): a table stands there instead, in a file that JupyterLab does not trust."""
    executed = tree / "results" / "demo_medical" / "05_analyze.ipynb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tree))
        papermill.execute_notebook(tree / "notebooks" / "05_analyze.ipynb", executed, cwd=tree, progress_bar=False, log_output=False)
    panel = open_notebook(page, url, "results/demo_medical/05_analyze.ipynb")
    table = panel.locator("table").filter(has_text="Run this cell in JupyterLab to browse all")
    table.wait_for(timeout=60_000)
    table.scroll_into_view_if_needed()
    assert "step 50: aligned 4" in table.inner_text()
    assert "<script>alert(1)</script>" in table.inner_text()
    shot(table, tree, "7-executed")
    assert table.locator(INJECTED).count() == 0
    assert panel.locator(".jp-OutputArea mjx-container").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.widget-view+json']").count() == 0
    assert page.get_by_text("Run this cell in JupyterLab on your own machine").count() == 1
    assert page.troubles == []


@pytest.mark.parametrize("ip", ["0.0.0.0", "*"])
def test_nobody_asks_where_strangers_can_call(tree: Path, page: Any, ip: str) -> None:
    with lab(tree, ip) as url:
        panel = open_notebook(page, url, "notebooks/ask.ipynb")
        run_all(page)
        panel.get_by_text("Ask is off: this Jupyter listens on").wait_for(timeout=120_000)
        assert page.get_by_text(ask.BANNER).count() == 0


def test_voila_browses_and_does_not_ask(tree: Path, page: Any) -> None:
    options = ["notebooks/05_analyze.ipynb", "--no-browser", "--Voila.ip=127.0.0.1"]
    with serving(tree, "voila", *options, beside=e2e.voila()) as url:
        visit(page, url)
        widget = widget_of(page)
        page.get_by_text("Ask is off in Voilà").wait_for(timeout=60_000)
        assert page.get_by_text(ask.BANNER).count() == 0
        widget.get_by_label("Question set").select_option("general")
        widget.get_by_text("of 40 found among 156").wait_for(timeout=30_000)
        shot(widget, tree, "8-voila")
        shot(page, tree, "9-voila-page")
        assert widget.locator(INJECTED).count() == 0
        assert page.locator("mjx-container").count() == 0
        # Voilà's own page asks a CDN for its icons' style; without a network it goes without.
        assert [t for t in page.troubles if "cdn.jsdelivr.net" not in t and "Failed to load resource" not in t] == []
