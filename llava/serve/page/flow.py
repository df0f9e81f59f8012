"""What the page does when a person does something: look, choose a face, ask, ask again, stop, clear, report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from llava.core.types import Explanation, GenerationSettings, Turn
from llava.data.answer_texts import VERDICT_QUESTION
from llava.data.inputs import NamedImage
from llava.jobs.case_file import case_about, entry_of, render_case
from llava.serve.engine import Answer, Engine, Question, Refusal
from llava.serve.page import views
from llava.serve.page.visits import Visit, Visits
from llava.serve.uploads import UploadLimits, read_upload

log = logging.getLogger(__name__)
MAX_QUESTION = 2_000  # characters
OTHER_WORDS = 0.7  # temperature of an answer that is asked for again


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What changes on the page; None leaves a part as it is.

    faces: how many there are to choose from; face: which one is talked about. notice: a sentence on what went wrong;
    say: what is spoken to people who hear the page. is_open: whether there is a verdict to show; has_words: whether
    there is somebody to ask about it; is_busy: whether something is written.
    """

    photo: Markup | None = None
    faces: int | None = None
    face: int | None = None
    card: Markup | None = None
    words: Markup | None = None
    heatmap: Markup | None = None
    notice: str | None = None
    say: str | None = None
    is_open: bool | None = None
    has_words: bool | None = None
    is_busy: bool | None = None
    question: str | None = None


def with_notices(step: Callable[..., Iterator[Screen]]) -> Callable[..., Iterator[Screen]]:
    """Make a step end with a sentence on the page where it fails; what nobody foresaw goes to the log."""

    @wraps(step)
    def safe(*given: Any) -> Iterator[Screen]:
        try:
            yield from step(*given)
        except ValueError as error:
            yield Screen(notice=str(error), say=str(error), is_busy=False)
        except Exception:
            log.exception("A step of the page failed")
            yield Screen(notice=views.FAILED, say=views.FAILED, is_busy=False)

    return safe


