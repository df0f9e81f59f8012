"""Who may register a worker, at which address, and how a worker stays known through restarts of either."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import httpx

from llava.core.config import setting
from llava.serve.fetch import Address, address_in, is_loopback, plain_address
from llava.serve.protocol import HeartBeat, Registration, WorkerStatus

log = logging.getLogger(__name__)

SECRET_VARIABLE = "M2F2_WORKER_SECRET"
SECRET_HEADER = "X-Worker-Secret"
LEAST_SECRET = 16
PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
# Where clouds hand credentials to machines: AWS over IPv6, Alibaba, Azure, Oracle. 169.254.169.254 is link-local.
METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))

Resolve: TypeAlias = Callable[[str, int], Sequence[str]]
RETRY_SECONDS = 2.0
CALL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class SecretSettings:
    """How workers prove that they belong here."""

    secret_file: str | None = setting(
        None, f"file with the secret that workers show; none = the environment variable {SECRET_VARIABLE}, if set"
    )
    allow_unauthenticated: bool = setting(False, "go without a secret although others can reach this address")


@dataclass(frozen=True, kw_only=True)
class WorkerAddress:
    """Where a worker is. name: as it registered; url: the same with the address that was checked instead of a name.

    host: the name alone, as `Host` header and for certificates; netloc: with the port.
    """

    name: str
    url: str
    host: str
    netloc: str


def read_secret(settings: SecretSettings) -> str | None:
    """Give the shared secret, None without one. Raises ValueError or FileNotFoundError for one that is of no use."""
    where = f"--secret-file {settings.secret_file}" if settings.secret_file else SECRET_VARIABLE
    if settings.secret_file:
        secret = Path(settings.secret_file).read_text(encoding="utf-8").strip()
    elif SECRET_VARIABLE in os.environ:
        secret = os.environ[SECRET_VARIABLE].strip()
    else:
        return None
    if len(secret) < LEAST_SECRET or not secret.isascii() or not secret.isprintable():
        raise ValueError(
            f"{where}: the secret needs {LEAST_SECRET} or more printable ASCII characters, as `openssl rand -hex 32` "
            "makes them."
        )
    if settings.allow_unauthenticated:
        raise ValueError(f"--allow-unauthenticated and a secret ({where}) contradict each other; leave one out.")
    return secret


def require_secret(secret: str | None, settings: SecretSettings, hosts: Mapping[str, str]) -> None:
    """Raise ValueError when there is no secret although one of `hosts` (flag: host) can be reached from elsewhere."""
    open_hosts = [f"{flag} {host}" for flag, host in hosts.items() if not is_loopback(host)]
    if secret is None and open_hosts and not settings.allow_unauthenticated:
        raise ValueError(
            f"{' and '.join(open_hosts)}: others can reach this, so workers need a secret: set {SECRET_VARIABLE} or "
            "--secret-file alike for controller and workers, stay on 127.0.0.1, or give --allow-unauthenticated."
        )


def is_admitted(
    secret: str | None, headers: Mapping[str, str], server: str, peer: str, allow_unauthenticated: bool
) -> bool:
    """Say whether a request may register. server and peer: addresses of the connection's two ends.

    A secret, once set, is asked of everybody. Without one only this machine is admitted: both ends loopback, no proxy
    between them, and asked for under a name of this machine (so no web page in a browser does it by a DNS trick).
    """
    if secret is not None:
        return hmac.compare_digest(headers.get(SECRET_HEADER, "").encode(), secret.encode())
    if allow_unauthenticated:
        return True
    try:
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:  # such as "["
        return False
    is_direct = not any(name in headers for name in PROXY_HEADERS)
    return is_direct and is_loopback(server) and is_loopback(peer) and is_loopback(host)


def resolve(host: str, port: int) -> list[str]:
    """Give the addresses behind a host name. Raises ValueError when there are none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"worker address: the name {host!r} is not known here ({error}).") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def checked_address(
    name: str,
    peer: str,
    own: tuple[str, int],
    allowed: Sequence[str] = (),
    resolver: Resolve = resolve,
) -> WorkerAddress:
    """Check the address that a worker at `peer` gives, and pin it, so that its name can not lead elsewhere later.

    own: address and port of the controller, which is no worker. allowed: networks beyond the peer itself, such as
    10.0.3.0/24. Raises ValueError that says what is wrong.
    """
    host, port, scheme = _parts(name)
    found = [plain_address(address) for address in resolver(host, port)]
    asking = address_in(peer)
    for address in found:
        _require_allowed(address, asking, allowed, name)
    # The peer's own address first: it is known to be up ("localhost" may be ::1 too, where nobody listens).
    address = min(found, key=lambda each: (each != asking, each.version))
    if port == own[1] and (address == address_in(own[0]) or address.is_loopback):
        raise ValueError(f"worker address {name!r} is the controller itself; give the worker's own port.")
    shown = f"[{host}]" if ":" in host else host
    literal = f"[{address}]" if address.version == 6 else str(address)
    return WorkerAddress(name=name, url=f"{scheme}://{literal}:{port}", host=host, netloc=f"{shown}:{port}")


