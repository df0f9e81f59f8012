"""What the controller asks of workers: only at addresses that were checked and pinned, with limits on time and size."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import httpx
from pydantic import ValidationError

from llava.serve.protocol import REQUEST_HEADER, WorkerStatus, split_chunks_async
from llava.serve.registration import WorkerAddress

log = logging.getLogger(__name__)
MAX_STATUS_BYTES = 100_000
STATUS_SECONDS = 5.0


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
