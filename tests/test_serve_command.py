"""`m2f2 serve` as a real process: ready line, answers, an end in order."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from test_serve_api import messages
from tiny_world import draw

from llava.serve.command import serve
from llava.serve.fetch import is_loopback
from llava.serve.keys import NewKey, create_key
from llava.serve.options import ServeSettings

ROOT = Path(__file__).parents[1]


@pytest.mark.e2e
def test_a_server_is_ready_answers_with_a_key_and_ends_in_order(tiny_explainer: Path, tmp_path: Path) -> None:
    shown = create_key(NewKey(name="test", file=str(tmp_path / "keys.json")))
    key = next(word for word in shown.split() if len(word) > 40)
    shutil.copytree(tiny_explainer, tmp_path / "demo")
    words = [sys.executable, "-m", "llava.cli", "serve", "--port", "0", "--model_path", "demo"]
    words += ["--keys", str(tmp_path / "keys.json"), "--face", "off"]
    place = os.environ | {"PYTHONPATH": str(ROOT), "M2F2_CHECKPOINTS": str(tmp_path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=place) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[1].removesuffix("/docs")
        assert httpx.get(f"{address}/health").json()["model"] == "demo"
        assert httpx.get(f"{address}/v1/models").status_code == 401
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
        reply = client.chat.completions.create(model="demo", messages=messages(draw(1, 3)))
        assert reply.verdict["label"] == "FAKE" and reply.choices[0].message.content
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in errors and "POST /v1/chat/completions 200" in errors


def test_an_open_server_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="can be reached from other machines; give --keys FILE"):
        ServeSettings(host="0.0.0.0")
    ServeSettings(host="0.0.0.0", allow_unauthenticated=True)
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "10.0.0.1", "example.org")] == [
        *(True, True, True),
        *(False, False),
    ]


def test_what_can_not_be_served_is_said_before_a_model_is_looked_for() -> None:
    nowhere = ["no-such-model"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: 127.0.0.1:{port} can not be listened on .*in use"):
            next(serve(ServeSettings(port=port, model_path=nowhere)))
    with pytest.raises(ValueError, match=r"port: 127.0.0.1:99999 can not be listened on .*65535"):
        next(serve(ServeSettings(port=99_999, model_path=nowhere)))
    with pytest.raises(FileNotFoundError, match="does not exist; make it with"):
        next(serve(ServeSettings(port=0, keys="nope.json", model_path=nowhere)))
    wrong = {"rows": 0, "requests_per_minute": 0, "margin": -1.0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: {value} is not usable"):
            ServeSettings(**{name: value})
    for proxies in (["proxy.example"], ["*"]):
        with pytest.raises(ValueError, match="trusted_proxies: "):
            ServeSettings(trusted_proxies=proxies)


def test_the_ready_line_is_an_address() -> None:
    assert "http://[::1]:8000 " in ServeSettings(host="::1").ready_line("::1", 8000)
    assert "http://127.0.0.1:1/docs " in ServeSettings(page=False).ready_line("127.0.0.1", 1)
