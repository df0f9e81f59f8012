"""`m2f2 serve` as a real process: ready line, answers, an end in order."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
from test_serve_api import messages
from tiny_world import draw

from llava.serve import command
from llava.serve.command import serve
from llava.serve.fetch import is_loopback
from llava.serve.keys import NewKey, create_key
from llava.serve.options import ServeSettings

ROOT = Path(__file__).parents[1]


@pytest.mark.e2e
def test_a_server_is_ready_answers_with_a_key_and_ends_in_order(tiny_explainer: Path, tmp_path: Path) -> None:
    shown = create_key(NewKey(name="test", file=str(tmp_path / "keys.json")))
    key = next(word for word in shown.split() if len(word) > 40)
    shutil.copytree(tiny_explainer, tmp_path / "demo")  # the model that is served when none is named
    words = [sys.executable, "-m", "llava.cli", "serve", "--port", "0"]
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
    assert list(ServeSettings(host="0.0.0.0", allow_unauthenticated=True).models) == ["demo"]


def test_what_can_not_be_served_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: 127.0.0.1:{port} can not be listened on .*in use"):
            next(serve(ServeSettings(port=port)))
    with pytest.raises(ValueError, match=r"port: 127.0.0.1:99999 can not be listened on .*65535"):
        next(serve(ServeSettings(port=99_999)))
    with pytest.raises(FileNotFoundError, match="does not exist; make it with"):
        next(serve(ServeSettings(port=0, keys="nope.json")))
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


def test_without_a_model_the_demonstration_is_trained_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(tmp_path))
    said = next(serve(ServeSettings(port=0)))
    assert f"{str(tmp_path / 'demo')!r} is not there yet: training it" in said
    assert command.SCRIPT == ROOT / "scripts" / "demo.sh"
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "10.0.0.1", "example.org")] == [
        *(True, True, True),
        *(False, False),
    ]


def test_the_script_that_trains_must_be_there_and_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(tmp_path / "models"))
    script = tmp_path / "demo.sh"
    monkeypatch.setattr(command, "SCRIPT", script)
    with pytest.raises(FileNotFoundError, match="the script that trains it, comes with the source tree alone; give"):
        next(serve(ServeSettings(port=0)))
    script.write_text(f'echo "$M2F2_CHECKPOINTS $PYTHON" > {tmp_path}/places; exit 3')
    with pytest.raises(ValueError, match=r"demo.sh ended with 3; its message stands above"):
        list(serve(ServeSettings(port=0)))
    assert (tmp_path / "places").read_text().split() == [str(tmp_path / "models"), sys.executable]


def test_who_stops_the_server_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(tmp_path / "models"))
    script = tmp_path / "demo.sh"
    script.write_text(f"sleep 600 & echo $! > {tmp_path}/step; wait")
    monkeypatch.setattr(command, "SCRIPT", script)
    server = serve(ServeSettings(port=0))
    next(server)

    def stop() -> None:
        wait_until(lambda: (tmp_path / "step").is_file() and (tmp_path / "step").read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        next(server)
    step = Path("/proc") / (tmp_path / "step").read_text().strip()
    wait_until(lambda: not step.exists() or " Z " in (step / "stat").read_text())


def wait_until(is_so: Callable[[], object]) -> None:
    for _ in range(600):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")
