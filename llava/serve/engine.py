"""What answers questions behind every door of the server; `llava.serve.batching` holds the one of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Protocol

from llava.core.types import Turn, Verdict

if TYPE_CHECKING:
    import numpy as np

    from llava.explainer.sampling import GenerationSettings
    from llava.pipeline.findings import Finding
    from llava.pipeline.pipeline import Image


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer: the verdict, before any text; then text to append.

    tokens: written so far. prompt_tokens: read, with the verdict; 0 where there is nothing to be asked about.
    """

    text: str = ""
    verdict: Verdict | None = None
    tokens: int = 0
    prompt_tokens: int = 0


def joined(pieces: Sequence[Piece]) -> Piece:
    """Give pieces that follow each other as one."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        verdict=next((piece.verdict for piece in pieces if piece.verdict is not None), None),
        tokens=max(piece.tokens for piece in pieces),
        prompt_tokens=max(piece.prompt_tokens for piece in pieces),
    )


class Engine(Protocol):
    """Answers one conversation about one face image; may be asked from several threads at once."""

    def ask(
        self, image: np.ndarray | None, turns: Sequence[Turn], settings: GenerationSettings, stop: Event
    ) -> Iterator[Piece]:
        """Yield the verdict on the largest face of an image (H, W, 3) uint8 RGB, then the text; `stop` ends it soon.

        There is no text where there is no verdict. Raises ValueError for what can not be answered.
        """
        ...

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face of images, largest first, without words."""
        ...
