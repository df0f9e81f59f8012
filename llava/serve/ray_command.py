"""`m2f2 serve --ray true`: the Ray Serve application, on a Ray of its own or on a running cluster."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

from llava.core.cluster import connected
from llava.serve.settings import ServeSettings

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
    room, fewest = settings.cluster.room(), settings.replica_range[0]
    if settings.cluster.is_private and fewest > room:
        raise ValueError(
            f"replicas: {fewest} do not fit here, {room} do; give fewer, or other --cluster.cpus, --cluster.model_cpus "
            "or --cluster.model_gpus."
        )


def _free_port(host: str) -> int:
    """Find a port where nobody listens, because Ray takes no 0."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
