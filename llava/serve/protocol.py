"""The wire between clients, controller and workers: the JSON of FastChat and LLaVA, with a limit on every field."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from enum import IntEnum
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from llava.core.types import Turn
from llava.explainer.prompts import IMAGE_TAG, strip_tags

MAX_NEW_TOKENS = 1024
MAX_IMAGE_BYTES = 20_000_000
MAX_CHUNK_BYTES = 2_000_000
GREEDY_UP_TO = 0.001  # temperature; the published worker samples only above it
END = b"\0"
REQUEST_HEADER = "X-Request-Id"

Name = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[str, Field(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]

_V0_ROLE = re.compile(r"\s*###\s?(Human|Assistant):")
_V1_FIRST = re.compile(r"(?:^|\s)USER:")
_V1_NEXT = re.compile(r"</s>\s*USER:")
_V1_ANSWER = re.compile(r"\sASSISTANT:")


class ErrorCode(IntEnum):
    """What a chunk's `error_code` says; 2 and 3 come from the controller."""

    OK = 0
    FAILED = 1
    NO_WORKER = 2
    LOST = 3  # the worker said nothing for too long, or died


class WorkerStatus(BaseModel):
    """What a worker serves and how busy it is. speed: its share of the lottery, 1 for every worker of ours."""

    model_names: Annotated[list[Name], Field(min_length=1, max_length=32)]
    speed: Annotated[float, Field(gt=0, le=1_000_000)] = 1
    queue_length: Count = 0


class Registration(BaseModel):
    """A worker makes itself known under its address. worker_status: None = the controller asks the worker for it."""

    worker_name: Name
    check_heart_beat: bool = True
    worker_status: WorkerStatus | None = None
    multimodal: bool = False


class HeartBeat(BaseModel):
    """A worker lives, and has so many requests running or waiting."""

    worker_name: Name
    queue_length: Count


class ModelQuestion(BaseModel):
    """Which model is meant; all that the controller reads of a request that it passes on."""

    model: Name


