"""Questions that come together are answered together, and each as it would be alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any

import numpy as np
import pytest
from clips import write_clip
from PIL import Image
from tiny_world import draw

from llava.core.types import GenerationSettings, Turn, VerdictLabel
from llava.data.inputs import NamedVideo
from llava.explainer.prompts import VERDICT_QUESTION
from llava.pipeline import Pipeline
from llava.pipeline.crops import faces_of
from llava.pipeline.settings import FaceSettings
from llava.serve.batching import BatchConfig, BatchingEngine
from llava.serve.engine import Call, Question, Refusal

ROOT = Path(__file__).parents[1]
QUESTIONS = (VERDICT_QUESTION, "Does the nose look real or fake?", "Why?")
SHORT = GenerationSettings(max_new_tokens=16)


@pytest.fixture(scope="module")
def pipeline(tiny_explainer: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_explainer, faces=FaceSettings(face="off"), stability=False)


@pytest.fixture
def engine(pipeline: Pipeline) -> Iterator[BatchingEngine]:
    engine = BatchingEngine(pipeline, BatchConfig(rows=4, images=2))
    yield engine
    engine.close()


def human(text: str) -> list[Turn]:
    return [Turn(role="human", text=text)]


def why(
    image: np.ndarray | None, turns: Sequence[Turn] | None = None, settings: GenerationSettings = SHORT
) -> Question:
    return Question(image=image, turns=human("Why?") if turns is None else turns, settings=settings)


def ask(
    engine: BatchingEngine,
    image: np.ndarray,
    question: str,
    settings: GenerationSettings = SHORT,
    is_crop: bool = False,
) -> tuple[Any, str]:
    first, *rest = engine.ask(Question(image=image, turns=human(question), settings=settings, is_crop=is_crop), Event())
    assert first.text == "" and all(piece.verdict is None for piece in rest)
    return first.verdict, "".join(piece.text for piece in rest)


def alone(pipeline: Pipeline, image: np.ndarray, question: str) -> tuple[Any, str]:
    (finding,) = pipeline.explained_findings([image], question, SHORT)
    return finding.verdict, finding.explanation.text


def test_many_at_once_are_answered_as_one_alone(engine: BatchingEngine, pipeline: Pipeline) -> None:
    asked = [(draw(n % 2, n), QUESTIONS[n % 3]) for n in (0, 1, 2, 0, 3, 1, 2, 2, 0)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda pair: ask(engine, *pair), asked))
    for (verdict, text), (image, question) in zip(found, asked, strict=True):
        wanted, words = alone(pipeline, image, question)
        assert text == words
        assert verdict.label == wanted.label and verdict.p_fake == pytest.approx(wanted.p_fake, abs=1e-6)
    assert len(engine.observations.images) == 2, "only the newest images are kept"


def test_an_image_is_looked_at_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    real = pipeline.look
    monkeypatch.setattr(pipeline, "look", lambda faces, *rest: looks.append(len(faces)) or real(faces, *rest))
    engine = BatchingEngine(pipeline)
    for question in QUESTIONS:
        ask(engine, draw(1, 5), question)
    assert looks == [1]
    (seen,) = engine.observations.images.values()
    assert len(seen.prefixes) == 1
    engine.close()


def test_a_face_that_was_found_is_not_looked_at_again(tiny_explainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photo is asked about, then each crop of it; every answer is the one that an engine without memory gives."""
    pipeline = Pipeline.from_pretrained(tiny_explainer)
    photo = np.asarray(Image.open(ROOT / "utils" / "demo_faces" / "grace_hopper.jpg").convert("RGB"))
    photo = np.concatenate([photo, photo[:, ::-1]], axis=1)
    asked = [(photo, False), *((finding.pixels, True) for finding in pipeline.findings([photo]))]
    assert len(asked) > 2, "the photo shows several faces"
    fresh = BatchingEngine(pipeline)
    wanted = [ask(fresh, picture, "Why?", is_crop=is_crop) for picture, is_crop in asked]
    fresh.close()
    passes: list[int] = []
    real = pipeline.detector.forward
    monkeypatch.setattr(pipeline.detector, "forward", lambda *a, **k: passes.append(1) or real(*a, **k))
    engine = BatchingEngine(pipeline)
    found = engine.findings([photo])
    looked = len(passes)
    assert looked > 0
    for (picture, is_crop), (verdict, text) in zip(asked, wanted, strict=True):
        again, words = ask(engine, picture, "Why?", is_crop=is_crop)
        assert words == text
        assert {**again.to_dict(), **numbers(verdict)} == {**verdict.to_dict(), **numbers(verdict)}
        assert again.p_fake == pytest.approx(verdict.p_fake, abs=1e-6)
    assert [ask(engine, f.pixels, "Why?", is_crop=True)[0].label for f in found] == [f.verdict.label for f in found]
    assert len(passes) == looked, "the detector ran for the findings alone"
    engine.close()


