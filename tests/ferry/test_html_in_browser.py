"""The page of a migration in a real browser: what is drawn is where it can be seen.

The page has no script; this test gives it one, which measures what was laid out.
"""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from ferry.html_report import page
from lab.browser import Browser, NoBrowser, find_browser
from tests.ferry.test_html_report import EVENTS, lines

pytestmark = pytest.mark.full
MEASURE = """<script>
const boxes = (what) => [...document.querySelectorAll(what)].map((e) => {
  const box = e.getBoundingClientRect();
  return {text: e.textContent, left: box.left, top: box.top, right: box.right, bottom: box.bottom};
});
const told = {
  width: document.documentElement.scrollWidth, shown: window.innerWidth,
  charts: [...document.querySelectorAll("svg")].map((svg) => {
    const all = svg.getBoundingClientRect();
    return {left: all.left, top: all.top, right: all.right, bottom: all.bottom,
            texts: [...svg.querySelectorAll("text")].map((e) => {
              const b = e.getBoundingClientRect();
              return {text: e.textContent, left: b.left, top: b.top, right: b.right,
                      bottom: b.bottom};
            })};
  }),
  headings: boxes("h2"), swatches: boxes("td i"),
};
document.body.innerHTML = "<pre>" + JSON.stringify(told).replace(/&/g, "&amp;")
  .replace(/</g, "&lt;") + "</pre>";
</script>"""


@pytest.fixture(scope="module")
def browser() -> Browser:
    try:
        return find_browser()
    except NoBrowser as error:
        pytest.skip(str(error))


def measured(browser: Browser, path: Path, width: int) -> dict[str, Any]:
    path.write_text(page(lines(EVENTS)).replace("</body>", f"{MEASURE}</body>"))
    size = f"--window-size={width},2000"
    document = browser.run(size, "--hide-scrollbars", "--dump-dom", f"file://{path}")
    found = re.search(r"<pre>(.*)</pre>", document, re.DOTALL)
    assert found, document
    told: dict[str, Any] = json.loads(unescape(found[1]))
    return told


def apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(
        one["right"] <= other["left"]
        or other["right"] <= one["left"]
        or one["bottom"] <= other["top"]
        or other["bottom"] <= one["top"]
    )


@pytest.mark.parametrize("width", [700, 1000, 1600])
def test_all_of_the_page_can_be_read(browser: Browser, tmp_path: Path, width: int) -> None:
    told = measured(browser, tmp_path / "page.html", width)
    assert told["width"] <= told["shown"] == width, "nothing has to be scrolled for sideways"
    assert [each["text"] for each in told["headings"]] == [
        *("Rounds: pages", "Rounds: MiB/s", "Downtime", "Devices", "On the wire", "Every round")
    ]
    assert len(told["charts"]) == 3
    assert len(told["swatches"]) == 2 and all(
        each["right"] - each["left"] > 5 for each in told["swatches"]
    )
    for drawn in told["charts"]:
        assert drawn["right"] - drawn["left"] > 500
        for number, text in enumerate(drawn["texts"]):
            assert drawn["left"] <= text["left"] < text["right"] <= drawn["right"], text
            assert drawn["top"] - 2 <= text["top"] < text["bottom"] <= drawn["bottom"] + 2, text
            for other in drawn["texts"][number + 1 :]:
                assert apart(text, other), (text, other)


def test_what_is_drawn_has_its_colors(browser: Browser, tmp_path: Path) -> None:
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(page(lines(EVENTS)))
    browser.run("--window-size=1000,1400", f"--screenshot={picture}", f"file://{path}")
    pixels = (image.imread(picture)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape[1] == 1000
    for color, least in (((0x34, 0x65, 0xA4), 200), ((0x73, 0xA9, 0x46), 1000), ((0xA4, 0, 0), 50)):
        assert (abs(pixels - color).max(axis=2) < 8).sum() > least, color
