"""The report in a browser: opened from the disk with the network off, and used. Skipped if there is no browser."""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_pages import HOSTILE, build_page, plant, write_many_rows
from run_folders import write_run

from smollm2.report.reading import read_runs
from smollm2.report.sections import SECTIONS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
SURFACE = "figure[data-chart=surface] .plot"
UNDRAWN = ".plot:not(:has(.main-svg))"
DRAWN = f"document.querySelectorAll('{UNDRAWN}').length === 0"
DRAWN_FIRST = f"[...document.querySelectorAll('{UNDRAWN}')].every(one => one.getBoundingClientRect().top > innerHeight)"
"""Those that the reader sees: the others are drawn when the reader comes near."""

COLLAPSED = "Object.fromEntries([...document.querySelectorAll('.collapsed')].map(one => [one.parentNode.id, one.open]))"
"""Whether each section that can be collapsed is open."""

BUSY_SECONDS = 200
"""A page draws in two seconds; a machine that runs other tests may need much longer."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """An opened page, with its errors and its requests."""

    def __init__(
        self, browser: Any, path: Path, width: int = 1440, theme: str = "light", *, scrolls: bool = True
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(BUSY_SECONDS * 1000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        tools = self.context.new_cdp_session(self.page)
        tools.send("Performance.enable")
        began = time.perf_counter()
        self.page.goto(path.as_uri())
        self.page.wait_for_function(DRAWN_FIRST)
        self.seconds = time.perf_counter() - began
        measured = {one["name"]: one["value"] for one in tools.send("Performance.getMetrics")["metrics"]}
        self.cpu_seconds = float(measured["ThreadTime"])
        self.drawn_first = self.page.locator(".plot:has(.main-svg)").evaluate_all(
            "all => all.map(one => one.closest('figure').dataset.chart)"
        )
        self.collapsed_first = self.page.evaluate(COLLAPSED)
        if scrolls:
            self.scroll_through()

    def scroll_through(self) -> None:
        """Scroll down and back, as a reader does, so that everything is drawn."""
        for figure in self.page.locator("figure[data-chart]").all():
            figure.scroll_into_view_if_needed()
        self.page.wait_for_function(DRAWN)
        self.page.evaluate("scrollTo(0, 0)")

    def points(self, figure: int, trace: int) -> dict[str, Any]:
        """Return the points of a trace."""
        plot = "document.querySelectorAll('.plot')"
        return dict(self.page.evaluate(f"(({{x, y, type}}) => ({{x, y, type}}))({plot}[{figure}].data[{trace}])"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that has everything."""
    run = write_run(tmp_path_factory.mktemp("runs"))
    (run / "report.html").write_text(build_page(read_runs([run])), encoding="utf-8")
    return run / "report.html"


@pytest.fixture(scope="module")
def shared(browser: Any, path: Path) -> Visit:
    return Visit(browser, path)


@pytest.fixture
def visit(shared: Visit) -> Visit:
    """Return the page with its controls as on the first load: loading it again would take seconds per test, and so would
    drawing again what no test has changed."""
    shared.page.evaluate(
        "const changed = e => e.checked !== e.defaultChecked || (e.type !== 'radio' && e.value !== e.defaultValue);"
        "for (const form of document.querySelectorAll('form')) if ([...form.querySelectorAll('input')].some(changed)) {"
        " form.reset(); form.querySelectorAll('input').forEach(e => e.dispatchEvent(new Event('input', {bubbles: true}))); }"
        "if (document.documentElement.dataset.theme === 'dark') document.querySelector('#theme').click();"
        "for (const details of document.querySelectorAll('details')) details.open = true;"
    )
    return shared


def test_it_opens_without_an_error_or_a_request_and_draws_every_chart(shared: Visit, path: Path) -> None:
    assert shared.errors == []
    assert set(shared.requests) == {path.as_uri()}
    assert shared.page.locator(".plot .main-svg").count() >= 9
    assert shared.page.locator("main > section").evaluate_all("all => all.map(one => one.id)") == [
        s.id for s in SECTIONS
    ]
    assert shared.page.locator("main > section").evaluate_all("all => all.every(one => one.offsetHeight > 40)")


