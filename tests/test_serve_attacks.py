"""Attacks on one real server: each is refused, the server lives on, and docs/security.md holds the same table."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from attacks import ATTACKS, CHAT, CLOSED, SLOW, Server, checked, made_key
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from servers import Process, ready_address
from test_serve_api import messages
from tiny_world import draw

from llava.serve.load import resident_mb

pytestmark = pytest.mark.e2e
DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
GROWTH_MB = 300
FUZZ = {CHAT: 150, "/v1/detect": 200, "/v1/explain": 200}
ANY, RAW = 350, 100  # together 1,000
FOUND: dict[str, list[int]] = {}


@pytest.fixture(scope="module")
def server(tiny_explainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("attacked")
    keys, log = str(folder / "keys.json"), folder / "log"
    key = made_key(keys, "good")
    words = [
        "--model_path",
        str(tiny_explainer),
        "--port",
        "0",
        "--keys",
        keys,
        "--face",
        "off",
        "--stability",
        "off",
        "--log_json",
    ]
    process = Process("attacked_server", [*words, "--requests_per_minute", "1000000"], log)
    try:
        address = ready_address(process, 300)
        with (
            ThreadPoolExecutor(len(SLOW)) as threads,
            httpx.Client(base_url=address, timeout=300, trust_env=False) as client,
        ):
            found = Server(address, key, keys, log, process.pid, client)
            found.late = {name: threads.submit(attack, found) for name, (attack, _) in SLOW.items()}
            yield found
    finally:
        process.stop()


@pytest.fixture(scope="module")
def good(server: Server) -> tuple[dict[str, Any], float]:
    """Give the reply to a good question and the memory after it, before any attack."""
    return ask(server), resident_mb(server.pid)


def ask(server: Server) -> dict[str, Any]:
    asked = {"model": "explainer", "messages": messages(draw(1, 3))}
    known = {"Authorization": f"Bearer {server.key}"}
    reply = server.client.post(CHAT, json=asked, headers=known)
    assert reply.status_code == 200
    said: dict[str, Any] = reply.json()
    return {"text": said["choices"][0]["message"]["content"], "verdict": said["verdict"]}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(server: Server, good: object, name: str) -> None:
    attack, allowed = ATTACKS[name]
    FOUND[name] = attack(server)
    assert FOUND[name] and set(FOUND[name]) <= allowed, FOUND[name]


@pytest.mark.parametrize("path", FUZZ)
def test_malformed_bodies_from_the_schema_are_refused(server: Server, path: str) -> None:
    told_schema = server.client.get("/openapi.json").json()
    del told_schema["paths"][path]["post"]["security"]  # the key is right, the bodies are wrong
    schema = schemathesis.openapi.from_dict(told_schema)
    statuses = FOUND.setdefault(f"malformed bodies made from the schema: {path}", [])
    known = {"Authorization": f"Bearer {server.key}"}

    @seed(5)
    @settings(
        max_examples=FUZZ[path],
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=HealthCheck,
    )
    @given(schema[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def fuzz(case: schemathesis.Case) -> None:
        statuses.append(checked(case.call(base_url=server.address, session=session, headers=known, timeout=300)))

    with requests.Session() as session:
        session.trust_env = False
        fuzz()
    assert len(statuses) >= FUZZ[path] and all(400 <= status < 500 for status in statuses), Counter(statuses)


def test_fields_of_the_schema_with_anything_in_them_are_refused(server: Server) -> None:
    fields = server.client.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]
    statuses = FOUND.setdefault(f"bodies with any JSON in the fields of the schema: {CHAT}", [])
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
        max_leaves=6,
    )

    @seed(7)
    @settings(max_examples=ANY, deadline=None, database=None, phases=[Phase.generate])
    @given(st.dictionaries(st.sampled_from(sorted(fields)), anything) | anything)
    def fuzz(body: object) -> None:
        statuses.append(server.post(content=json.dumps(body), headers={"Content-Type": "application/json"}))

    fuzz()
    assert set(statuses) == {400}, Counter(statuses)


def test_bytes_that_are_no_json_are_refused(server: Server) -> None:
    statuses = FOUND.setdefault(f"bodies of random bytes: {CHAT}", [])

    @seed(6)
    @settings(max_examples=RAW, deadline=None, database=None, phases=[Phase.generate])
    @given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "multipart/form-data", ""]))
    def fuzz(body: bytes, kind: str) -> None:
        statuses.append(server.post(content=body, headers={"Content-Type": kind}))

    fuzz()
    assert set(statuses) <= {400, 415, 422}, Counter(statuses)


def test_slow_senders_are_cut_off(server: Server) -> None:
    for name, late in server.late.items():
        FOUND[name] = late.result(300)
        assert FOUND[name] and set(FOUND[name]) <= SLOW[name][1], (name, FOUND[name])


def test_afterwards_the_server_is_as_it_was(server: Server, good: tuple[dict[str, Any], float]) -> None:
    before, memory = good
    assert ask(server) == before
    log = server.log.read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    requests_logged = [line for line in lines if line["logger"] == "llava.serve.requests"]
    assert len(requests_logged) > 1000
    assert {"time", "id", "method", "path", "status", "seconds"} <= requests_logged[-1].keys()
    assert "Traceback" not in log and server.key not in log and "data:image" not in log
    grown = resident_mb(server.pid) - memory
    print(f"memory: {memory:.0f} MB before, {grown:+.0f} MB after all attacks")
    assert grown < GROWTH_MB


def test_the_table_in_the_document_is_this_one() -> None:
    lines = [f"| {name} | {told(statuses)} |" for name, statuses in FOUND.items()]
    print("\n".join(["| Attempt | Answer |", "|---|---|", *lines]))
    if len(FOUND) < len(ATTACKS) + len(SLOW) + len(FUZZ) + 2:
        pytest.skip("only with all attacks")
    rows = [line.split("|")[1:3] for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    written = {name.strip(): answers for name, answers in rows}
    for name, statuses in FOUND.items():
        assert set(map(word, statuses)) <= set(re.findall(r"\d{3}|cut off", written[name])), name


def word(status: int) -> str:
    return "cut off" if status == CLOSED else str(status)


def told(statuses: Sequence[int]) -> str:
    """Write the statuses, the most frequent first, and how many there were."""
    names = [word(status) for status, _ in Counter(statuses).most_common()]
    return ", ".join(names) + (f" ({len(statuses)} requests)" if len(statuses) >= RAW else "")
