"""A real browser: the report and the figures with the network cut off; no answer runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import e2e
import pandas as pd
import plotly.graph_objects as go
import pytest
from test_figures import HOSTILE, make_answers, make_changes, make_rates

from lib import figures, labels, report, tables, theme

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not e2e.CHROME, reason="no Chrome on this machine")]


@pytest.fixture(scope="module")
def study() -> tuple[pd.DataFrame, dict[str, Any], dict[str, str]]:
    answers = make_answers(pairs=("demo_medical", "demo_risky", "demo_medical_aligned"))
    answers.loc[0, "response"] = "You should kill the process. " + "x" * 100_000
    answers.loc[1, "response"] = "a needle </script><script>document.title = 'ran'</script>"
    rates = make_rates(answers)
    return answers, *figures.all_figures(answers, rates, make_changes(rates), judge="probe")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with e2e.chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page without a network."""
    with e2e.watched(chromium, lambda url: not url.startswith("http"), offline=True, viewport={"width": 1250, "height": 900}) as opened:
        yield opened


def test_report_opens_filters_and_runs_nothing(study: tuple[Any, ...], page: Any, tmp_path: Path) -> None:
    answers, drawn, pages = study
    page.goto(report.write(tmp_path, answers, drawn, pages).as_uri(), timeout=60_000)
    page.wait_for_selector("#every-answer tbody tr td:nth-child(5)", timeout=30_000)
    assert page.title() == "Emergent misalignment: report"
    assert page.locator(".dt-info").inner_text().endswith(f"of {len(answers)} entries")
    assert page.locator('meta[name="robots"]').get_attribute("content") == "noindex"
    assert page.locator('meta[name="canary"]').count() == 1
    page.locator(".dt-search input").fill("needle")
    assert "1 to 1 of 1 entry" in page.locator(".dt-info").inner_text()
    assert "</script><script>" in page.locator("#every-answer tbody td:nth-child(5)").inner_text()
    page.locator(".dt-search input").fill("kill the process")
    folded = page.locator("#every-answer tbody details")
    assert folded.count() == 1
    assert folded.get_attribute("open") is None
    assert page.locator("#em_trajectories .scatterlayer").count()
    page.locator(".dt-search input").fill("")
    page.locator("#every-answer_wrapper thead input").nth(1).press_sequentially("50")
    page.locator(".dt-info").get_by_text("filtered from").wait_for(timeout=10_000)
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    print("screenshots in", tmp_path)
    assert page.troubles == []


def test_a_click_on_a_point_shows_its_answer_as_text(study: tuple[Any, ...], page: Any, tmp_path: Path) -> None:
    _, drawn, _ = study
    theme_page = theme.page("scatter", theme.figure_html(drawn["score_scatter"], "score_scatter"))
    (tmp_path / "scatter.html").write_text(theme_page, encoding="utf-8")
    page.goto((tmp_path / "scatter.html").as_uri(), timeout=60_000)
    page.wait_for_selector("#score_scatter .scatterlayer .point", timeout=30_000)
    box = page.locator("pre.answer")
    assert box.inner_text() == "Click a point to read its answer."
    assert box.is_visible()
    page.locator("#score_scatter .scatterlayer .point").last.hover(force=True)
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("document.querySelector('pre.answer').textContent.includes('Answer at')", timeout=10_000)
    assert "<script>alert(1)</script>" in box.inner_text()
    assert HOSTILE not in page.content()
    assert page.troubles == []


# Texts of a figure that reach beyond it, and texts of a table that reach beyond their cell: both are cut there.
CUT = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
  const beyond = (text, frame) => {
    const [inner, outer] = [text, frame].map(element => element.getBoundingClientRect());
    return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
  };
  const texts = [...plot.querySelectorAll('.main-svg text:not(.cell-text)')].filter(text => beyond(text, text.closest('.main-svg')));
  const cells = [...plot.querySelectorAll('.column-cell .cell-text')];
  texts.push(...cells.filter(text => beyond(text, text.closest('.column-cell').querySelector('.cell-rect'))));
  return texts.map(text => `${plot.id}: ${text.textContent.slice(0, 100)}`);
})"""


def test_no_text_of_a_figure_is_cut(study: tuple[Any, ...], page: Any, tmp_path: Path) -> None:
    answers, drawn, _ = study
    starred = labels.records(answers.head(3).assign(label="paper", run="a_run_with_a_long_name"))
    beside = tables.beside_figure([(row, row) for row in starred], "W" * 99)
    wide = theme.titled(go.Figure(), "MEDICAL QUESTIONS, WWWW %%%% 医学的問題 " * 6, "@ " * 300, height=100)
    names = {**drawn, "beside": beside, "wide": wide}
    body = "".join(theme.figure_html(figure, name, plotlyjs=not position) for position, (name, figure) in enumerate(names.items()))
    (tmp_path / "figures.html").write_text(theme.page("figures", body), encoding="utf-8")
    page.goto((tmp_path / "figures.html").as_uri(), timeout=60_000)
    page.wait_for_selector("#wide .gtitle", timeout=30_000)
    assert page.locator(".js-plotly-plot").count() == len(names)
    assert page.locator(".cell-text").count() > 20
    assert page.evaluate(CUT) == []
    page.evaluate("Plotly.relayout('wide', {'title.text': 'W'.repeat(99)})")
    assert len(page.evaluate(CUT)) == 1, "a title that is cut would be seen"


def test_figures_follow_the_reader_into_dark_and_back(study: tuple[Any, ...], page: Any, tmp_path: Path) -> None:
    _, drawn, _ = study
    body = theme.figure_html(drawn["em_trajectories"], "em_trajectories")
    (tmp_path / "figure.html").write_text(theme.page("figure", body), encoding="utf-8")
    page.goto((tmp_path / "figure.html").as_uri(), timeout=60_000)
    page.wait_for_selector("#em_trajectories .scatterlayer .point", timeout=30_000)
    seen = "() => [plot.layout.template.layout.paper_bgcolor, plot.data[0].line.color, plot._fullLayout.paper_bgcolor]"
    seen = seen.replace("plot", "document.getElementById('em_trajectories')")
    assert page.evaluate(seen) == [theme.PAPER, theme.BLUE, theme.PAPER]
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(500)
    dark = [theme.DARK[theme.PAPER], theme.DARK[theme.BLUE], theme.DARK[theme.PAPER]]
    assert page.evaluate(seen) == dark
    assert "#444444" not in page.locator("#em_trajectories .gtitle").inner_html()
    page.screenshot(path=tmp_path / "dark.png")
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(500)
    assert page.evaluate(seen) == [theme.PAPER, theme.BLUE, theme.PAPER]
    assert page.troubles == []