def test_a_figure_is_drawn_when_the_reader_comes_near(shared: Visit) -> None:
    assert "curves" in shared.drawn_first and "surface" not in shared.drawn_first
    assert shared.page.locator(f"{SURFACE} .main-svg").count() > 0


def test_collapsed_sections_are_opened_by_their_links(shared: Visit) -> None:
    sections = {"checks", "config", "machine", "events"}
    assert shared.collapsed_first == dict.fromkeys(sections, False)
    shared.page.evaluate("for (const one of document.querySelectorAll('.collapsed')) one.open = false")
    shared.page.locator("nav a[href='#machine']").click()
    assert shared.page.evaluate(COLLAPSED) == {section: section == "machine" for section in sections}


def test_the_keyboard_reaches_every_control_visibly(visit: Visit) -> None:
    page = visit.page
    page.evaluate("(({body}) => { body.tabIndex = -1; body.focus(); body.removeAttribute('tabindex') })(document)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    seen = set()
    for _ in range(110):
        page.keyboard.press("Tab")
        name, width = page.evaluate(
            "(({activeElement: e}) => [e.id || e.name || e.dataset.move || e.dataset.tool || e.textContent.slice(0, 20), "
            "parseFloat(getComputedStyle(e.matches('.choices input') ? e.nextElementSibling : e).outlineWidth)])(document)"
        )
        seen.add(name)
        assert width >= 2 or name == "", name
    assert {
        "theme",
        "axis",
        "smoothing",
        "log",
        "reset",
        "png",
        "csv",
        "round",
        "measure",
        "form",
        "given",
        "Copy",
    } <= seen
    page.locator("[name=axis]").first.focus()
    page.keyboard.press("ArrowRight")
    assert visit.points(0, 0)["x"][-1] == 400 * 2048


@pytest.mark.parametrize(("width", "theme"), [(1440, "dark"), (390, "dark"), (390, "light"), (1440, "light")])
def test_it_fits_every_width_and_uses_the_systems_theme(shared: Visit, width: int, theme: str) -> None:
    shared.page.set_viewport_size({"width": width, "height": 900})
    shared.page.emulate_media(color_scheme=theme)
    shared.page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
    assert shared.page.evaluate("document.documentElement.scrollWidth") <= width
    shade = shared.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(shade.removeprefix("rgb(").split(",")[0]) < 128) == (theme == "dark")
    assert shared.errors == []


def test_the_curves_are_drawn_against_the_chosen_axis(visit: Visit) -> None:
    page = visit.page
    assert visit.points(0, 0)["x"][-1] == 400
    page.get_by_label("tokens", exact=True).check(force=True)
    assert visit.points(0, 0)["x"][-1] == 400 * 2048
    page.get_by_label("seconds", exact=True).check(force=True)
    assert 50 < visit.points(0, 0)["x"][-1] < 100
    page.get_by_label("Log axis").check()
    assert page.evaluate("document.querySelectorAll('.plot')[0].layout.yaxis.type") == "log"


def test_smoothing_draws_the_mean_over_the_rows(visit: Visit) -> None:
    slider = visit.page.get_by_label("Smoothing")
    assert slider.input_value() == "0"  # the run is short
    slider.fill("0.6")
    raw, smooth = visit.points(0, 0)["y"], visit.points(0, 1)["y"]
    total, weight = 0.0, 0.0
    for value, shown in zip(raw, smooth, strict=True):
        total, weight = 0.6 * total + 0.4 * value, 0.6 * weight + 0.4
        assert shown == pytest.approx(total / weight)
    hover = "document.querySelectorAll('.plot')[0].data.slice(0, 2).map(one => one.hoverinfo || one.hovertemplate)"
    assert visit.page.evaluate(hover)[1] == "skip" and "y:" in visit.page.evaluate(hover)[0]
    slider.fill("0")
    assert visit.points(0, 0)["y"] == raw
    assert visit.page.locator("#curve-controls output").text_content() == "0.00"


def test_the_samples_move_with_the_slider_and_the_buttons(visit: Visit) -> None:
    page = visit.page
    rounds = page.locator("[data-samples]")
    last = rounds.locator(".card .text").first.text_content()
    assert page.get_by_role("button", name="Later").is_disabled()
    page.get_by_role("button", name="Earlier").click()
    assert page.locator("#samples output").text_content() == "350"
    assert rounds.locator(".card .text").first.text_content() != last
    page.locator("#samples input[type=range]").fill("0")
    assert page.locator("#samples output").text_content() == "50"
    assert page.get_by_role("button", name="Earlier").is_disabled()
    assert rounds.locator(".card").count() == 2


