"""Ray: a private one on this machine, which the network cannot reach, or a cluster that runs already."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address

from llava.core.config import setting

log = logging.getLogger(__name__)
LEAST_STORE_MB = 100  # Ray itself refuses less than 75
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Ray listens on every interface unless it believes that this system can be no cluster; then on 127.0.0.1 alone.
PRIVATE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Which Ray does the work, and how much of a machine it takes."""

    address: str | None = setting(
        None, "address of a running Ray cluster; none = a private one on this machine, which the network cannot reach"
    )
    cpus: int | None = setting(None, "CPUs of a private one; none = all")
    store_mb: int = setting(500, "memory of a private one through which processes hand over pictures, in MB")
    model_cpus: int = setting(1, "CPUs of each process that holds the model, and the threads that it computes with")
    model_gpus: float = setting(0.0, "GPUs of each process that holds the model; 0.5 = two share one")

    def __post_init__(self) -> None:
        """Raise ValueError for what Ray cannot do."""
        least = {"cpus": 1, "store_mb": LEAST_STORE_MB, "model_cpus": 1, "model_gpus": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"cluster.{name}: {value} is not usable; allowed: {bound} or more.")

    @property
    def is_private(self) -> bool:
        """Say whether Ray is started for this run alone."""
        return self.address is None

    @property
    def resources(self) -> dict[str, float]:
        """Give what each process that holds the model takes, as Ray names it."""
        return {"num_cpus": self.model_cpus, "num_gpus": self.model_gpus}

    def room(self) -> int:
        """Count the processes with a model that the connected Ray has room for now."""
        import ray

        there, wanted = ray.cluster_resources(), {"CPU": self.model_cpus, "GPU": self.model_gpus}
        return min(int(there.get(name, 0) / count) for name, count in wanted.items() if count)


@contextmanager
def connected(settings: ClusterSettings) -> Iterator[None]:
    """Be connected to Ray; a private one is started, and has ended with all its processes afterwards.

    Raises ValueError when a private one would stand open to the network.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if settings.is_private:
        os.environ.update(PRIVATE)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray  # here, because it reads the environment when it is imported

    known = {"log_to_driver": True, "logging_level": logging.WARNING}
    if not settings.is_private:
        ray.init(address=settings.address, **known)
    else:
        store = settings.store_mb * 2**20
        ray.init("local", num_cpus=settings.cpus, object_store_memory=store, include_dashboard=False, **known)
    try:
        if settings.is_private:
            _require_loopback([node["NodeManagerAddress"] for node in ray.nodes()])
        yield
    finally:
        ray.shutdown()


def keep_replicas_private() -> None:
    """Let the gRPC servers that this process starts from now on listen on 127.0.0.1 alone, whatever they ask for.

    Ray Serve opens one in each replica on every interface, has no setting for that, and unpickles what it is sent.
    """
    from grpc.aio._server import Server

    def on_loopback(server: Server, address: str) -> int:
        return int(add_insecure_port(server, f"127.0.0.1:{address.rpartition(':')[2]}"))

    add_insecure_port = Server.add_insecure_port
    Server.add_insecure_port = on_loopback


def _require_loopback(addresses: list[str]) -> None:
    """Raise ValueError for a Ray that others may reach, as when it was imported before this module set it up."""
    found = [address for address in addresses if not ip_address(address).is_loopback]
    if found:
        raise ValueError(
            f"Ray listens on {found[0]}, which others may reach; set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "
            "before Ray is imported, or start a cluster yourself and give --cluster.address."
        )
