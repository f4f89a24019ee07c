"""The page of a grid in a real browser: it shows, it answers, it is quiet, on a phone and in the dark too."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import chromium
from chromium import Browser
from dodoco_ext.observatory.page.render import render
from dodoco_ext.observatory.page.view import View
from page_cases import CONDITIONS, PART, WHOLE, planted_numbers, write_grid

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium: apt-get install chromium"),
]

DESKTOP, PHONE = (1280, 800), (375, 812)

Colour = NDArray[np.float64]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two models, one of them seen in part."""
    folder = write_grid(tmp_path_factory.mktemp("grid"), planted_numbers(WHOLE, PART))
    path = folder / "report.html"
    path.write_text(render(View.of_folder(folder)), encoding="utf-8")
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        yield opened


def complaints(browser: Browser) -> list[Any]:
    """Everything that the console or the log said, and whatever was asked for beside the page itself."""
    said: list[Any] = browser.told(
        "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"
    )
    asked = [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")]
    return said + [url[:90] for url in asked[1:] if not url.startswith("data:")]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_opens_without_a_complaint_and_without_the_network(
    browser: Browser, page: Path, size: tuple[int, int], dark: bool
) -> None:
    browser.open(page, *size, dark=dark)
    assert browser.run("document.title") == "Routing of 2 models under 6 data conditions"
    assert complaints(browser) == []


def test_complaints_and_requests_would_be_seen(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    text = page.read_text("utf-8")
    for planted, seen in (
        ("<script>console.error('broken')</script>", "broken"),
        ("<script>nothing.here()</script>", "nothing is not defined"),
        ('<img src="http://127.0.0.1:9/x.png">', "127.0.0.1:9"),
    ):
        spoilt = tmp_path / "spoilt.html"
        spoilt.write_text(text.replace("</body>", planted + "</body>"), encoding="utf-8")
        browser.events.clear()
        browser.open(spoilt, *DESKTOP)
        assert seen in str(complaints(browser)), planted


def test_every_chart_is_there_and_visible(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP)
    for section, wanted in (
        ("bands-chart", 1),
        ("[data-chart=ratios]", 1),
        ("[data-chart=gap]", 3),
        ("[data-chart=ep]", 4),
        ("[data-chart=batch]", 2),
        ("[data-chart=map]", 6),
    ):
        selector = section if section.startswith("[") else f"#{section}"
        shown = browser.run(
            f"[...document.querySelectorAll('{selector}')]"
            ".filter(e => e.offsetWidth > 200 && e.offsetHeight > 60).length"
        )
        assert shown == wanted, section
    # A line and a marker at each EP size for each condition, beside the null's line.
    panel = "document.querySelector('[data-chart=ep] svg')"
    assert browser.run(f"{panel}.querySelectorAll('path.line:not(.null)').length") == len(
        CONDITIONS
    )
    assert browser.run(f"{panel}.querySelectorAll('path.mark').length") == 4 * len(CONDITIONS)
    assert browser.run(f"{panel}.querySelectorAll('path.line.null').length") == 1
    assert browser.run(f"{panel}.getBoundingClientRect().height") > 150
    drawn = browser.run(
        f"[...{panel}.querySelectorAll('path.line:not(.null)')].every(p => p.getTotalLength() > 100)"
    )
    assert drawn


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("model", ["", WHOLE, PART])
def test_the_first_screen_answers_the_three_questions(
    browser: Browser, page: Path, size: tuple[int, int], model: str
) -> None:
    browser.open(page, *size)
    choose(browser, "model", model)
    cards = browser.run(
        "[...document.querySelectorAll('.answer')].filter(e => e.offsetHeight).map(e => "
        "[e.dataset.answer, e.querySelector('b').textContent, e.getBoundingClientRect().bottom])"
    )
    assert [card[0] for card in cards] == ["concentration", "mock", "ep"]
    assert all(re.search(r"\d", card[1]) for card in cards)
    assert max(card[2] for card in cards) <= size[1]


def choose(browser: Browser, control: str, value: str) -> None:
    """Picks an option as a user does: the value, then the event."""
    browser.run(
        f"(() => {{ const s = document.getElementById('{control}'); s.value = {value!r}; "
        "s.dispatchEvent(new Event('change')); })()"
    )


def test_it_fits_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, *PHONE)
    assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
    too_wide = browser.run(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"
    )
    assert too_wide == []
    small = browser.run(
        "[...document.querySelectorAll('select')].filter(e => e.offsetHeight && e.offsetHeight < 32).length"
    )
    assert small == 0
    # Text in charts is scaled with them.
    scale = browser.run(
        "(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)(document.querySelector('svg.panel'))"
    )
    assert 10.5 * scale >= 8.5


def test_a_model_can_be_chosen(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP)
    shown = (
        "[...document.querySelectorAll('[data-group] > [data-model]')]"
        ".filter(e => !e.hidden).map(e => e.dataset.model)"
    )
    assert set(browser.run(shown)) == {WHOLE}
    choose(browser, "model", PART)
    assert set(browser.run(shown)) == {PART}
    text = browser.run("document.querySelector('#ep + .card').innerText")
    assert "Not measurable at EP 16: 16 ranks do not divide 24 experts." in text
    assert "There is no batch scan of this model." in browser.run(
        "document.querySelector('#batch + .card').innerText"
    )


def test_a_condition_can_be_picked_out(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP)
    opacity = "['s2', 's3'].map(c => getComputedStyle(document.querySelector(`[data-chart=ep] .line.${c}`)).opacity)"
    assert browser.run(opacity) == ["1", "1"]
    choose(browser, "condition", "3")
    assert browser.run(opacity) == ["0.18", "1"]
    bands = (
        "[...document.querySelectorAll('[data-chart=ep] .random')]"
        ".filter(e => getComputedStyle(e).display != 'none').map(e => e.classList.contains('s3'))"
    )
    assert set(browser.run(bands)) == {True}


def test_the_grid_shows_one_figure_at_a_time(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP)
    shown = "[...document.querySelectorAll('[data-metric]')].filter(e => e.offsetHeight).map(e => e.dataset.metric)"
    assert browser.run(shown) == ["corrected"]
    choose(browser, "metric", "ranks")
    assert browser.run(shown) == ["ranks"]
    squares = browser.run("document.querySelectorAll('#heat-ranks td.square').length")
    assert squares == 2 * len(CONDITIONS)
    missing = "[...document.querySelectorAll('#heat-ranks td.square')].filter(e => e.textContent == '–').length"
    assert browser.run(missing) == 4


def test_edges_of_bands_can_be_moved(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP)
    cell = "document.querySelector('#bands-table [data-lowest]')"
    lowest = float(browser.run(f"{cell}.dataset.lowest"))
    before = browser.run(f"{cell}.textContent")
    assert before == ("data-resilient" if lowest <= 0.15 else "intermediate")
    slide = (
        "(() => {{ const s = document.getElementById('{}'); s.value = {}; "
        "s.dispatchEvent(new Event('input')); }})()"
    )
    browser.run(slide.format("edge-low", 0.3))
    assert browser.run(f"{cell}.textContent") == "data-resilient"
    browser.run(slide.format("edge-low", 0.05))
    browser.run(slide.format("edge-high", 0.1))
    assert browser.run(f"{cell}.textContent") == "persistently concentrated"
    assert browser.run("document.getElementById('edges').textContent") == "0.050 and 0.100"


def test_pointing_at_a_mark_and_at_a_map_says_numbers(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP)
    tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
    for selector, wanted in (
        ("[data-chart=ratios] path.mark", r"^uniform mock over english: corrected \d\.\d+ \("),
        (".maps img", r"^layer \d, expert \d+: [\d,]+ assignments, \d+\.\d\d times uniform$"),
        (
            "#heat-corrected td.square",
            r"^zoo:mha, uniform mock \(mock\): corrected Gini \d\.\d+ \(",
        ),
    ):
        at = browser.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); "
            f"return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector('{selector}'))"
        )
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
        assert re.search(wanted, browser.run(tip)), selector
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.run(tip) == ""


