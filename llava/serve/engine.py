"""What answers questions behind every door: the protocol of an engine, and one that answers in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from threading import Event, Lock
from typing import TYPE_CHECKING, Protocol

from llava.core.types import Turn, Verdict
from llava.data.inputs import NamedImage
from llava.pipeline.faces import faces_of

if TYPE_CHECKING:
    import numpy as np

    from llava.explainer.generation import GenerationSettings
    from llava.pipeline import Pipeline

WAIT_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer: the verdict, before any text; then text to append. tokens: written so far."""

    text: str = ""
    verdict: Verdict | None = None
    tokens: int = 0


class Engine(Protocol):
    """Answers one conversation about one face image; may be asked from several threads at once."""

    def ask(
        self, image: np.ndarray | None, turns: Sequence[Turn], settings: GenerationSettings, stop: Event
    ) -> Iterator[Piece]:
        """Yield the verdict on the largest face of an image (H, W, 3) uint8 RGB, then the text; `stop` ends it soon.

        There is no text where there is no verdict. Raises ValueError for what can not be answered.
        """
        ...


class PipelineEngine:
    """Answers with a pipeline of this process, one request after the other."""

    def __init__(self, pipeline: Pipeline) -> None:
        pipeline.needed_explainer()
        self._pipeline = pipeline
        self._turn = Lock()

    def ask(
        self, image: np.ndarray | None, turns: Sequence[Turn], settings: GenerationSettings, stop: Event
    ) -> Iterator[Piece]:
        """Yield the verdict, then the text, as `Engine.ask` says."""
        if image is None:
            raise ValueError("This model answers questions about one face image, and there is none; send one.")
        settings = self._within_context(turns, settings)
        with self._alone(stop) as is_wanted:
            if is_wanted:
                yield from self._answer(image, turns, settings, stop)

    def _answer(
        self, image: np.ndarray, turns: Sequence[Turn], settings: GenerationSettings, stop: Event
    ) -> Iterator[Piece]:
        face = faces_of(NamedImage(name="image", pixels=image), self._pipeline.faces)[0]
        (finding,), encoded = self._pipeline.look([face], self._pipeline.stability)
        yield Piece(verdict=finding.verdict)
        if encoded is None or stop.is_set():
            return
        with closing(self._pipeline.needed_explainer().stream(encoded, turns, settings)) as stream:
            has_begun = False
            for tokens, text in enumerate(stream, 1):
                shown = text if has_begun else text.lstrip()
                has_begun = has_begun or bool(shown)
                yield Piece(text=shown, tokens=tokens)
                if stop.is_set():
                    return

    def _within_context(self, turns: Sequence[Turn], settings: GenerationSettings) -> GenerationSettings:
        """Shorten the answer to what the model has room for. Raises ValueError when the conversation fills it."""
        explainer = self._pipeline.needed_explainer()
        length = len(explainer.processor.encode(turns, settings.layout)[0])
        room = explainer.model.config.text_config.max_position_embeddings - length
        if room < 1:
            raise ValueError(f"The conversation has {length} tokens, more than the model reads; begin a new one.")
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))

    @contextmanager
    def _alone(self, stop: Event) -> Iterator[bool]:
        """Wait until nobody else is answered; False when `stop` was set before."""
        while not stop.is_set():
            if self._turn.acquire(timeout=WAIT_SECONDS):
                try:
                    yield True
                finally:
                    self._turn.release()
                return
        yield False
