"""Two models in one server, one with words and one without: chosen by name by programs, and by people on the page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import MappingProxyType

import browser as browsers
import gradio as gr
import httpx
import numpy as np
import openai
import pytest
from browser import Browser
from PIL import Image
from selenium.webdriver.common.keys import Keys
from servers import ROOT, Process, free_port, ready_address, running, wait_for
from test_serve_api import messages, png
from test_serve_verdicts import last
from tiny_world import SCOPE, draw

from llava.core.cluster import ClusterSettings
from llava.pipeline import Pipeline
from llava.serve.command import _require_room, serve
from llava.serve.controller import ControllerSettings
from llava.serve.controller import build_app as controller_app
from llava.serve.engine import WORDLESS
from llava.serve.gradio_web_server import WebSettings, models_of
from llava.serve.model_worker import WorkerSettings, load_engine
from llava.serve.model_worker import build_app as worker_app
from llava.serve.options import ServeSettings
from llava.serve.page import views
from llava.serve.page.flow import Flow
from llava.serve.page.layout import _present, build_page

PHOTO = ROOT / "utils" / "demo_faces" / "astronaut.png"


@pytest.fixture(scope="module")
def models(tiny_explainer: Path) -> dict[str, Path]:
    return {"explainer": tiny_explainer, "detector": tiny_explainer.parent / "detector"}


@pytest.fixture(scope="module")
def process(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    flags = ["serve", "--model_path", *map(str, models.values()), "--port", "0", "--examples", "none"]
    started = Process(
        "llava.cli", [*flags, "--requests_per_minute", "10000"], tmp_path_factory.mktemp("models") / "log"
    )
    yield started
    assert started.stop() == 0 and "Traceback" not in started.log.read_text()


@pytest.fixture(scope="module")
def address(process: Process) -> str:
    return ready_address(process)


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def photo() -> np.ndarray:
    return np.asarray(Image.open(PHOTO).convert("RGB"))


def test_every_model_has_a_name_of_its_own() -> None:
    assert list(ServeSettings(model_path=["a/x", "hub/y", "z/"]).models) == ["x", "y", "z"]
    named = ServeSettings(model_path=["a/x", "b/x"], model_name=["words", "plain"])
    assert named.models == {"words": "a/x", "plain": "b/x"}
    assert "(models words, plain; stop with Ctrl+C)" in named.ready_line("127.0.0.1", 1)
    with pytest.raises(ValueError, match=r"2 models \(a/x, b/x\) have the name 'x'; .* --model_name x-1 x-2"):
        ServeSettings(model_path=["a/x", "c", "b/x"])
    with pytest.raises(ValueError, match=r"model_name: 1 names \(x\) for 2 models \(a, b\); give one for each"):
        ServeSettings(model_path=["a", "b"], model_name=["x"])
    with pytest.raises(ValueError, match="a name is empty"):
        ServeSettings(model_path=["a"], model_name=[" "])
    with pytest.raises(ValueError, match="model_path: no model stands behind it"):
        ServeSettings(model_path=[])


def test_a_model_that_is_missing_is_said_before_another_one_is_loaded(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(FileNotFoundError, match="No model at 'nope'"):
        next(serve(ServeSettings(model_path=[str(models["detector"]), "nope"], port=0)))


@pytest.mark.e2e
def test_programs_list_both_and_ask_each_by_its_name(
    address: str, client: openai.OpenAI, models: dict[str, Path]
) -> None:
    listed = [(model.id, model.capabilities, model.scope) for model in client.models.list()]
    assert listed == [("explainer", ["detect", "explain"], SCOPE), ("detector", ["detect"], SCOPE)]
    health = httpx.get(f"{address}/health").json()
    assert health["models"] == list(models) and health["model"] == "explainer"
    said = {}
    for name, folder in models.items():
        pipeline = Pipeline.from_pretrained(folder)
        reply = client.chat.completions.create(model=name, messages=messages(photo()))
        (wanted,) = pipeline.detect(photo())
        assert reply.model == name and reply.verdict["label"] == wanted.label
        assert reply.verdict["p_fake"] == pytest.approx(wanted.p_fake, abs=1e-5)
        said[name] = reply.choices[0].message.content
        if name == "explainer":
            assert said[name] == pipeline.explain(photo()).text and reply.usage.completion_tokens > 0
        else:
            scope = f"Scope of the detector: {SCOPE}."
            assert said[name] == f"The detector's verdict is {wanted}; no language model wrote this. {scope}"
            assert reply.usage.total_tokens == 0
    head, *_ = client.chat.completions.create(model="detector", messages=messages(photo()), stream=True)
    assert head.model == "detector"
    unnamed = httpx.post(f"{address}/v1/chat/completions", json={"messages": messages(photo())}, timeout=120).json()
    assert unnamed["model"] == "explainer" and unnamed["choices"][0]["message"]["content"] == said["explainer"]


def form(address: str, path: str, data: dict[str, str], address_too: str = "") -> httpx.Response:
    files = [("files", ("x.png", png(photo())))]
    return httpx.post(f"{address}/v1/{path}{address_too}", files=files, data=data, timeout=120)


@pytest.mark.e2e
def test_files_are_judged_by_the_model_that_is_named(address: str, process: Process) -> None:
    for data, name in (({}, "explainer"), ({"model": "explainer"}, "explainer"), ({"model": "detector"}, "detector")):
        found = form(address, "detect", data).json()
        assert found["model"] == name and found["verdicts"][0]["label"] != "INCONCLUSIVE"
    explained = form(address, "explain", {"model": "explainer"}).json()
    assert explained["model"] == "explainer" and explained["explanations"][0]["text"]
    refused = form(address, "explain", {"model": "detector"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        f"{WORDLESS} Send the files to /v1/detect, or ask for the model 'explainer'."
    )
    counted = httpx.get(f"{address}/metrics").text
    for name in ("explainer", "detector"):
        assert f'm2f2_answer_seconds_count{{model="{name}"}}' in counted
        assert 'call="findings",label="' in counted and f'model="{name}"}}' in counted
    lines = process.log.read_text().splitlines()
    assert any("/v1/detect 200" in line and line.endswith("model=detector") for line in lines)
    assert any("/v1/explain 200" in line and line.endswith("model=explainer") for line in lines)


@pytest.mark.e2e
def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(address: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=messages(draw(1, 3)))
    wanted = "There is no model 'gpt' here; ask 'explainer' or 'detector'."
    error = {"message": wanted, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert caught.value.body == error
    for path in ("detect", "explain"):
        reply = form(address, path, {"model": "gpt"})
        assert reply.status_code == 404 and reply.json()["error"] == error
        in_address = form(address, path, {}, "?model=detector")
        assert in_address.status_code == 400, "else the first would answer for the one that was meant"
        assert in_address.json()["error"]["message"].startswith("model: nothing is read from the address")


@pytest.mark.e2e
@pytest.mark.skipif(bool(browsers.missing()), reason=f"not installed: {browsers.missing()} (apt: chromium-driver)")
def test_a_person_chooses_the_model_and_sees_its_verdict(browser: Browser, address: str) -> None:
    browser.look()
    browser.open(address)
    choices = browser.value("[...document.querySelectorAll('#model label')].map(choice => choice.innerText.trim())")
    assert choices == ["explainer: verdict and words", "detector: verdict alone"]
    assert browser.text("head").count(views.MIXED_LEAD) == 1
    browser.wait("[...document.querySelectorAll('#model input')].every(choice => choice.name === 'model')")  # one group
    browser.find("#model input:checked").send_keys(Keys.ARROW_RIGHT)
    assert browser.value("document.querySelector('#model input:checked').value") == "detector"
    browser.drop(PHOTO)
    browser.find("#card .verdict")
    browser.wait("document.getElementById('words').innerText.includes('no words')")
    assert "Verdict of detector" in browser.text("card")
    assert browser.text("words") == f"{views.NO_WRITER} For reasons in words, clear this and choose explainer."
    hidden = ("ask", "asking", "again", "stop", "suggestions")
    assert not [name for name in hidden if browser.value(f"document.getElementById('{name}')?.offsetParent != null")]
    browser.click("Clear, take another")
    browser.wait("!document.querySelector('#card .verdict')")
    browser.wait("document.querySelector('#model input')?.offsetParent")
    assert browser.value("document.querySelector('#model input:checked').value") == "detector", "the choice stays"
    browser.find("#model input[value='explainer']").click()
    browser.drop(PHOTO)
    browser.wait_for_answer()
    assert "Verdict of explainer" in browser.text("card") and browser.find("#ask").is_displayed()
    assert "A language model wrote this" in browser.text("words")
    assert browser.errors() == []


@contextmanager
def worker(name: str, folder: Path, controller: str) -> Iterator[None]:
    """Serve a model as a worker of a controller."""
    port = free_port()
    settings = WorkerSettings(
        model_path=str(folder),
        model_name=name,
        port=port,
        controller_address=controller,
        heartbeat_seconds=0.2,
        stability=False,
    )
    with closing(load_engine(settings)) as engine, running(worker_app(settings, engine), port=port):
        yield


@pytest.mark.e2e
def test_workers_with_and_without_words_stand_behind_one_controller(models: dict[str, Path]) -> None:
    with ExitStack() as stack:
        address = stack.enter_context(running(controller_app(ControllerSettings(host="127.0.0.1"))))
        for name, folder in models.items():
            stack.enter_context(worker(name, folder, address))
        wait_for(lambda: httpx.post(f"{address}/list_models").json()["models"] == sorted(models))
        engines = {
            mode: models_of(WebSettings(controller_url=address, model_list_mode=mode)) for mode in ("once", "reload")
        }
        for served in engines.values():
            page, flow = str(build_page(served, is_remote=True).get_config_file()), Flow(served)
            assert views.MIXED_LEAD in page and "verdict alone" not in page, "nobody knows yet which of them writes"
            assert views.REMOTE_PRIVACY in html.unescape(page) and views.PRIVACY not in page
            wordless = last(flow.look("page", "detector", lambda: (PHOTO.read_bytes(), "x.png")))
            assert WORDLESS in str(wordless.words) and wordless.has_words is False
            assert "of <bdi>detector</bdi>" in wordless.card and wordless.say.startswith("Verdict of detector: ")
            written = list(flow.look("page", "explainer", lambda: (PHOTO.read_bytes(), "x.png")))
            shown = next(screen for screen in written if screen.is_open)
            assert "of <bdi>explainer</bdi>" in shown.card and shown.has_words is True
            assert 'class="answer"' in written[-1].words


def test_the_choice_of_models_follows_the_controller_and_keeps_what_was_chosen() -> None:
    known = {"a": None, "b": None}
    assert _present(MappingProxyType(known), ["a", "b"], "b") == gr.skip(), "a choice made meanwhile is not undone"
    changed = _present(MappingProxyType(known), ["b"], "b")
    assert [name for _, name in changed.choices] == ["a", "b"] and changed.value == "b" and changed.visible
    assert _present(MappingProxyType(known), ["gone"], "gone").value == "a"
    assert not _present(MappingProxyType({"a": None}), ["a", "b"], "a").visible


def test_on_ray_there_must_be_room_for_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    cluster = ClusterSettings(cpus=4, model_cpus=2)
    _require_room(ServeSettings(ray=True, model_path=["a", "b"], cluster=cluster))
    with pytest.raises(ValueError, match="replicas: 3 of all 3 models do not fit here, 2 do"):
        _require_room(ServeSettings(ray=True, model_path=["a", "b", "c"], cluster=cluster))
