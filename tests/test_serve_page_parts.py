"""The steps of the page without a browser, and what its door keeps out; real engine, real server on loopback."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pytest
from clips import write_clip
from markupsafe import Markup
from PIL import Image
from servers import ROOT, Peer, running, wait_for

from llava.core.types import Explanation, Verdict, VerdictLabel
from llava.data.inputs import NamedImage
from llava.pipeline import Pipeline
from llava.pipeline.verdict import Finding
from llava.serve.api import Service, build_app
from llava.serve.batching import BatchingEngine
from llava.serve.engine import Piece
from llava.serve.guard import RequestLimits
from llava.serve.keys import KeyRing, NewKey, OldKey, create_key, revoke_key
from llava.serve.page import views
from llava.serve.page.door import open_page
from llava.serve.page.flow import MAX_QUESTION, Flow, Screen
from llava.serve.page.layout import build_page
from llava.serve.page.views import card, heatmap
from llava.serve.page.visits import Visit, Visits

FACES = ROOT / "utils" / "demo_faces"
PHOTO = FACES / "astronaut.png"


def verdict(label: VerdictLabel = VerdictLabel.FAKE, p_fake: float | None = 0.87, **more: Any) -> Verdict:
    known: dict[str, Any] = {"probabilities": {}, "evidence": {"p_fake": 0.87, "eyes": 0.5}, "detector": "toy"}
    known["meanings"] = {"p_fake": "Score for fake", "eyes": "Map: eyes"}
    return Verdict(label=label, p_fake=p_fake, **(known | more))


def visit(side: int = 10) -> Visit:
    pixels = np.zeros((side, side, 3), np.uint8)
    return Visit(
        engine=None, source=NamedImage(name="x", pixels=pixels), findings=[Finding(verdict=verdict(), pixels=pixels)]
    )


def test_visits_are_forgotten_by_time_by_room_and_on_request() -> None:
    now = [0.0]
    gone: list[str] = []
    visits = Visits(seconds=60, max_bytes=1500, clock=lambda: now[0], on_forget=gone.append)
    first, second, third = visit(), visit(), visit()
    visits.put("a", first)
    now[0] = 50.0
    assert visits.get("a") is first
    now[0] = 100.0
    assert visits.get("a") is first, "who asks is remembered"
    visits.put("b", second)
    visits.put("c", third)
    stop = first.stop
    assert [visits.get(name) for name in "abc"] == [None, second, third], "600 bytes each, 1500 at most"
    assert first.stop is stop, "nothing is begun by looking"
    now[0] = 161.0
    assert visits.get("b") is None and visits.get("c") is None and gone == ["a", "b", "c"]
    ending = second.begin()
    visits.put("b", second)
    visits.drop("b")
    assert visits.get("b") is None and ending.is_set()
    visits.put("large", visit(100))
    assert visits.get("large") is not None, "one is kept, however large"
    quick = Visits(seconds=0.05, on_forget=gone.append)
    quick.put("unwatched", visit())
    wait_for(lambda: "unwatched" in gone)


def test_a_card_says_it_all_in_words() -> None:
    calibrated = verdict(
        calibration="calibrated on faces, n = 90",
        band=(0.3, 0.7),
        coverage=0.9,
        real_coverage=0.9,
        likelihood_ratio=9.0,
        prior=0.5,
        stability={"x": 0.8},
    )
    text = re.sub(r"<[^>]+>", " ", card(Finding(verdict=calibrated), "x.png"))
    for part in (
        "Fake",
        "87 % forged",
        "Calibrated on faces, n = 90",
        "80 % to 80 % in 1 delivered versions",
        "Map: eyes",
    ):
        assert part in text, part
    assert "not calibrated" not in text and "on calibrated" not in text and "Looks fake" not in text
    for label, word in (views.HEADLINES | views.UNCALIBRATED).items():
        score = None if label == VerdictLabel.INCONCLUSIVE else 0.5
        shown = card(Finding(verdict=verdict(label, score, reason="both look alike", evidence={})), "x")
        assert word in shown and f'data-label="{label}"' in shown and "<svg" in shown
    assert "There is no map" in heatmap(Finding(verdict=verdict()))
    assert "draws no map" in heatmap(Finding(verdict=verdict(), pixels=np.zeros((9, 9, 3), np.uint8)))


def test_what_is_said_is_never_markup() -> None:
    from llava.serve.page.views import photo
    from llava.serve.page.views import words as shown

    said = Explanation(
        verdict=verdict(), question="<img src=x onerror=alert(1)>", text="<script>", text_verdict=None, agrees=None
    )
    assert "<script>" not in shown([said]) and "<img" not in shown([said])
    named = visit()
    named = Visit(
        engine=None, source=NamedImage(name='"><script>', pixels=named.finding.pixels), findings=named.findings
    )
    assert "<script>" not in photo(named)


@pytest.fixture(scope="module")
def engine(tiny_explainer: Path) -> Iterator[BatchingEngine]:
    started = BatchingEngine(Pipeline.from_pretrained(tiny_explainer, stability=False))
    yield started
    started.close()


def photo() -> tuple[bytes, str]:
    return PHOTO.read_bytes(), PHOTO.name


def last(screens: Iterator[Screen]) -> Screen:
    return list(screens)[-1]


@pytest.mark.e2e
def test_an_answer_is_stopped_written_again_and_cleared(engine: BatchingEngine) -> None:
    flow = Flow({"m": engine})
    whole = last(flow.look("page", "m", photo))
    assert whole.say and whole.is_busy is False and whole.notice is None
    asked = flow.ask("page", "Does the nose look real or fake?")
    shown = [next(asked) for _ in range(3)]
    assert shown[0].is_busy and last(flow.stop("page")).is_busy is False
    stopped = list(asked)[-1]
    assert stopped.is_busy is False and len(str(stopped.words)) >= len(str(shown[-1].words)) - 200
    assert last(flow.again("page")).words.count('class="question"') == 1, "the last answer is replaced"
    assert json.loads(flow.report("page", "json")["text"])["entries"][0]["explanation"]["text"] in str(whole.words)
    before = flow.report("page", "json")
    early = flow.again("page")
    next(early)
    last(flow.stop("page"))
    unsaid = list(early)[-1]
    assert views.STOPPED in str(unsaid.words) and unsaid.say == views.STOPPED and unsaid.is_busy is False
    entry, kept = (json.loads(each["text"])["entries"][0] for each in (flow.report("page", "json"), before))
    assert entry["follow_ups"] == kept["follow_ups"] and kept["follow_ups"], "the answer that was to be replaced stays"
    writing = flow.ask("page", "Why?")
    next(writing), next(writing)
    cleared = last(flow.clear("page"))
    assert cleared.is_open is False and cleared.card == ""
    assert all(screen.words is None for screen in writing), "what was begun before is not shown after"
    for step in (flow.ask("page", "Why?"), flow.again("page"), flow.choose("page", 0), flow.stop("page")):
        assert last(step).notice == views.GONE
    with pytest.raises(ValueError, match="drop it again"):
        flow.report("page", "html")


@pytest.mark.e2e
def test_mistakes_are_answered_with_sentences(engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Flow({"m": engine})
    assert "not an image or video" in last(flow.look("page", "m", lambda: (b"words", "x.jpg"))).notice
    last(flow.look("page", "m", photo))
    assert last(flow.ask("page", "  ")).notice == views.EMPTY
    assert f"at most {MAX_QUESTION:,} are read" in last(flow.ask("page", "why " * MAX_QUESTION)).notice
    assert "There is no such face" in last(flow.choose("page", 8)).notice

    def breaks_off(*_: Any) -> Iterator[Piece]:
        yield Piece(text="Half an")
        raise ValueError("The worker died.")

    monkeypatch.setattr(engine, "ask", breaks_off)
    *_, writing, broken, failed = flow.ask("page", "Why?")
    assert "Half an" in writing.words and 'aria-busy="true"' in writing.words
    assert "Half an" not in broken.words and views.BROKEN_OFF in broken.words and 'aria-busy="false"' in broken.words
    assert failed.notice == "The worker died." and failed.is_busy is False
    monkeypatch.setattr(engine, "ask", lambda *a: 1 / 0)
    failed = last(flow.ask("page", "Why?"))
    assert failed.notice == views.FAILED and failed.is_busy is False


@pytest.mark.e2e
def test_a_video_is_judged_and_its_most_telling_frame_explained(engine: BatchingEngine, tmp_path: Path) -> None:
    frame = np.asarray(Image.open(PHOTO).convert("RGB").resize((384, 384)))
    clip = write_clip(tmp_path / "clip.mp4", [frame] * 6, rate=5)
    screens = list(Flow({"m": engine}).look("page", "m", lambda: (clip.read_bytes(), "clip.mp4")))
    shown = next(screen for screen in screens if screen.is_open)
    wanted = engine.pipeline.explain_video(clip)
    assert f'data-label="{wanted.verdict.label}"' in str(shown.card)
    assert "6 frames were looked at" in str(shown.card)
    assert "most telling frame of clip.mp4" in str(shown.photo)
    assert wanted.text in str(screens[-1].words) and f"About {wanted.about}" in str(screens[-1].words)


@pytest.mark.e2e
def test_a_video_without_a_face_gets_no_verdict_and_says_why(engine: BatchingEngine, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "grey.mp4", [np.full((96, 128, 3), 90, np.uint8)] * 6, rate=5)
    shown = last(Flow({"m": engine}).look("page", "m", lambda: (clip.read_bytes(), "grey.mp4")))
    assert 'data-label="INCONCLUSIVE"' in shown.card and "no face found in any frame." in shown.card
    assert "--" not in Markup(shown.card).striptags() and "seen longest" not in shown.card
    assert shown.say == "Verdict: No verdict. No face found in any frame." and not shown.notice


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def secret(keys: Path) -> str:
    return create_key(NewKey(name="newsroom", file=str(keys))).split()[0]


def served(engine: BatchingEngine, keys: KeyRing | None = None, per_minute: int = 1000) -> Any:
    limits = RequestLimits(requests_per_minute=per_minute)
    page = open_page({"m": engine}, limits, keys=keys, examples=FACES)
    return running(build_app(Service(engines={"tiny": engine}, keys=keys, limits=limits, page=page)))


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "is_told"), [("demo", True), ("newsroom", False)])
def test_the_demonstration_is_called_one(engine: BatchingEngine, name: str, is_told: bool) -> None:
    assert (views.DEMO in str(build_page({name: engine}).get_config_file())) == is_told


@pytest.fixture(scope="module")
def address(engine: BatchingEngine) -> Iterator[str]:
    with served(engine) as found:
        yield found


def completed(address: str, asked: dict[str, Any]) -> str:
    """Let a step be done, and give what the page is told at its end."""
    assert httpx.post(f"{address}/gradio_api/queue/join", json=asked, timeout=60).status_code == 200
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=abc", timeout=120) as stream:
        return next(line for line in stream.iter_lines() if "process_completed" in line)


def number_of(address: str, button: str, event: str = "click") -> int:
    """Give the number of the step that a button or another part starts, by the part's id."""
    config = httpx.get(f"{address}/config").json()
    (part,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == button]
    (number,) = [one["id"] for one in config["dependencies"] if [part, event] in map(list, one["targets"])]
    return int(number)