class Flow:
    """The steps of all open pages; `page` names the one that acts. engines: of each model by its name."""

    def __init__(
        self, engines: Mapping[str, Engine], uploads: UploadLimits | None = None, visits: Visits | None = None
    ) -> None:
        self._engines = engines
        self._uploads = uploads or UploadLimits()
        self._visits = visits or Visits()

    @with_notices
    def look(self, page: str, model: str | None, read: Callable[[], tuple[bytes, str]]) -> Iterator[Screen]:
        """Find the faces of a picture or video, show the verdict on the largest one, and explain it.

        model: name of the one that is asked. read: gives content and name of the file.
        """
        self._visits.drop(page)
        yield Screen(notice="", say="Looking at your file.", is_busy=True)
        visit = replace(self._seen(self._engine(model), *read()), model=(model or "") if len(self._engines) > 1 else "")
        self._visits.put(page, visit)
        yield from self._shown(visit)

    @with_notices
    def choose(self, page: str, number: int) -> Iterator[Screen]:
        """Talk about another face of the same picture."""
        visit = self._visit(page)
        if number not in range(len(visit.findings)):
            raise Refusal(400, f"There is no such face; choose 1 to {len(visit.findings)}.")
        visit.begin()
        visit.chosen = number
        yield from self._shown(visit, is_new=False)

    @with_notices
    def ask(self, page: str, question: str | None) -> Iterator[Screen]:
        """Answer one more question about the face."""
        visit, question = self._visit(page), (question or "").strip()
        if not question:
            raise Refusal(400, views.EMPTY)
        if len(question) > MAX_QUESTION:
            raise Refusal(413, f"The question has {len(question):,} characters; at most {MAX_QUESTION:,} are read.")
        yield from self._written(visit, question, GenerationSettings(), visit.answers)

    @with_notices
    def again(self, page: str) -> Iterator[Screen]:
        """Write the last answer again, in other words."""
        visit = self._visit(page)
        question = visit.answers[-1].question if visit.answers else VERDICT_QUESTION
        visit.rewrites += 1
        settings = GenerationSettings(temperature=OTHER_WORDS, seed=visit.rewrites)
        # Said first, so that words which come out the same are heard, too.
        yield from self._written(visit, question, settings, visit.answers[:-1], say=views.AGAIN)

    @with_notices
    def stop(self, page: str) -> Iterator[Screen]:
        """End the answer that is being written; what there is of it stays."""
        visit = self._visit(page)
        visit.is_stopped = True
        visit.stop.set()
        yield Screen(is_busy=False)

    @with_notices
    def clear(self, page: str) -> Iterator[Screen]:
        """Forget the picture and everything that was said."""
        self._visits.drop(page)
        empty = Markup("")
        parts: dict[str, Any] = {"photo": empty, "card": empty, "words": empty, "heatmap": empty, "question": ""}
        yield Screen(**parts, faces=0, notice="", say="Cleared.", is_open=False, is_busy=False)

    def report(self, page: str, kind: str) -> dict[str, str]:
        """Give the case file of a visit as a file to save: name, type and text. Raises Refusal."""
        visit = self._visit(page)
        entries = [
            entry_of(finding, visit.source, visit.said.get(number, ())) for number, finding in enumerate(visit.findings)
        ]
        settings = {"question": VERDICT_QUESTION} if visit.engine.has_words else None
        case = case_about(visit.engine.model_facts(), entries, settings)
        stem = f"{Path(visit.source.name).stem or 'picture'}-report"
        if kind == "json":
            text = json.dumps(case, indent=2, ensure_ascii=False)
            return {"name": f"{stem}.json", "type": "application/json", "text": text}
        return {"name": f"{stem}.html", "type": "text/html", "text": render_case(case)}

    def _visit(self, page: str) -> Visit:
        visit = self._visits.get(page)
        if visit is None:
            raise Refusal(400, views.GONE)
        return visit

    def _engine(self, model: str | None) -> Engine:
        """Give the engine of a model. Raises Refusal (503) where it is not there."""
        try:
            return self._engines[model or ""]
        except (KeyError, ConnectionError):
            raise Refusal(503, views.NO_MODEL) from None

    def _wordless_note(self) -> str:
        """Say that a model has no words, and which of those that are always here have some."""
        known = self._engines if isinstance(self._engines, dict) else {}
        return views.wordless_note([name for name, engine in known.items() if engine.has_words])

    def _seen(self, engine: Engine, content: bytes, name: str) -> Visit:
        """Read what was sent and find its faces. Raises Refusal, or ValueError where an engine takes no videos."""
        source = read_upload(content, name, self._uploads)
        if isinstance(source, NamedImage):
            return Visit(engine=engine, source=source, findings=engine.findings([source]))
        finding = engine.video_finding(source)
        return Visit(engine=engine, source=replace(source, source=None), findings=[finding])

    def _shown(self, visit: Visit, is_new: bool = True) -> Iterator[Screen]:
        """Show the verdict on the chosen face, and explain it unless that was done before.

        is_new: the choice of faces is made anew. Where a person chose, its mark alone is set.
        """
        verdict, has_words = visit.finding.verdict, bool(visit.engine.has_words)
        is_asked = has_words and visit.finding.pixels is not None and not visit.answers
        note = views.NO_WORDS if visit.finding.pixels is None else "" if has_words else self._wordless_note()
        yield Screen(
            photo=views.photo(visit),
            faces=len(visit.findings) if is_new else None,
            face=visit.chosen,
            card=views.card(visit.finding, visit.source.name, visit.model),
            words=views.words(visit.answers, note),
            heatmap=views.heatmap(visit.finding),
            say=views.announcement(verdict, visit.model),
            notice="",
            is_open=True,
            has_words=has_words,
            is_busy=is_asked,
        )
        if is_asked:
            yield from self._written(visit, VERDICT_QUESTION, GenerationSettings(), [])

    def _written(
        self,
        visit: Visit,
        question: str,
        settings: GenerationSettings,
        before: list[Explanation],
        say: str | None = None,
    ) -> Iterator[Screen]:
        """Write an answer after those `before`, piece by piece, unless the person goes on to something else."""
        finding, stop = visit.finding, visit.begin()
        if finding.pixels is None or not visit.engine.has_words:
            raise Refusal(400, views.NO_WORDS if finding.pixels is None else self._wordless_note())
        picture: np.ndarray | None = finding.pixels
        is_crop = True
        if visit.chosen == 0 and isinstance(visit.source, NamedImage):
            picture, is_crop = visit.source.pixels, False  # as through the API: the largest face of the whole picture
        inquiry = Question(image=picture, turns=turns(before, question), settings=settings, is_crop=is_crop)
        answer = Answer(question, finding.verdict)
        yield Screen(words=_unfinished(before, answer), notice="", say=say, is_busy=True)
        try:
            for piece in visit.engine.ask(inquiry, stop):
                if visit.stop is not stop:
                    return
                answer.add(piece)
                yield Screen(words=_unfinished(before, answer))
        except Exception:
            if visit.stop is stop:
                yield Screen(words=views.words(visit.answers, views.BROKEN_OFF))
            raise
        if visit.stop is not stop:
            return
        said = answer.explanation
        if said.text:
            visit.said[visit.chosen] = [*before, said]
        note = "" if said.text else views.STOPPED if visit.is_stopped else views.NO_MORE
        heard = f"{said.text} {said.remark}".strip() or note
        yield Screen(words=views.words(visit.answers, note), say=heard, is_busy=False, question="")


def turns(before: Sequence[Explanation], question: str) -> list[Turn]:
    """Give a conversation with one more question."""
    said = [(Turn(role="human", text=answer.question), Turn(role="assistant", text=answer.text)) for answer in before]
    return [*(turn for pair in said for turn in pair), Turn(role="human", text=question)]


def _unfinished(before: Sequence[Explanation], answer: Answer) -> Markup:
    return views.words([*before, answer.explanation], is_writing=True)
