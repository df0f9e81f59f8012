"""`m2f2 serve`: one model, its API and documentation, in one process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from llava.core.config import setting
from llava.pipeline.settings import FaceSettings, ModelSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llava.serve.batching import BatchingEngine

log = logging.getLogger(__name__)
SHUTDOWN_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class ServeSettings(FaceSettings, ModelSettings):
    """What is served, where, and to whom."""

    model_path: str = setting("outputs/demo/explainer", "merged explainer: folder, name in checkpoints/, or hub id")
    model_name: str | None = setting(None, "name that clients ask for; none = the name of the folder")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 = every one")
    port: int = setting(8000, "port to listen on; 0 = any free one")
    keys: str | None = setting(None, "file of API keys (m2f2 keys create); none = no key is asked for")
    allow_unauthenticated: bool = setting(False, "let everybody in who can reach an address beyond this machine")
    rows: int = setting(16, "answers that are written side by side; further questions wait")
    requests_per_minute: int = setting(60, "of one API key, and of one address without a key")
    prior: float | None = setting(None, "share of forgeries expected; none = as in the calibration data")
    stability: bool = setting(True, "judge delivered versions of each face too")

    def __post_init__(self) -> None:
        """Raise ValueError for a server that would stand open to the network."""
        if not (is_loopback(self.host) or self.keys or self.allow_unauthenticated):
            raise ValueError(
                f"host: {self.host!r} can be reached from other machines; give --keys FILE (m2f2 keys create makes "
                "one), or --allow_unauthenticated true."
            )

    @property
    def name(self) -> str:
        """Give the model's name, as clients ask for it."""
        return self.model_name or Path(self.model_path).name


class _Server(uvicorn.Server):
    """A server that ends in order on Ctrl+C and SIGTERM; uvicorn's own raises the signal again when it has ended."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals over for as long as it runs."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(settings: ServeSettings) -> Iterator[str]:
    """Load the model and serve it until told to stop; yields where it is. Raises ValueError or FileNotFoundError."""
    engine = load_engine(settings)
    server = _Server(
        uvicorn.Config(
            build(settings, engine),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
    listener = server.config.bind_socket()
    host, port = listener.getsockname()[:2]
    yield f"ready: http://{host}:{port}/docs (model {settings.name}; stop with Ctrl+C)\n"
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()


def build(settings: ServeSettings, engine: BatchingEngine) -> FastAPI:
    """Give the application of these settings."""
    from llava.serve.api import Service, build_app
    from llava.serve.keys import KeyRing
    from llava.serve.limits import RequestLimits

    return build_app(
        Service(
            engine=engine,
            model=settings.name,
            keys=KeyRing(settings.keys) if settings.keys else None,
            limits=RequestLimits(
                requests_per_minute=settings.requests_per_minute,
                max_active=settings.rows,
                max_waiting=4 * settings.rows,
            ),
        )
    )


def load_engine(settings: ServeSettings) -> BatchingEngine:
    """Load the model behind an engine of this process."""
    from llava.pipeline import Pipeline
    from llava.serve.batching import BatchConfig, BatchingEngine

    faces = FaceSettings(face=settings.face, margin=settings.margin, whole_from=settings.whole_from)
    pipeline = Pipeline.from_pretrained(
        settings.model_path,
        settings.device,
        settings.precision,
        settings.quantization,
        faces,
        settings.batch_size,
        settings.prior,
        settings.stability,
    )
    return BatchingEngine(pipeline, BatchConfig(rows=settings.rows))


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
