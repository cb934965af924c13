"""The page in a real browser: Debian's Chromium, driven by Playwright, if both are here."""

import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from test_server import Live, live

from nanopersrm.serve.server import INLINE, Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = files("nanopersrm.serve").joinpath("page.html").read_text("utf-8")
ADA = "I came home late; I saw no supper. So be it! " * 6
CANDIDATES = ("One thing; another.", "lol no way!!")


def test_the_page_needs_nothing_from_elsewhere():
    assert not re.search(r"\b(?:src|href|action)=(?!\"data:)", PAGE)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", PAGE)
    assert not re.search(r"\sstyle=\"(?!…)", PAGE)
    assert not re.search(r"\son\w+=", PAGE.split("<script>")[0])
    assert "innerHTML" not in PAGE  # texts of people enter as texts
    assert [kind for kind, _ in INLINE.findall(PAGE)] == ["style", "script"]
    assert PAGE.count("<script") == PAGE.count("<style") == 1


def test_every_field_has_a_label():
    before = PAGE.split("<script>")[0]
    labelled = set(re.findall(r'<label for="([\w-]+)"', before))
    fields = re.findall(r"<(?:input|textarea|select)\b([^>]*)>", before)
    assert len(fields) >= 7
    for attributes in fields:
        name = re.search(r'id="([\w-]+)"', attributes)
        assert name
        assert name[1] in labelled or "aria-label=" in attributes, attributes


@pytest.fixture
def server() -> Iterator[Live]:
    yield from live(Limits(seconds=20))


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


def opened(browser: Any, server: Live, **look: Any) -> tuple[Any, list[str]]:
    """The page, and a list of what went wrong or elsewhere."""
    page, wrong = browser.new_page(**look), list[str]()
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))

    def logged(line: Any) -> None:
        if line.type == "error":
            wrong.append(line.text)

    def requested(request: Any) -> None:
        if not request.url.startswith((server.url, "data:")):
            wrong.append(f"elsewhere: {request.url}")

    page.on("console", logged)
    page.on("request", requested)
    page.goto(server.url)
    return page, wrong


def judge(page: Any) -> None:
    page.get_by_label("Exemplars: texts this person wrote").fill(f"{ADA}\n---\n{ADA}")
    for label, text in zip("AB", CANDIDATES, strict=True):
        page.get_by_label(f"Candidate {label}", exact=True).fill(text)
    page.locator("#traits li").first.wait_for()
    page.get_by_role("button", name="Judge", exact=True).click()
    page.locator("#ranking").wait_for(state="visible")


@pytest.mark.slow
def test_from_texts_to_a_ranking(browser, server):
    page, wrong = opened(browser, server, viewport={"width": 1100, "height": 900})
    judge(page)
    assert page.locator("#traits li").count() == 8
    assert page.locator("#traits rect.writer").count() == 8
    assert page.locator("#places tr").count() == 2
    assert re.match(
        r"Closest to the writer: candidate [AB]\.", page.locator("#status").inner_text()
    )
    marked = page.locator("#cards .text mark").all_inner_texts()
    assert marked == [*CANDIDATES]  # the fake judge quotes the beginning of each candidate
    assert page.locator("#cards .thought mark.nowhere").count() == 0
    assert page.locator("#alone").is_visible()  # two chances by measurement, one of a place
    assert page.locator("#places").inner_text().count("%") == 3
    assert wrong == []


@pytest.mark.slow
def test_what_goes_wrong_is_said_on_the_page(browser, server):
    page, wrong = opened(browser, server)
    page.get_by_label("Exemplars: texts this person wrote").fill(ADA)
    page.get_by_role("button", name="Judge", exact=True).click()
    assert page.locator("#error").inner_text() == "Paste at least one candidate."
    page.get_by_label("Candidate A", exact=True).fill("boom <img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Judge", exact=True).click()
    page.get_by_role("alert").filter(has_text="the judge failed with RuntimeError").wait_for()
    assert page.locator("#cards img").count() == 0
    server.judge.gate.clear()
    page.get_by_label("Candidate A", exact=True).fill("One.")
    page.get_by_role("button", name="Judge", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("status").filter(has_text="Stopped.").wait_for()
    server.judge.gate.set()
    assert wrong == []
