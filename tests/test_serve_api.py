"""The HTTP API behind a real server on loopback, asked by httpx and by the official OpenAI client."""

from __future__ import annotations

import base64
import io
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from clips import write_clip
from PIL import Image
from tiny_world import draw

from llava.core.types import GenerationSettings
from llava.explainer.generation import Decoder
from llava.explainer.prompts import VERDICT_QUESTION
from llava.pipeline import Pipeline
from llava.pipeline.crops import TURNS
from llava.pipeline.settings import FaceSettings
from llava.serve.api import Service, build_app
from llava.serve.batching import BatchingEngine
from llava.serve.guard import RequestLimits

pytestmark = pytest.mark.e2e
PHOTO = Path(__file__).parents[1] / "utils" / "demo_faces" / "grace_hopper.jpg"


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(picture: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"


def messages(picture: np.ndarray, text: str = VERDICT_QUESTION) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_uri(picture)}}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def pipeline(tiny_explainer: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_explainer, faces=FaceSettings(face="off"), stability=False)


@contextmanager
def serving(pipeline: Pipeline) -> Iterator[str]:
    engine = BatchingEngine(pipeline)
    app = build_app(Service(engines={"tiny": engine}, limits=RequestLimits(requests_per_minute=10_000, max_active=16)))
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    while not running.started:
        time.sleep(0.02)
    yield address
    running.should_exit = True
    thread.join(10)
    engine.close()


@pytest.fixture(scope="module")
def server(pipeline: Pipeline) -> Iterator[str]:
    with serving(pipeline) as address:
        yield address


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def said_alone(pipeline: Pipeline, picture: np.ndarray, question: str = VERDICT_QUESTION) -> Any:
    (finding,) = pipeline.explained_findings([picture], question, GenerationSettings())
    return finding.explanation


def test_the_openai_client_gets_verdict_and_words(client: openai.OpenAI, pipeline: Pipeline) -> None:
    picture = draw(1, 3)
    reply = client.chat.completions.create(model="tiny", messages=messages(picture))
    wanted = said_alone(pipeline, picture)
    assert reply.choices[0].message.content == wanted.text
    assert reply.choices[0].finish_reason == "stop"
    assert reply.verdict["label"] == wanted.verdict.label
    assert reply.verdict["p_fake"] == pytest.approx(wanted.verdict.p_fake, abs=1e-6)
    assert reply.usage.prompt_tokens > pipeline.needed_explainer().model.config.image_tokens
    assert reply.usage.completion_tokens > 3
    assert [(model.id, model.capabilities) for model in client.models.list()] == [("tiny", ["detect", "explain"])]


def test_the_stream_begins_with_the_verdict(client: openai.OpenAI, pipeline: Pipeline) -> None:
    picture = draw(0, 4)
    asked = {"model": "tiny", "messages": messages(picture), "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**asked))
    assert chunks[0].verdict["label"] == "REAL" and not chunks[0].choices[0].delta.content
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == said_alone(pipeline, picture).text
    assert len(chunks) > 3 and chunks[-1].usage.completion_tokens > 3
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_null_is_a_setting_that_was_not_sent(server: str, pipeline: Pipeline) -> None:
    asked = {"model": "tiny", "messages": messages(draw(1, 2)), "max_tokens": 8}
    unset = dict.fromkeys(("tools", "stop", "response_format", "seed", "temperature", "stream", "n"))
    plain, sent = (httpx.post(f"{server}/v1/chat/completions", json=body) for body in (asked, asked | unset))
    assert sent.status_code == 200 and sent.json()["choices"] == plain.json()["choices"]


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    first = messages(draw(1, 3))
    said = client.chat.completions.create(model="tiny", messages=first).choices[0].message.content
    follow_up = [
        *first,
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Does the nose look real?"},
    ]
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be kind."}, *follow_up]
    )
    assert "nose" in reply.choices[0].message.content
    assert reply.notes == ["The system message was not used: the model has one of its own."]
    cut = client.chat.completions.create(model="tiny", messages=first, max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


def test_sixteen_at_once_are_one_batch(server: str, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    widest: list[int] = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: (widest.append(len(self.rows)), step(self)))
    asked = [{"model": "tiny", "messages": messages(draw(n % 2, n)), "max_tokens": 40} for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda body: httpx.post(f"{server}/v1/chat/completions", json=body, timeout=300), asked))
    assert [reply.status_code for reply in found] == [200] * 16
    for n, reply in enumerate(found):
        assert reply.json()["choices"][0]["message"]["content"] == said_alone(pipeline, draw(n % 2, n)).text
    assert max(widest) > 2, "questions that come together share a batch"


def long_message(more: int = 2) -> list[dict[str, Any]]:
    (message,) = messages(draw(0, 1))
    return [{**message, "content": [*message["content"][-1:], *[{"type": "text", "text": "Why? " * 1600}] * more]}]


def turns_after(count: int) -> list[dict[str, Any]]:
    return [{"role": ("assistant", "user")[n % 2], "content": "Why? " * 1600} for n in range(count)]


