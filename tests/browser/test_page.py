"""The page of a report in a headless Chromium: what a reader can do with it, at two widths, in light and dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeTiny
from helpers.report_runs import write_real_runs, write_runs
from snugfit.planning.served import served_fits
from snugfit.publishing.report import make_report

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")
CHROMIUM = os.environ.get("SNUGFIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SHOTS = os.environ.get("SNUGFIT_SCREENSHOTS")  # a folder for pictures, to be looked at


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: make browser")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_tiny: MakeTiny) -> tuple[Path, Path]:
    """A checkpoint and the page of its report."""
    folder = tmp_path_factory.mktemp("runs")
    # 16 KiB a token: what fits differs from card to card
    shapes = {"num_hidden_layers": 8, "head_dim": 128, "num_key_value_heads": 4}
    source = make_tiny("llama", max_position_embeddings=4_194_304, **shapes)
    runs = write_real_runs(folder, source)
    make_report(runs, output_dir=folder / "report", base_model="org/made-up", license="mit", repo="me/made-up-hybrid")
    return runs[0], folder / "report" / "index.html"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two checkpoints without files."""
    folder = tmp_path_factory.mktemp("two")
    make_report(write_runs(folder), output_dir=folder / "report")
    return folder / "report" / "index.html"


def opened(browser: Any, page: Path, size: str = "desktop", scheme: str = "light") -> Any:
    """The page in a tab of a size and a colour scheme, once its script has run; requests to elsewhere fail the test."""
    width, height = SIZES[size]
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on(
        "request",
        lambda request: problems.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", timeout=10_000)
    tab.problems = problems
    return tab


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_axe_finds_nothing(browser: Any, made: tuple[Path, Path], two: Path, size: str, scheme: str) -> None:
    """No violation of WCAG 2.2 A and AA (contrast, names, headers, keyboard), no error, no request, nothing cut off."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="make browser").Axe()
    for page in (made[1], two):
        tab = opened(browser, page, size, scheme)
        rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
        found = axe.run(tab, options=rules).response["violations"]
        assert [(v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in found] == []
        assert tab.problems == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        if SHOTS:
            tab.screenshot(path=f"{SHOTS}/{page.parent.parent.name}-{size}-{scheme}.png", full_page=True)
        tab.close()


def test_the_context_that_fits_a_chosen_gpu(browser: Any, made: tuple[Path, Path]) -> None:
    """Each choice shows the tokens that `served_fits` gives, for every GPU of the list."""
    checkpoint, page = made
    tab = opened(browser, page)
    wanted = {(f.card, f.engine, f.tensor_parallel_size, f.max_num_seqs): f for f in served_fits(checkpoint).fits}
    for card, engine, gpus, sequences, cache in (
        ("RTX 3060", "vllm", 1, 1, "auto"),
        ("RTX 3060", "vllm", 1, 40, "auto"),
        ("H100", "vllm", 2, 40, "fp8"),
        ("RTX 5090", "sglang", 1, 8, "fp8"),
        ("L4", "aphrodite", 1, 1, "auto"),
    ):
        for name, value in (
            ("card", card),
            ("engine", engine),
            ("gpus", gpus),
            ("sequences", sequences),
            ("cache", cache),
        ):
            tab.select_option(f"#fit-form [name={name}]", str(value))
        fit = wanted[card, engine, gpus, sequences]
        tokens = fit.fp8 if cache == "fp8" else fit.auto
        shown = tab.inner_text("#fit-answer strong")
        assert shown == (f"{tokens:,} tokens" if tokens and not fit.problem else "It does not fit")
        assert tab.inner_text("#fit-bars li.chosen").startswith(card)
    assert tab.locator("#fit-bars li").count() == len({card for card, *_ in wanted})


def test_a_table_sorts_by_click_and_by_keyboard(browser: Any, made: tuple[Path, Path]) -> None:
    """Ascending, descending, as it was; numbers as numbers; the state is announced."""
    tab = opened(browser, made[1])
    heads = tab.locator("table[data-name=evaluation] thead th")
    place = [text.strip() for text in heads.all_inner_texts()].index("perplexity")
    head = heads.nth(place)

    def column() -> list[float]:
        cells = tab.locator(f"table[data-name=evaluation] tbody tr > :nth-child({place + 1})")
        return [float(text.split(" ")[0]) for text in cells.all_inner_texts()]

    before = column()
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column() == sorted(before)
    head.locator("button").focus()
    tab.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column() == sorted(before, reverse=True)
    tab.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "none"
    assert column() == before


def test_a_chart_is_read_by_pointer_and_by_keyboard(browser: Any, made: tuple[Path, Path]) -> None:
    """Hovering shows the values at a length; arrow keys move along them and say them; Escape closes."""
    tab = opened(browser, made[1])
    canvas = tab.locator("[data-plot=kl-by-context] .canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    tab.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] / 2)
    tip = tab.inner_text("#tip")
    assert "32,768" in tip
    assert "made-up-hybrid: 0.0525 ± 0.0026" in tip
    canvas.focus()
    tab.keyboard.press("Home")
    status = tab.locator("[data-plot=kl-by-context] [role=status]")
    assert "4,096" in status.inner_text()
    tab.keyboard.press("ArrowRight")
    assert "8,192" in status.inner_text()
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#tip")


def test_models_can_be_switched(browser: Any, made: tuple[Path, Path]) -> None:
    """Without its mark a model has no line and no row; a line's own button hides the line alone."""
    tab = opened(browser, made[1])
    lines = tab.locator("[data-plot=perplexity-by-context] polyline")
    rows = tab.locator("table[data-name=evaluation] tbody tr:visible")
    assert lines.count() == 3
    count = rows.count()
    tab.uncheck("#models input[value=made-up-nvfp4]")
    assert lines.count() == 2
    assert rows.count() == count - 4
    tab.check("#models input[value=made-up-nvfp4]")
    button = tab.locator("[data-plot=perplexity-by-context] .legend button").first
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert lines.count() == 2
    assert rows.count() == count


def test_the_checkpoint_can_be_switched(browser: Any, two: Path) -> None:
    """Components, map and errors are those of the chosen checkpoint; a cell says its layer, by pointer or keyboard."""
    tab = opened(browser, two)
    assert tab.is_visible("#t-formats")
    assert not tab.is_visible("#t-formats-2")
    tab.select_option("#map-form [name=checkpoint]", "1")
    assert not tab.is_visible("#t-formats")
    assert tab.is_visible("#t-formats-2")
    cells = tab.locator("#map .cell")
    assert cells.count() == 12 * 7
    cells.nth(13).hover()
    assert tab.inner_text("#map-reading") == cells.nth(13).get_attribute("aria-label")
    cells.first.focus()
    tab.keyboard.press("ArrowDown")
    assert tab.inner_text("#map-reading").startswith("Layer 0, k_proj: nvfp4, 4.5 bits a weight")
    tab.select_option("#map-form [name=figure]", "input")
    assert tab.locator("#map .cell").count() == 12 * 7


def test_every_control_is_reached_by_the_tab_key(browser: Any, made: tuple[Path, Path]) -> None:
    """The first stop is the link to the figures; every button, select and link comes, each visibly focused."""
    tab = opened(browser, made[1])
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    total = tab.evaluate(
        "[...document.querySelectorAll('a, button, select, input')].filter(e => e.checkVisibility()).length"
    )
    seen, rounds = 1, 0
    while rounds < 3 * total:
        tab.keyboard.press("Tab")
        rounds += 1
        name, outline = tab.evaluate(
            "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if name == "BODY":
            break
        assert outline != "none", name
        seen += name in ("A", "BUTTON", "SELECT", "INPUT")
    assert seen == total


def test_without_a_script_the_tables_are_there(browser: Any, made: tuple[Path, Path]) -> None:
    """Every number is in the document itself."""
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(made[1].as_uri())
    assert tab.locator("table[data-name=evaluation] tbody tr").count() == 12
    assert tab.is_visible("noscript p")
    context.close()
