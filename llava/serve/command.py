"""`m2f2 serve`: one model, its page, its API and documentation, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llava.pipeline.loading import load
from llava.pipeline.settings import DEMO_MODEL
from llava.serve.keys import read_keys
from llava.serve.settings import ServeSettings
from llava.serve.web import require_free, server_of


def serve(settings: ServeSettings) -> Iterator[str]:
    """Load the model and serve it until told to stop; yields where it is. Raises ValueError or FileNotFoundError."""
    if not settings.ray or settings.cluster.is_private:  # a cluster may have its own proxy there
        require_free(settings.host, settings.port)
    if settings.keys:
        read_keys(Path(settings.keys))  # before the model, which takes minutes
    if settings.model_path is None:
        yield from _trained_demo()
    yield from _with_ray(settings) if settings.ray else _here(settings)


def _with_ray(settings: ServeSettings) -> Iterator[str]:
    from llava.serve.ray_command import serve_with_ray

    return serve_with_ray(settings)


def _here(settings: ServeSettings) -> Iterator[str]:
    """Serve from this process."""
    from llava.core.logs import log_json
    from llava.serve.app import build
    from llava.serve.batching import BatchConfig, BatchingEngine

    if settings.log_json:
        log_json()
    engine = BatchingEngine(load(settings, settings.model), BatchConfig(rows=settings.rows))
    server = server_of(build(settings, engine), settings.host, settings.port, settings.trusted_proxies)
    listener = server.config.bind_socket()
    listener.listen()  # so that who reads the ready line can connect
    host, port = listener.getsockname()[:2]
    yield settings.ready_line(host, port)
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