def test_without_scripts_everything_is_shown(browser: Browser, page: Path) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page, *DESKTOP)
    assert browser.run("document.getElementById('model').offsetHeight") == 0
    models = "[...document.querySelectorAll('#ep + .card [data-model]')].filter(e => e.offsetHeight).length"
    assert browser.run(models) == 2
    assert (
        browser.run("[...document.querySelectorAll('.answers')].filter(e => e.offsetHeight).length")
        == 3
    )


def rgb(text: str) -> Colour:
    """A computed colour, 0 to 1 [3]."""
    return np.array([float(part) for part in re.findall(r"[\d.]+", text)[:3]]) / 255


def linear(colour: Colour) -> Colour:
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision
# deficiency", IEEE TVCG 15 (2009), severity 1.0; on linear RGB.
SIGHT = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def lab(colour: Colour, sight: Colour) -> Colour:
    """CIE L*a*b* (D65) of what an eye of that kind sees."""
    seen = np.clip(sight @ linear(colour), 0, 1)
    ratio = (_TO_XYZ @ seen) / (_TO_XYZ @ np.ones(3))
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: Colour, b: Colour) -> float:
    """Contrast ratio (WCAG 2.2)."""
    light, dark = sorted((float(_TO_XYZ[1] @ linear(c)) for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_marks_stand_out_and_differ_to_every_eye(
    browser: Browser, page: Path, dark: bool
) -> None:
    browser.open(page, *DESKTOP, dark=dark)

    def computed(selector: str, name: str) -> Colour:
        return rgb(browser.run(f"getComputedStyle(document.querySelector('{selector}'))['{name}']"))

    card = computed(".card", "backgroundColor")
    assert (card.mean() < 0.2) == dark
    for selector in (".answer p", ".answer h2", ".soft", "th", "td", "ol.findings li", "summary"):
        assert contrast(computed(selector, "color"), card) >= 4.5, selector
    for selector in ("svg .tick", "svg .note", "svg .title"):
        assert contrast(computed(selector, "fill"), card) >= 4.5, selector
    marks = [computed(f"[data-chart=ep] path.mark.c{i}", "fill") for i in range(6)]
    assert min(contrast(mark, card) for mark in marks) >= 3
    for name, sight in SIGHT.items():
        apart = min(
            float(np.linalg.norm(lab(a, sight) - lab(b, sight)))
            for a, b in itertools.combinations(marks, 2)
        )
        assert apart >= 30, name  # 2.3 is just noticeable
    shapes = {
        re.sub(r"[\d. -]+", " ", d)
        for d in browser.run(
            "[0, 1, 2, 3, 4, 5].map(i => document.querySelector(`[data-chart=ep] path.mark.s${i}`).getAttribute('d'))"
        )
    }
    assert len(shapes) >= 4


def test_a_common_palette_would_not_pass() -> None:
    red, green = np.array([214, 39, 40]) / 255, np.array([100, 110, 30]) / 255
    apart = {n: float(np.linalg.norm(lab(red, s) - lab(green, s))) for n, s in SIGHT.items()}
    assert apart["full"] >= 30
    assert min(apart.values()) < 30


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_numbers_in_the_heat_map_can_be_read_and_their_order_seen(
    browser: Browser, page: Path, dark: bool
) -> None:
    browser.open(page, *DESKTOP, dark=dark)
    squares = browser.run(
        "[...document.querySelectorAll('#heat-corrected td.square')].filter(e => e.textContent != '–').map(e => "
        "[Number(e.textContent), getComputedStyle(e).backgroundColor, getComputedStyle(e).color])"
    )
    squares.sort()
    assert min(contrast(rgb(back), rgb(ink)) for _, back, ink in squares) >= 4.5
    for sight in SIGHT.values():
        lightness = [lab(rgb(back), sight)[0] for _, back, _ in squares]
        assert lightness == pytest.approx(sorted(lightness), abs=0.5)
