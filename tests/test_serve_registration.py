"""Who may register a worker and where it may be, without a packet sent: names are resolved by a table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from llava.serve.registration import (
    SECRET_HEADER,
    SECRET_VARIABLE,
    SecretSettings,
    checked_address,
    is_admitted,
    is_loopback,
    read_secret,
    require_secret,
    resolve,
)

SECRET = "0123456789abcdef0123456789abcdef"
OWN = ("10.0.0.1", 21001)
NAMES: Mapping[str, list[str]] = {
    "localhost": ["::1", "127.0.0.1"],
    "worker.example": ["10.0.0.7"],
    "both.example": ["10.0.0.7", "10.9.9.9"],
    "v6.example": ["fd00::7"],
    "metadata.example": ["169.254.169.254"],
    "2130706433": ["127.0.0.1"],
    "0x7f.1": ["127.0.0.1"],
}


def table(host: str, port: int) -> list[str]:
    return NAMES.get(host) or [host]


def check(name: str, peer: str, allowed: tuple[str, ...] = (), own: tuple[str, int] = OWN) -> str:
    return checked_address(name, peer, own, allowed, table).url


@pytest.mark.parametrize(
    ("name", "peer", "url"),
    [
        ("http://10.0.0.7:21002", "10.0.0.7", "http://10.0.0.7:21002"),
        ("http://worker.example:21002", "10.0.0.7", "http://10.0.0.7:21002"),
        ("https://worker.example:443/", "10.0.0.7", "https://10.0.0.7:443"),
        ("http://localhost:21002", "127.0.0.1", "http://127.0.0.1:21002"),
        ("http://localhost:21002", "::1", "http://[::1]:21002"),
        ("http://127.0.0.1:21002", "::ffff:127.0.0.1", "http://127.0.0.1:21002"),
        ("http://[::ffff:10.0.0.7]:21002", "10.0.0.7", "http://10.0.0.7:21002"),
        ("http://[fd00::7]:21002", "fd00::7", "http://[fd00::7]:21002"),
        ("http://v6.example:21002", "fd00::7", "http://[fd00::7]:21002"),
    ],
)
def test_a_worker_at_its_own_address_is_pinned_to_it(name: str, peer: str, url: str) -> None:
    assert check(name, peer) == url


def test_the_name_goes_along_for_host_header_and_certificate() -> None:
    address = checked_address("https://worker.example:8443", "10.0.0.7", OWN, (), table)
    assert (address.host, address.netloc) == ("worker.example", "worker.example:8443")
    assert checked_address("http://[fd00::7]:1", "fd00::7", OWN, (), table).netloc == "[fd00::7]:1"


@pytest.mark.parametrize(
    "name",
    [
        "http://10.0.0.8:21002",
        "http://127.0.0.1:6379",
        "http://localhost:6379",
        "http://[::1]:6379",
        "http://[::ffff:127.0.0.1]:6379",
        "http://2130706433:6379",
        "http://0x7f.1:6379",
        "http://both.example:21002",
        "http://169.254.169.254:80",
        "http://metadata.example:80",
        "http://[::ffff:169.254.169.254]:80",
        "http://[fe80::1]:80",
        "http://[fd00:ec2::254]:80",
        "http://100.100.100.200:80",
        "http://[64:ff9b::a9fe:a9fe]:80",
        "http://0.0.0.0:80",
        "http://[::]:80",
        "http://224.0.0.1:80",
        "http://255.255.255.255:80",
    ],
)
def test_a_worker_can_not_lead_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="leads to"):
        check(name, "10.0.0.7")


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1", "100.100.100.200", "0.0.0.0", "224.0.0.1"])
def test_some_addresses_are_refused_whoever_asks_and_whatever_is_allowed(address: str) -> None:
    literal = f"[{address}]" if ":" in address else address
    for networks in ((), ("0.0.0.0/0", "::/0")):
        with pytest.raises(ValueError, match="where no worker may be"):
            check(f"http://{literal}:80", address, networks)


def test_a_network_can_be_allowed() -> None:
    assert check("http://10.0.3.9:21002", "10.0.0.7", ("10.0.3.0/24",)) == "http://10.0.3.9:21002"
    with pytest.raises(ValueError, match="--worker-networks"):
        check("http://10.0.4.9:21002", "10.0.0.7", ("10.0.3.0/24",))


@pytest.mark.parametrize(
    "name",
    [
        "10.0.0.7:21002",
        "ftp://10.0.0.7:21",
        "file:///etc/passwd",
        "gopher://10.0.0.7:70",
        "http://10.0.0.7",
        "http://:21002",
        "http://10.0.0.7:0",
        "http://10.0.0.7:99999",
        "http://10.0.0.7:port",
        "http://user@10.0.0.7:21002",
        "http://user:word@10.0.0.7:21002",
        "http://10.0.0.7:21002/admin",
        "http://10.0.0.7:21002?a=b",
        "http://10.0.0.7:21002#a",
        "http://10.0.0.7:21002\\@evil",
        "http://10.0.0.7:21002\r\nX: y",
        "http://10.0.0.7 :21002",
        "http://[fe80::1%25eth0]:21002",
        "http://[10.0.0.7:21002",
        "http://wörker:21002",
        "",
    ],
)
def test_only_a_plain_address_is_one(name: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        check(name, "10.0.0.7")


def test_the_controller_is_not_its_own_worker() -> None:
    for name, peer, own in (
        ("http://127.0.0.1:21001", "127.0.0.1", ("127.0.0.1", 21001)),
        ("http://localhost:21001", "::1", ("127.0.0.1", 21001)),
        ("http://10.0.0.1:21001", "10.0.0.1", OWN),
    ):
        with pytest.raises(ValueError, match="the controller itself"):
            check(name, peer, own=own)


def test_an_unknown_name_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not known here"):
        resolve("a..b", 1)
    assert "127.0.0.1" in resolve("127.0.0.1", 1)


def admitted(secret: str | None = None, free: bool = False, **given: str) -> bool:
    headers = {"host": given.pop("host", "localhost:21001"), **{k.replace("_", "-"): v for k, v in given.items()}}
    server, peer = headers.pop("server", "127.0.0.1"), headers.pop("peer", "127.0.0.1")
    shown = headers.pop("shown", None)
    return is_admitted(secret, headers | ({} if shown is None else {SECRET_HEADER: shown}), server, peer, free)


def test_without_a_secret_only_this_machine_registers() -> None:
    assert admitted() and admitted(host="[::1]:21001", server="::1", peer="::1")
    assert not admitted(peer="10.0.0.7")
    assert not admitted(server="10.0.0.1")
    assert not admitted(x_forwarded_for="10.0.0.7")
    assert not admitted(forwarded="for=10.0.0.7")
    assert not admitted(host="evil.example")
    assert not admitted(host="")
    assert admitted(free=True, peer="10.0.0.7")


def test_with_a_secret_everybody_has_to_show_it() -> None:
    assert admitted(SECRET, shown=SECRET, peer="10.0.0.7")
    for shown in (None, "", SECRET[:-1], SECRET + "x", "ä"):
        assert not admitted(SECRET, **({} if shown is None else {"shown": shown}))


def test_a_secret_is_read_from_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    assert read_secret(SecretSettings()) is None
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    assert read_secret(SecretSettings()) == SECRET
    file = tmp_path / "secret"
    file.write_text("from the file 0123456\n")
    assert read_secret(SecretSettings(secret_file=str(file))) == "from the file 0123456"
    with pytest.raises(FileNotFoundError):
        read_secret(SecretSettings(secret_file=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="contradict"):
        read_secret(SecretSettings(allow_unauthenticated=True))
    for short in ("", "short", "ä" * 20):
        monkeypatch.setenv(SECRET_VARIABLE, short)
        with pytest.raises(ValueError, match="16 or more"):
            read_secret(SecretSettings())


def test_an_open_address_needs_a_secret() -> None:
    require_secret(None, SecretSettings(), {"--host": "localhost"})
    require_secret(SECRET, SecretSettings(), {"--host": "0.0.0.0"})
    require_secret(None, SecretSettings(allow_unauthenticated=True), {"--host": "0.0.0.0"})
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0"):
        require_secret(None, SecretSettings(), {"--host": "0.0.0.0"})
    assert is_loopback("127.8.9.1") and is_loopback("::1") and is_loopback("::ffff:127.0.0.1")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("localhost.evil.example")


def test_the_secret_is_in_no_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.serve.controller import ControllerSettings, build_app

    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    with caplog.at_level(logging.DEBUG):
        settings = ControllerSettings(host="0.0.0.0")
        build_app(settings)
    assert SECRET not in caplog.text + repr(settings)
