"""One function lays out prompts for training, inference and serving; published layouts exist under a name.

A prompt is a list of segments; each is tokenised on its own, so the training mask is exact by construction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava.core.registry import nearest
from llava.core.types import Turn
from llava.data.answer_texts import VERDICT_QUESTION as VERDICT_QUESTION
from llava.data.conversations import DEEPFAKE_MARK as EVIDENCE_TAG
from llava.data.conversations import IMAGE_MARK as IMAGE_TAG

TAGS = re.compile(f"({re.escape(IMAGE_TAG)}|{re.escape(EVIDENCE_TAG)})")

_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_V0_SYSTEM = (
    "Assistant: A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a prompt; `is_answer` pieces are learned and end with the end-of-sequence token."""

    text: str
    is_answer: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a conversation becomes text. `place_tags` gets the first question as it was written, with its tags if any."""

    opening: str
    question: str
    place_tags: Callable[[str], str]


def strip_tags(question: str) -> str:
    """Take the tags and the line feeds around them out of a question."""
    return TAGS.sub("", question).strip()


def _tags_first(question: str) -> str:
    return f"{IMAGE_TAG}\n{EVIDENCE_TAG}\n{strip_tags(question)}"


def _moved_to_front(question: str) -> str:
    """Move the tags as the published training code does: line feeds that stood around them stay.

    A question without tags is laid out as `<image>\\n<deepfake>\\nquestion` is.
    """
    if not TAGS.search(question):
        question = _tags_first(question)
    for tag in (EVIDENCE_TAG, IMAGE_TAG):
        question = f"{tag}\n{question.replace(tag, '').strip()}"
    return question


LAYOUTS: dict[str, Layout] = {
    # Ours, for training, inference and serving alike: vicuna v1 with the tags before the question.
    "v1": Layout(opening=_V1_SYSTEM + " ", question="USER: {} ASSISTANT:", place_tags=_tags_first),
    # What the published training code made of its records, such as two more line feeds behind the tags.
    "published_train": Layout(opening=_V1_SYSTEM + " ", question="USER: {} ASSISTANT:", place_tags=_moved_to_front),
    # The published command lines for DD-VQA judgement and explanation: a v0-like template.
    "published_det": Layout(
        opening=_V0_SYSTEM,
        question="###Human: {} ###Assistant:",
        place_tags=lambda q: f"{IMAGE_TAG}\n {EVIDENCE_TAG}\n {strip_tags(q)}",
    ),
    "published_exp": Layout(opening=_V0_SYSTEM, question="###Human: {} ###Assistant:", place_tags=_tags_first),
    # The published web page: the evidence tag ends up behind the question.
    "published_page": Layout(
        opening=_V1_SYSTEM + " ",
        question="USER: {} ASSISTANT:",
        place_tags=lambda q: f"{IMAGE_TAG}\n{strip_tags(q)}\n\n{EVIDENCE_TAG}",
    ),
}


def layout_named(name: str) -> Layout:
    """Look a layout up. Raises ValueError that lists the names."""
    if name not in LAYOUTS:
        raise ValueError(f"Unknown prompt layout {name!r}. {nearest(name, list(LAYOUTS))}")
    return LAYOUTS[name]


def lay_out(turns: Sequence[Turn], layout: str = "v1") -> list[Segment]:
    """Turn a conversation into segments; one that ends with a question ends ready for the answer.

    Raises ValueError when the turns do not alternate, starting with a human.
    """
    form = layout_named(layout)
    segments = []
    for i, turn in enumerate(turns):
        expected = "human" if i % 2 == 0 else "assistant"
        if turn.role != expected:
            raise ValueError(f"Turn {i} of a conversation must be by the {expected}, got {turn.role!r}.")
        if turn.role == "assistant":
            segments.append(Segment(text=turn.text.strip(), is_answer=True))
            continue
        opening = form.opening if i == 0 else ""
        asked = form.place_tags(turn.text) if i == 0 else strip_tags(turn.text)
        segments.append(Segment(text=opening + form.question.format(asked)))
    return segments


def plain_text(segments: Sequence[Segment]) -> str:
    """Show a prompt as one string, tags included."""
    return " ".join(s.text for s in segments)
