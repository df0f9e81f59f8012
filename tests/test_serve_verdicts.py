"""A detector without an explainer behind every door: its verdict, one sentence, and no language model."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import browser as browsers
import httpx
import numpy as np
import openai
import pytest
from browser import Browser
from PIL import Image
from servers import ROOT, Process, ready_address, running, wait_for
from test_architecture import LLM_STACK
from test_serve_api import data_uri, messages, png
from tiny_world import SCOPE, draw

from llava.core.types import GenerationSettings, Turn, Verdict
from llava.data.answer_texts import VERDICT_QUESTION
from llava.data.inputs import NamedImage
from llava.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings
from llava.pipeline.verdict import meaning
from llava.serve.batching import BatchingEngine
from llava.serve.engine import WORDLESS, Call, Piece, Question, Refusal
from llava.serve.gradio_web_server import Controller, RemoteEngine
from llava.serve.model_worker import WorkerSettings, build_app, load_engine
from llava.serve.page import views
from llava.serve.page.flow import Flow, Screen
from llava.serve.page.layout import build_page
from llava.serve.protocol import decode_chunk, split_chunks

FACES = ROOT / "utils" / "demo_faces"
PHOTO = FACES / "astronaut.png"
BLANK = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def detector(tiny_explainer: Path) -> Path:
    return tiny_explainer.parent / "detector"


@pytest.fixture(scope="module")
def pipeline(detector: Path) -> Pipeline:
    return Pipeline.from_pretrained(detector, faces=FaceSettings(face="off"), stability=False)


@pytest.fixture
def engine(pipeline: Pipeline) -> Iterator[BatchingEngine]:
    engine = BatchingEngine(pipeline)
    yield engine
    engine.close()


def asked(engine: Any, image: np.ndarray, *said: str) -> list[Piece]:
    """Give what an engine answers to a conversation: question, answer, …, question."""
    turns = [Turn(role="assistant" if n % 2 else "human", text=text) for n, text in enumerate(said or ("Why?",))]
    stop = Event()
    patience = Timer(60, stop.set)  # an engine whose thread died would say nothing for ever
    patience.start()
    try:
        return list(engine.ask(Question(image=image, turns=turns, settings=GenerationSettings()), stop))
    finally:
        patience.cancel()


def sentence(verdict: Verdict) -> str:
    return f"The detector's verdict is {verdict}; no language model wrote this. {verdict.scope_text}"


def close_to(found: Verdict, wanted: Verdict) -> bool:
    """Say whether two verdicts are one, up to the last digits, which another batch may change."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items()}
        return round(value, 4) if isinstance(value, float) else value

    return rounded(found.to_dict()) == rounded({**wanted.to_dict(), "image": found.image})


def test_a_question_gets_the_verdict_in_a_sentence(engine: BatchingEngine, pipeline: Pipeline) -> None:
    for label, name in enumerate(("REAL", "FAKE")):
        first, said = asked(engine, draw(label, 3))
        assert first.verdict is not None and first.verdict.label == name and not first.text
        assert close_to(first.verdict, *pipeline.detect(draw(label, 3)))
        assert said.text == sentence(first.verdict) and f"verdict is {name}: p_fake " in said.text
        assert not (said.tokens or said.prompt_tokens or first.prompt_tokens or said.is_cut)
    _, later = asked(engine, draw(1, 3), VERDICT_QUESTION, said.text, "Why?")
    assert later.text == WORDLESS and "no words" in WORDLESS and "merged explainer" in WORDLESS


def test_no_face_is_said_to_be_none(detector: Path) -> None:
    engine = BatchingEngine(Pipeline.from_pretrained(detector, stability=False))
    for said in ((), (VERDICT_QUESTION, "There is none.", "Why?")):
        first, reason = asked(engine, BLANK, *said)
        assert first.verdict is not None and first.verdict.p_fake is None
        assert reason.text == meaning(first.verdict) == "There is no verdict: no face found."
    engine.close()


def test_questions_that_wait_together_are_looked_at_together(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Sequence[Any]] = []
    real = pipeline.look
    monkeypatch.setattr(pipeline, "look", lambda faces, *rest: looks.append(faces) or real(faces, *rest))
    engine, gate = BatchingEngine(pipeline), Event()
    engine._waiting.put(Call(lambda: gate.wait(20)))
    with ThreadPoolExecutor(5) as threads:
        answers = [threads.submit(asked, engine, draw(n % 2, n)) for n in range(5)]
        wait_for(lambda: engine._waiting.qsize() == 5)
        gate.set()
        labels = [answer.result(60)[0].verdict.label for answer in answers]
    assert labels == ["REAL", "FAKE", "REAL", "FAKE", "REAL"]
    assert [len(faces) for faces in looks] == [5]
    assert all(face.prepared for face in looks[0]), "made ready by who asks, so that the model's thread runs it alone"
    assert engine.findings([draw(1, 1)])[0].verdict.label == "FAKE"
    assert len(looks) == 1, "what was seen is remembered"
    engine.close()


