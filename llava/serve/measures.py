"""Counters of a server, for Prometheus, and one log line per request; nothing of an image or a text is kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from uuid import uuid4

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.core.types import Verdict

log = logging.getLogger("llava.serve.requests")
KNOWN = ("/health", "/metrics", "/v1/models", "/v1/detect", "/v1/explain", "/v1/chat/completions")


class Measures:
    """The counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = self.registry
        self._requests = Counter("m2f2_requests", "requests by path and status", ("path", "status"), registry=kept)
        self._seconds = Histogram("m2f2_request_seconds", "seconds of a request by path", ("path",), registry=kept)
        self._verdicts = Counter("m2f2_verdicts", "verdicts by label", ("label",), registry=kept)
        self._tokens = Counter("m2f2_tokens", "tokens written", registry=kept)
        self._answer = Histogram("m2f2_answer_seconds", "seconds of an answer in words", registry=kept)

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        """Count verdicts."""
        for verdict in verdicts:
            self._verdicts.labels(str(verdict.label)).inc()

    def wrote(self, tokens: int, seconds: float) -> None:
        """Count an answer."""
        self._tokens.inc(tokens)
        self._answer.observe(seconds)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Wrap an application so that each request is counted and logged by an id, which the reply carries."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            name, started, status = uuid4().hex[:12], time.monotonic(), 499

            async def noted(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
                await send(message)

            try:
                await app(scope, receive, noted)
            finally:
                seconds = time.monotonic() - started
                path = scope["path"] if scope["path"] in KNOWN else "other"
                self._requests.labels(path, str(status)).inc()
                self._seconds.labels(path).observe(seconds)
                told = {"id": name, "method": scope["method"], "path": path, "status": status}
                fields = told | {"seconds": round(seconds, 3)}
                log.info("%s %s %s %d %.3f s", *told.values(), seconds, extra={"fields": fields})

        return counted
