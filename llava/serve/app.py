"""The application of `m2f2 serve`: API, page, guards and counters around one engine."""

from __future__ import annotations

from fastapi import FastAPI

from llava.serve.api import Service, build_app
from llava.serve.engine import Engine
from llava.serve.keys import KeyRing
from llava.serve.limits import RequestLimits
from llava.serve.measures import MeasuredEngine, Measures
from llava.serve.settings import ServeSettings


def build(settings: ServeSettings, engine: Engine) -> FastAPI:
    """Give the application of these settings. Raises ValueError for a file of keys that can not be used."""
    measures = Measures()
    engine = MeasuredEngine(engine, measures)
    keys = KeyRing(settings.keys) if settings.keys else None
    at_once = settings.rows * settings.replica_range[1]
    limits = RequestLimits(
        requests_per_minute=settings.requests_per_minute,
        max_active=at_once,
        max_waiting=4 * at_once if settings.waiting is None else settings.waiting,
    )
    page = None
    if settings.page:
        from llava.serve.page.mount import open_page

        page = open_page({settings.name: engine}, limits, keys=keys, examples=settings.examples)
    return build_app(
        Service(engine=engine, model=settings.name, measures=measures, keys=keys, limits=limits, page=page)
    )
