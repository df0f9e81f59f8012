"""What answers questions behind every door of the server; `llava.serve.batching` holds the one of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

from llava.core.types import Turn, Verdict

if TYPE_CHECKING:
    import numpy as np

    from llava.core.types import GenerationSettings
    from llava.data.inputs import Image, NamedVideo
    from llava.pipeline.verdict import Finding, VideoFinding


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A conversation that ends with a question about one image, uint8 RGB (H, W, 3), None where none was sent.

    is_crop: the image is what a finding was made of (`Finding.pixels`), and is judged whole.
    """

    image: np.ndarray | None
    turns: Sequence[Turn]
    settings: GenerationSettings
    is_crop: bool = False

    def pixels(self) -> np.ndarray:
        """Give the image. Raises ValueError where there is none."""
        if self.image is None:
            raise ValueError("This model answers questions about one face image, and there is none; send one.")
        return self.image


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer: the verdict, before any text; then text to append.

    evidence_map, seen: with the verdict, as `Finding` has them. tokens: written so far. prompt_tokens: read, with the
    verdict; 0 where there is nothing to be asked about. is_cut: with the last token, whether the answer ends there
    because of its limit, or because the model reads no more.
    """

    text: str = ""
    verdict: Verdict | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    is_cut: bool = False
    evidence_map: np.ndarray | None = None
    seen: float = 1.0


def joined(pieces: Sequence[Piece]) -> Piece:
    """Give pieces that follow each other as one."""
    first = next((piece for piece in pieces if piece.verdict is not None), pieces[0])
    text, tokens = "".join(piece.text for piece in pieces), max(piece.tokens for piece in pieces)
    return replace(first, text=text, tokens=tokens, is_cut=any(piece.is_cut for piece in pieces))


class Engine(Protocol):
    """Answers one conversation about one face image; may be asked from several threads at once."""

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield the verdict on the image's largest face, then the text; `stop` ends it soon.

        There is no text where there is no verdict. Raises ValueError for what can not be answered.
        """
        ...

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face of images, largest first, without words."""
        ...

    def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Give the finding on the face that a video shows longest, without words. Raises ValueError where it cannot."""
        ...

    def model_facts(self) -> dict[str, Any]:
        """Give what a case file says of the model; see `llava.jobs.case_file.model_facts`."""
        ...
