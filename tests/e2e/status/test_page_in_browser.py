"""The status page in a real Chromium: wide and on a phone, light and dark, and full of malice.

WILLI_SCREENSHOTS=DIRECTORY keeps a picture of each state, for a person to look at; docs/status.png is one of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, sync_playwright

from tests.conftest import StartWilli
from tests.support import overviews
from tests.support.loopback import free_port, need, wait_until
from tests.support.overviews import HOSTILE
from tests.support.status import Status
from tests.support.status_server import StatusServer
from tests.support.talk import BEN, BOB, OK, QUEUED, content, deliver, greeted, reply, say
from tests.support.upstream import ScriptedUpstream
from willi_lib.status import page as status_page
from willi_lib.status import words

CHROMIUM = "/usr/bin/chromium"
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
PATIENCE = 60_000  # milliseconds for one step of the browser; on an idle machine a step takes less than 100
WIDE, PHONE = (1280, 900), (375, 812)
WIDTHS = (1600, 1280, 1001, 1000, 901, 900, 500, 375, 320)
STATES = {
    "healthy": overviews.healthy, "troubled": overviews.troubled, "hostile": overviews.hostile,
    "empty": overviews.empty,
}  # fmt: skip

# The lowest contrast (WCAG 2.1, 1.4.3) of all text that is shown, and where.
CONTRAST = """() => {
  const channels = (text) => text.match(/[0-9.]+/g).map(Number);
  const part = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([red, green, blue]) => 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let [lowest, texts] = [[99, ""], 0];
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.namespaceURI.endsWith("svg") || !node.checkVisibility()) continue;
    const [front, back] = [light(channels(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    texts += 1;
    if (ratio < lowest[0]) lowest = [ratio, walker.currentNode.data];
  }
  return [...lowest, texts];
}"""

# What reaches out of the box around it: of a row, a tile or a paragraph.
OUTSIDE = """() => [...document.querySelectorAll("td, th, li, dd, .tile, .badge, h1, h2, p")].filter((node) =>
  node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== "inline"
  && node.checkVisibility()).map((node) => node.outerHTML.slice(0, 200))"""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    need("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(params=STATES)
def base_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a status page answers, with the headers of the status process.

    On a busy machine ten seconds are short: the page would ask again while it is measured. A picture shows the ten.
    """
    if "WILLI_SCREENSHOTS" not in os.environ:
        monkeypatch.setattr(status_page, "REFRESH", 600)
    server = StatusServer(STATES[request.param]())
    yield server.url
    server.stop()


@pytest.fixture
def server() -> Iterator[StatusServer]:
    """One whose state the test chooses."""
    server = StatusServer(overviews.healthy())
    yield server
    server.stop()


@pytest.fixture
def complaints() -> list[str]:
    """Whatever the browser found wrong, violations of the policy among it, or asked the user."""
    return []


@pytest.fixture
def open_page(browser: Browser, complaints: list[str]) -> Iterator[Open]:
    """open_page(url, size=WIDE, scheme="light"): a page whose complaints are kept."""
    contexts: list[BrowserContext] = []

    def refuse(dialog: Dialog) -> None:
        complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open_page(url: str, size: tuple[int, int] = WIDE, scheme: Any = "light") -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("dialog", refuse)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


def picture(page: Page, name: str) -> None:
    """Keep one, if somebody wants to look at it."""
    if directory := os.environ.get("WILLI_SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{name}.png")
        page.screenshot(path=Path(directory) / f"{name}-all.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_width_and_all_text_can_be_read(
    request: pytest.FixtureRequest, base_url: str, open_page: Open, complaints: list[str], scheme: str
):
    page = open_page(base_url, scheme=scheme)
    for width in WIDTHS if scheme == "light" else ():  # both schemes have the same boxes
        page.set_viewport_size({"width": width, "height": 900})
        needed, there = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert needed <= there == width
        assert page.evaluate(OUTSIDE) == [], width
    for size in (WIDE, PHONE):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        contrast, where, texts = page.evaluate(CONTRAST)
        assert texts > 50
        assert contrast >= 4.5, where
        picture(page, f"{request.node.callspec.params['base_url']}-{scheme}-{size[0]}")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 18, 20)"
    assert dark is (scheme == "dark")
    assert complaints == []


def test_a_violation_of_the_policy_would_be_seen(open_page: Open, server: StatusServer, complaints: list[str]):
    page = open_page(server.url)
    assert complaints == []
    page.evaluate("document.body.setAttribute('style', 'color: red')")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'alert(1)'}))")
    wait_until(lambda: (page.evaluate("1"), len(complaints) >= 2)[1], "two violations")
    assert all("Content Security Policy" in complaint for complaint in complaints), complaints


def test_malice_is_shown_as_text_and_does_nothing(open_page: Open, server: StatusServer, complaints: list[str]):
    server.overview = overviews.hostile()
    page = open_page(server.url)
    shown = page.locator("body").inner_text()
    for text in HOSTILE:
        assert words.shorten(text, 60).removesuffix("…") in shown
    elements = page.evaluate("[...new Set([...document.querySelectorAll('*')].map((node) => node.localName))]")
    assert {"script", "img", "iframe", "b", "font"}.isdisjoint(elements)
    assert page.locator("h1").count() == 1
    for row in page.locator("tr").all()[:10]:
        row.hover()
    assert complaints == []
    assert page.url == f"{server.url}/"


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_the_form_shows_the_answer_which_then_stands_still(
    open_page: Open, server: StatusServer, complaints: list[str], size: tuple[int, int]
):
    page = open_page(server.url, size)
    page.get_by_label("Where does mail go for").fill("Sales+Autumn@example.org")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?address=Sales%2BAutumn%40example.org")
    answer = page.get_by_role("region", name="Where mail goes for Sales+Autumn@example.org")
    assert "route: mail2.example.org:25, tls_verify = true" in answer.inner_text()
    assert answer.locator("tbody tr").count() == 5
    assert answer.is_visible()
    assert page.locator("meta[http-equiv=refresh]").count() == 0
    assert page.get_by_label("Where does mail go for").input_value() == "Sales+Autumn@example.org"
    picture(page, f"asked-light-{size[0]}")
    page.get_by_role("link", name="Go on").click()
    page.wait_for_url(f"{server.url}/")
    assert page.locator("meta[http-equiv=refresh]").count() == 1
    assert complaints == []


