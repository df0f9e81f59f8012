"""Which internet addresses are public, and which URLs the server may open at all; nothing is looked up here."""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TypeAlias

import httpx

from llava.serve.refusals import Refused

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
    """Give the parsed URL if the server may open it: https, a plain host, an allowed port. Raises Refused (400).

    A host in numbers has to be public; what a name resolves to is for the caller to check.
    """
    name = shown(url)
    if len(url) > MAX_URL or not url.isprintable() or "\\" in url or " " in url:
        raise Refused(400, f"{name}: not an address; give https://host/path, {MAX_URL} characters at most.")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError):
        raise Refused(400, f"{name}: not an address; give https://host/path.") from None
    if parsed.scheme != "https":
        raise Refused(400, f"{name}: only https:// addresses and data: URIs are opened; or upload the file.")
    if parsed.userinfo:
        raise Refused(400, f"{name}: an address with a user name or password is not opened; leave them out.")
    if (443 if parsed.port is None else parsed.port) not in ports:
        allowed = ", ".join(map(str, sorted(ports)))
        raise Refused(400, f"{name}: port {parsed.port} is not opened; allowed: {allowed}.")
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


def not_public(url: str) -> Refused:
    """Give the refusal for a host that is unknown or not public: one sentence, so that it maps no network."""
    return Refused(400, f"{shown(url)}: does not lead to a host on the public internet.")


def shown(url: str, length: int = 100) -> str:
    """Give the beginning of an address without its query, for a message."""
    text = "".join(c if c.isprintable() else "?" for c in re.split("[?#]", url[: MAX_URL + 1])[0])
    text = re.sub(r"//[^/@]*@", "//", text)
    return text if len(text) <= length else f"{text[: length - 3]}..."
