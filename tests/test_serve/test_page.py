"""The page in a real browser: Debian's Chromium, driven by Playwright, if both are here."""

import json
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from test_server import Live, live

from nanopersrm.judge.judgement import JudgedCandidate
from nanopersrm.serve.schemas import JudgeRequest
from nanopersrm.serve.server import INLINE, Limits
from nanopersrm.style.ledger import CandidateReading, Line, Passage
from nanopersrm.style.phrases import Phrase, Word

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = files("nanopersrm.serve").joinpath("page.html").read_text("utf-8")
ADA = "I came home late; I saw no supper. So be it! " * 6
CANDIDATES = ("One thing; another.", "lol no way!!")
READ = ("🙂🙂 So be it, 👩\u200d🍳 <b onclick=alert(1)>Ada</b>", "lol <img src=x onerror=alert(2)>")
# Of a word and of a phrase: gain in nats, topic.
WORDS = {"So": (2.4, False), "be": (0.75, False), "<b": (-0.75, False), "Ada": (2.0, True),
         "lol": (-3.0, False)}  # fmt: skip
PHRASES = {"So be": (3.0, False), "Ada": (2.0, True), "it, 👩\u200d🍳 <b": (-0.6, False),
           "lol <img src=x": (-3.04, False)}  # fmt: skip


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
    for settings in re.findall(r"value=.({.*?})", before):
        JudgeRequest(exemplars=["a"], candidates=["b"], **json.loads(settings))