def test_a_malicious_question_is_answered_as_text(open_page: Open, server: StatusServer, complaints: list[str]):
    page = open_page(server.url)
    for malice in HOSTILE[:6]:
        page.goto(server.url)
        page.get_by_label("Where does mail go for").fill(malice)
        page.get_by_role("button", name="Look up").click()
        page.wait_for_url("**/?address=*")
        assert page.locator("#answer").inner_text() == f"Where mail goes for {malice}"
        assert page.get_by_label("Where does mail go for").input_value() == malice
        assert complaints == [], malice


@pytest.mark.parametrize("fragment", ["", "#events"])
def test_the_page_asks_again_by_itself_and_stays_where_it_was(
    open_page: Open, server: StatusServer, monkeypatch: pytest.MonkeyPatch, fragment: str
):
    def change() -> None:
        monkeypatch.setattr(status_page, "REFRESH", 600)
        server.overview = overviews.troubled()

    monkeypatch.setattr(status_page, "REFRESH", 3)
    server.then["/"] = change
    page = open_page(f"{server.url}/{fragment}")
    page.mouse.wheel(0, 400)
    wait_until(lambda: page.evaluate("scrollY") > 0, "the page further down")
    page.get_by_text("6 problems need you").wait_for()
    wait_until(lambda: page.evaluate("scrollY") > 0, "the page further down, as before")
    assert server.asked.count("/") == 2


def test_the_pause_gives_time_to_type(open_page: Open, server: StatusServer, complaints: list[str]):
    page = open_page(server.url)
    page.get_by_role("link", name="Pause").click()
    page.wait_for_url("**/?address=")
    assert page.locator("meta[http-equiv=refresh]").count() == 0
    page.keyboard.type("ann@example.org")  # the cursor is in the field
    page.keyboard.press("Enter")
    page.wait_for_url("**/?address=ann%40example.org")
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_whoever_uses_the_keyboard_sees_where_he_is(open_page: Open, server: StatusServer, scheme: str):
    page = open_page(server.url, scheme=scheme)
    seen = []
    for _ in range(3):
        page.keyboard.press("Tab")
        name, style, width = page.evaluate(
            "(() => { const node = document.activeElement, look = getComputedStyle(node);"
            " return [node.localName, look.outlineStyle, parseFloat(look.outlineWidth)]; })()"
        )
        seen.append(name)
        assert style == "solid" and width >= 2, name
    assert seen == ["a", "input", "button"]


def test_a_reader_finds_tables_pictures_and_headings(open_page: Open, server: StatusServer):
    server.overview = overviews.troubled()
    page = open_page(server.url)
    assert page.get_by_role("heading", level=1).inner_text() == "Willi mx1.example.org"
    assert page.get_by_role("region", name="6 problems need you").is_visible()
    assert page.get_by_role("table", name="The upstream hosts, the busiest first").is_visible()
    assert page.get_by_role("row", name="mail2.example.org:25 down 12 min").count() == 1
    assert page.get_by_role("img", name="Turned away in each of the last 60 minutes: 87 in all").is_visible()
    assert page.get_by_role("columnheader", name="Last error").count() == 2


# The real one, under traffic

SCRIPT = b'"<script>alert(1)</script>"@a.example'


def test_a_running_willi_shows_its_traffic_to_a_browser(
    start_willi: StartWilli, upstream: ScriptedUpstream, open_page: Open, complaints: list[str]
):
    status = Status(free_port())
    table = f"pattern;server;tls_verify\nb.example;{upstream.server};no\n"
    willi = start_willi(csv=table, workers=2, status_listen=status.setting)
    wait_until(status.answers, "an answer of the status")
    upstream.answers[BEN] = reply("550 5.1.1 <b>no ben</b> here")
    with greeted(willi, b"EHLO <script>alert(2)</script>") as client:
        for _ in range(3):
            assert deliver(client) == QUEUED
        lines = b"MAIL FROM:<" + SCRIPT + b">", BEN, BOB, b"DATA"
        assert say(client, *lines)[1:3] == ["550 5.1.1 <b>no ben</b> here", OK]
        assert content(client) == QUEUED
    wait_until(lambda: status.value("willi_messages_total", verdict="accepted") == 4, "four messages")
    page = open_page(f"http://127.0.0.1:{status.port}/")
    assert page.get_by_role("heading", level=2).first.inner_text() == "All is well"
    shown = page.locator("body").inner_text()
    assert SCRIPT.decode() in shown
    assert "550 5.1.1 <b>no ben</b> here" in shown
    assert page.get_by_role("table", name="The upstream hosts, the busiest first").inner_text().count(upstream.server)
    page.get_by_label("Where does mail go for").fill("Bob@B.example")
    page.keyboard.press("Enter")
    answer = page.get_by_role("region", name="Where mail goes for Bob@B.example")
    assert f"route: {upstream.server}, tls_verify = false" in answer.inner_text()
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    picture(page, "running-asked-phone")
    assert complaints == []
