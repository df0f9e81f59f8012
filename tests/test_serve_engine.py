"""The engine of one process: the pipeline's words, one request after the other, ended when nobody reads."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from tiny_explainer import REASON_QUESTION
from tiny_world import draw

from llava.core.types import Turn, VerdictLabel
from llava.explainer.generation import GenerationSettings
from llava.explainer.prompts import VERDICT_QUESTION
from llava.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings
from llava.serve.engine import Piece, PipelineEngine

LONG = GenerationSettings(max_new_tokens=1024, temperature=10.0)


@pytest.fixture(scope="module")
def pipeline(tiny_explainer: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_explainer, "cpu", faces=FaceSettings(face="off"))


def human(text: str) -> list[Turn]:
    return [Turn(role="human", text=text)]


def test_verdict_first_then_the_words_of_a_chat(pipeline: Pipeline) -> None:
    engine = PipelineEngine(pipeline)
    for label in (0, 1):
        chat = pipeline.chat(draw(label, 5))
        first, second = "".join(chat.ask(VERDICT_QUESTION)), "".join(chat.ask(REASON_QUESTION))
        turns = [*human(VERDICT_QUESTION), Turn(role="assistant", text=first), *human(REASON_QUESTION)]
        for asked, text in ((turns[:1], first), (turns, second)):
            start, *rest = engine.ask(draw(label, 5), asked, GenerationSettings(), Event())
            assert start.verdict is not None and start.text == ""
            assert start.verdict.label == chat.verdict.label and start.verdict.stability == chat.verdict.stability
            assert "".join(piece.text for piece in rest) == text
            assert rest[-1].tokens == len(rest) > 3 and all(piece.verdict is None for piece in rest)


def test_no_face_is_a_verdict_without_words(tiny_explainer: Path) -> None:
    engine = PipelineEngine(Pipeline.from_pretrained(tiny_explainer, "cpu"))
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    (only,) = engine.ask(grey, human(VERDICT_QUESTION), GenerationSettings(), Event())
    assert only.verdict is not None and only.verdict.label == VerdictLabel.INCONCLUSIVE


def test_what_can_not_be_answered_is_a_value_error(pipeline: Pipeline, tiny_explainer: Path) -> None:
    engine = PipelineEngine(pipeline)
    with pytest.raises(ValueError, match="send one"):
        list(engine.ask(None, human("Why?"), GenerationSettings(), Event()))
    with pytest.raises(ValueError, match="more than the model reads"):
        list(engine.ask(draw(1, 5), human("why " * 3000), GenerationSettings(), Event()))
    with pytest.raises(ValueError, match="gives verdicts and no words"):
        PipelineEngine(Pipeline.from_pretrained(tiny_explainer.parent / "detector", "cpu"))


def test_stop_ends_an_answer_and_lets_the_next_one_begin(pipeline: Pipeline) -> None:
    engine, stop = PipelineEngine(pipeline), Event()
    pieces = []
    for piece in engine.ask(draw(1, 5), human(VERDICT_QUESTION), LONG, stop):
        pieces.append(piece)
        if piece.tokens == 5:
            stop.set()
    assert pieces[-1].tokens == 5
    *_, last = engine.ask(draw(1, 5), human(VERDICT_QUESTION), GenerationSettings(), Event())
    assert last.tokens > 0


def test_a_request_that_waits_can_be_given_up(pipeline: Pipeline) -> None:
    engine, stop = PipelineEngine(pipeline), Event()
    running = engine.ask(draw(1, 5), human(VERDICT_QUESTION), LONG, Event())
    next(running)
    found: list[Piece] = []
    waiting = Thread(
        target=lambda: found.extend(engine.ask(draw(0, 5), human(VERDICT_QUESTION), GenerationSettings(), stop))
    )
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive() and not found
    stop.set()
    waiting.join(2)
    assert not waiting.is_alive() and not found
    running.close()  # type: ignore[attr-defined]
    assert list(engine.ask(draw(0, 5), human(VERDICT_QUESTION), GenerationSettings(), Event()))
