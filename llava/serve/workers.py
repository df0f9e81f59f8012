"""The workers that a controller knows: which live, which is asked next, and what is asked of them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, TypeAlias

import httpx
from pydantic import ValidationError

from llava.serve.protocol import REQUEST_HEADER, WorkerStatus, split_chunks_async
from llava.serve.registration import WorkerAddress

log = logging.getLogger(__name__)

MAX_WORKERS = 256
Dispatch: TypeAlias = Literal["lottery", "shortest_queue"]
MAX_STATUS_BYTES = 100_000
STATUS_SECONDS = 5.0


@dataclass(kw_only=True)
class Worker:
    """A registered worker. queue: its requests, as last told, and what was sent there since; seen: seconds, of `Pool`'s
    clock."""

    address: WorkerAddress
    status: WorkerStatus
    expires: bool
    is_multimodal: bool
    queue: int
    heard_at: float


class Pool:
    """The workers that registered and were heard of within `expiry_seconds`.

    lottery draws one, the faster the likelier; shortest_queue takes the one with the least to do for its speed.
    """

    def __init__(
        self,
        dispatch: Dispatch = "shortest_queue",
        expiry_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._dispatch = dispatch
        self._expiry_seconds = expiry_seconds
        self._clock = clock
        self._rng = rng or random.Random()
        self._workers: dict[str, Worker] = {}

    def add(self, address: WorkerAddress, status: WorkerStatus, expires: bool, is_multimodal: bool) -> None:
        """Take a worker in, or what it says anew. Raises ValueError when there are too many."""
        if address.name not in self._workers and len(self.workers()) >= MAX_WORKERS:
            raise ValueError(f"There are {MAX_WORKERS} workers, which is the limit.")
        self._workers[address.name] = Worker(
            address=address,
            status=status,
            expires=expires,
            is_multimodal=is_multimodal,
            queue=status.queue_length,
            heard_at=self._clock(),
        )

    def beat(self, name: str, queue_length: int) -> bool:
        """Note that a worker lives; False when it is not known and has to register."""
        worker = self._alive().get(name)
        if worker is None:
            return False
        worker.heard_at, worker.queue = self._clock(), queue_length
        return True

    def drop(self, name: str) -> None:
        """Forget a worker that failed; if it lives, its next heartbeat brings it back."""
        self._workers.pop(name, None)

    def workers(self) -> list[Worker]:
        """List the workers that live."""
        return list(self._alive().values())

    def models(self, is_multimodal: bool | None = None) -> list[str]:
        """List the models that are served, sorted; None = of every kind."""
        chosen = (w for w in self.workers() if is_multimodal is None or w.is_multimodal == is_multimodal)
        return sorted({name for worker in chosen for name in worker.status.model_names})

    def choose(self, model: str, without: Collection[str] = ()) -> Worker | None:
        """Pick a worker for one more request, which counts as waiting there; None when there is none."""
        able = [w for w in self.workers() if model in w.status.model_names and w.address.name not in without]
        if not able:
            return None
        if self._dispatch == "lottery":
            (chosen,) = self._rng.choices(able, weights=[worker.status.speed for worker in able])
        else:
            chosen = min(able, key=lambda worker: worker.queue / worker.status.speed)
        chosen.queue += 1
        return chosen

    def done(self, name: str) -> None:
        """Note that a request that was sent to a worker is over."""
        if name in self._workers:
            self._workers[name].queue = max(0, self._workers[name].queue - 1)

    def _alive(self) -> dict[str, Worker]:
        oldest = self._clock() - self._expiry_seconds
        self._workers = {n: w for n, w in self._workers.items() if w.heard_at >= oldest or not w.expires}
        return self._workers


class WorkerClient:
    """Asks workers for answers and for their status; follows no redirect and uses no proxy."""

    def __init__(self, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        # No connection is kept: one that a restarted worker has closed would look like a worker that died.
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(silence_seconds, connect=STATUS_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close what is open."""
        await self._http.aclose()

    async def answer(self, address: WorkerAddress, body: bytes, request_id: str) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of an answer, each whole.

        Raises ConnectionError when the worker can not be reached, dies or says nothing, TimeoutError when it is silent.
        """
        has_begun = False
        try:
            async with aclosing(await self._post(address, "/worker_generate_stream", body, request_id)) as response:
                async for chunk in split_chunks_async(response.aiter_raw()):
                    has_begun = True
                    yield chunk
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise TimeoutError(f"the worker was silent for {self._silence_seconds:g} seconds") from None
        except (httpx.HTTPError, ValueError) as error:
            raise ConnectionError("the worker broke off") from error
        if not has_begun:
            raise ConnectionError("the worker said nothing")

    async def status(self, address: WorkerAddress) -> WorkerStatus | None:
        """Ask a worker how it is; None when it gives no answer that makes sense."""
        said = bytearray()
        try:
            async with (
                asyncio.timeout(STATUS_SECONDS),
                aclosing(await self._post(address, "/worker_get_status", b"{}")) as response,
            ):
                async for data in response.aiter_raw():
                    said += data
                    if len(said) > MAX_STATUS_BYTES:
                        raise ValueError("its status is too long")
            return WorkerStatus.model_validate_json(bytes(said)) if response.is_success else None
        except (httpx.HTTPError, TimeoutError, ValidationError, ValueError) as error:
            log.warning("no status worker=%s: %s", address.name, type(error).__name__)
            return None

    async def _post(self, address: WorkerAddress, path: str, body: bytes, request_id: str = "") -> httpx.Response:
        """Send to the pinned address under the name that was registered; the body of the answer is not read yet."""
        headers = {"Host": address.netloc, "Content-Type": "application/json", REQUEST_HEADER: request_id}
        named = {"sni_hostname": address.host}
        request = self._http.build_request("POST", address.url + path, content=body, headers=headers, extensions=named)
        return await self._http.send(request, stream=True)