def numbers(verdict: Any) -> dict[str, Any]:
    """Give what may differ in the last digit, because it was computed within another batch."""
    return {name: getattr(verdict, name) for name in ("p_fake", "raw_p_fake", "probabilities", "evidence", "stability")}


def test_a_new_image_is_made_ready_once_for_all_who_ask(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real, gate = pipeline.face_of, Event()
    monkeypatch.setattr(pipeline, "face_of", lambda image: made.append("face") or (gate.wait(20) and real(image)))
    engine = BatchingEngine(pipeline)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, engine, draw(1, 6), QUESTIONS[n % 3]) for n in range(6)]
        sleep(0.2)
        gate.set()
        assert len({str(answer.result(60)[0]) for answer in asked}) == 1
    assert made == ["face"] and not engine.observations._coming
    engine.close()


def test_who_leaves_or_stops_frees_the_place(engine: BatchingEngine) -> None:
    long = GenerationSettings(max_new_tokens=400)
    answers = [engine.ask(why(draw(1, n), settings=long), Event()) for n in range(4)]
    for answer in answers:
        next(answer), next(answer)
    for answer in answers:
        answer.close()
    _, text = ask(engine, draw(1, 9), "Why?")
    assert text and not engine.decoder.rows and not engine._active
    stop = Event()
    stopped = engine.ask(why(draw(1, 2), settings=long), stop)
    next(stopped)
    stop.set()
    assert len(list(stopped)) < 100, "of 400 tokens"


