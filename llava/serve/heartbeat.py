"""A worker keeps itself known to its controller, through restarts of either."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httpx

from llava.serve.protocol import HeartBeat, Registration, WorkerStatus
from llava.serve.registration import SECRET_HEADER

log = logging.getLogger(__name__)
RETRY_SECONDS = 2.0
CALL_SECONDS = 5.0


async def stay_registered(
    controller: str, name: str, secret: str | None, status: Callable[[], WorkerStatus], seconds: float
) -> None:
    """Register a worker by its address `name`, then send a heartbeat every `seconds`, until cancelled.

    A controller that does not know the worker (any more) gets a new registration; one that does not answer, or refuses,
    is asked again soon.
    """
    headers = {SECRET_HEADER: secret} if secret else {}
    async with httpx.AsyncClient(timeout=CALL_SECONDS, headers=headers, trust_env=False) as client:
        is_known = False
        while True:
            is_known = await _say(client, controller, name, status(), is_known)
            await asyncio.sleep(seconds if is_known else min(RETRY_SECONDS, seconds))


async def _say(client: httpx.AsyncClient, controller: str, name: str, status: WorkerStatus, is_known: bool) -> bool:
    """Send a heartbeat, or register; gives whether the controller knows the worker now."""
    try:
        if is_known:
            beat = HeartBeat(worker_name=name, queue_length=status.queue_length)
            answer = await client.post(f"{controller}/receive_heart_beat", json=beat.model_dump())
            if answer.raise_for_status().json()["exist"]:
                return True
        asked = Registration(worker_name=name, worker_status=status, multimodal=True)
        answer = await client.post(f"{controller}/register_worker", json=asked.model_dump())
        if answer.is_error:
            log.error("controller %s refuses this worker: %s %s", controller, answer.status_code, answer.text[:300])
            return False
        log.info("registered as %s at %s", name, controller)
        return True
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        log.warning("controller %s does not answer (%s); trying again", controller, type(error).__name__)
        return is_known