def test_a_photo_gets_the_verdict_of_the_pipeline(detector: Path) -> None:
    pipeline = Pipeline.from_pretrained(detector)
    photo = NamedImage(name="photo.png", pixels=np.asarray(Image.open(PHOTO).convert("RGB")))
    (wanted,) = pipeline.findings([photo])
    engine = BatchingEngine(pipeline)
    (found,) = engine.findings([photo])
    assert len(found.verdict.stability) > 5 and close_to(found.verdict, wanted.verdict)
    assert (found.evidence_map is None) == (wanted.evidence_map is None)
    assert found.evidence_map is None or np.allclose(found.evidence_map, wanted.evidence_map, atol=1e-5)
    engine.close()


def test_a_failure_is_told_and_an_end_leaves_nobody_waiting(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BatchingEngine(pipeline)
    monkeypatch.setattr(pipeline, "look", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked(engine, draw(1, 3))
    monkeypatch.undo()
    assert asked(engine, draw(1, 3))[-1].text, "the next question is answered"
    gate, told = Event(), []
    engine._waiting.put(Call(lambda: gate.wait(20)))

    def ask() -> None:
        with pytest.raises(Refusal, match="The server ends"):
            asked(engine, draw(1, 4))
        told.append(True)

    asking, closing = Thread(target=ask, daemon=True), Thread(target=engine.close, daemon=True)
    asking.start()
    wait_for(lambda: engine._waiting.qsize() == 1)
    closing.start()
    wait_for(lambda: engine._is_closing)
    gate.set()
    for thread in (asking, closing):
        thread.join(20)
    assert told and not closing.is_alive()


ALONE = """
import sys
from pathlib import Path
from fastapi.testclient import TestClient
from llava.pipeline.settings import load
from llava.serve.options import build
from llava.serve.batching import BatchingEngine
from llava.serve.options import ServeSettings

detector, photo, uri = sys.argv[1:]
settings = ServeSettings(model_path=[detector], examples=None)
engine = BatchingEngine(load(settings, detector))
parts = [{"type": "text", "text": "Real?"}, {"type": "image_url", "image_url": {"url": uri}}]
with TestClient(build(settings, {"detector": engine})) as client:
    files = [("files", ("x.png", Path(photo).read_bytes()))]
    assert client.post("/v1/detect", files=files).json()["verdicts"][0]["label"]
    asked = {"model": "detector", "messages": [{"role": "user", "content": parts}]}
    assert client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert client.post("/v1/explain", files=files).status_code == 400
engine.close()
print(*sys.modules)
"""


@pytest.mark.e2e
def test_no_language_model_is_loaded(detector: Path) -> None:
    words = [sys.executable, "-c", ALONE, str(detector), str(PHOTO), data_uri(draw(1, 3))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"torch", "llava.serve.batching", "llava.serve.page.layout"} <= loaded
    assert not {name for name in loaded if name.startswith("llava.explainer")} | (loaded & set(LLM_STACK))


@pytest.fixture(scope="module")
def address(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start `m2f2 serve` with the detector; give where it is."""
    flags = ["serve", "--model_path", str(detector), "--port", "0", "--requests_per_minute", "10000"]
    process = Process("llava.cli", [*flags, "--examples", "none"], tmp_path_factory.mktemp("verdicts") / "log")
    yield ready_address(process)
    assert process.stop() == 0 and "Traceback" not in process.log.read_text()


def photo_pixels() -> np.ndarray:
    return np.asarray(Image.open(PHOTO).convert("RGB"))


@pytest.mark.e2e
def test_programs_get_the_verdict(address: str, detector: Path) -> None:
    (wanted,) = Pipeline.from_pretrained(detector).detect(photo_pixels())
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    assert [(model.id, model.capabilities) for model in client.models.list()] == [("detector", ["detect"])]
    files = [("files", ("x.png", png(photo_pixels())))]
    (verdict,) = httpx.post(f"{address}/v1/detect", files=files, timeout=120).json()["verdicts"]
    assert verdict["image"] == "x.png" and verdict["label"] == wanted.label
    first = messages(photo_pixels())
    whole = client.chat.completions.create(model="detector", messages=first)
    text = whole.choices[0].message.content
    assert whole.verdict == verdict | {"image": whole.verdict["image"]} and text == sentence(Verdict(**verdict))
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == whole.usage.prompt_tokens == whole.usage.total_tokens == 0
    follow_up = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
    assert client.chat.completions.create(model="detector", messages=follow_up).choices[0].message.content == WORDLESS
    head, *rest = client.chat.completions.create(model="detector", messages=first, stream=True)
    assert head.verdict == whole.verdict and not head.choices[0].delta.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == text
    assert rest[-1].choices[0].finish_reason == "stop"
    refused = httpx.post(f"{address}/v1/explain", files=files, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == f"{WORDLESS} Send the files to /v1/detect, or serve such an explainer."


@pytest.fixture(scope="module")
def worker(detector: Path) -> Iterator[str]:
    """Serve the detector as a worker; give where it is."""
    settings = WorkerSettings(model_path=str(detector), no_register=True, face="off", stability=False)
    engine = load_engine(settings)
    with running(build_app(settings, engine)) as address:
        yield address
    engine.close()


@pytest.mark.e2e
def test_a_worker_says_that_it_has_no_words(worker: str, pipeline: Pipeline) -> None:
    def said(prompt: str) -> list[Any]:
        image = base64.b64encode(png(draw(1, 3))).decode()
        body = {"prompt": prompt, "images": [image], "echo": False, "evidence_map": True}
        reply = httpx.post(f"{worker}/worker_generate_stream", json=body, timeout=60)
        return [decode_chunk(chunk) for chunk in split_chunks([reply.content])]

    (wanted,) = pipeline.detect(draw(1, 3))
    first, *_, last = said("USER: <image>\nReal or fake? ASSISTANT:")
    assert first.verdict["label"] == wanted.label and not first.has_words and first.text == ""
    assert last.text.startswith("The detector's verdict is FAKE: p_fake ") and last.remark == ""
    *_, last = said("USER: <image>\nReal or fake? ASSISTANT: Fake.</s>USER: Why? ASSISTANT:")
    assert last.text == WORDLESS and last.remark == "" and last.error_code == 0, "nothing is said to take no side"


def last(screens: Iterator[Screen]) -> Screen:
    return list(screens)[-1]


@pytest.mark.e2e
def test_the_page_of_a_controller_learns_it_from_the_verdict(worker: str) -> None:
    remote = RemoteEngine(Controller(worker), "detector", FaceSettings(face="off"))
    assert remote.has_words is None and remote.scope == "", "nobody was asked yet"
    flow = Flow({"m": remote})
    shown = last(flow.look("page", "m", lambda: (png(draw(1, 3)), "x.png")))
    assert 'data-label="FAKE"' in str(shown.card) and shown.has_words is False and remote.has_words is False
    report = flow.report("page", "html")["text"]
    assert f"<bdi>{worker}</bdi>" in report and "<h3>Calibration</h3>" not in report, "what is not known here"
    assert remote.scope == SCOPE and f"Scope of the detector: {SCOPE}." in str(shown.card)
    assert WORDLESS in str(shown.words) and "language model wrote this" not in str(shown.words)


def test_the_page_asks_nothing_and_takes_no_question(engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ask", lambda *_: pytest.fail("the page asked for words"))
    flow = Flow({"m": engine})
    _, shown = flow.look("page", "m", lambda: (png(draw(1, 3)), "x.png"))
    assert shown.is_open and shown.has_words is False and shown.is_busy is False and shown.notice == ""
    assert WORDLESS in str(shown.words) and 'class="answer"' not in str(shown.words)
    for step in (flow.ask("page", "Why?"), flow.again("page")):
        assert last(step).notice == WORDLESS
    case = json.loads(flow.report("page", "json")["text"])
    assert case["entries"][0]["explanation"] is None and "question" not in json.dumps(case.get("settings"))


def test_the_page_promises_no_reasons_where_no_model_gives_any(engine: BatchingEngine) -> None:
    class Writer:
        has_words = True

    class Stranger:
        has_words = None

    wordless, writer, unknown = engine, Writer(), Stranger()
    cases: dict[str, list[Any]] = {
        views.WORDLESS_LEAD: [{"a": wordless}],
        views.LEAD: [{"a": writer}, {"a": writer, "b": writer}],
        views.MIXED_LEAD: [{"a": wordless, "b": writer}, {"a": unknown}],
    }
    for lead, served in cases.items():
        for models in served:
            text = str(build_page(models).get_config_file())
            assert [each for each in cases if each in text] == [lead]
            assert ("language model" in text) == (lead != views.WORDLESS_LEAD)
            assert "ask about it" not in text, "who has no words answers no questions"


@pytest.mark.e2e
@pytest.mark.skipif(bool(browsers.missing()), reason=f"not installed: {browsers.missing()} (apt: chromium-driver)")
def test_a_person_sees_the_verdict_and_no_box_for_questions(browser: Browser, address: str) -> None:
    files = [("files", (PHOTO.name, PHOTO.read_bytes()))]
    (verdict,) = httpx.post(f"{address}/v1/detect", files=files, timeout=120).json()["verdicts"]
    browser.open(address)
    browser.drop(PHOTO)
    card = browser.find("#card .verdict")
    browser.wait("document.getElementById('words').innerText.includes('no words')")
    assert card.get_attribute("data-label") == verdict["label"]
    assert f"Score {verdict['p_fake']:.3f} of 1" in browser.text("card")
    assert browser.text("words") == WORDLESS and views.WORDLESS_LEAD in browser.text("head")
    hidden = ("ask", "asking", "again", "stop", "suggestions")
    shown = [name for name in hidden if browser.value(f"document.getElementById('{name}')?.offsetParent != null")]
    assert shown == [] and browser.find("#save-json").is_displayed()
    browser.click("Heatmap")
    browser.wait("document.getElementById('heatmap').innerText.length > 20")
    browser.click("Clear, take another")
    browser.wait("!document.querySelector('#card .verdict')")
    assert browser.text("notice") == "" and browser.errors() == []
