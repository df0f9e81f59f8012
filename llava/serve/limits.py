"""How much the server takes on: requests per minute, bytes of a request, requests at work and waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from ipaddress import IPv6Address, ip_address, ip_network

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from llava.core.config import setting
from llava.serve.refusals import Refused

MAX_IDLE = 10_000


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What requests may cost."""

    requests_per_minute: int = setting(60, "of one API key, and of one address without a key")
    max_body_bytes: int = setting(30_000_000, "largest request body, in bytes (base64 takes 4/3 of a file)")
    max_header_bytes: int = setting(16_384, "address line and headers together, in bytes")
    max_headers: int = setting(100, "headers of a request")
    body_seconds: float = setting(30.0, "longest time for a request body to arrive, in seconds")
    max_active: int = setting(8, "requests that are worked on together")
    max_waiting: int = setting(32, "requests that wait for those")
    wait_seconds: float = setting(30.0, "longest wait for a turn, in seconds")
    work_seconds: float = setting(300.0, "longest answer, in seconds")

    def __post_init__(self) -> None:
        """Raise ValueError for limits that let nothing in."""
        for field in fields(self):
            least = 0 if field.name == "max_waiting" else 1e-3
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name}: {getattr(self, field.name)} is not usable; allowed: more than 0.")


class RateLimiter:
    """Requests per minute of each key or address, in a moving window, in this process."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._windows = MovingWindowRateLimiter(self._storage)

    def hit(self, identity: str, per_minute: int) -> None:
        """Count one request. Raises Refused (429) with the seconds to wait when there were too many."""
        self._forget_idle()
        item = RateLimitItemPerMinute(per_minute)
        if not self._windows.hit(item, identity):
            wait = self._windows.get_window_stats(item, identity).reset_time - time.time()
            raise Refused(429, f"More than {per_minute} requests in a minute; wait and ask again.", max(wait, 1.0))

    def _forget_idle(self) -> None:
        """Drop who has not asked for a minute: the library empties their lists, but keeps their names."""
        if len(self._storage.events) > MAX_IDLE:
            for name in [name for name, events in list(self._storage.events.items()) if not events]:
                self._storage.clear(name)


def address_identity(host: str) -> str:
    """Name who an address belongs to: an IPv4 address, or the /64 of an IPv6 one, which one customer holds."""
    try:
        address = ip_address(host)
    except ValueError:
        return f"address {host}"
    if isinstance(address, IPv6Address):
        return f"address {address.ipv4_mapped or ip_network((int(address), 64), strict=False)}"
    return f"address {address}"


def check_head(headers: Iterable[tuple[bytes, bytes]], target: bytes, limits: RequestLimits) -> None:
    """Raise Refused where the address line is too long (414), or the headers are too many or too long (431)."""
    sizes = [len(name) + len(value) for name, value in headers]
    if len(target) > limits.max_header_bytes:
        raise Refused(414, f"The address of the request is longer than {limits.max_header_bytes:,} bytes.")
    if len(sizes) > limits.max_headers or sum(sizes) + len(target) > limits.max_header_bytes:
        allowed = f"{limits.max_headers} headers and {limits.max_header_bytes:,} bytes"
        raise Refused(431, f"The headers are more than is taken: {allowed} at most.")


def too_long(limits: RequestLimits) -> Refused:
    """Give the refusal for a body that is too long."""
    return Refused(413, f"The request is larger than {limits.max_body_bytes:,} bytes, the limit.")


class Gate:
    """Lets a few requests in at a time; a few more wait for a limited time, and the others are told to come back."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._turns = asyncio.Semaphore(limits.max_active)
        self._inside = 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Hold a place, active or waiting. Raises Refused (503) when all are taken."""
        if self._inside >= self._limits.max_active + self._limits.max_waiting:
            raise self._busy()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Raises Refused (503) when it does not come in time."""
        try:
            async with asyncio.timeout(self._limits.wait_seconds):
                await self._turns.acquire()
        except TimeoutError:
            raise self._busy() from None
        try:
            yield
        finally:
            self._turns.release()

    def _busy(self) -> Refused:
        return Refused(503, "The server is busy; ask again in a moment.", min(self._limits.wait_seconds, 10.0))