def _parts(name: str) -> tuple[str, int, str]:
    """Give host, port and scheme of an address that is nothing else."""
    wrong = ValueError(f"worker address {name[:256]!r} is not of the form http://HOST:PORT (or https://).")
    if not name.isascii() or not name.isprintable() or any(letter in name for letter in " \\@?#%"):
        raise wrong
    try:
        parts = urlsplit(name)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not host or not port or parts.path not in ("", "/"):
        raise wrong
    return host, port, parts.scheme


def _require_allowed(address: Address, asking: Address | None, allowed: Sequence[str], name: str) -> None:
    is_special = address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved
    if (is_special and not address.is_loopback) or address in METADATA:  # Python calls ::1 reserved
        raise ValueError(f"worker address {name!r} leads to {address}, where no worker may be.")
    is_peer = asking is not None and (address == asking or (address.is_loopback and asking.is_loopback))
    if not is_peer and not any(address in ipaddress.ip_network(network) for network in allowed):
        raise ValueError(
            f"worker address {name!r} leads to {address}, and the request comes from {asking}; a worker registers "
            "itself, or its network is named in --worker-networks of the controller."
        )


async def stay_registered(
    controller: str, name: str, secret: str | None, status: Callable[[], WorkerStatus], seconds: float
) -> None:
    """Register a worker by its address `name`, then send a heartbeat every `seconds`, until cancelled.

    A controller that does not know the worker (any more) gets a new registration; one that does not answer, or refuses,
    is asked again soon.
    """
    headers = {SECRET_HEADER: secret} if secret else {}
    async with httpx.AsyncClient(timeout=CALL_SECONDS, headers=headers, trust_env=False) as client:
        is_known = False
        while True:
            is_known = await _say(client, controller, name, status(), is_known)
            await asyncio.sleep(seconds if is_known else min(RETRY_SECONDS, seconds))


async def _say(client: httpx.AsyncClient, controller: str, name: str, status: WorkerStatus, is_known: bool) -> bool:
    """Send a heartbeat, or register; gives whether the controller knows the worker now."""
    try:
        if is_known:
            beat = HeartBeat(worker_name=name, queue_length=status.queue_length)
            answer = await client.post(f"{controller}/receive_heart_beat", json=beat.model_dump())
            if answer.raise_for_status().json()["exist"]:
                return True
        asked = Registration(worker_name=name, worker_status=status, multimodal=True)
        answer = await client.post(f"{controller}/register_worker", json=asked.model_dump())
        if answer.is_error:
            log.error("controller %s refuses this worker: %s %s", controller, answer.status_code, answer.text[:300])
            return False
        log.info("registered as %s at %s", name, controller)
        return True
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        log.warning("controller %s does not answer (%s); trying again", controller, type(error).__name__)
        return is_known
