"""The same question has the same verdict and text through every door: pages, OpenAI's client, worker protocol."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import browser as browsers
import httpx
import openai
import pytest
from browser import Browser, chromium
from servers import ROOT, Process, free_port, ready_address, wait_for

from llava.explainer.prompts import VERDICT_QUESTION
from llava.serve.protocol import decode_chunk, split_chunks

pytestmark = pytest.mark.e2e
PHOTO = ROOT / "utils" / "demo_faces" / "astronaut.png"
MODEL = "explainer"


@pytest.fixture(scope="module")
def doors(tiny_explainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start one process for everything, and beside it controller, worker and page; give their addresses."""
    folder = tmp_path_factory.mktemp("doors")
    ports = {name: free_port() for name in ("controller", "worker", "page")}
    at = {name: f"http://localhost:{port}" for name, port in ports.items()}
    with ExitStack() as stack:

        def start(name: str, module: str, *flags: str) -> Process:
            process = Process(module, flags, folder / name)
            stack.callback(lambda: process.is_running and process.kill())
            return process

        alone = start("alone", "llava.cli", "serve", "--model_path", str(tiny_explainer), "--port", "0")
        start("controller", "llava.serve.controller", "--port", str(ports["controller"]))
        worker = ["--controller", at["controller"], "--worker", at["worker"], "--port", str(ports["worker"])]
        start("worker", "llava.serve.model_worker", *worker, "--model-path", str(tiny_explainer), "--model-name", MODEL)
        wait_for(lambda: httpx.post(f"{at['controller']}/list_models").json()["models"] == [MODEL])
        page = ["--controller", at["controller"], "--port", str(ports["page"]), "--model-list-mode", "reload"]
        start("page", "llava.serve.gradio_web_server", *page, "--examples", str(PHOTO.parent))
        wait_for(lambda: httpx.get(f"{at['page']}/health").is_success)
        yield at | {"alone": ready_address(alone)}


@pytest.fixture(scope="module")
def answer(doors: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Give verdict and text as OpenAI's client has them."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content()}"}}
    client = openai.OpenAI(base_url=f"{doors['alone']}/v1", api_key="none", max_retries=0, timeout=300)
    asked = [{"role": "user", "content": [image, {"type": "text", "text": VERDICT_QUESTION}]}]
    reply = client.chat.completions.create(model=MODEL, messages=asked)
    assert reply.verdict["p_fake"] is not None and reply.choices[0].message.content
    return reply.verdict, reply.choices[0].message.content


def content() -> str:
    return base64.b64encode(PHOTO.read_bytes()).decode()


def test_the_worker_protocol_says_what_openai_s_client_hears(
    doors: dict[str, str], answer: tuple[dict[str, Any], str]
) -> None:
    prompt = f"USER: <image>\n{VERDICT_QUESTION} ASSISTANT:"
    asked = {"model": MODEL, "prompt": prompt, "images": [content()], "temperature": 0, "echo": False}
    reply = httpx.post(f"{doors['controller']}/worker_generate_stream", json=asked, timeout=300)
    chunks = [decode_chunk(chunk) for chunk in split_chunks([reply.content])]
    verdict, text = answer
    assert chunks[0].verdict == verdict | {"image": chunks[0].verdict["image"]}
    assert chunks[-1].text.strip() == text


@pytest.mark.skipif(bool(browsers.missing()), reason=f"not installed: {browsers.missing()} (apt: chromium-driver)")
def test_both_pages_show_what_openai_s_client_hears(
    doors: dict[str, str], answer: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    verdict, text = answer
    with chromium(tmp_path) as browser:
        shown = {name: shown_on(browser, doors[name].replace("localhost", "127.0.0.1")) for name in ("alone", "page")}
    assert shown["alone"] == shown["page"]
    label, score, words = shown["page"]
    assert label == verdict["label"] and words == [text]
    assert f"Score {verdict['p_fake']:.3f} of 1" in score


def shown_on(browser: Browser, address: str) -> tuple[str | None, str, list[str]]:
    """Give label, card and answers of a page about the photo; no other host is asked for anything."""
    browser.open(address)
    browser.drop(PHOTO)
    browser.wait_for_answer()
    answers = browser.value("[...document.querySelectorAll('#words .answer')].map(part => part.textContent)")
    assert {httpx.URL(one).netloc.decode() for one in browser.requests()} == {address.removeprefix("http://")}
    return browser.find("#card .verdict").get_attribute("data-label"), browser.text("card"), answers
