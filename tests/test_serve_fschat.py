"""The real FastChat (fschat 0.2.36) as the other side: its controller, its base worker, its clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from servers import Process, free_port, wait_for
from test_serve_stack import MODEL, ask, body

from llava.explainer.prompts import VERDICT_QUESTION
from llava.serve.protocol import parse_prompt

pytestmark = pytest.mark.e2e
fastchat = pytest.importorskip("fastchat", reason="fschat==0.2.36 is not installed (extra dev)")
QUICK = {"FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION": "2", "FASTCHAT_WORKER_HEART_BEAT_INTERVAL": "1"}
Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[Process] = []

    def run(module: str, *flags: str) -> Process:
        log = tmp_path / f"{len(processes)}.log"
        processes.append(Process(module, list(flags), log, {**QUICK, "LOGDIR": str(tmp_path)}))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()


def models(address: str) -> list[str]:
    return list(httpx.post(f"{address}/list_models").json()["models"])


def worker_flags(controller: str, explainer: Path) -> tuple[str, list[str]]:
    port = free_port()
    address = f"http://localhost:{port}"
    flags = ["--controller-address", controller, "--worker-address", address, "--port", str(port)]
    flags += ["--model-path", str(explainer), "--model-name", MODEL, "--face", "off", "--stability", "false"]
    return address, [*flags, "--heartbeat-seconds", "0.5"]


def client(controller: str, model: str, message: str, folder: Path) -> str:
    """Run FastChat's own test client; gives what it printed."""
    command = [sys.executable, "-m", "fastchat.serve.test_message", "--controller-address", controller]
    done = subprocess.run(
        [*command, "--model-name", model, "--message", message],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"LOGDIR": str(folder), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fastchat_s_controller_takes_our_worker(start: Start, tiny_explainer: Path, tmp_path: Path) -> None:
    port = free_port()
    controller = f"http://localhost:{port}"
    start("fastchat.serve.controller", "--host", "localhost", "--port", str(port))
    address, flags = worker_flags(controller, tiny_explainer)
    start("llava.serve.model_worker", *flags)
    wait_for(lambda: models(controller) == [MODEL])
    assert httpx.post(f"{controller}/get_worker_address", json={"model": MODEL}).json() == {"address": address}
    assert httpx.post(f"{controller}/list_multimodal_models").json() == {"models": [MODEL]}
    for label in (0, 1):
        chunks = ask(controller, body(label, echo=False))
        assert chunks[0].verdict is not None and chunks[0].verdict["label"] == ("REAL", "FAKE")[label]
        assert chunks[-1].text == f"The image is {('real', 'fake')[label]}."
    httpx.post(f"{controller}/refresh_all_workers")
    assert models(controller) == [MODEL]
    # Its heartbeats count: FastChat forgets workers after 2 s here.
    wait_for(lambda: httpx.post(f"{controller}/worker_get_status").json()["speed"] == 1)
    printed = client(controller, MODEL, "Is it real?", tmp_path)
    assert f"Models: ['{MODEL}']" in printed and "there is none; send one" in printed


def test_our_controller_takes_fastchat_s_worker_and_client(start: Start, tmp_path: Path) -> None:
    port = free_port()
    controller = f"http://localhost:{port}"
    start("llava.serve.controller", "--port", str(port), "--expiry-seconds", "3")
    wait_for(lambda: models(controller) == [])
    worker_port = free_port()
    start("fschat_worker", controller, str(worker_port))
    wait_for(lambda: models(controller) == ["echo"])
    wait_for(lambda: httpx.post(f"http://localhost:{worker_port}/worker_get_status").is_success)  # it registers first
    assert httpx.post(f"{controller}/list_language_models").json() == {"models": ["echo"]}
    said = ask(controller, {"model": "echo", "prompt": "say hello"})
    assert [chunk.text for chunk in said] == ["h", "he", "hel", "hell", "hello"]
    printed = client(controller, "echo", "hello", tmp_path)
    assert "Models: ['echo']" in printed and f"http://localhost:{worker_port}" in printed
    assert printed.rstrip().endswith("Assistant:")  # the last word of FastChat's own prompt template
    assert models(controller) == ["echo"]  # its heartbeats count


@pytest.mark.parametrize("name", ["one_shot", "vicuna_v1.1"])
def test_prompts_of_fastchat_s_templates_are_read(name: str) -> None:
    from fastchat.conversation import get_conv_template

    template = get_conv_template(name)
    for role, message in zip(template.roles, (f"<image>\n{VERDICT_QUESTION}", None), strict=True):
        template.append_message(role, message)
    assert [turn.text for turn in parse_prompt(template.get_prompt())] == [VERDICT_QUESTION]


def test_fastchat_s_page_reads_our_stream(start: Start, tiny_explainer: Path) -> None:
    page = pytest.importorskip("fastchat.serve.gradio_web_server", reason="FastChat's page does not import here")
    from fastchat.conversation import get_conv_template

    port = free_port()
    controller = f"http://localhost:{port}"
    start("llava.serve.controller", "--port", str(port))
    wait_for(lambda: models(controller) == [])
    address, flags = worker_flags(controller, tiny_explainer)
    start("llava.serve.model_worker", *flags)
    wait_for(lambda: models(controller) == [MODEL])
    assert page.get_model_list(controller, "", True) == ([MODEL], [MODEL])
    template = get_conv_template("vicuna_v1.1")
    asked = body(1)
    stream = page.model_worker_stream_iter(
        template, MODEL, address, asked["prompt"], 0.0, 1.0, 1.0, 64, asked["images"]
    )
    assert list(stream)[-1]["text"] == "The image is fake."
