"""An image or video behind a public https address, for a server that strangers send addresses to.

The host is looked up once, every address found has to be public, and the connection goes to the address that was
checked, so that a second answer of the name server changes nothing. Each redirect passes the same check.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import httpx

from llava.core.config import setting
from llava.data.inputs import FetchLimits
from llava.serve.addresses import check_url, is_public, not_public, shown
from llava.serve.refusals import Refused
from llava.serve.uploads import SNIFF_BYTES, media_type, unknown_format

Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
HEADERS = {"User-Agent": "m2f2-det", "Accept": "image/*, video/*", "Accept-Encoding": "identity"}
REDIRECTS = (301, 302, 303, 307, 308)
# One connection per download: a kept one was opened for another host name and checked for that one only.
NO_REUSE = httpx.Limits(max_keepalive_connections=0)
MAX_ADDRESSES = 3
# Threads of its own: a name server that keeps silent would take those in which images are decoded, one for each name.
LOOKUPS = ThreadPoolExecutor(8, thread_name_prefix="lookup")


@dataclass(frozen=True, kw_only=True)
class ServerFetchLimits(FetchLimits):
    """What an image or video from the web may cost the server."""

    max_redirects: int = setting(3, "redirects that are followed")


async def resolve(host: str, port: int) -> list[str]:
    """Look up all IPv4 and IPv6 addresses of a host. Raises OSError."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(LOOKUPS, look_up)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Downloads from public https addresses within limits; one serves all requests.

    resolver: gives the addresses of a host. transport: sends a request whose URL has a checked address for its host;
    the name for Host and TLS is in its header and in its extension `sni_hostname`.
    """

    def __init__(
        self,
        limits: ServerFetchLimits | None = None,
        resolver: Resolver = resolve,
        transport: httpx.AsyncBaseTransport | None = None,
        ports: Collection[int] = (443,),
    ) -> None:
        self._limits = limits or ServerFetchLimits()
        self._resolver = resolver
        self._transport = transport or httpx.AsyncHTTPTransport(trust_env=False, limits=NO_REUSE)
        self._ports = ports

    async def fetch(self, url: str) -> bytes:
        """Download what begins like an image or video. Raises Refused: 400 (address), 413 (size), 415 (content)."""
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._follow(url)
        except TimeoutError:
            raise Refused(400, f"{shown(url)}: took longer than {self._limits.seconds:g} s.") from None
        except httpx.HTTPError:
            raise Refused(400, f"{shown(url)}: cannot be downloaded over https.") from None

    async def aclose(self) -> None:
        """Close what is open."""
        await self._transport.aclose()

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            parsed = check_url(url, self._ports)
            response = await self._send(parsed)
            try:
                if response.status_code not in REDIRECTS:
                    return await self._content(response, url)
                url = _target(parsed, response)
            finally:
                await response.aclose()
        raise Refused(400, f"{shown(url)}: redirected more than {self._limits.max_redirects} times.")

    async def _send(self, url: httpx.URL) -> httpx.Response:
        """Ask a host at one of its addresses, all of which have to be public."""
        failed: httpx.ConnectError | None = None
        for address in (await self._addresses(url))[:MAX_ADDRESSES]:
            request = httpx.Request(
                "GET",
                url.copy_with(host=address, fragment=None),
                headers={"Host": url.netloc.decode("ascii"), **HEADERS},
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
            )
            try:
                return await self._transport.handle_async_request(request)
            except httpx.ConnectError as error:
                failed = error
        assert failed is not None
        raise failed

    async def _addresses(self, url: httpx.URL) -> Sequence[str]:
        host = url.raw_host.decode("ascii")
        if is_public(host):
            return [host]
        try:
            addresses = await self._resolver(host, url.port or 443)
        except OSError:
            addresses = []
        if not addresses or not all(map(is_public, addresses)):
            raise not_public(str(url))
        return addresses

    async def _content(self, response: httpx.Response, url: str) -> bytes:
        if response.status_code != 200:
            raise Refused(400, f"{shown(url)}: the host answers with status {response.status_code}.")
        too_large = Refused(413, f"{shown(url)}: larger than {self._limits.max_bytes:,} bytes, the limit.")
        announced = response.headers.get("Content-Length", "")
        if announced.isdecimal() and int(announced[:20]) > self._limits.max_bytes:
            raise too_large
        content, is_known = bytearray(), False
        assert isinstance(response.stream, httpx.AsyncByteStream)
        async for chunk in response.stream:  # raw: nothing is decompressed
            content += chunk
            if len(content) > self._limits.max_bytes:
                raise too_large
            if not is_known and len(content) >= SNIFF_BYTES:
                is_known = _known(content, url)
        _known(content, url)
        return bytes(content)


def _known(content: bytearray, url: str) -> bool:
    if media_type(content) is None:
        raise unknown_format(shown(url))
    return True


def _target(url: httpx.URL, response: httpx.Response) -> str:
    try:
        return str(url.join(response.headers.get("Location", "")))
    except (httpx.InvalidURL, ValueError):
        raise Refused(400, f"{shown(str(url))}: redirects to what is not an address.") from None