def test_the_heat_map_shows_what_is_chosen(visit: Visit) -> None:
    page = visit.page
    heat = "document.querySelector('[data-chart=heat] .plot')"
    assert page.evaluate(f"{heat}.data[0].y.length") == 6
    page.get_by_label("largest attention logit").check(force=True)
    assert page.evaluate(f"{heat}.data[0].y") == [f"layers.{layer}" for layer in range(4)]
    assert page.evaluate(f"{heat}.data[0].customdata[0][0]") == pytest.approx(4.5)


def test_the_lengths_of_documents_are_bars_of_each_source(visit: Visit) -> None:
    page = visit.page
    bars = "document.querySelector('[data-chart=bars] .plot')"
    assert page.evaluate(f"{bars}.data.map(one => [one.type, one.name])") == [
        ["bar", "data/documentation"],
        ["bar", "data/stories"],
    ]
    assert page.evaluate(f"{bars}.data[0].x").index("1,024") > 0
    with page.expect_download() as download:
        page.locator("[data-chart=bars] [data-tool=csv]").click()
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert lines[0] == '"source","at least","below","documents"' and lines[1].startswith('"data/documentation",')


def test_the_landscape_is_a_surface_or_a_map(visit: Visit) -> None:
    page = visit.page
    surface = "document.querySelector('[data-chart=surface] .plot')"
    assert page.evaluate(f"{surface}.data[0].type") == "surface"
    assert page.locator("[data-chart=surface] canvas").count() > 0
    page.get_by_label("map", exact=True).check(force=True)
    assert page.evaluate(f"{surface}.data[0].type") == "contour"
    assert visit.errors == []


def test_the_theme_button_names_what_it_does_and_redraws(visit: Visit) -> None:
    button = visit.page.locator("#theme")
    assert button.text_content() == "Dark theme"
    ink = "document.querySelectorAll('.plot')[0].layout.font.color"
    before = visit.page.evaluate(ink)
    button.click()
    assert button.text_content() == "Light theme"
    assert visit.page.evaluate(ink) != before


def test_the_defaults_can_be_hidden_in_the_configuration(visit: Visit) -> None:
    rows = visit.page.locator("#config tbody tr:visible")
    everything = rows.count()
    visit.page.get_by_label("Only what was set").check()
    assert rows.count() == 2 < everything


def test_a_command_is_copied_or_selected(visit: Visit) -> None:
    page = visit.page
    command = page.locator("#next code").nth(1).text_content()
    page.get_by_role("button", name="Copy: Generate text").click()
    page.wait_for_function("document.querySelector('[data-status]').textContent !== ''")
    if "selected" in str(page.locator("[data-status]").text_content()):
        assert page.evaluate("getSelection().toString()") == command


def test_the_contents_are_a_sidebar_on_a_wide_screen(visit: Visit) -> None:
    for width, is_sidebar in ((1440, True), (1200, True), (1100, False), (390, False)):
        visit.page.set_viewport_size({"width": width, "height": 900})
        nav, main = (visit.page.locator(name).bounding_box() for name in ("nav", "main"))
        assert (nav["x"] + nav["width"] <= main["x"] and nav["height"] > 200) == is_sidebar
    visit.page.set_viewport_size({"width": 1440, "height": 900})


def test_the_first_screen_has_the_verdict_the_loss_and_a_sample(visit: Visit) -> None:
    for place in (".verdict", "[data-chart=curves] .plot", ".first .card"):
        box = visit.page.locator(place).first.bounding_box()
        assert box["y"] + box["height"] < 900, place


def test_lines_are_labelled_at_their_ends_and_ticks_have_no_exponent(visit: Visit) -> None:
    labels = visit.page.locator(".annotation-text").all_text_contents()
    assert {"training 3.054", "validation 4.227", "best checkpoint", "resumed"} <= set(labels)
    ticks = visit.page.locator("[data-name='Learning rate'] .ytick text").all_text_contents()
    assert "0.001" in ticks and not any("e" in tick or "μ" in tick for tick in ticks)


