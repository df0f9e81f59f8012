"""The web page of a controller: what its workers answer, for people."""

from __future__ import annotations

import base64
import logging
import sys
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

import httpx
import numpy as np
from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging
from llava.core.types import GenerationSettings, Turn, Verdict, VerdictLabel
from llava.data.inputs import Image, NamedImage, NamedVideo
from llava.explainer.prompts import IMAGE_TAG, VERDICT_QUESTION, strip_tags
from llava.jobs.case_file import png_bytes
from llava.pipeline.crops import Face, faces_of
from llava.pipeline.settings import FaceSettings
from llava.pipeline.verdict import Finding, VideoFinding
from llava.serve.engine import Piece, Question
from llava.serve.model_worker import translated
from llava.serve.options import PROXIES, require_keys, require_networks
from llava.serve.protocol import Chunk, GenerateRequest, decode_chunk, split_chunks
from llava.serve.web import serve

if TYPE_CHECKING:
    from llava.serve.engine import Engine
    from llava.serve.page.door import PageDoor

log = logging.getLogger(__name__)

CONNECT_SECONDS, SILENCE_SECONDS = 5.0, 300.0
ROLE_WORDS = ("USER:", "ASSISTANT:", "</s>", "###")
TOO_MUCH = {
    "prompt": "The conversation is too long for a worker; begin a new one.",
    "images": "The picture is too large for a worker; send a smaller one.",
}
VERDICTS = TypeAdapter(Verdict)
ALIASES = {"--controller": "--controller-url", "--concurrency-count": "--at-once"}
REFUSED = {
    "--share": "it would lead people's pictures through somebody else's server; put a proxy of yours in front",
    "--moderate": "it would send what people write to somebody else's server",
}


