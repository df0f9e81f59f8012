"""What `m2f2 serve` is told, and which addresses stand open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from llava.core.cluster import ClusterSettings
from llava.core.config import setting
from llava.pipeline.settings import DEMO_MODEL, PipelineSettings
from llava.serve.fetch import is_loopback

PROXIES = "addresses or networks of proxies in front; who asks is then who their X-Forwarded-For names"


@dataclass(frozen=True, kw_only=True)
class ServeSettings(PipelineSettings):
    """What is served, where, and to whom."""

    model_path: str | None = setting(
        None,
        "merged explainer, or a detector for verdicts alone: folder, name in checkpoints/, or hub id; none = that of "
        "make demo, trained if missing",
    )
    model_name: str | None = setting(None, "name that clients ask for; none = the name of the folder")
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
    replicas: int = setting(1, "processes with the model, with --ray; or give the next two")
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
        if self.ray and self.trusted_proxies:
            raise ValueError("trusted_proxies: with --ray the connections are those of Ray's own proxy; leave it out.")
        fewest, most = self.replica_range
        if not 1 <= fewest <= most:
            raise ValueError(f"replicas: {fewest} to {most} is not usable; allowed: 1 or more, the fewest first.")
        if most > 1 and not self.ray:
            raise ValueError(f"replicas: {most} need Ray; add --ray true, or leave it at 1.")

    @property
    def name(self) -> str:
        """Give the model's name, as clients ask for it."""
        return self.model_name or Path(self.model_path or DEMO_MODEL).name

    @property
    def model(self) -> str:
        """Give which model is served, the demonstration's where none was named."""
        from llava.core.weights import checkpoints_dir

        return self.model_path or str(checkpoints_dir() / DEMO_MODEL)

    def ready_line(self, host: str, port: int) -> str:
        """Say that it answers, and where."""
        where = "" if self.page else "/docs"
        shown = f"[{host}]" if ":" in host else host
        return f"ready: http://{shown}:{port}{where} (model {self.name}; stop with Ctrl+C)\n"

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
