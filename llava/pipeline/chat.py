"""A conversation about one face: verdict first, answers streamed, the image encoded once."""

from __future__ import annotations

from collections.abc import Iterator

from llava.core.types import Explanation, Turn, Verdict
from llava.explainer.generation import Explainer
from llava.explainer.modeling import Encoded
from llava.explainer.sampling import GenerationSettings
from llava.pipeline.agreement import explanation


class Chat:
    """Ask about one face again and again.

    verdict: the detector's, known before any word is written. turns: what was said so far. last: the last answer with
    whether it agrees with the verdict; None before the first.
    """

    def __init__(
        self,
        explainer: Explainer,
        verdict: Verdict,
        encoded: Encoded | None,
        settings: GenerationSettings | None = None,
    ) -> None:
        self._explainer = explainer
        self._encoded = encoded
        self._settings = settings
        self.verdict = verdict
        self.turns: list[Turn] = []
        self.last: Explanation | None = None

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; it becomes part of the conversation once it is complete.

        Raises ValueError for an empty question, and where there is no face to talk about.
        """
        if self._encoded is None:
            raise ValueError(f"There is nothing to ask about: {self.verdict.reason}.")
        if not question.strip():
            raise ValueError("The question is empty; ask something, such as: Why?")
        asked = [*self.turns, Turn(role="human", text=question.strip())]
        pieces: list[str] = []
        for piece in self._explainer.stream(self._encoded, asked, self._settings):
            pieces.append(piece)
            yield piece
        text = "".join(pieces).rstrip()
        self.turns = [*asked, Turn(role="assistant", text=text)]
        self.last = explanation(self.verdict, question, text)