@dataclass(frozen=True)
class Controller:
    """A controller at an address; it knows which models its workers have."""

    address: str

    def models(self) -> list[str]:
        """List the models that can be asked now. Raises ConnectionError where there is no controller."""
        try:
            said = httpx.post(f"{self.address}/list_models", timeout=CONNECT_SECONDS, trust_env=False)
            return sorted(str(name) for name in said.raise_for_status().json()["models"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ConnectionError(f"no controller answers at {self.address} ({type(error).__name__})") from error


class RemoteEngine:
    """The engine of one model behind a controller. Faces are found here, so that only crops of them are sent.

    has_words, scope: as the worker said with its last verdict; None, or empty, before the first.
    """

    def __init__(self, controller: Controller, model: str, faces: FaceSettings | None = None) -> None:
        self._controller, self._model = controller, model
        self._faces = faces or FaceSettings()
        self.has_words: bool | None = None
        self.scope = ""

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield the verdict, then the text, as `Engine.ask` says. Raises ValueError with what the worker says."""
        named = NamedImage(name="image", pixels=question.pixels())
        face = Face(image=named.name, pixels=named.pixels) if question.is_crop else faces_of(named, self._faces)[0]
        shown, chunks = "", self._chunks(face, question)
        with closing(chunks):
            for chunk in chunks:
                if stop.is_set():
                    return
                if chunk.verdict is not None:
                    yield _first_piece(chunk, face)
                    if chunk.verdict["label"] == VerdictLabel.INCONCLUSIVE:
                        return
                if new := chunk.text[len(shown) :]:
                    shown = chunk.text
                    yield Piece(text=new)

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face of images that were read. Raises ValueError with what the worker says."""
        found = []
        for image in images:
            if not isinstance(image, NamedImage) or image.pixels is None:
                raise ValueError("A controller is asked about images that were read.")
            found += [self._finding(face, image.pixels) for face in faces_of(image, self._faces)]
        return found

    def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Raise ValueError: workers are asked about images."""
        raise ValueError("A video can not be judged through a controller; send a photo, or use m2f2 serve.")

    def model_facts(self) -> dict[str, Any]:
        """Give what is known of the model here: its name, and where it was asked."""
        return {"name": self._model, "controller": self._controller.address}

    def _finding(self, face: Face, image: np.ndarray) -> Finding:
        turns, settings = [Turn(role="human", text=VERDICT_QUESTION)], GenerationSettings(max_new_tokens=1)
        with closing(self._chunks(face, Question(image=image, turns=turns, settings=settings))) as chunks:
            piece = _first_piece(next(chunks, None), face)
        assert piece.verdict is not None
        return Finding(verdict=piece.verdict, pixels=face.pixels, evidence_map=piece.evidence_map, seen=piece.seen)

    def _chunks(self, face: Face, question: Question) -> Generator[Chunk, None, None]:
        """Yield the chunks of an answer about a face, or about the whole image where there is none."""
        asked = self._request(face, question)
        limits = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        address = f"{self._controller.address}/worker_generate_stream"
        try:
            with (
                httpx.Client(timeout=limits, trust_env=False) as client,
                client.stream("POST", address, json=asked.model_dump()) as reply,
            ):
                for data in split_chunks(reply.iter_raw()):
                    chunk = decode_chunk(data)
                    if chunk.error_code:
                        raise ValueError(chunk.text)
                    if chunk.verdict is not None:
                        self.has_words, self.scope = chunk.has_words, str(chunk.verdict.get("scope", ""))
                    yield chunk
        except httpx.HTTPError as error:
            raise ValueError(f"The model can not be reached now ({type(error).__name__}); try again soon.") from error

    def _request(self, face: Face, question: Question) -> GenerateRequest:
        """Write a question for a worker. Raises ValueError where it is more than a worker takes."""
        pixels, settings = question.pixels() if face.pixels is None else face.pixels, question.settings
        try:
            return GenerateRequest(
                model=self._model,
                prompt=prompt_of(question.turns),
                images=[base64.b64encode(png_bytes(pixels)).decode()],
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
                max_new_tokens=settings.max_new_tokens,
                stop="</s>",
                echo=False,
                evidence_map=True,
                is_crop=face.pixels is not None,
            )
        except ValidationError as error:  # its own words would show what was sent
            name = error.errors(include_input=False)[0]["loc"][0]
            raise ValueError(TOO_MUCH.get(str(name), f"{name}: a worker takes no such value.")) from None


def prompt_of(turns: Sequence[Turn]) -> str:
    """Write a conversation about one image as clients of LLaVA do, vicuna v1; role words in it can not end a turn."""
    said = []
    for number, turn in enumerate(turns):
        text = strip_tags(turn.text)
        for word in ROLE_WORDS:
            text = text.replace(word, f"{word[:-1]} {word[-1]}")
        image = f"{IMAGE_TAG}\n" if number == 0 else ""
        said.append(f"USER: {image}{text} ASSISTANT:" if turn.role == "human" else f" {text}</s>")
    return "".join(said)


def _first_piece(chunk: Chunk | None, face: Face) -> Piece:
    """Give the verdict of an answer's first chunk, under the name and place of the face in its image."""
    if chunk is None or chunk.verdict is None:
        raise ValueError("This worker gives no verdict: it is no M2F2-Det worker of this version.")
    try:
        verdict = VERDICTS.validate_python(chunk.verdict)
    except ValidationError as error:
        raise ValueError(f"The worker's verdict can not be read: {error.errors()[0]['msg']}.") from None
    verdict = replace(verdict, image=face.image, face=face.number, face_count=face.count, **face.place)
    found = None if chunk.evidence_map is None else np.asarray(chunk.evidence_map, np.float32)
    return Piece(verdict=verdict, evidence_map=found, seen=chunk.seen)


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Where the page is, whose workers it asks, and who may open it."""

    controller_url: str = setting("http://localhost:21001", "address of the controller; --controller says the same")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 = every one")
    port: int = setting(7860, "port to listen on")
    model_list_mode: Literal["once", "reload"] = setting(
        "once", "once = the models that are there at the start; reload = those that are there when a page is opened"
    )
    at_once: int = setting(16, "answers that are awaited at the same time; --concurrency-count says the same")
    requests_per_minute: int = setting(60, "steps that one address may take on the page")
    keys: str | None = setting(None, "file of API keys (m2f2 keys create) that people log in with; none = no login")
    allow_unauthenticated: bool = setting(False, "let everybody in who can reach an address beyond this machine")
    trusted_proxies: list[str] = setting([], PROXIES)
    examples: str | None = setting("utils/demo_faces", "folder of the photos that the page offers; none = none")
    embed: bool = setting(False, "accepted; the page fits into the width that it has")

    def __post_init__(self) -> None:
        """Raise ValueError for a page that would stand open to the network."""
        require_keys(self.host, self.keys, self.allow_unauthenticated)
        require_networks(self.trusted_proxies)


class Models(Mapping[str, "Engine"]):
    """The engines of the models that a controller has now, by name; all of it may raise ConnectionError."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def __getitem__(self, name: str) -> Engine:

        if name not in self._controller.models():
            raise KeyError(name)
        return RemoteEngine(self._controller, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._controller.models())

    def __len__(self) -> int:
        return len(self._controller.models())


def models_of(settings: WebSettings) -> Mapping[str, Engine]:
    """Ask the controller for its models. Raises ConnectionError without one, ValueError when it has no worker."""

    controller = Controller(settings.controller_url.rstrip("/"))
    names = controller.models()
    log.info("Models of %s: %s", controller.address, ", ".join(names) or "none yet")
    if settings.model_list_mode == "reload":
        return Models(controller)
    if not names:
        raise ValueError(
            f"The controller at {controller.address} knows no worker yet; start one (python -m "
            "llava.serve.model_worker), or give --model-list-mode reload."
        )
    return {name: RemoteEngine(controller, name) for name in names}


def build_app(settings: WebSettings, models: Mapping[str, Engine]) -> FastAPI:
    """Give the application of the page."""
    from llava.serve.guard import Guard, RequestLimits
    from llava.serve.keys import KeyRing
    from llava.serve.page.door import open_page

    limits = RequestLimits(
        requests_per_minute=settings.requests_per_minute,
        max_active=settings.at_once,
        max_waiting=4 * settings.at_once,
    )
    keys = KeyRing(settings.keys) if settings.keys else None
    page: PageDoor = open_page(models, limits, keys=keys, examples=settings.examples, is_remote=True)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with page.lifespan():
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, limits=limits, is_guarded=lambda path: False)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the page answers."""
        return {"status": "ok"}

    app.mount("/", page)
    app.state.close_streams = page.close
    return app


def main() -> None:
    """Serve the page until told to stop."""
    setup_logging()
    try:
        words = list(translated(sys.argv[1:], ALIASES, REFUSED))
        settings = parse(WebSettings, words, description=__doc__ or "")
        app = build_app(settings, models_of(settings))
    except (ValueError, OSError) as error:
        sys.exit(f"gradio_web_server: {error}")
    serve(app, settings.host, settings.port, settings.trusted_proxies)


if __name__ == "__main__":
    main()
