"""`m2f2 serve`: one model or several, their page, API and documentation, in one process or on Ray."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from llava.core.cluster import connected
from llava.pipeline.settings import load
from llava.serve.keys import read_keys
from llava.serve.options import ServeSettings, build
from llava.serve.web import require_free, server_of

NAME = "m2f2"


def serve_with_ray(settings: ServeSettings) -> Iterator[str]:
    """Serve until told to stop; yields where. What was started has ended afterwards. Raises ValueError."""
    with connected(settings.cluster), _interruptible():
        from ray import serve

        from llava.serve.ray_app import application

        _require_room(settings)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        port = settings.port or _free_port(settings.host)
        try:
            serve.start(http_options={"host": settings.host, "port": port}, logging_config={"log_level": "WARNING"})
            serve.run(application(settings), name=NAME, route_prefix="/")
            yield settings.ready_line(settings.host, port)
            Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            serve.shutdown() if settings.cluster.is_private else serve.delete(NAME)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM do what Ctrl+C does, whatever Ray has set; a second one waits until all has ended."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _require_room(settings: ServeSettings) -> None:
    """Raise ValueError where replicas would wait for ever for a place on this machine."""
    count = len(settings.models)
    room, fewest = settings.cluster.room(), settings.replica_range[0] * count
    if settings.cluster.is_private and fewest > room:
        of_all = f" of all {count} models" if count > 1 else ""
        raise ValueError(
            f"replicas: {fewest}{of_all} do not fit here, {room} do; give fewer, or other --cluster.cpus, "
            "--cluster.model_cpus or --cluster.model_gpus."
        )


def _free_port(host: str) -> int:
    """Find a port where nobody listens, because Ray takes no 0."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def serve(settings: ServeSettings) -> Iterator[str]:
    """Load the models and serve them until told to stop; yields where. Raises ValueError or FileNotFoundError."""
    if not settings.ray or settings.cluster.is_private:  # a cluster may have its own proxy there
        require_free(settings.host, settings.port)
    if settings.keys:
        read_keys(Path(settings.keys))  # before the model, which takes minutes
    _require_models(settings)
    yield from serve_with_ray(settings) if settings.ray else _here(settings)


def _require_models(settings: ServeSettings) -> None:
    """Raise FileNotFoundError or ValueError for a model that is not there, before another one is loaded."""
    from llava.detectors.published import ready_detector  # here, because it needs PyTorch

    for path in settings.models.values():
        ready_detector(path)


def _here(settings: ServeSettings) -> Iterator[str]:
    """Serve from this process."""
    from llava.core.runtime import log_json
    from llava.serve.batching import BatchConfig, BatchingEngine

    if settings.log_json:
        log_json()
    config = BatchConfig(rows=settings.rows)
    with ExitStack() as open_engines:
        engines = {
            name: open_engines.enter_context(closing(BatchingEngine(load(settings, path), config, name)))
            for name, path in settings.models.items()
        }
        server = server_of(build(settings, engines), settings.host, settings.port, settings.trusted_proxies)
        listener = server.config.bind_socket()
        listener.listen()  # so that who reads the ready line can connect
        host, port = listener.getsockname()[:2]
        yield settings.ready_line(host, port)
        server.run(sockets=[listener])
