"""The page of a real `m2f2 serve`, used in a real headless Chromium as a person uses it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser as browsers
import httpx
import numpy as np
import pytest
from browser import Browser, chromium
from page_parser import Page
from PIL import Image
from selenium.webdriver.common.keys import Keys
from servers import ROOT, Process, ready_address, running, wait_for

from llava.core.types import Explanation, Verdict
from llava.explainer.prompts import VERDICT_QUESTION
from llava.pipeline import Pipeline
from llava.serve.api import Service, build_app
from llava.serve.batching import BatchingEngine
from llava.serve.page.door import open_page
from llava.serve.page.views import SUGGESTIONS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(browsers.missing()), reason=f"not installed: {browsers.missing()} (apt: chromium-driver)"),
]
FACES = ROOT / "utils" / "demo_faces"
PHOTO = FACES / "astronaut.png"
FOLLOW_UP = "Does the nose look real or fake?"


@pytest.fixture(scope="module")
def process(tiny_explainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    flags = ["serve", "--model_path", str(tiny_explainer), "--port", "0", "--examples", str(FACES)]
    started = Process("llava.cli", [*flags, "--requests_per_minute", "10000"], tmp_path_factory.mktemp("serve") / "log")
    yield started
    if started.is_running:
        started.kill()


@pytest.fixture(scope="module")
def address(process: Process) -> str:
    return ready_address(process)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Browser]:
    with chromium(downloads) as started:
        yield started


@pytest.fixture(scope="module")
def answered(browser: Browser, address: str) -> Browser:
    """Give the page after a photo was dropped and explained."""
    browser.look()
    browser.open(address)
    browser.drop(PHOTO)
    browser.wait_for_answer()
    return browser


def explained(address: str, path: Path = PHOTO) -> dict[str, Any]:
    reply = httpx.post(f"{address}/v1/explain", files=[("files", (path.name, path.read_bytes()))], timeout=120)
    return reply.json()["explanations"][0]


def asked_on(address: str, first: str) -> str:
    """Give the answer of the API to the second question about the photo."""
    image = {"url": f"data:image/png;base64,{base64.b64encode(PHOTO.read_bytes()).decode()}"}
    parts = [{"type": "text", "text": VERDICT_QUESTION}, {"type": "image_url", "image_url": image}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": first}]
    body = {"model": "explainer", "messages": [*said, {"role": "user", "content": FOLLOW_UP}]}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)
    return reply.json()["choices"][0]["message"]["content"]


def answers(browser: Browser) -> list[str]:
    return browser.value("[...document.querySelectorAll('#words .answer')].map(part => part.textContent)")


def test_a_photo_gets_the_verdict_and_the_words_of_the_api(answered: Browser, address: str) -> None:
    wanted = explained(address)
    verdict = wanted["verdict"]
    assert answered.find("#card .verdict").get_attribute("data-label") == verdict["label"]
    card = answered.text("card")
    assert f"Score {verdict['p_fake']:.3f} of 1" in card and "not calibrated" in card
    assert f"{verdict['evidence']['p_fake']:.3f}" in card and "Score for fake" in card
    assert answers(answered) == [wanted["text"]]
    remark = Explanation(**{**wanted, "verdict": Verdict(**verdict)}).remark.strip("[]")
    assert answered.value("document.querySelector('#words .remark')?.textContent ?? ''") == remark
    heard = answered.value("document.querySelector('[role=status][aria-live=polite]').textContent")
    assert wanted["text"] in heard
    assert "astronaut.png" in answered.text("photo")
    assert "This is no evidence by itself" in answered.text("about")


def test_a_follow_up_goes_on_with_the_conversation(answered: Browser, address: str) -> None:
    box = answered.find("#asking textarea")
    box.send_keys(FOLLOW_UP, Keys.ENTER)
    answered.wait_for_answer(2)
    first, second = answers(answered)
    assert answered.value("document.querySelector('#words .question bdi').textContent") == FOLLOW_UP
    assert box.get_attribute("value") == ""
    assert second == asked_on(address, first)
    answered.click(SUGGESTIONS[0])
    answered.wait_for_answer(3)
    assert "nose" in second and answers(answered)[:2] == [first, second]
    answered.value("document.querySelector('#say p').textContent = ''")
    answered.click("Regenerate")
    answered.wait("document.querySelector('#say p').textContent")
    answered.wait_for_answer(3)
    assert answers(answered)[:2] == [first, second]


def test_what_the_page_says_is_counted(answered: Browser, address: str) -> None:
    def counted() -> dict[str, float]:
        lines = [line for line in httpx.get(f"{address}/metrics").text.splitlines() if line.startswith("m2f2_")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    count, tokens = (f'm2f2_{name}{{model="explainer"}}' for name in ("answer_seconds_count", "tokens_total"))
    before, told = counted(), len(answers(answered))
    answered.click(SUGGESTIONS[1])
    answered.wait_for_answer(told + 1)
    after = counted()
    assert after[count] == before[count] + 1
    assert after[tokens] > before[tokens]
    assert sum(value for name, value in before.items() if 'call="findings"' in name and "_total" in name) >= 1


def test_the_map_is_shown_or_said_to_be_missing(answered: Browser) -> None:
    answered.click("Heatmap")
    answered.wait("document.getElementById('heatmap').innerText.length > 20")
    has_map = answered.value("document.querySelectorAll('#heatmap img').length") == 2
    assert has_map != ("This detector draws no map" in answered.text("heatmap"))
    answered.click("Explanation")


def test_the_reports_say_what_the_card_says(answered: Browser, address: str, downloads: Path) -> None:
    wanted = explained(address)
    answered.click("Save report (JSON)")
    answered.click("Save report (page)")
    paths = [downloads / f"astronaut-report.{kind}" for kind in ("json", "html")]
    wait_for(lambda: all(path.is_file() for path in paths), 60)
    (entry,) = json.loads(paths[0].read_text())["entries"]
    told = {name: entry["verdict"][name] for name in ("label", "calibration", "face_box", "detector")}
    assert told == {name: wanted["verdict"][name] for name in told}
    assert entry["verdict"]["p_fake"] == pytest.approx(wanted["verdict"]["p_fake"], abs=1e-6)
    assert entry["explanation"]["text"] == wanted["text"] and entry["explanation"]["question"] == VERDICT_QUESTION
    page = Page(paths[1].read_text())
    assert wanted["verdict"]["label"] in page.text and wanted["text"] in page.text
    told = [wanted["text"], *(said["text"] for said in entry["follow_ups"])]
    assert told == answers(answered) and len(told) > 2 and all(text in page.text for text in told)
    assert entry["follow_ups"][0]["question"] == FOLLOW_UP and f"Then asked: {FOLLOW_UP}" in page.text


def test_everything_has_a_name_and_the_keyboard_reaches_it(answered: Browser) -> None:
    nameless = """[...document.querySelectorAll('input, textarea, select, button')].filter(part => part.offsetParent
        && !(part.labels?.length || part.getAttribute('aria-label') || part.textContent.trim() || part.title))
        .map(part => part.outerHTML.slice(0, 200))"""
    assert answered.value(nameless) == []
    assert answered.value("[...document.images].filter(image => !image.alt).length") == 0
    assert answered.value("document.documentElement.lang") == "en"
    assert answered.value("[...document.querySelectorAll('h1')].map(part => part.textContent)") == [
        "Is this face real or forged?"
    ]
    reached = []
    for _ in range(30):  # more than once around, from wherever the last click was
        answered.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(answered.value("document.activeElement.innerText || document.activeElement.tagName"))
    wanted = ["Clear, take another", "Explanation", "Regenerate", "TEXTAREA", "Ask", SUGGESTIONS[0]]
    wanted += ["Save report (page)", "Save report (JSON)", "For programs: the API"]
    reached = reached[reached.index("Clear, take another") :]
    places = [reached.index(name) for name in wanted]
    assert places == sorted(places), reached


def test_a_phone_scrolls_in_one_direction_only_and_the_dark_is_dark(answered: Browser) -> None:
    answered.look(390, 844, is_dark=True)
    answered.wait("document.body.classList.contains('dark')")
    assert answered.value("document.documentElement.scrollWidth") <= 390
    paper, ink = answered.value(
        "[getComputedStyle(document.querySelector('.gradio-container')).backgroundColor,"
        " getComputedStyle(document.querySelector('#card .meaning')).color]"
    )
    assert brightness(paper) < 60 and brightness(ink) > 180
    answered.look(1280)
    answered.wait("!document.body.classList.contains('dark')")


def test_what_goes_wrong_is_said_where_it_is_seen(answered: Browser) -> None:
    answered.find("#asking textarea").clear()
    answered.click("Ask")
    answered.wait("document.querySelector('#notice [role=alert]')")
    top = answered.value("document.querySelector('#notice p').getBoundingClientRect().top")
    assert answered.value("scrollY") > 200 and 0 <= top < answered.value("innerHeight")


def brightness(colour: str) -> float:
    return float(np.mean([float(part) for part in colour.strip("rgba()").split(",")[:3]]))


def test_one_of_several_faces_is_chosen(browser: Browser, address: str, tmp_path: Path) -> None:
    pictures = [Image.open(path).convert("RGB").resize((360, 360)) for path in (PHOTO, FACES / "portrait_cc0_1.png")]
    both = Image.new("RGB", (720, 360))
    for number, picture in enumerate(pictures):
        both.paste(picture, (360 * number, 0))
    both.save(tmp_path / "both.png")
    content = (tmp_path / "both.png").read_bytes()
    verdicts = httpx.post(f"{address}/v1/detect", files=[("files", ("both.png", content))], timeout=120).json()[
        "verdicts"
    ]
    assert len(verdicts) > 1
    browser.open(address)
    browser.drop(tmp_path / "both.png")
    browser.wait_for_answer()
    assert browser.value("document.querySelectorAll('#photo .box b').length") == len(verdicts)
    assert f"on face 1 of {len(verdicts)}" in browser.text("card")
    names = "[...document.querySelectorAll('#faces input')].map(choice => choice.name)"
    assert set(browser.value(names)) == {"faces"}, "else arrow keys do not move between them"
    browser.value("document.querySelector(\"#faces input[value='0']\").name = 'radio-7'")  # as Gradio does at any time
    assert set(browser.value(names)) == {"faces"}
    for number, key in ((2, Keys.ARROW_RIGHT), (1, Keys.ARROW_LEFT)) * 3:  # while words about the one before come
        browser.find("#faces input:checked").send_keys(key)  # as in every group of radio buttons
        browser.wait(f"document.getElementById('card').innerText.includes('on face {number} of')")
    browser.find("#faces input:checked").send_keys(Keys.ARROW_RIGHT)
    browser.wait("document.getElementById('card').innerText.includes('on face 2 of')")
    browser.wait_for_answer()
    assert f"Score {verdicts[1]['p_fake']:.3f} of 1" in browser.text("card")
    assert browser.find("#card .verdict").get_attribute("data-label") == verdicts[1]["label"]
    assert browser.value("document.querySelector('#faces input:checked').value") == "1", "the choice is seen"
    browser.click("Clear, take another")
    browser.find("#drop input[type=file]")
    browser.wait("!document.querySelector('#card .verdict')")


def test_what_can_not_be_judged_gets_a_sentence(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(address)
    fake = tmp_path / "portrait.jpg"
    fake.write_text("These are words and no picture.")
    browser.drop(fake)
    browser.wait("document.querySelector('#notice [role=alert]')")
    assert "portrait.jpg: not an image or video in a format that is known here" in browser.text("notice")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "dark.png")
    browser.drop(tmp_path / "dark.png")
    card = browser.find("#card .verdict")
    assert card.get_attribute("data-label") == "INCONCLUSIVE" and "No face was found" in card.text
    assert not browser.find("#ask").is_displayed() and not browser.find("#again").is_displayed()
    assert browser.text("notice") == "" and "Traceback" not in browser.value("document.body.innerText")


def test_an_example_is_explained_and_nothing_was_asked_of_anybody_else(browser: Browser, address: str) -> None:
    browser.open(address)
    assert "US Navy, public domain" in browser.text("offer")
    browser.click("Grace Hopper")
    browser.wait_for_answer()
    asked = browser.requests()
    assert len(asked) > 20 and {httpx.URL(one).netloc.decode() for one in asked} == {address.removeprefix("http://")}
    assert browser.errors() == []


def test_stop_keeps_what_is_written_and_clear_forgets_it(
    browser: Browser, tiny_explainer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BatchingEngine(Pipeline.from_pretrained(tiny_explainer, stability=False))
    write = engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda: (time.sleep(0.5), write())[1])
    with running(build_app(Service(engines={"m": engine}, page=open_page({"m": engine})))) as address:
        browser.open(address)
        browser.drop(PHOTO)
        browser.wait("document.querySelector('#words .answer')?.textContent.trim()")
        (job,) = engine._active
        browser.click("Stop")
        browser.wait_for_answer()
        (kept,) = answers(browser)
        wait_for(lambda: not engine._active)
        assert job.row is not None and not job.row.is_done, "the rest is not written"
        monkeypatch.undo()
        whole = explained(address)["text"]
        assert kept and whole.startswith(kept) and len(kept) < len(whole)
        browser.click("Clear, take another")
        browser.wait("!document.querySelector('#card .verdict')")
        assert kept not in browser.find("body").text and browser.find("#drop input[type=file]")
    engine.close()


def test_an_open_page_does_not_hold_the_server_up(browser: Browser, process: Process, address: str) -> None:
    browser.open(address)
    started = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - started < 9, "streams are ended, not waited for"
    assert "Traceback" not in process.log.read_text()
