"""Controller and two workers as real processes on loopback: answers, kill -9 under load, restart, hang, hang-up."""

from __future__ import annotations

import base64
import io
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image
from servers import Process, free_port, wait_for
from tiny_explainer import REASON_QUESTION
from tiny_world import draw

from llava.core.types import Turn
from llava.explainer.prompts import VERDICT_QUESTION
from llava.serve.protocol import Chunk, decode_chunk, split_chunks

pytestmark = pytest.mark.e2e
MODEL = "M2F2-Det"
REQUESTS, AT_A_TIME = 120, 8


def base64_of(label: int, index: int = 5) -> str:
    file = io.BytesIO()
    Image.fromarray(draw(label, index)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def prompt_of(*said: str) -> str:
    question, *rest = said
    prompt = f"A chat. USER: <image>\n{question}\n\n<deepfake> ASSISTANT:"
    for answer, follow_up in zip(rest[::2], rest[1::2], strict=True):
        prompt += f" {answer}</s>USER: {follow_up} ASSISTANT:"
    return prompt


def body(label: int, *said: str, **changes: object) -> dict[str, object]:
    prompt = prompt_of(*(said or (VERDICT_QUESTION,)))
    return {"model": MODEL, "prompt": prompt, "images": [base64_of(label)], "temperature": 0, "stop": "</s>"} | changes


def ask(address: str, asked: dict[str, object]) -> list[Chunk]:
    answer = httpx.post(f"{address}/worker_generate_stream", json=asked, timeout=120)
    assert answer.status_code == 200
    return [decode_chunk(chunk) for chunk in split_chunks([answer.content])]


class Stack:
    """A controller and workers for one explainer; the folder holds their logs."""

    def __init__(self, folder: Path, explainer: Path) -> None:
        self.folder = folder
        self.explainer = explainer
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.workers: dict[str, Process] = {}
        self.start_controller()

    def start_controller(self) -> None:
        flags = ["--port", str(self.port), "--expiry-seconds", "4", "--worker-seconds", "8"]
        self.controller = Process("llava.serve.controller", flags, self.folder / "controller.log")
        wait_for(lambda: httpx.post(f"{self.address}/list_models").is_success)

    def start_worker(self) -> str:
        port = free_port()
        address = f"http://localhost:{port}"
        flags = ["--controller", self.address, "--worker", address, "--port", str(port), "--face", "off"]
        flags += ["--model-path", str(self.explainer), "--model-name", MODEL, "--heartbeat-seconds", "0.3"]
        flags += ["--stability", "false"]
        self.workers[address] = Process("llava.serve.model_worker", flags, self.folder / f"worker_{port}.log")
        return address

    def wait_for_workers(self, count: int, seconds: float = 300) -> None:
        wait_for(lambda: httpx.post(f"{self.address}/worker_get_status").json()["speed"] == count, seconds)

    def queue_length(self) -> int:
        return int(httpx.post(f"{self.address}/worker_get_status").json()["queue_length"])

    def stop(self) -> None:
        for process in (*self.workers.values(), self.controller):
            process.kill()


@pytest.fixture(scope="module")
def stack(tiny_explainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"), tiny_explainer)
    try:
        stack.start_worker()
        stack.start_worker()
        stack.wait_for_workers(2)
        yield stack
    finally:
        stack.stop()


def test_the_same_question_gives_the_same_verdict_and_text_as_the_pipeline(stack: Stack) -> None:
    from llava.pipeline import Pipeline
    from llava.pipeline.settings import FaceSettings

    pipeline = Pipeline.from_pretrained(stack.explainer, "cpu", faces=FaceSettings(face="off"), stability=False)
    explainer = pipeline.needed_explainer()
    for label in (0, 1):
        first = pipeline.explain(draw(label, 5))
        turns = [Turn(role="human", text=VERDICT_QUESTION), Turn(role="assistant", text=first.text)]
        turns.append(Turn(role="human", text=REASON_QUESTION))
        (second,) = explainer.answer(explainer.encode([draw(label, 5)]), [turns])
        said = (VERDICT_QUESTION, first.text, REASON_QUESTION)
        for address in (stack.address, *stack.workers):
            chunks = ask(address, body(label))
            verdict = chunks[0].verdict
            assert verdict is not None and verdict["label"] == first.verdict.label
            assert verdict["p_fake"] == pytest.approx(first.verdict.p_fake, abs=1e-6)
            assert chunks[-1].text == prompt_of(VERDICT_QUESTION) + first.text
            assert ask(address, body(label, *said))[-1].text == prompt_of(*said) + second
        published = f"Assistant: A chat.###Human: <image>\n <deepfake>\n {VERDICT_QUESTION} ###Assistant:"
        assert ask(stack.address, body(label, prompt=published, echo=False, stop="###"))[-1].text == first.text


def test_kill_9_of_a_worker_under_load_loses_no_request(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    doomed = next(iter(stack.workers))
    answered = 0

    def one(number: int) -> str:
        nonlocal answered
        chunks = ask(stack.address, body(number % 2))
        answered += 1
        if answered == 20:
            stack.workers[doomed].kill()
        errors = [chunk for chunk in chunks if chunk.error_code]
        assert len(errors) <= 1 and (not errors or chunks[-1] is errors[0])
        assert errors or chunks[-1].text.endswith(f"The image is {('real', 'fake')[number % 2]}.")
        return f"error {errors[0].error_code}" if errors else "answer"

    started = time.monotonic()
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        outcomes = Counter(threads.map(one, range(REQUESTS)))
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"\nkill -9 under load: sent {REQUESTS}, {dict(outcomes)}, {seconds:.1f} s")
    assert outcomes.total() == REQUESTS
    assert outcomes["answer"] >= REQUESTS - AT_A_TIME  # only requests in flight there may have failed
    assert all(ask(stack.address, body(1))[-1].error_code == 0 for _ in range(5))
    del stack.workers[doomed]
    stack.start_worker()
    stack.wait_for_workers(2)


def test_a_restarted_controller_gets_its_workers_back(stack: Stack) -> None:
    stack.controller.kill()
    with pytest.raises(httpx.ConnectError):
        ask(stack.address, body(1))
    stack.start_controller()
    stack.wait_for_workers(2, 10)
    assert ask(stack.address, body(1))[-1].text.endswith("The image is fake.")


def test_a_worker_that_hangs_expires_and_comes_back(stack: Stack) -> None:
    hanging = next(iter(stack.workers))
    stack.workers[hanging].send(signal.SIGSTOP)
    started = time.monotonic()
    with ThreadPoolExecutor(4) as threads:  # some of them go to the worker that hangs
        codes = Counter(threads.map(lambda n: ask(stack.address, body(n % 2))[-1].error_code, range(4)))
    assert time.monotonic() - started < 10
    assert codes.total() == 4 and codes[3] >= 1 and set(codes) <= {0, 3}
    stack.wait_for_workers(1, 10)
    assert all(ask(stack.address, body(1))[-1].error_code == 0 for _ in range(4))
    stack.workers[hanging].send(signal.SIGCONT)
    stack.wait_for_workers(2, 10)


def test_a_client_that_hangs_up_frees_its_slot_at_once(stack: Stack) -> None:
    address, worker = next(iter(stack.workers.items()))
    for door in (address, stack.address):
        for _ in range(6):  # more than the slots of a worker
            endless = body(1, temperature=10, max_new_tokens=1024)
            with httpx.stream("POST", f"{door}/worker_generate_stream", json=endless, timeout=30) as answer:
                next(answer.iter_raw())
        wait_for(lambda: stack.queue_length() == 0, 10)
        status = httpx.post(f"{address}/worker_get_status").json()
        assert status["queue_length"] == 0
    assert "outcome=client left" in worker.log.read_text()
    assert ask(stack.address, body(1))[-1].text.endswith("The image is fake.")


def test_the_logs_hold_no_words_and_no_images(stack: Stack) -> None:
    logs = "".join(path.read_text() for path in stack.folder.glob("*.log"))
    assert "outcome=done" in logs
    assert VERDICT_QUESTION not in logs and base64_of(1)[100:160] not in logs and "Traceback" not in logs


def test_a_secret_keeps_strangers_out(stack: Stack, tmp_path: Path) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    flags = ["--port", str(port), "--secret-file", str(secret)]
    controller = Process("llava.serve.controller", flags, tmp_path / "controller.log")
    worker_port = free_port()
    flags = ["--controller", address, "--port", str(worker_port), "--model-path", str(stack.explainer)]
    flags += ["--model-name", "with", "--heartbeat-seconds", "0.3", "--secret-file", str(secret)]
    worker = Process("llava.serve.model_worker", flags, tmp_path / "worker.log")
    try:
        wait_for(lambda: httpx.post(f"{address}/list_models").json() == {"models": ["with"]})
        status = {"model_names": ["forged"], "speed": 1, "queue_length": 0}
        forged = {"worker_name": f"http://127.0.0.1:{worker_port}", "worker_status": status}
        assert httpx.post(f"{address}/register_worker", json=forged).status_code == 403
        assert httpx.post(f"{address}/list_models").json() == {"models": ["with"]}
        for process in (controller, worker):
            assert process.stop() == 0
            assert "Application shutdown complete" in process.log.read_text()
    finally:
        controller.kill()
        worker.kill()
    assert secret.read_text().strip() not in controller.log.read_text() + worker.log.read_text()


def test_an_open_controller_without_a_secret_does_not_start(tmp_path: Path) -> None:
    process = Process("llava.serve.controller", ["--host", "0.0.0.0", "--port", str(free_port())], tmp_path / "log")
    assert process.wait() == 1
    assert "workers need a secret" in process.log.read_text() and "Traceback" not in process.log.read_text()