def test_the_zoom_is_reset_and_numbers_and_pictures_are_downloaded(visit: Visit) -> None:
    page = visit.page
    x_range = "document.querySelectorAll('.plot')[0].layout.xaxis.range.slice()"
    whole = page.evaluate(x_range)
    page.evaluate("Plotly.relayout(document.querySelectorAll('.plot')[0], {'xaxis.range': [100, 200]})")
    page.get_by_role("button", name="Reset zoom").first.click()
    assert page.evaluate(x_range) == whole
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").first.click()
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert download.value.suggested_filename == "Loss.csv"
    assert lines[0] == '"curve","step","tokens","seconds","value"' and lines[1].startswith('"training loss",10,20480,')
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").first.click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_every_control_and_landmark_has_a_name(visit: Visit) -> None:
    unnamed = visit.page.evaluate(
        "[...document.querySelectorAll('input, button, meter, form, nav, section, [role=region], [role=img]')].filter(e => "
        "!(e.labels?.length || e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent.trim())).length"
    )
    assert unnamed == 0
    assert visit.page.evaluate("['header', 'nav', 'main', 'footer'].every(name => document.querySelector(name))")
    levels = visit.page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(one => Number(one.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after <= before + 1 or after == 4 for before, after in itertools.pairwise(levels))


@pytest.fixture(scope="module")
def hostile(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """The page of a run in which every text is hostile."""
    run = write_run(tmp_path_factory.mktemp("hostile"), reports=8)
    for text in HOSTILE:
        plant(run, text)
    (run / "report.html").write_bytes(build_page(read_runs([run])).encode("utf-8", "backslashreplace"))
    return Visit(browser, run / "report.html")


@pytest.mark.parametrize("text", HOSTILE[:6])
def test_hostile_text_is_shown_literally(hostile: Visit, text: str) -> None:
    assert hostile.page.locator("#samples h3", has_text=text).count() > 0
    assert text in hostile.page.locator("#config").text_content()
    labels = hostile.page.locator("[data-chart=heat] .ytick text").all_text_contents()
    assert any(text == label for label in labels)


def test_hostile_text_does_nothing(hostile: Visit) -> None:
    assert hostile.errors == []
    assert hostile.page.evaluate("document.querySelectorAll('script:not([type])').length") == 2
    assert hostile.page.locator("img, iframe, object, [onload], [onerror], [onclick], [onmouseover]").count() == 0


def test_names_of_runs_are_text_in_labels_and_legends(browser: Any, tmp_path: Path) -> None:
    name = "<b>bold<b><a href='#x'>link"
    runs = [write_run(tmp_path, name=name, reports=8), write_run(tmp_path, name="other", reports=8)]
    (tmp_path / "comparison.html").write_text(build_page(read_runs(runs)), encoding="utf-8")
    visit = Visit(browser, tmp_path / "comparison.html")
    labels = visit.page.locator(".annotation-text").all_text_contents()
    assert any(label == f"{name[:17]}…" for label in labels) and "other" in labels
    visit.page.set_viewport_size({"width": 390, "height": 900})
    visit.page.get_by_label("tokens", exact=True).check(force=True)
    legend = visit.page.locator(".legendtext").all_text_contents()
    assert name in legend and "other" in legend
    assert visit.errors == []
    visit.context.close()


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_at_most_twice_the_time_of_a_thousand(browser: Any, tmp_path: Path) -> None:
    """Counted in the seconds that the page's thread worked, since other programs may keep it waiting; of the best of three
    visits, since the first one starts parts of the browser. Most of either is plotly's own start."""
    best: dict[int, float] = {}
    for rows in (1000, 100_000):
        run = write_many_rows(tmp_path / str(rows), rows)
        (run / "report.html").write_text(build_page(read_runs([run])), encoding="utf-8")
        visits = [Visit(browser, run / "report.html", scrolls=False) for _ in range(3)]
        assert [visit.errors for visit in visits] == [[], [], []]
        best[rows] = min(visit.cpu_seconds for visit in visits)
        for visit in visits:
            visit.context.close()
    print(json.dumps({"seconds of the page's thread": best}))
    assert best[100_000] < 2 * best[1000]
