"""The web page of a controller: what its workers answer, for people."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastapi import FastAPI

from llava.core.config import parse, setting
from llava.core.logs import setup_logging
from llava.serve.flags import translated
from llava.serve.settings import require_keys
from llava.serve.web import serve

if TYPE_CHECKING:
    from llava.serve.engine import Engine
    from llava.serve.page.door import PageDoor
    from llava.serve.remote import Controller

log = logging.getLogger(__name__)
ALIASES = {"--controller": "--controller-url", "--concurrency-count": "--at-once"}
REFUSED = {
    "--share": "it would lead people's pictures through somebody else's server; put a proxy of yours in front",
    "--moderate": "it would send what people write to somebody else's server",
}


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
    examples: str | None = setting("utils/demo_faces", "folder of the photos that the page offers; none = none")
    embed: bool = setting(False, "accepted; the page fits into the width that it has")

    def __post_init__(self) -> None:
        """Raise ValueError for a page that would stand open to the network."""
        require_keys(self.host, self.keys, self.allow_unauthenticated)


class Models(Mapping[str, "Engine"]):
    """The engines of the models that a controller has now, by name; all of it may raise ConnectionError."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def __getitem__(self, name: str) -> Engine:
        from llava.serve.remote import RemoteEngine

        if name not in self._controller.models():
            raise KeyError(name)
        return RemoteEngine(self._controller, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._controller.models())

    def __len__(self) -> int:
        return len(self._controller.models())


def models_of(settings: WebSettings) -> Mapping[str, Engine]:
    """Ask the controller for its models. Raises ConnectionError without one, ValueError when it has no worker."""
    from llava.serve.remote import Controller, RemoteEngine

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
    from llava.serve.guard import Guard
    from llava.serve.keys import KeyRing
    from llava.serve.limits import RequestLimits
    from llava.serve.page.mount import open_page

    limits = RequestLimits(
        requests_per_minute=settings.requests_per_minute,
        max_active=settings.at_once,
        max_waiting=4 * settings.at_once,
    )
    keys = KeyRing(settings.keys) if settings.keys else None
    page: PageDoor = open_page(models, limits, keys=keys, examples=settings.examples)

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
    serve(app, settings.host, settings.port)


if __name__ == "__main__":
    main()