@pytest.mark.parametrize("what", ["images", "video"])
def test_the_model_is_free_while_faces_are_looked_for(
    engine: BatchingEngine, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = []

    def slowly(*given: Any) -> Any:
        call = Call(lambda: True)
        engine._waiting.put(call)
        free.append(call.result.result(timeout=20))
        return faces_of(*given)

    for module in ("pipeline", "video"):
        monkeypatch.setattr(f"llava.pipeline.{module}.faces_of", slowly)
    if what == "images":
        assert len(engine.findings([draw(0, 21), draw(0, 22)])) == 2
    else:
        clip = write_clip(tmp_path / "clip.mp4", [draw(0, 23)] * 4)
        found = engine.video_finding(NamedVideo(name="clip.mp4", source=clip.read_bytes()))
        assert found.verdict.p_fake is not None
    assert len(free) >= 2 and all(free)


def test_a_question_that_waits_can_be_given_up(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, stop, gate = BatchingEngine(pipeline, BatchConfig(rows=1)), Event(), Event()
    step = engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda: gate.wait(20) and step())
    running = engine.ask(why(draw(1, 5)), Event())
    next(running), next(running)
    found: list[Any] = []
    waiting = Thread(target=lambda: found.extend(engine.ask(why(draw(0, 5)), stop)))
    waiting.start()
    sleep(0.2)
    assert waiting.is_alive() and not found
    stop.set()
    waiting.join(2)
    assert not waiting.is_alive() and not found
    running.close()
    gate.set()
    assert ask(engine, draw(0, 5), "Why?")[1]
    engine.close()


def test_closing_waits_for_no_answer_and_leaves_nobody_waiting(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate, raised = BatchingEngine(pipeline, BatchConfig(rows=1)), Event(), []
    monkeypatch.setattr(engine.decoder, "step", lambda: gate.wait(20))  # never writes a token

    def told(work: Callable[[], object]) -> None:
        with pytest.raises(Refusal, match="The server ends") as caught:
            work()
        raised.append(caught.value.status)

    running = engine.ask(why(draw(1, 5)), Event())
    next(running)
    works = (
        lambda: list(running),
        lambda: list(engine.ask(why(draw(0, 5)), Event())),
        lambda: engine.findings([draw(1, 6)]),
    )
    asking = [Thread(target=told, args=(work,), daemon=True) for work in works]
    for thread in asking:
        thread.start()
    sleep(0.3)
    closing = Thread(target=engine.close, daemon=True)
    closing.start()
    gate.set()
    for thread in (closing, *asking):
        thread.join(20)
    for work in works[1:]:
        told(work)
    assert not closing.is_alive() and raised == [503] * 5


def test_the_words_are_those_of_a_chat(engine: BatchingEngine, pipeline: Pipeline) -> None:
    for label in (0, 1):
        chat = pipeline.chat(draw(label, 5))
        first, second = "".join(chat.ask(VERDICT_QUESTION)), "".join(chat.ask(QUESTIONS[1]))
        turns = [*human(VERDICT_QUESTION), Turn(role="assistant", text=first), *human(QUESTIONS[1])]
        for asked, text in ((turns[:1], first), (turns, second)):
            start, *rest = engine.ask(why(draw(label, 5), asked, settings=GenerationSettings()), Event())
            assert start.verdict.label == chat.verdict.label and start.prompt_tokens > 0
            assert "".join(piece.text for piece in rest) == text and rest[-1].tokens > 3


def test_a_bad_question_fails_alone(engine: BatchingEngine) -> None:
    with pytest.raises(ValueError, match="must be by the human"):
        list(engine.ask(why(draw(1, 1), [Turn(role="assistant", text="Fake.")]), Event()))
    with pytest.raises(ValueError, match="there is none; send one"):
        list(engine.ask(why(None), Event()))
    with pytest.raises(ValueError, match="more than the model reads"):
        ask(engine, draw(1, 1), "why " * 3000)
    with pytest.raises(ValueError, match="temperature"):
        ask(engine, draw(1, 1), "Why?", GenerationSettings(temperature=-1))
    assert ask(engine, draw(1, 1), "Why?")[1]


def test_an_answer_says_whether_its_limit_cut_it(engine: BatchingEngine, pipeline: Pipeline) -> None:
    def pieces(words: int, limit: int) -> tuple[int, Any]:
        first, *_, last = engine.ask(
            why(draw(1, 1), human("why " * words), GenerationSettings(max_new_tokens=limit)), Event()
        )
        return first.prompt_tokens, last

    (short, cut), (longer, _) = pieces(1, 2), pieces(101, 1)
    assert cut.is_cut and cut.tokens == 2
    *_, whole = engine.ask(why(draw(1, 1), human(VERDICT_QUESTION), GenerationSettings()), Event())
    assert not whole.is_cut and whole.tokens > 3
    room = pipeline.needed_explainer().model.config.text_config.max_position_embeddings - short
    read, last = pieces(1 + 100 * (room - 1) // (longer - short), 200)
    assert last.is_cut and last.tokens == room + short - read < 200, "the model reads no more"


def test_no_face_is_a_verdict_without_words(tiny_explainer: Path) -> None:
    engine = BatchingEngine(Pipeline.from_pretrained(tiny_explainer, stability=False))
    (only,) = engine.ask(why(np.zeros((64, 64, 3), np.uint8)), Event())
    assert only.verdict is not None and only.verdict.label == VerdictLabel.INCONCLUSIVE
    engine.close()


def test_a_failing_model_tells_everyone_and_goes_on(engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.decoder, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(engine, draw(1, 1), "Why?", GenerationSettings(max_new_tokens=50))
    monkeypatch.undo()
    assert ask(engine, draw(1, 1), "Why?")[1]