def luminance(colour: str) -> float:
    """Relative (WCAG 2.2), of "#fff", "#1d1b18" or "118 184 242"."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = map(int, colour.split()) if " " in colour else bytes.fromhex(digits)
    shares = [channel / 255 for channel in channels]
    light = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]


def test_text_can_be_read_on_every_colour():
    schemes = re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        shades = {
            name: luminance(colour) for name, colour in re.findall(r"--(\S+): ([^;]+);", scheme)
        }
        for text, ground in (("ink", "like"), ("ink", "unlike"), ("ink", "mark"),
                             ("soft", "card"), ("soft", "ground"), ("card", "ink")):  # fmt: skip
            dark, light = sorted((shades[text], shades[ground]))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


@pytest.fixture
def server() -> Iterator[Live]:
    yield from live(Limits(seconds=20))


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def opened(browser: Any, server: Live, **look: Any) -> tuple[Any, list[str]]:
    """The page, and a list of what went wrong or elsewhere."""
    page, wrong = browser.new_page(**look), list[str]()
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda line: wrong.extend([line.text] * (line.type == "error")))
    elsewhere = f"^(?!{server.url}|data:).+"
    page.on("request", lambda sent: wrong.extend(re.findall(elsewhere, sent.url)))
    page.goto(server.url)
    return page, wrong


def judge(page: Any, candidates: tuple[str, str] = CANDIDATES) -> None:
    page.get_by_label("Exemplars: texts this person wrote").fill(f"{ADA}\n---\n{ADA}")
    for label, text in zip("AB", candidates, strict=True):
        page.get_by_label(f"Candidate {label}", exact=True).fill(text)
    page.locator("#traits li").first.wait_for()
    page.get_by_role("button", name="Judge", exact=True).click()
    page.locator("#ranking").wait_for(state="visible")


def known(text: str) -> JudgedCandidate:
    """Made up: the words and phrases above that stand in the text, and a ledger."""
    words = [Word(i, i + len(x), *y) for x, y in WORDS.items() if (i := text.find(x)) >= 0]
    runs = [Phrase(i, i + len(x), x, *y) for x, y in PHRASES.items() if (i := text.find(x)) >= 0]
    passages = tuple(Passage(p.start, p.end, p.text, p.gain) for p in runs)
    lines = [Line("reading", None, 0.114, 6.1, passages), Line("third_person", 2.66, 0.0, -1.2)]
    lines.append(Line("sum", None, None, 4.9))
    return JudgedCandidate(lines, 8.44, 61.2, CandidateReading(0.2, 0.1, words, runs))


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
    thoughts = page.locator("#cards .thought").all_inner_texts()  # without a ledger they stay
    assert thoughts == [f'It says "{text}" and no more.' for text in CANDIDATES]
    assert not page.locator("#reading").is_visible()  # nothing was read
    assert page.locator("#cards").locator("span, table, .read, mark").count() == 0
    assert page.locator("#places").inner_text().count("%") == 3  # two of the texts, one of a place
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


@pytest.fixture
def read(browser, server) -> Iterator[Any]:
    """The page with two candidates that were read."""
    server.judge.known = [known(text) for text in READ]
    page, wrong = opened(browser, server)
    judge(page, READ)
    yield page
    assert wrong == []


@pytest.mark.slow
def test_a_ledger_is_a_table_with_bars(read):
    table = read.get_by_role("table", name="Evidence on candidate A")
    cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    assert table.locator("tr").evaluate_all(cells) == [
        ["Feature", "Candidate", "Writer", "Decibans"],
        ["reading\nnats a token", "+0.11\n“So be”, “Ada”", "", "+6.1"],
        ["third person\nper 100 words", "0", "2.7", "−1.2"],
        ["sum", "", "", "+4.9"],
    ]
    assert table.get_by_role("rowheader").count() == 3
    bars = "bars => bars.map(b => [b.className.baseVal, Math.sign(b.getAttribute('x'))])"
    drawn = table.locator(".for, .against")
    assert drawn.evaluate_all(bars) == [["for", 0], ["against", -1], ["for", 0]]
    widths = [float(bar.get_attribute("width")) for bar in drawn.all()]
    assert widths == pytest.approx([50, 50 * 1.2 / 6.1, 50 * 4.9 / 6.1])
    assert read.locator("#cards .thought").count() == 0  # the table is in their place
    assert "+8.4, 61.2 %" in read.locator("#places").inner_text()


@pytest.mark.slow
def test_words_that_sound_like_the_writer(read):
    cards, switch = read.locator("#cards"), read.get_by_role("button", name="Highlight")
    coloured = "nodes => nodes.map(n => [n.className, n.textContent, n.style.cssText])"
    assert cards.locator(".like, .unlike, .topic").evaluate_all(coloured) == [
        ["like", "So", "--strength: 1;"],
        ["like", "be", "--strength: 0.5;"],
        ["unlike", "<b", "--strength: 0.5;"],
        ["topic", "Ada", "--strength: 1;"],
        ["unlike", "lol", "--strength: 1;"],
    ]
    assert cards.locator(".phrase").all_text_contents() == [
        "So be (like the writer, plus 3.0)",
        "it, 👩\u200d🍳 <b (unlike the writer, minus 0.6)",
        "lol <img src=x (unlike the writer, minus 3.0)",
    ]
    seen = "\n".join(cards.locator(".text").all_text_contents())
    assert re.sub(r" \((un)?like the writer.*?\)", "", seen) == "\n".join(READ)
    assert cards.locator("b, img").count() == 0
    marks = cards.locator(".text mark")  # for the line; in pieces, for words end in them
    assert marks.all_inner_texts() == ["So", " ", "be", "Ada"]
    switch.click()
    assert switch.get_attribute("aria-pressed") == "false"
    assert cards.locator(".text span").count() == 0
    assert cards.locator(".text").all_inner_texts() == [*READ]
    assert marks.all_inner_texts() == ["So be", "Ada"]


@pytest.mark.slow
def test_the_gain_of_a_phrase_shows_on_focus_and_moves_nothing(read):
    places = """() => [...document.querySelectorAll("*")].map(
        node => JSON.stringify(node.getBoundingClientRect()))"""
    tip = "() => getComputedStyle(document.activeElement, '::after').content"
    read.get_by_role("button", name="Highlight").focus()
    before = read.evaluate(places)
    for gain in ("+3.0", "−0.6", "−3.0"):
        read.keyboard.press("Tab")
        assert gain in read.evaluate(tip)
        assert read.evaluate(places) == before
    read.keyboard.press("Escape")
    assert read.evaluate(tip) == "none"