BAD = {
    "no image": ({"messages": [{"role": "user", "content": "Why?"}]}, "holds 0 images"),
    "two images": ({"messages": messages(draw(0, 1)) + messages(draw(0, 1))}, "holds 2 images"),
    "wrong order": ({"messages": [*messages(draw(0, 1)), {"role": "assistant", "content": "Real."}]}, "must alternate"),
    "empty": ({"messages": messages(draw(0, 1), " ")}, "has no text"),
    "long in parts": ({"messages": long_message()}, "A message has 16,000 characters"),
    "long in turns": ({"messages": long_message(1) + turns_after(8)}, "The conversation has 72,000 characters"),
    "tools": ({"messages": messages(draw(0, 1)), "tools": []}, "tools: no setting that is known here"),
    "tokens": ({"messages": messages(draw(0, 1)), "max_tokens": 10**6}, "max_tokens: Input should be less than"),
    "local file": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
                        {"type": "text", "text": "?"},
                    ],
                }
            ]
        },
        "https",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_in_a_sentence(server: str, name: str) -> None:
    body, message = BAD[name]
    reply = httpx.post(f"{server}/v1/chat/completions", json={"model": "tiny"} | body)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]
    assert "Traceback" not in reply.text


def test_files_are_judged_and_explained(server: str, pipeline: Pipeline) -> None:
    pictures = [draw(0, 5), draw(1, 6)]
    files = [("files", (f"../../{n}.png", png(p), "image/png")) for n, p in enumerate(pictures)]
    verdicts = httpx.post(f"{server}/v1/detect", files=files).json()["verdicts"]
    assert [v["label"] for v in verdicts] == ["REAL", "FAKE"]
    assert [v["image"] for v in verdicts] == ["0.png", "1.png"]
    reply = httpx.post(
        f"{server}/v1/explain", files=files, data={"question": "Does the nose look real or fake?"}
    ).json()
    for explained, picture in zip(reply["explanations"], pictures, strict=True):
        wanted = said_alone(pipeline, picture, "Does the nose look real or fake?")
        assert explained["text"] == wanted.text and explained["agrees"] == wanted.agrees
    assert [one["verdict"]["image"] for one in reply["explanations"]] == ["0.png", "1.png"]
    broken = httpx.post(f"{server}/v1/detect", files=[("files", ("x.png", b"no image", "image/png"))])
    assert broken.status_code == 415 and "x.png" in broken.json()["error"]["message"]
    assert httpx.post(f"{server}/v1/detect").status_code == 400
    misspelt = httpx.post(f"{server}/v1/explain", files=files, data={"questoin": "Why?"})
    assert misspelt.status_code == 400
    assert "questoin: there is no such field here; allowed: files, model," in misspelt.json()["error"]["message"]
    form = httpx.post(f"{server}/v1/chat/completions", data={"model": "tiny"})
    assert form.status_code == 400 and "send application/json" in form.json()["error"]["message"]


def test_landmarks_and_what_makes_a_face_unfit_are_in_the_answer(tiny_explainer: Path) -> None:
    with Image.open(PHOTO) as photo:
        pictures = [photo, photo.rotate(90, expand=True), photo.resize((77, 90)), photo.crop((0, 0, 320, 600))]
        files = [("files", (f"{n}.png", png(np.asarray(picture)), "image/png")) for n, picture in enumerate(pictures)]
    with serving(Pipeline.from_pretrained(tiny_explainer, stability=False)) as address:
        judged, *unfit = httpx.post(f"{address}/v1/detect", files=files, timeout=300).json()["verdicts"]
    assert np.allclose(judged["face_landmarks"][:2], ((223.6, 190.4), (307.0, 187.4)), atol=8)
    assert judged["face_roll"] == pytest.approx(-2.1, abs=3) and judged["label"] != "INCONCLUSIVE"
    assert [verdict["reason"].partition(":")[0] for verdict in unfit] == [
        TURNS[3],
        "the face is too small",
        "the face is cut off by the image's border",
    ]
    assert unfit[0]["face_roll"] == pytest.approx(-92.1, abs=3)


def test_a_video_is_judged_between_images(server: str, pipeline: Pipeline, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", [draw(1, number) for number in range(6)])
    parts = [png(draw(0, 1)), clip.read_bytes(), png(draw(1, 2))]
    files = [("files", (f"{number}.x", part)) for number, part in enumerate(parts)]
    first, video, last = httpx.post(f"{server}/v1/detect", files=files, timeout=60).json()["verdicts"]
    alone = pipeline.detect_video(clip)
    assert (first["image"], video["image"], last["image"]) == ("0.x", "1.x", "2.x")
    assert video["label"] == str(alone.label) and video["p_fake"] == pytest.approx(alone.p_fake, abs=1e-5)
    assert len(video["frames"]) == len(alone.frames) == 6 and "frames" not in first
    refused = httpx.post(f"{server}/v1/explain", files=files[1:2], timeout=60)
    assert refused.status_code == 415 and "send one of its frames" in refused.json()["error"]["message"]


def test_what_is_not_there_is_refused(server: str) -> None:
    assert httpx.get(f"{server}/v1/nothing").status_code == 404


def test_health_metrics_and_documentation(server: str) -> None:
    assert httpx.get(f"{server}/health").json()["status"] == "ok"
    numbers = httpx.get(f"{server}/metrics").text
    assert 'm2f2_requests_total{path="/health",status="200"}' in numbers and "m2f2_tokens_total" in numbers
    paths = httpx.get(f"{server}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/detect", "/v1/explain", "/v1/models", "/health"} <= paths.keys()
    page = httpx.get(f"{server}/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) == 3 and not re.search("https?://", page), "nothing comes from elsewhere"
    assert all(httpx.get(f"{server}/{name}").status_code == 200 for name in loaded if name != "data:,")
    assert "SwaggerUIBundle" in httpx.get(f"{server}/swagger/swagger-ui-bundle.js").text
