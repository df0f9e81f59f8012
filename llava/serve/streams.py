"""Two helpers of streamed answers: from a thread to the event loop, and up to a text that ends the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from threading import Event
from typing import TypeVar

T = TypeVar("T")


async def from_thread(
    produce: Callable[[], Iterator[T]], threads: Executor, stop: Event, seconds: float | None = None
) -> AsyncGenerator[list[T], None]:
    """Yield what `produce` yields in a thread, as it comes; what came while nobody looked comes together.

    Raises what is raised there, and TimeoutError after `seconds` (None = never). A reader that leaves sets `stop`,
    which the thread is to look at, and does not wait for it.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    items: list[T] = []

    def run() -> None:
        for item in produce():
            items.append(item)
            loop.call_soon_threadsafe(arrived.set)
            if stop.is_set():
                return

    ended = loop.run_in_executor(threads, run)
    ended.add_done_callback(lambda _: arrived.set())
    deadline = None if seconds is None else loop.time() + seconds
    try:
        while not ended.done() or items:
            async with asyncio.timeout_at(deadline):
                await arrived.wait()
            arrived.clear()
            if items:
                came = items[:]
                del items[: len(came)]  # the thread may have put in more since
                yield came
        ended.result()
    finally:
        stop.set()
        ended.cancel()


class StopAt:
    """Gives a growing text up to the first of some texts that end it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._text = ""
        self.is_reached = False

    def feed(self, text: str) -> None:
        """Take more text in."""
        self._text += text
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.is_reached = True

    def shown(self, is_last: bool = False) -> str:
        """Give the text without white space at its end, and unless it is the last, without what may become a stop."""
        if is_last or self.is_reached:
            return self._text.rstrip()
        held = max((_overlap(self._text, stop) for stop in self._stops), default=0)
        return self._text[: len(self._text) - held].rstrip()


def _overlap(text: str, stop: str) -> int:
    """Count the letters at the end of a text with which a stop begins."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