class GenerateRequest(BaseModel):
    """A question with its whole prompt template, as clients of FastChat and LLaVA send it.

    images: base64, as many as `<image>` in the prompt. max_new_tokens: more than 1024 counts as 1024, as published.
    echo: whether the answer's text begins with the prompt; FastChat's clients send false. Ours alone: evidence_map,
    whether the first chunk is to hold the detector's map; is_crop, whether the image is a face's crop, to be judged
    whole; seed, of the sampling, None = another one for each request, as clients that know none expect it.
    """

    model: str = Field("", max_length=256)
    prompt: Annotated[str, Field(min_length=1, max_length=64_000)]
    images: Annotated[list[Annotated[str, Field(max_length=MAX_IMAGE_BYTES * 4 // 3 + 4)]], Field(max_length=1)] = []
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    echo: bool = True
    evidence_map: bool = False
    is_crop: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Give the texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def turns(self) -> tuple[Turn, ...]:
        """Give the conversation. Raises ValueError for a prompt of no known template, or other than one image each."""
        asked = self.prompt.count(IMAGE_TAG)
        if asked != len(self.images) or asked > 1:
            raise ValueError(
                f"images: the prompt has {asked} {IMAGE_TAG} and the request {len(self.images)} images; send one image "
                f"and one {IMAGE_TAG}."
            )
        return parse_prompt(self.prompt)

    def image(self) -> bytes | None:
        """Give the bytes of the image file, None without one. Raises ValueError for what is not base64."""
        try:
            return base64.b64decode(self.images[0], validate=True) if self.images else None
        except (binascii.Error, ValueError):
            raise ValueError("images: not base64; encode the bytes of a JPEG, PNG or WebP file.") from None


class Chunk(BaseModel):
    """One message of an answer. text: all that was written so far, after the prompt unless `echo` is false.

    verdict: of the detector, in the first chunk, as `Verdict.to_dict` gives it. evidence_map: beside it where it was
    asked for, rows of values in [0, 1]; seen: the side of the square under it, as a share of the crop's shorter side.
    has_words: beside the verdict, false where a detector alone answers, whose text only repeats the verdict.
    remark: in the last one, says where the text contradicts the verdict. Older clients read none of these.
    """

    text: str
    error_code: int
    verdict: dict[str, Any] | None = None
    evidence_map: list[list[float]] | None = None
    seen: float = 1.0
    has_words: bool = True
    remark: str = ""


def encode_chunk(chunk: Chunk) -> bytes:
    """Give the bytes of a chunk on the wire: JSON of what was set, then a zero byte."""
    return chunk.model_dump_json(exclude_unset=True).encode() + END


def error_chunk(code: ErrorCode, text: str) -> bytes:
    """Give the one chunk that ends a request that failed."""
    return encode_chunk(Chunk(text=text, error_code=int(code)))


def decode_chunk(data: bytes) -> Chunk:
    """Read one chunk without its zero byte. Raises ValueError for anything else."""
    try:
        return Chunk.model_validate_json(data)
    except ValidationError:
        raise ValueError("The stream holds a message that is no chunk; is this the address of a worker?") from None


class ChunkSplitter:
    """Cuts a stream of bytes, however it is dealt out, at its zero bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Give the chunks that are complete now. Raises ValueError when one is too long."""
        *whole, self._rest = (self._rest + data).split(END)
        if len(self._rest) > MAX_CHUNK_BYTES:
            raise ValueError(f"The stream holds a chunk of more than {MAX_CHUNK_BYTES:,} bytes.")
        return [chunk for chunk in whole if chunk]

    def finish(self) -> None:
        """Raise ValueError when the stream ended within a chunk."""
        if self._rest.strip():
            raise ValueError("The stream ended within a chunk.")


def split_chunks(stream: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the chunks of a stream of bytes, without their zero bytes. Raises ValueError for a broken stream."""
    splitter = ChunkSplitter()
    for data in stream:
        yield from splitter.feed(data)
    splitter.finish()


async def split_chunks_async(stream: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield as `split_chunks` does."""
    splitter = ChunkSplitter()
    async for data in stream:
        for chunk in splitter.feed(data):
            yield chunk
    splitter.finish()


def parse_prompt(prompt: str) -> tuple[Turn, ...]:
    """Read the turns out of a whole prompt, vicuna v1 or v0-like, without tags, so that any layout can hold them.

    What stands before the turn with `<image>` belongs to the template (FastChat's `one_shot` begins with an example).
    Raises ValueError for another template, and for a prompt that does not end where an answer begins.
    """
    first, role = _V1_FIRST.search(prompt), _V0_ROLE.search(prompt)
    if first is None and role is None:
        raise ValueError("prompt: no turn found; write 'USER: … ASSISTANT:' or '###Human: … ###Assistant:'.")
    is_v1 = first is not None and (role is None or first.start() < role.start())
    said = _v1_texts(prompt[first.end() :]) if is_v1 and first else _v0_texts(prompt)
    start = next((i for i in range(0, len(said), 2) if IMAGE_TAG in said[i]), 0)
    texts = [strip_tags(text) for text in said[start:]]
    if not all(texts[::2]):
        raise ValueError("prompt: a question is empty; ask something, such as: Why?")
    return tuple(Turn(role="assistant" if i % 2 else "human", text=text) for i, text in enumerate(texts))


def _v1_texts(said: str) -> list[str]:
    """Give question, answer, …, question of what follows the first `USER:`."""
    *rounds, last = _V1_NEXT.split(said)
    texts = []
    for each in rounds:
        parts = _V1_ANSWER.split(each, maxsplit=1)
        if len(parts) != 2:
            raise ValueError("prompt: a 'USER:' turn before the last has no 'ASSISTANT:' answer.")
        texts += parts
    question, found, rest = last.rpartition("ASSISTANT:")
    if not found or rest.strip():
        raise ValueError("prompt: it must end with 'ASSISTANT:', where the answer begins.")
    return [*texts, question]


def _v0_texts(prompt: str) -> list[str]:
    """Give question, answer, …, question of a prompt with `###Human:` and `###Assistant:`."""
    _, *parts = _V0_ROLE.split(prompt)
    roles, texts = parts[::2], parts[1::2]
    expected = ["Human", "Assistant"] * (len(roles) // 2)
    if roles != expected or texts[-1].strip():
        raise ValueError("prompt: '###Human:' and '###Assistant:' must take turns and end with '###Assistant:'.")
    return texts[:-1]
