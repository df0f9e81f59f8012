"""API keys are shown once and kept as hashes; they expire, are withdrawn, and a running server follows."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from llava.cli import main
from llava.serve.keys import ApiKey, KeyFile, KeyRing, NewKey, OldKey, create_key, list_keys, read_keys, revoke_key


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "deep" / "keys.json")


def created(file: str, name: str, **options: float) -> str:
    return create_key(NewKey(file=file, name=name, **options)).splitlines()[0]


def test_the_life_of_a_key(file: str) -> None:
    secret = created(file, "ana", requests_per_minute=7)
    ring = KeyRing(file)
    key = ring.find(secret)
    assert key is not None and (key.name, key.requests_per_minute, key.last_four) == ("ana", 7, secret[-4:])
    other = created(file, "ben")
    assert ring.find(other) is not None and ring.find(secret) is not None  # read again
    assert "ana is no longer valid" in revoke_key(OldKey(file=file, name="ana"))
    assert ring.find(secret) is None and ring.find(other) is not None


def test_the_file_holds_hashes_and_only_its_owner_reads_it(file: str) -> None:
    old = os.umask(0)
    try:
        secret = created(file, "ana")
        created(file, "ben")
        revoke_key(OldKey(file=file, name="ben"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600
    assert [p.name for p in Path(file).parent.iterdir()] == ["keys.json"]
    text = Path(file).read_text()
    assert secret not in text and secret[5:-4] not in text
    assert json.loads(text)["keys"][0]["sha256"] == hashlib.sha256(secret.encode()).hexdigest()


def test_keys_are_long_random_and_easy_to_spot(file: str) -> None:
    secrets = {created(file, f"n{n}") for n in range(20)}
    assert len(secrets) == 20
    assert all(re.fullmatch(r"m2f2_[A-Za-z0-9_-]{43}", secret) for secret in secrets)  # 43 * 6 bits >= 256


def test_a_key_expires(file: str) -> None:
    secret = created(file, "ana", days=1.5)
    ring, now = KeyRing(file), datetime.now(UTC)
    assert ring.find(secret, now + timedelta(hours=35)) is not None
    assert ring.find(secret, now + timedelta(hours=37)) is None
    assert ring.find(created(file, "ben"), now + timedelta(days=9999)) is not None


def test_what_is_not_the_key_is_not_taken(file: str) -> None:
    secret = created(file, "ana")
    ring = KeyRing(file)
    digest = read_keys(Path(file))[0].sha256
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), digest, "\ud800", "é", "ana", secret[-4:], "x" * 9999):
        assert ring.find(wrong) is None


def test_without_a_sound_file_no_key_is_valid(file: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = created(file, "ana")
    ring, content = KeyRing(file), Path(file).read_text()
    for damage in ("", "[]", '{"keys": [{"name": 1}]}', '{"keys": {"a": 1}}', b"\xff"):
        Path(file).write_bytes(damage if isinstance(damage, bytes) else damage.encode())
        assert ring.find(secret) is None
        assert "No key is valid" in caplog.text and "damaged" in caplog.text
        with pytest.raises(ValueError, match="is damaged"):
            KeyRing(file)
        caplog.clear()
    Path(file).unlink()
    assert ring.find(secret) is None and "does not exist" in caplog.text
    with pytest.raises(FileNotFoundError, match="m2f2 keys create"):
        KeyRing(file)
    Path(file).write_text(content)
    assert ring.find(secret) is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": ""}, "name: ''"),
        ({"name": "a b"}, "name: 'a b'"),
        ({"name": "a\n"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "a", "days": 0}, "days: 0"),
        ({"name": "a", "days": float("nan")}, "days: nan"),
        ({"name": "a", "days": 1e12}, "at most 36500"),
        ({"name": "a", "requests_per_minute": -1}, "requests_per_minute: -1"),
    ],
)
def test_a_key_that_cannot_be_kept_is_an_error(options: dict[str, object], words: str, file: str) -> None:
    with pytest.raises(ValueError, match=words):
        NewKey(file=file, **options)


def test_names_are_unique_and_looked_up(file: str) -> None:
    secret = created(file, "ana")
    with pytest.raises(ValueError, match="'ana' has a key already"):
        created(file, "ana")
    with pytest.raises(ValueError, match="Did you mean 'ana'"):
        revoke_key(OldKey(file=file, name="anna"))
    assert KeyRing(file).find(secret) is not None
    with pytest.raises(FileNotFoundError):
        list_keys(KeyFile(file=file + "x"))


def test_the_command_line_makes_lists_and_withdraws(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "ana", "--file", file, "--days", "30", "--requests_per_minute", "5"]) == 0
    secret, told = capsys.readouterr().out.splitlines()
    assert KeyRing(file).find(secret) is not None and "only now" in told
    assert main(["keys", "list", "--file", file]) == 0
    listed = capsys.readouterr().out
    assert "ana" in listed and secret[-4:] in listed and secret not in listed
    assert re.search(rf"ana +{re.escape(secret[-4:])} .* 5$", listed, re.MULTILINE)
    assert main(["keys", "revoke", "ana", "--file", file]) == 0
    assert KeyRing(file).find(secret) is None
    capsys.readouterr()
    assert main(["keys", "revoke", "ana", "--file", file]) == 2


def test_comparison_takes_every_key_and_no_short_way(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    secrets = [created(file, f"n{n}") for n in range(5)]
    ring, compared, real = KeyRing(file), [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for secret in (secrets[0], secrets[4], "wrong"):
        compared.clear()
        ring.find(secret)
        assert len(compared) == 5


def test_a_key_knows_its_own_time() -> None:
    key = ApiKey(name="a", sha256="", last_four="", created="", expires="2026-01-01T00:00:00+00:00")
    assert key.is_valid(datetime(2025, 12, 31, 23, 59, tzinfo=UTC))
    assert not key.is_valid(datetime(2026, 1, 1, tzinfo=UTC))
