"""An image or video behind a public https address, for a server that strangers send addresses to.

The host is looked up once, every address found has to be public, and the connection goes to the address that was
checked, so that a second answer of the name server changes nothing. Each redirect passes the same check.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TypeAlias

import httpx

from llava.core.config import setting
from llava.data.inputs import FetchLimits
from llava.serve.engine import Refusal
from llava.serve.uploads import SNIFF_BYTES, media_type, unknown_format

Address: TypeAlias = IPv4Address | IPv6Address
MAX_URL = 2048
# IANA special-purpose registries (RFC 6890 and updates); Python's own `is_global` depends on its patch release.
NOT_PUBLIC_V4 = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            "168.63.129.16/32",  # Azure's own services inside a virtual machine: public by number only
            "224.0.0.0/3",  # multicast, reserved, broadcast
        ),
    )
)
# All that is not 2000::/3 is refused, and with it ::1, fe80::/10, fc00::/7, ff00::/8, IPv4-mapped, NAT64.
PUBLIC_V6 = ip_network("2000::/3")
NOT_PUBLIC_V6 = tuple(
    map(
        ip_network,
        (
            "2001::/23",  # IETF protocols; Teredo among them, which carries IPv4 addresses
            "2001:db8::/32",
            "2002::/16",  # 6to4, which carries IPv4 addresses
            "2620:4f:8000::/48",
            "3fff::/20",
        ),
    )
)
# The last label begins with a letter, as all top-level names do: 2130706433, 0x7f.1 and 0177.0.0.1 are no names.
DNS_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])\Z", re.ASCII
)
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
HEADERS = {"User-Agent": "m2f2-det", "Accept": "image/*, video/*", "Accept-Encoding": "identity"}
REDIRECTS = (301, 302, 303, 307, 308)
# One connection per download: a kept one was opened for another host name and checked for that one only.
NO_REUSE = httpx.Limits(max_keepalive_connections=0)
MAX_ADDRESSES = 3
# Threads of its own: a name server that keeps silent would take those in which images are decoded, one for each name.
LOOKUPS = ThreadPoolExecutor(8, thread_name_prefix="lookup")


def is_public(address: str) -> bool:
    """Say whether an IPv4 or IPv6 address belongs to the public internet; what is no address does not."""
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv4Address):
        return not any(found in network for network in NOT_PUBLIC_V4)
    assert isinstance(found, IPv6Address)
    return found.scope_id is None and found in PUBLIC_V6 and not any(found in network for network in NOT_PUBLIC_V6)


def check_url(url: str, ports: Collection[int] = (443,)) -> httpx.URL:
    """Give the parsed URL if the server may open it: https, a plain host, an allowed port. Raises Refusal (400).

    A host in numbers has to be public; what a name resolves to is for the caller to check.
    """
    name = shown(url)
    if len(url) > MAX_URL or not url.isprintable() or "\\" in url or " " in url:
        raise Refusal(400, f"{name}: not an address; give https://host/path, {MAX_URL} characters at most.")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError):
        raise Refusal(400, f"{name}: not an address; give https://host/path.") from None
    if parsed.scheme != "https":
        raise Refusal(400, f"{name}: only https:// addresses and data: URIs are opened; or upload the file.")
    if parsed.userinfo:
        raise Refusal(400, f"{name}: an address with a user name or password is not opened; leave them out.")
    if (443 if parsed.port is None else parsed.port) not in ports:
        allowed = ", ".join(map(str, sorted(ports)))
        raise Refusal(400, f"{name}: port {parsed.port} is not opened; allowed: {allowed}.")
    if not DNS_NAME.match(host) and not is_public(host):
        raise not_public(url)
    return parsed


def is_loopback(host: str) -> bool:
    """Say whether a host name or address is this machine's own, without looking it up."""
    address = address_in(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def address_in(text: str) -> Address | None:
    """Read an address as `plain_address` does; None where there is none."""
    try:
        return plain_address(text)
    except ValueError:
        return None


def plain_address(text: str) -> Address:
    """Read an address; an IPv4 address inside an IPv6 one counts as itself, a zone is left out. Raises ValueError."""
    address = ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def not_public(url: str) -> Refusal:
    """Give the refusal for a host that is unknown or not public: one sentence, so that it maps no network."""
    return Refusal(400, f"{shown(url)}: does not lead to a host on the public internet.")


def shown(url: str, length: int = 100) -> str:
    """Give the beginning of an address without its query, for a message."""
    text = "".join(c if c.isprintable() else "?" for c in re.split("[?#]", url[: MAX_URL + 1])[0])
    text = re.sub(r"//[^/@]*@", "//", text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


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
        """Download what begins like an image or video. Raises Refusal: 400 (address), 413 (size), 415 (content)."""
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._follow(url)
        except TimeoutError:
            raise Refusal(400, f"{shown(url)}: took longer than {self._limits.seconds:g} s.") from None
        except httpx.HTTPError:
            raise Refusal(400, f"{shown(url)}: cannot be downloaded over https.") from None

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
        raise Refusal(400, f"{shown(url)}: redirected more than {self._limits.max_redirects} times.")

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
            raise Refusal(400, f"{shown(url)}: the host answers with status {response.status_code}.")
        too_large = Refusal(413, f"{shown(url)}: larger than {self._limits.max_bytes:,} bytes, the limit.")
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
        raise Refusal(400, f"{shown(str(url))}: redirects to what is not an address.") from None
