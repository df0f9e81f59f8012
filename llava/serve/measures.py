"""Counters of a server, for Prometheus, and one log line per request; nothing of an image or a text is kept.

`MeasuredEngine` counts what an engine says, by whichever door it was asked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any
from uuid import uuid4

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.core.types import Verdict
from llava.data.inputs import Image, NamedVideo
from llava.pipeline.verdict import Finding, VideoFinding
from llava.serve.engine import Engine, Piece, Question

log = logging.getLogger("llava.serve.requests")
KNOWN = ("/health", "/metrics", "/v1/models", "/v1/detect", "/v1/explain", "/v1/chat/completions")


class Measures:
    """The counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = self.registry
        self._requests = Counter("m2f2_requests", "requests by path and status", ("path", "status"), registry=kept)
        self._seconds = Histogram("m2f2_request_seconds", "seconds of a request by path", ("path",), registry=kept)
        self._verdicts = Counter(
            "m2f2_verdicts", "verdicts by label, call and model", ("label", "call", "model"), registry=kept
        )
        self._tokens = Counter("m2f2_tokens", "tokens written by model", ("model",), registry=kept)
        self._answer = Histogram("m2f2_answer_seconds", "seconds of an answer by model", ("model",), registry=kept)

    def judged(self, model: str, call: str, verdicts: Sequence[Verdict]) -> None:
        """Count verdicts of a model. call: what its engine was asked for: an answer, findings or a video."""
        for verdict in verdicts:
            self._verdicts.labels(str(verdict.label), call, model).inc()

    def wrote(self, model: str, tokens: int, seconds: float) -> None:
        """Count an answer of a model."""
        self._tokens.labels(model).inc(tokens)
        self._answer.labels(model).observe(seconds)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Wrap an application so that each request is counted and logged by an id, which the reply carries.

        The line names the model that was asked, where the application put it into the request's state as `model`.
        """

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            name, started, status = uuid4().hex[:12], time.monotonic(), 499
            state = scope.setdefault("state", {})

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
                facts = {"id": name, "method": scope["method"], "path": path, "status": status}
                model = {"model": state["model"]} if "model" in state else {}
                fields = facts | {"seconds": round(seconds, 3)} | model
                is_file = path == "other" and scope["method"] == "GET" and status < 400  # a page loads many
                level = logging.DEBUG if is_file else logging.INFO
                line = "%s %s %s %d %.3f s" + " model=%s" * len(model)
                log.log(level, line, *facts.values(), seconds, *model.values(), extra={"fields": fields})

        return counted


class MeasuredEngine:
    """An engine whose verdicts, tokens and seconds are counted; else it is the one that it was made of."""

    def __init__(self, engine: Engine, measures: Measures, model: str) -> None:
        self._engine, self._measures, self._model = engine, measures, model

    @property
    def has_words(self) -> bool | None:
        """Say whether it writes words, as `Engine.has_words` says."""
        return self._engine.has_words

    @property
    def scope(self) -> str:
        """Say what the model can see, as `Engine.scope` says."""
        return self._engine.scope

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield the verdict, then the text, as `Engine.ask` says; what was said until a caller left counts, too."""
        started, tokens = time.monotonic(), 0
        try:
            for piece in self._engine.ask(question, stop):
                if piece.verdict is not None:
                    self._measures.judged(self._model, "answer", [piece.verdict])
                tokens = max(tokens, piece.tokens)
                yield piece
        finally:
            self._measures.wrote(self._model, tokens, time.monotonic() - started)

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face, as `Engine.findings` says."""
        found = self._engine.findings(images)
        self._measures.judged(self._model, "findings", [finding.verdict for finding in found])
        return found

    def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Give the finding on a video, as `Engine.video_finding` says."""
        found = self._engine.video_finding(video)
        self._measures.judged(self._model, "video", [found.verdict])
        return found

    def model_facts(self) -> dict[str, Any]:
        """Give what a case file says of the model."""
        return self._engine.model_facts()
