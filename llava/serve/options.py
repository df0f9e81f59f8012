"""What `m2f2 serve` is told, which addresses stand open, and the application that comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING

from llava.core.cluster import ClusterSettings
from llava.core.config import setting
from llava.core.types import STARTER
from llava.pipeline.settings import PipelineSettings
from llava.serve.fetch import is_loopback
from llava.serve.keys import KeyRing

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llava.serve.engine import Engine

PROXIES = "addresses or networks of proxies in front; who asks is then who their X-Forwarded-For names"


@dataclass(frozen=True, kw_only=True)
class ServeSettings(PipelineSettings):
    """What is served, where, and to whom."""

    model_path: list[str] = setting(
        [STARTER],
        "merged explainers, and detectors for verdicts alone: starter, folders, names in checkpoints/, or hub ids; the "
        "first answers who names none",
    )
    model_name: list[str] | None = setting(
        None, "names that clients ask for, in the order of model_path; none = the names of the folders"
    )
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 = every one")
    port: int = setting(8000, "port to listen on; 0 = any free one")
    keys: str | None = setting(None, "file of API keys (m2f2 keys create); none = no key is asked for")
    allow_unauthenticated: bool = setting(False, "let everybody in who can reach an address beyond this machine")
    trusted_proxies: list[str] = setting([], PROXIES)
    rows: int = setting(16, "answers that are written side by side; further questions wait")
    waiting: int | None = setting(None, "requests that wait for those; more are refused; none = 4 times as many")
    log_json: bool = setting(False, "log JSON lines; a request's has time, id, method, path, status and seconds")
    requests_per_minute: int = setting(60, "of one API key, and of one address without a key")
    page: bool = setting(True, "serve the web page, too; false = the API alone")
    examples: str | None = setting("utils/demo_faces", "folder of the photos that the page offers; none = none")
    ray: bool = setting(False, "serve with Ray: several processes with the model, on one machine or a cluster")
    replicas: int = setting(1, "processes with each model, with --ray; or give the next two")
    min_replicas: int | None = setting(None, "fewest processes with the model when they follow the load")
    max_replicas: int | None = setting(None, "most processes with the model when they follow the load; none = replicas")
    upscale_seconds: float = setting(30.0, "how long the load must be too high before one more process is started")
    cluster: ClusterSettings = setting(ClusterSettings())

    def __post_init__(self) -> None:
        """Raise ValueError for a server that would stand open to the network, and for what can not be done."""
        super().__post_init__()
        require_keys(self.host, self.keys, self.allow_unauthenticated)
        for name, least in {"rows": 1, "waiting": 0, "requests_per_minute": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: {value} is not usable; allowed: {least} or more.")
        if self.upscale_seconds < 0:
            raise ValueError(f"upscale_seconds: {self.upscale_seconds} is not usable; allowed: 0 or more.")
        require_networks(self.trusted_proxies)
        self._require_names()
        if self.ray and self.trusted_proxies:
            raise ValueError("trusted_proxies: with --ray the connections are those of Ray's own proxy; leave it out.")
        fewest, most = self.replica_range
        if not 1 <= fewest <= most:
            raise ValueError(f"replicas: {fewest} to {most} is not usable; allowed: 1 or more, the fewest first.")
        if most > 1 and not self.ray:
            raise ValueError(f"replicas: {most} need Ray; add --ray true, or leave it at 1.")

    def _require_names(self) -> None:
        """Raise ValueError unless every model has one name of its own."""
        if not self.model_path:
            raise ValueError("model_path: no model stands behind it; give one or more, or leave it out.")
        paths, names = self.model_path, self.model_name or []
        if self.model_name is not None and len(names) != len(paths):
            raise ValueError(
                f"model_name: {len(names)} names ({', '.join(names)}) for {len(paths)} models ({', '.join(paths)}); "
                "give one for each, in the same order."
            )
        found = Counter(self._names)
        for name, count in found.items():
            if not name.strip():
                raise ValueError("model_name: a name is empty; give one for each model.")
            if count > 1:
                same = ", ".join(path for path, its in zip(paths, self._names, strict=True) if its == name)
                raise ValueError(
                    f"model_name: {count} models ({same}) have the name {name!r}; give each one of its own, such as "
                    f"--model_name {' '.join(f'{name}-{number + 1}' for number in range(count))}."
                )

    @property
    def _names(self) -> list[str]:
        return self.model_name or [Path(path).name or Path(path).resolve().name for path in self.model_path]

    @property
    def models(self) -> dict[str, str]:
        """Give which models are served, by the names that clients ask for."""
        return dict(zip(self._names, self.model_path, strict=True))

    def ready_line(self, host: str, port: int) -> str:
        """Say that it answers, and where."""
        where = "" if self.page else "/docs"
        shown = f"[{host}]" if ":" in host else host
        names = f"model{'s' * (len(self._names) > 1)} {', '.join(self._names)}"
        return f"ready: http://{shown}:{port}{where} ({names}; stop with Ctrl+C)\n"

    @property
    def replica_range(self) -> tuple[int, int]:
        """Give the fewest and the most processes with the model; the same where they do not follow the load."""
        most = self.replicas if self.max_replicas is None else self.max_replicas
        return (most if self.max_replicas is None else 1) if self.min_replicas is None else self.min_replicas, most


def require_keys(host: str, keys: str | None, allow_unauthenticated: bool) -> None:
    """Raise ValueError for an address that other machines reach without a key, unless that is wanted."""
    if not (is_loopback(host) or keys or allow_unauthenticated):
        raise ValueError(
            f"host: {host!r} can be reached from other machines; give --keys FILE (m2f2 keys create makes one), or "
            "--allow_unauthenticated true."
        )


def require_networks(proxies: Sequence[str]) -> None:
    """Raise ValueError for a proxy that is no address and no network."""
    for proxy in proxies:
        try:
            ip_network(proxy)
        except ValueError as error:
            raise ValueError(f"trusted_proxies: {error}; give addresses or networks, such as 10.0.3.0/24.") from None


def build(settings: ServeSettings, engines: Mapping[str, Engine]) -> FastAPI:
    """Give the application of these settings. Raises ValueError for a file of keys that can not be used."""
    from llava.serve.api import Service, build_app  # here, because --help needs no server
    from llava.serve.guard import RequestLimits
    from llava.serve.measures import MeasuredEngine, Measures

    measures = Measures()
    measured = {name: MeasuredEngine(engine, measures, name) for name, engine in engines.items()}
    keys = KeyRing(settings.keys) if settings.keys else None
    at_once = settings.rows * settings.replica_range[1] * len(measured)
    limits = RequestLimits(
        requests_per_minute=settings.requests_per_minute,
        max_active=at_once,
        max_waiting=4 * at_once if settings.waiting is None else settings.waiting,
    )
    page = None
    if settings.page:
        from llava.serve.page.door import open_page

        page = open_page(measured, limits, keys=keys, examples=settings.examples)
    return build_app(Service(engines=measured, measures=measures, keys=keys, limits=limits, page=page))
