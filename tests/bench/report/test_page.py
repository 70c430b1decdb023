"""The HTML report in a real Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium

from made_documents import EVALUATION, HOSTILE, comparison, hostile_result, loaded_result
from ossquant.bench.report.content import Content, Entry
from ossquant.bench.report.page import to_html

CONTENT = Content(
    (Entry("c.json", comparison()), Entry("r.json", loaded_result()), Entry("e.json", EVALUATION))
)  # fmt: skip
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(251, 251, 250)", "rgb(20, 23, 27)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(CONTENT), encoding="utf-8")
    return path


@pytest.mark.parametrize(("scheme", "background"), [("light", LIGHT), ("dark", DARK)])
def test_it_renders(browser: Chromium, page: Path, scheme: str, background: str) -> None:
    """In light and in dark it shows its parts, says nothing on the console and asks the network for nothing."""
    browser.open(page, scheme)
    assert browser.said == []
    assert [each for each in browser.asked if not each.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate(BACKGROUND) == background
    assert browser.evaluate("document.querySelector('h1').textContent") == "gpt-oss-20b, openai/gpt-oss-20bregressed"
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map(each => each.textContent)")
    assert headings == ["Head against baseregressed", "gpt-oss-20b", "Quality"]
    empty = "[...document.querySelectorAll('svg')].filter(each => each.getBoundingClientRect().height < 60).length"
    assert browser.evaluate("document.querySelectorAll('svg').length") == 9
    assert browser.evaluate(empty) == 0
    pixels = browser.pixels(400, 120)
    dark = sum(sum(pixel) < 3 * 128 for pixel in pixels) / len(pixels)
    assert dark > 0.8 if scheme == "dark" else dark < 0.2
    assert len(set(pixels)) > 20  # the title's letters, not a blank page


def test_text_stands_out(browser: Chromium, page: Path) -> None:
    """Every colour of text has a contrast of 4.5 or more against the card it stands on, in light and dark."""
    luminance = """(() => {
      const style = getComputedStyle(document.documentElement);
      const light = name => {
        const hex = style.getPropertyValue(name).trim();
        const part = at => { const c = parseInt(hex.slice(at, at + 2), 16) / 255;
                             return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
        return 0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5);
      };
      const card = light("--card");
      return ["--ink", "--dim", "--accent", "--second", "--good", "--bad", "--unsure"].map(name => {
        const [low, high] = [card, light(name)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
      });
    })()"""
    for scheme in ("light", "dark"):
        browser.open(page, scheme)
        assert min(browser.evaluate(luminance)) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_button_switches(browser: Chromium, page: Path, scheme: str) -> None:
    """The button turns light into dark and back, whatever the system prefers, and is named after what it turns to."""
    browser.open(page, scheme)
    other = {LIGHT: DARK, DARK: LIGHT}
    before = browser.evaluate(BACKGROUND)
    name = "document.getElementById('theme').textContent"
    assert browser.evaluate(name) == ("dark" if scheme == "light" else "light")
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(BACKGROUND) == other[before]
    assert browser.evaluate(name) == scheme
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(BACKGROUND) == before
    assert browser.said == []


@pytest.mark.parametrize("width", [360, 1100, 1800])
def test_it_fits(browser: Chromium, page: Path, width: int) -> None:
    """Nothing reaches beyond the window, on a telephone neither; wide tables scroll by themselves."""
    browser.open(page, width=width)
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width


def test_hostile_names(browser: Chromium, tmp_path: Path) -> None:
    """Names that a server gives itself are text: no element, script, request or formatting comes of them."""
    path = tmp_path / "hostile.html"
    path.write_text(to_html(Content((Entry(HOSTILE, hostile_result()),))), encoding="utf-8")
    browser.open(path)
    assert browser.said == []
    assert [each for each in browser.asked if not each.startswith("data:")] == [path.as_uri()]
    assert browser.evaluate("document.querySelectorAll('img, iframe, a, object').length") == 0
    assert browser.evaluate("document.scripts.length") == 1
    assert "<img src=" in browser.evaluate("document.querySelector('h1').textContent")
    assert "\\u202e" in browser.evaluate("document.body.textContent")
    assert "\u202e" not in browser.evaluate("document.documentElement.outerHTML")


def test_a_foreign_script_would_not_run(browser: Chromium, page: Path, tmp_path: Path) -> None:
    """Even if one got into the page, its policy lets neither a script nor a request through."""
    path = tmp_path / "injected.html"
    injected = "<img src='http://127.0.0.1:9/x.png'><script>document.title = 'mine'</script></body>"
    path.write_text(page.read_text("utf-8").replace("</body>", injected), encoding="utf-8")
    browser.open(path)
    assert browser.evaluate("document.title") != "mine"
    assert any("Content Security Policy" in each for each in browser.said)


def test_the_browser_would_tell(browser: Chromium, tmp_path: Path) -> None:
    """A console message, an error and a request are seen where there are some."""
    path = tmp_path / "talks.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('spoken'); missing()</script>")
    browser.open(path)
    assert any("spoken" in each for each in browser.said)
    assert any("missing is not defined" in each for each in browser.said)
    assert "http://127.0.0.1:9/x.png" in browser.asked