def remembered() -> str:
    """Give what Gradio remembers of all sessions."""
    pages = [page for page in gr.Blocks.get_instances() if page.title == "M2F2-Det"]
    return "".join(repr(state.config_values) for page in pages for state in page.state_holder.session_data.values())


def step(data: list[Any], index: int = 0) -> dict[str, Any]:
    return {"data": data, "fn_index": index, "session_hash": "abc", "trigger_id": 1, "event_data": None}


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", f"/gradio_api/file={PHOTO}"), ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/file=/etc/passwd")),
        *(("GET", "/gradio_api/file=http://PEER/x"), ("GET", "/gradio_api/proxy=http://PEER/x")),
        *(
            ("HEAD", "/gradio_api/proxy=http://PEER/x"),
            ("POST", "/gradio_api/run/predict"),
            ("POST", "/gradio_api/call/look"),
        ),
        *(("POST", "/gradio_api/vibe-edit"), ("GET", "/gradio_api/vibe-code"), ("GET", "/gradio_api/info")),
        *(("GET", "/gradio_api/runs"), ("GET", "/monitoring"), ("GET", "/gradio_api/deep_link"), ("GET", "/pwa_icon")),
        *(
            ("POST", "/gradio_api/component_server"),
            ("POST", "/gradio_api/process_recording"),
            ("GET", "/gradio_api/token"),
        ),
        *(("GET", "/gradio_api/stream/a/b/c/playlist.m3u8"), ("GET", "/assets/../../routes.py"), ("POST", "/")),
        *(
            ("GET", "/assets/..%2f..%2f..%2froutes.py"),
            ("GET", "/gradio_api//file=/etc/passwd"),
            ("GET", "//etc/passwd"),
        ),
        *(
            ("GET", "/svelte/../../../routes.py"),
            ("GET", "/static/..%2f..%2findex.html"),
            ("GET", "/gradio_api/dev/reload"),
        ),
    ],
)
def test_no_other_route_of_gradio_is_open(address: str, method: str, path: str) -> None:
    peer = Peer(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
    raw = path.replace("PEER", peer.address.removeprefix("http://"))
    reply = httpx.request(method, httpx.URL(address).copy_with(raw_path=raw.encode()), timeout=60)
    assert reply.status_code in (403, 404, 405), reply.text
    assert "root:" not in reply.text and "secret" not in reply.text and "Traceback" not in reply.text
    assert peer.connections == 0
    peer.close()


@pytest.mark.e2e
def test_no_address_is_fetched_and_no_file_read_for_a_client(address: str) -> None:
    peer = Peer(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
    meta = {"_type": "gradio.FileData"}
    bad = [{"path": peer.address, "meta": meta}, {"path": "/etc/passwd", "meta": meta}, {"path": 5, "meta": meta}]
    bad += [{"path": f"{peer.address}/x.png", "url": peer.address, "is_stream": True, "meta": meta}]
    for file in bad:
        for data in ([file], [[{"deep": file}]], [{"value": file}]):
            reply = httpx.post(f"{address}/gradio_api/queue/join", json=step(data), timeout=60)
            assert reply.status_code == 400 and "was not uploaded here" in reply.json()["detail"]
    (path,) = httpx.post(
        f"{address}/gradio_api/upload", files={"files": ("x.png", PHOTO.read_bytes())}, timeout=60
    ).json()
    there = {"path": path, "url": f"{peer.address}/x.png", "orig_name": "x.png", "meta": meta}
    assert '"success":true' in completed(address, step([there, "m"])).replace(" ", "")
    folder = Path(path).parents[1]
    assert not Path(path).exists() and not [p for p in folder.rglob("*") if p.is_file()], "read once, then deleted"
    assert httpx.get(f"{address}/gradio_api/file={path}").status_code == 404
    assert peer.connections == 0
    assert "Your picture x.png" in remembered(), "Gradio keeps what it shows"
    assert '"success":true' in completed(address, step([], number_of(address, "clear"))).replace(" ", "")
    assert "Your picture x.png" not in remembered(), "and Clear makes it forget"
    peer.close()


@pytest.mark.e2e
def test_the_face_that_was_pressed_is_chosen_whatever_the_page_kept(address: str, tmp_path: Path) -> None:
    faces = [Image.open(path).convert("RGB").resize((360, 360)) for path in (PHOTO, FACES / "portrait_cc0_1.png")]
    Image.fromarray(np.concatenate([np.asarray(face) for face in faces], axis=1)).save(tmp_path / "both.png")
    files = {"files": ("both.png", (tmp_path / "both.png").read_bytes())}
    (path,) = httpx.post(f"{address}/gradio_api/upload", files=files, timeout=60).json()
    completed(address, step([{"path": path, "orig_name": "both.png", "meta": {"_type": "gradio.FileData"}}, "m"]))
    number = number_of(address, "faces", "select")
    for event, said in (({"index": 1, "value": 1}, "on face 2 of 2"), (None, "no such face"), ({}, "no such face")):
        asked = step([], number) | {"event_data": event}
        assert httpx.post(f"{address}/gradio_api/queue/join", json=asked, timeout=60).status_code == 200
        with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=abc", timeout=120) as stream:
            assert any(said in line for line in stream.iter_lines()), said


@pytest.mark.e2e
def test_a_step_or_file_that_no_page_asks_for_is_no_error_of_the_server(address: str) -> None:
    files = [{"path": "a\0b"}, {"path": "\ud800"}]
    asked = [json.dumps({**step([file])}) for file in files] + ['{"data":' + "[" * 450 + "]" * 450 + "}"]
    asked += [json.dumps({**step([]), "fn_index": number}) for number in (99_999, -1, "99999", [], 0.5)]
    replies = [httpx.post(f"{address}/gradio_api/queue/join", content=body, timeout=60) for body in asked]
    assert [reply.status_code for reply in replies] == [400] * len(asked), [reply.text for reply in replies]
    assert httpx.get(f"{address}/assets/{'a' * 3000}").status_code == 404


@pytest.mark.e2e
def test_who_closes_the_page_ends_the_answer(
    engine: BatchingEngine, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = httpx.post(
        f"{address}/gradio_api/upload", files={"files": ("x.png", PHOTO.read_bytes())}, timeout=60
    ).json()
    completed(address, step([{"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}, "m"]))
    write = engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda: (time.sleep(0.5), write()))
    question = step(["Does the nose look real or fake?"], number_of(address, "ask"))
    assert httpx.post(f"{address}/gradio_api/queue/join", json=question, timeout=60).status_code == 200
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=abc", timeout=120):
        wait_for(lambda: engine._active)
        (job,) = engine._active
    wait_for(lambda: not engine._active)
    assert job.stop.is_set() and job.row is not None and not job.row.is_done


@pytest.mark.e2e
def test_what_is_too_much_or_from_elsewhere_is_refused(engine: BatchingEngine) -> None:
    with served(engine, per_minute=5) as address:
        large = httpx.post(f"{address}/gradio_api/upload", files={"files": ("x.png", bytes(20_000_001))}, timeout=60)
        assert large.status_code == 413
        assert httpx.post(f"{address}/gradio_api/queue/join", content=b" " * 100_001).status_code == 413
        assert httpx.post(f"{address}/gradio_api/queue/join", content=b"[" * 50_000).status_code == 400
        crossed = httpx.post(f"{address}/gradio_api/queue/join", json={}, headers={"Sec-Fetch-Site": "cross-site"})
        assert crossed.status_code == 403
        assert httpx.get(f"{address}/", headers={"X": "x" * 20_000}).status_code == 431
        replies = [httpx.post(f"{address}/gradio_api/queue/join", content=b"{") for _ in range(5)]
        assert [reply.status_code for reply in replies] == [400, 400, 429, 429, 429]
        assert "More than 5 requests in a minute" in replies[-1].json()["detail"]
        assert [httpx.get(f"{address}/config").status_code for _ in range(20)] == [200] * 20, "files are counted apart"
        page = httpx.get(address)
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert httpx.get(f"{address}/v1/nothing").status_code == 404 and httpx.get(f"{address}/docs").status_code == 200


@pytest.mark.e2e
def test_a_key_opens_the_page_and_a_withdrawn_one_does_not(engine: BatchingEngine, keys: Path, secret: str) -> None:
    with served(engine, KeyRing(keys)) as address, httpx.Client(base_url=address) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/gradio_api/queue/join", json=step([])).status_code == 401
        assert client.post("/gradio_api/upload", files={"files": ("x", b"x")}).status_code == 401
        for name, given in (("newsroom", "wrong"), ("somebody", secret), ("", "")):
            assert client.post("/login", data={"username": name, "password": given}).status_code in (400, 422)
        assert client.post("/login", data={"username": "newsroom", "password": secret}).status_code == 200
        assert client.get("/config").status_code == 200
        assert client.get("/v1/models").status_code == 401, "the API keeps to its header"
        revoke_key(OldKey(name="newsroom", file=str(keys)))
        assert client.post("/gradio_api/queue/join", json=step([None, "m"], 1)).status_code == 200
        with client.stream("GET", "/gradio_api/queue/data?session_hash=abc", timeout=60) as stream:
            said = "".join(line for line in stream.iter_lines())
        assert views.LOCKED in said
        assert "/logout?all_session=false" in client.get("/config").text
        with httpx.Client(base_url=address) as other:
            assert other.get("/config").status_code == 401
        assert client.get("/logout?all_session=false").status_code == 302
        assert client.get("/config").status_code == 401, "another key can log in"
