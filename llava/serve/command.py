"""`m2f2 serve`: one model, its page, its API and documentation, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from llava.core.config import setting
from llava.pipeline.settings import DEMO_MODEL, JudgeSettings
from llava.serve.web import server_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llava.serve.batching import BatchingEngine


@dataclass(frozen=True, kw_only=True)
class ServeSettings(JudgeSettings):
    """What is served, where, and to whom."""

    model_path: str | None = setting(
        None, "merged explainer: folder, name in checkpoints/, or hub id; none = that of m2f2 demo, trained if missing"
    )
    model_name: str | None = setting(None, "name that clients ask for; none = the name of the folder")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 = every one")
    port: int = setting(8000, "port to listen on; 0 = any free one")
    keys: str | None = setting(None, "file of API keys (m2f2 keys create); none = no key is asked for")
    allow_unauthenticated: bool = setting(False, "let everybody in who can reach an address beyond this machine")
    rows: int = setting(16, "answers that are written side by side; further questions wait")
    waiting: int | None = setting(None, "requests that wait for those; more are refused; none = 4 times rows")
    log_json: bool = setting(False, "log JSON lines; a request's has time, id, method, path, status and seconds")
    requests_per_minute: int = setting(60, "of one API key, and of one address without a key")
    page: bool = setting(True, "serve the web page, too; false = the API alone")
    examples: str | None = setting("utils/demo_faces", "folder of the photos that the page offers; none = none")

    def __post_init__(self) -> None:
        """Raise ValueError for a server that would stand open to the network."""
        require_keys(self.host, self.keys, self.allow_unauthenticated)

    @property
    def name(self) -> str:
        """Give the model's name, as clients ask for it."""
        return self.model_name or Path(self.model_path or DEMO_MODEL).name


def serve(settings: ServeSettings) -> Iterator[str]:
    """Load the model and serve it until told to stop; yields where it is. Raises ValueError or FileNotFoundError."""
    from llava.core.logs import log_json
    from llava.core.weights import checkpoints_dir
    from llava.serve.batching import BatchConfig, BatchingEngine

    if settings.log_json:
        log_json()
    if settings.model_path is None:
        yield from _trained_demo()
    model = settings.load(settings.model_path or str(checkpoints_dir() / DEMO_MODEL))
    engine = BatchingEngine(model, BatchConfig(rows=settings.rows))
    server = server_of(build(settings, engine), settings.host, settings.port)
    listener = server.config.bind_socket()
    listener.listen()  # so that who reads the ready line can connect
    host, port = listener.getsockname()[:2]
    where = "" if settings.page else "/docs"
    yield f"ready: http://{host}:{port}{where} (model {settings.name}; stop with Ctrl+C)\n"
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()


def _trained_demo() -> Iterator[str]:
    """Train the demonstration's model unless it is there; yields what that says."""
    from llava.core.weights import checkpoints_dir

    folder = checkpoints_dir() / DEMO_MODEL
    if not folder.is_dir():
        from llava.pipeline.demo import DemoConfig, run_demo

        yield f"No model was named, and {str(folder)!r} is not there yet: training it, which takes 5 to 10 minutes.\n"
        yield from run_demo(DemoConfig())


def build(settings: ServeSettings, engine: BatchingEngine) -> FastAPI:
    """Give the application of these settings."""
    from llava.serve.api import Service, build_app
    from llava.serve.keys import KeyRing
    from llava.serve.limits import RequestLimits

    keys = KeyRing(settings.keys) if settings.keys else None
    limits = RequestLimits(
        requests_per_minute=settings.requests_per_minute,
        max_active=settings.rows,
        max_waiting=4 * settings.rows if settings.waiting is None else settings.waiting,
    )
    page = None
    if settings.page:
        from llava.serve.page.mount import open_page

        page = open_page({settings.name: engine}, limits, keys=keys, examples=settings.examples)
    return build_app(Service(engine=engine, model=settings.name, keys=keys, limits=limits, page=page))


def require_keys(host: str, keys: str | None, allow_unauthenticated: bool) -> None:
    """Raise ValueError for an address that other machines reach without a key, unless that is wanted."""
    if not (is_loopback(host) or keys or allow_unauthenticated):
        raise ValueError(
            f"host: {host!r} can be reached from other machines; give --keys FILE (m2f2 keys create makes one), or "
            "--allow_unauthenticated true."
        )


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
