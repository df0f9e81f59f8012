"""The wire: prompts back to turns, chunks out of any stream, limits on every field."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llava.core.types import Turn
from llava.explainer.prompts import LAYOUTS, lay_out, plain_text
from llava.serve.protocol import (
    MAX_CHUNK_BYTES,
    Chunk,
    ErrorCode,
    GenerateRequest,
    Registration,
    decode_chunk,
    encode_chunk,
    error_chunk,
    parse_prompt,
    split_chunks,
    split_chunks_async,
)

QUESTION = "Determine the authenticity of this image."
V1 = "A chat between a curious user and an artificial intelligence assistant. The user's questions."
# What the published page, the published training code and the two published command lines send.
PUBLISHED = [
    f"{V1} USER: <image>\n{QUESTION}\n\n<deepfake> ASSISTANT:",
    f"{V1} USER: <image>\n<deepfake>\n\n\n{QUESTION} ASSISTANT:",
    f"Assistant: A chat.###Human: <image>\n <deepfake>\n {QUESTION} ###Assistant:",
    f"Assistant: A chat.###Human: <image>\n<deepfake>\n{QUESTION} ###Assistant:",
    f"{V1} USER: {QUESTION}<image> ASSISTANT:",
    f"{V1} USER: {QUESTION} ASSISTANT: ",
    f"USER: {QUESTION} ASSISTANT:",
    f"A chat.\n### Human: <image>{QUESTION}\n### Assistant:",
]


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(role="assistant" if i % 2 else "human", text=text) for i, text in enumerate(texts))


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_every_known_template_says_the_same(prompt: str) -> None:
    assert parse_prompt(prompt) == turns(QUESTION)


@pytest.mark.parametrize(
    "prompt",
    [
        f"{V1} USER: <image>\n{QUESTION} ASSISTANT: It is fake.</s>USER: Why? ASSISTANT:",
        f"{V1} USER: <image>\n{QUESTION} ASSISTANT: It is fake. </s> USER: Why? ASSISTANT:",
        f"A chat.###Human: <image>{QUESTION} ###Assistant: It is fake. ###Human: Why? ###Assistant:",
        f"A chat.\n### Human: <image>{QUESTION}\n### Assistant: It is fake.\n### Human: Why?\n### Assistant:",
    ],
)
def test_earlier_turns_are_kept(prompt: str) -> None:
    assert [t.text.strip() for t in parse_prompt(prompt)] == [QUESTION, "It is fake.", "Why?"]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_our_own_layouts_are_read_back(layout: str) -> None:
    said = turns(QUESTION, "The image is fake.", "Why?")
    segments = lay_out(said, layout)
    is_v1 = "USER" in LAYOUTS[layout].question
    prompt = "".join(s.text + ("</s>" if s.is_answer and is_v1 else " ") for s in segments)
    assert [t.text.strip() for t in parse_prompt(prompt)] == [t.text for t in said]
    assert plain_text(lay_out(parse_prompt(prompt), layout)) == plain_text(segments)


def test_words_of_the_other_template_stay_words() -> None:
    assert parse_prompt("x USER: What does ###Human: mean? ASSISTANT:") == turns("What does ###Human: mean?")
    assert parse_prompt("x###Human: Is USER: real? ###Assistant:") == turns("Is USER: real?")
    assert parse_prompt("x USER: Is it ASSISTANT: or USER: who? ASSISTANT:") == turns("Is it ASSISTANT: or USER: who?")


def test_an_example_before_the_image_is_left_out() -> None:
    prompt = f"x\n### Human: Ideas?\n### Assistant: Many.\n### Human: <image>\n{QUESTION}\n### Assistant:"
    assert parse_prompt(prompt) == turns(QUESTION)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (QUESTION, "no turn found"),
        (f"USER: {QUESTION}", "must end with 'ASSISTANT:'"),
        (f"USER: {QUESTION} ASSISTANT: I think", "must end with 'ASSISTANT:'"),
        ("USER: <image>\n<deepfake> ASSISTANT:", "a question is empty"),
        ("USER: a</s>USER: b ASSISTANT:", "has no 'ASSISTANT:' answer"),
        ("###Human: a ###Human: b ###Assistant:", "must take turns"),
        ("###Human: a ###Assistant: b", "must take turns"),
        ("###Assistant:", "must take turns"),
    ],
)
def test_another_template_is_refused_with_its_reason(prompt: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_prompt(prompt)


@given(st.text())
def test_any_prompt_gives_turns_or_a_value_error(text: str) -> None:
    for prompt in (text, f"USER: {text} ASSISTANT:", f"###Human: {text} ###Assistant:"):
        try:
            said = parse_prompt(prompt)
        except ValueError:
            continue
        assert len(said) % 2 == 1 and said[-1].role == "human" and said[-1].text.strip()
        assert "<image>" not in "".join(t.text for t in said)


def test_images_and_tags_must_match() -> None:
    image = base64.b64encode(b"bytes").decode()
    good = GenerateRequest(prompt=PUBLISHED[0], images=[image])
    assert good.turns() == turns(QUESTION) and good.image() == b"bytes"
    for prompt, images in ((PUBLISHED[0], []), (PUBLISHED[5], [image]), (f"<image>{PUBLISHED[0]}", [image])):
        with pytest.raises(ValueError, match="send one image and one <image>"):
            GenerateRequest(prompt=prompt, images=images).turns()
    with pytest.raises(ValueError, match="not base64"):
        GenerateRequest(prompt=PUBLISHED[0], images=["%%%%"]).image()


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ""},
        {"prompt": "x" * 64_001},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"max_new_tokens": "many"},
        {"images": ["", ""]},
        {"images": "abc"},
        {"stop": [""]},
        {"stop": ["x"] * 9},
        {"model": "x" * 257},
    ],
)
def test_every_field_has_a_limit(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate({"prompt": PUBLISHED[0], **wrong})


def test_fields_of_fastchat_that_mean_nothing_here_are_let_through() -> None:
    asked = {"model": "m", "prompt": "p", "stop": None, "stop_token_ids": [2], "repetition_penalty": 1.0, "echo": False}
    request = GenerateRequest.model_validate(asked)
    assert (request.stops, request.echo, request.temperature, request.max_new_tokens) == ((), False, 1.0, 256)
    status = {"model_names": ["a"], "speed": 1, "queue_length": 0}
    assert Registration.model_validate({"worker_name": "http://a:1", "worker_status": status}).check_heart_beat


def test_a_chunk_is_json_and_a_zero_byte() -> None:
    assert json.loads(encode_chunk(Chunk(text="a\0b", error_code=0))[:-1]) == {"text": "a\0b", "error_code": 0}
    assert encode_chunk(Chunk(text="a\0b", error_code=0)).count(b"\0") == 1
    assert json.loads(error_chunk(ErrorCode.LOST, "gone")[:-1]) == {"text": "gone", "error_code": 3}
    theirs = b'{"text": "x", "error_code": 0, "usage": {}, "logprobs": null, "finish_reason": null}'
    assert decode_chunk(theirs) == Chunk(text="x", error_code=0)
    for wrong in (b"", b"{", b"[]", b'{"text": 1}'):
        with pytest.raises(ValueError, match="no chunk"):
            decode_chunk(wrong)


@given(st.lists(st.text(min_size=1)), st.data())
def test_chunks_survive_any_cutting_of_the_stream(texts: list[str], data: st.DataObject) -> None:
    stream = b"".join(encode_chunk(Chunk(text=text, error_code=0)) for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def slowly() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async def gathered() -> list[bytes]:
        return [chunk async for chunk in split_chunks_async(slowly())]

    assert [decode_chunk(chunk).text for chunk in split_chunks(parts)] == texts
    assert asyncio.run(gathered()) == list(split_chunks(parts))


def test_a_broken_stream_is_no_answer() -> None:
    with pytest.raises(ValueError, match="ended within a chunk"):
        list(split_chunks([b'{"text": "a"}\0{"te']))
    with pytest.raises(ValueError, match="more than"):
        list(split_chunks([b"x" * (MAX_CHUNK_BYTES + 1)]))
