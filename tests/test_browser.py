"""The playground in a real browser: the ranks that it shows, its chips and filters, and what leaves the machine."""

import contextlib
import json
import os
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from PIL import Image
from playwright.sync_api import expect

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.hub.space import space_files
from sentence_transformers_inf.passages import encode_passages
from sentence_transformers_inf.playground.corpus import read_corpus
from tests.browser import BROWSER, PICTURE, Playground, chromium, free_port, open_page, take_picture

expect.set_options(timeout=60_000)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")]

EVIL = [
    "<script>window.hacked = 1</script> on tax",
    "${window.hacked = 2} {{value}} {{#each x}} on the sky",
    '<img src=x onerror="window.hacked = 3"></summary></details></li> on cats',
]

CONTRAST = """() => {
    const light = colour => { const rgb = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]; };
    const behind = node => { const colour = getComputedStyle(node).backgroundColor;
        return node.parentElement && /rgba\\(.*, 0\\)/.test(colour) ? behind(node.parentElement) : colour; };
    const found = {};
    for (const node of document.querySelectorAll("#result *, .about *, #kinds button, [role=tab]")) {
        if (![...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())) continue;
        const [one, two] = [light(getComputedStyle(node).color), light(behind(node))];
        const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        if (ratio < 4.5) found[node.className || node.tagName] = ratio;
    }
    return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def playground():
    """On the shipped adapter and the bundled corpus; at the end, its process has reached for no other machine."""
    started = Playground()
    yield started.address
    printed = started.stop()
    assert "LEAVES" not in printed
    assert "ASKS FOR" not in printed


@pytest.fixture
def page(browser, playground):
    """At the end, the page has asked no other machine for anything, and no script of it has failed."""
    opened = open_page(browser, playground)
    yield opened
    assert {url.split("/")[2] for url in opened.requested if not url.startswith(("data:", "blob:"))} == {
        playground.split("/")[2]
    }
    assert not opened.errors
    opened.context.close()


def ask(page, query, instruction):
    page.get_by_label("Query").fill(query)
    page.get_by_label("Instruction").fill(instruction)
    page.get_by_label("Instruction").press("Enter")


def expect_rank(page, section, row, rank):
    """Wait until a column shows the passage of a row at a rank."""
    expect(page.locator(f"#result section >> nth={section} >> li[data-row='{row}'] .rank")).to_have_text(str(rank))


def test_the_ranks_change_as_the_evaluator_computes_them(page):
    records = load_records("mini", "test")
    chosen = [3, 40, 77]
    vectors = encode_passages(load_instruction_model(bundled_base()), read_corpus("mini").passages)
    models = load_instruction_model(bundled_base()), load_instruction_model()
    measured = [measure(model, records, passage_embeddings=vectors).ranks for model in models]
    for number in chosen:
        record = records[number]
        for side, name in enumerate(("instruction_positive", "instruction_negative")):
            ask(page, record["query_positive"], record[name])
            for section, of_model in enumerate(measured, start=1):  # after the column without the instruction
                for passage in (0, 1):
                    expect_rank(page, section, 3 * number + passage, of_model[number, side, passage])
            before = int(page.locator(f"#result section >> nth=0 >> li[data-row='{3 * number + side}'] .rank").inner_text())
            moved = page.locator(f"#result section >> nth=2 >> li[data-row='{3 * number + side}'] .move").inner_text()
            steps = before - int(measured[1][number, side, side])
            mark = f"▲{steps}" if steps > 0 else f"▼{-steps}" if steps else "–"
            assert moved.startswith(mark)


def test_a_chip_brings_an_example_and_the_opposite_turns_it_round(page):
    words = page.locator("#result .words")
    page.get_by_role("button", name="exclusion").click()
    expect(words).to_contain_text("the passage you excluded")
    first, told = (page.get_by_label(name).input_value() for name in ("Query", "Instruction"))
    starred = page.locator("#result section >> nth=2 >> li.expected").get_attribute("data-row")
    page.get_by_role("button", name="Opposite").click()
    expect(page.get_by_label("Instruction")).not_to_have_value(told)
    expect(page.get_by_label("Query")).to_have_value(first)
    expect(page.locator("#result section >> nth=2 >> li.unwanted")).to_have_attribute("data-row", starred)
    page.get_by_role("button", name="exclusion").click()
    expect(page.get_by_label("Query")).not_to_have_value(first)
    ask(page, "a query of my own", "")
    expect(words).to_contain_text("Plain search")
    page.get_by_role("button", name="Opposite").click()
    expect(page.locator("#result .message")).to_contain_text("Only examples have an opposite")


def test_the_corpus_is_filtered_and_the_checkpoint_shown(page):
    page.get_by_role("tab", name="Corpus").click()
    count = page.locator("#listed [role=status]")
    expect(count).to_contain_text("357 of 357")
    page.get_by_label("Kind").click()
    page.get_by_role("option", name="exclusion").click()
    expect(count).to_contain_text("33 of 357")
    page.get_by_label("Words in the passage").fill("swaddl")
    page.get_by_label("Words in the passage").press("Enter")
    expect(page.locator("#listed .message")).to_contain_text("No passage fits")
    page.get_by_label("Words in the passage").fill("newborn shoulders")
    page.get_by_label("Words in the passage").press("Enter")
    expect(count).to_contain_text("1 of 357")
    page.get_by_role("tab", name="Checkpoint").click()
    expect(page.get_by_role("table", name="pair accuracy by kind")).to_contain_text("exclusion")


def test_everything_is_reached_by_keyboard(page):
    def tab_to(selector):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                style = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
                assert style == "solid"  # one sees where one is
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("#query textarea")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("how to soothe a crying newborn")
    tab_to("#instruction textarea")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("for puppies")
    page.keyboard.press("Enter")
    expect(page.locator("#result .tag")).to_have_count(0)
    tab_to("#kinds button")
    page.keyboard.press("Enter")
    expect(page.locator("#result .tag.expected").first).to_be_visible()
    tab_to("#result summary")
    page.keyboard.press("Enter")
    expect(page.locator("#result details[open]")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_readable_on_every_screen(browser, playground, width, scheme, tmp_path):
    page = open_page(browser, playground, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(CONTRAST) == {}
    take_picture(page, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size < 300 * 1024
    sections = page.locator("#result section").all()
    tops = {section.bounding_box()["y"] for section in sections}
    assert len(tops) == (1 if width == 1280 else len(sections))  # side by side, or one under the other


def test_the_picture_in_the_readme_shows_the_page_as_it_is(page, tmp_path):
    take_picture(page, tmp_path / "picture.png")
    with Image.open(PICTURE) as kept, Image.open(tmp_path / "picture.png") as new:
        assert kept.width == new.width == 1280
        assert abs(kept.height - new.height) < 200  # other fonts, other lines
    assert PICTURE.stat().st_size < 300 * 1024
    assert "docs/images/playground.png" in (PICTURE.parents[2] / "README.md").read_text(encoding="utf-8").split("\n## ")[0]


def test_what_a_corpus_and_a_user_write_is_text(browser, tiny, tmp_path):
    corpus = tmp_path / "evil.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in EVIL), encoding="utf-8")
    playground = Playground(tiny, "--corpus", corpus)
    try:
        page = open_page(browser, playground.address)
        expect(page.locator("#result .message")).to_contain_text("Type a query")
        ask(page, EVIL[2], EVIL[0])
        for text in EVIL:
            expect(page.locator("#result section").last).to_contain_text(text)
        page.get_by_role("tab", name="Corpus").click()
        for text in EVIL:
            expect(page.locator("#listed")).to_contain_text(text)
        assert page.locator("#result script, #result img, #listed script, #listed img").count() == 0
        assert page.evaluate("window.hacked") is None
        page.get_by_role("tab", name="Search").click()
        ask(page, "x" * 2_000_000, "")
        expect(page.locator("#result .message")).to_have_text(
            "The query has 2,000,000 characters. Shorten it to at most 4,000."
        )
        ask(page, "sky", "")
        expect(page.locator("#result section")).to_have_count(1)
        assert not page.errors
    finally:
        playground.stop()


def test_the_space_s_program_serves_the_page(tiny, tmp_path):
    for name, content in space_files(tiny, None, "help-centre").items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"},
    )  # fmt: skip
    try:
        for _ in range(9000):
            with contextlib.suppress(URLError), urlopen(f"http://127.0.0.1:{port}/config") as answer:
                assert "Does the ranking obey?" in answer.read().decode()
                return
            assert process.poll() is None
            time.sleep(0.1)  # the program says nothing when it is ready
        raise AssertionError("it does not answer")
    finally:
        process.kill()
        process.communicate()
