"""What the open pages look at: in memory alone, with a limit in bytes, and forgotten when nobody asks any more."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock, Timer

from llava.core.types import Explanation
from llava.data.inputs import NamedImage, NamedInput
from llava.pipeline.verdict import Finding
from llava.serve.engine import Engine


@dataclass(eq=False, kw_only=True)
class Visit:
    """One picture or video on one open page: what was found, which face is talked about, and what was said of each.

    model: name of the one that is asked, empty where there is no other.
    stop: ends the answer that is being written; every answer has its own. is_stopped: whether a person ended it.
    rewrites: how often other words were asked for.
    """

    engine: Engine
    source: NamedInput
    findings: list[Finding]
    model: str = ""
    chosen: int = 0
    said: dict[int, list[Explanation]] = field(default_factory=dict)
    stop: Event = field(default_factory=Event)
    is_stopped: bool = False
    rewrites: int = 0

    @property
    def finding(self) -> Finding:
        """Give the finding on the face that is talked about."""
        return self.findings[self.chosen]

    @property
    def answers(self) -> list[Explanation]:
        """Give what was said of that face, oldest first."""
        return self.said.setdefault(self.chosen, [])

    def begin(self) -> Event:
        """End the answer that is being written, which is shown no further, and give what ends the next one."""
        self.stop.set()
        self.stop, self.is_stopped = Event(), False
        return self.stop

    @property
    def byte_count(self) -> int:
        """Count the bytes of the pictures that are kept."""
        pictures = [finding.pixels for finding in self.findings]
        if isinstance(self.source, NamedImage):
            pictures.append(self.source.pixels)
        return sum(picture.nbytes for picture in pictures if picture is not None)


class Visits:
    """The newest visits by the name of their page.

    One that nobody asked about for `seconds` is forgotten before twice that time. on_forget: called with its name.
    """

    def __init__(
        self,
        seconds: float = 1800.0,
        max_bytes: int = 1_000_000_000,
        clock: Callable[[], float] = time.monotonic,
        on_forget: Callable[[str], object] = lambda name: None,
    ) -> None:
        self._seconds, self._max_bytes, self._clock = seconds, max_bytes, clock
        self._visits: OrderedDict[str, tuple[Visit, float]] = OrderedDict()
        self._lock = Lock()
        self._on_forget = on_forget
        self._timer: Timer | None = None

    def get(self, name: str) -> Visit | None:
        """Give a page's visit, None when there is none any more."""
        with self._lock:
            self._forget()
            if name not in self._visits:
                return None
            visit = self._visits.pop(name)[0]
            self._visits[name] = visit, self._clock()
            return visit

    def put(self, name: str, visit: Visit) -> None:
        """Remember a page's visit instead of the one before, and forget the oldest ones where there are too many."""
        with self._lock:
            self._drop(name)
            self._visits[name] = visit, self._clock()
            self._forget()
            while len(self._visits) > 1 and sum(v.byte_count for v, _ in self._visits.values()) > self._max_bytes:
                self._drop(next(iter(self._visits)))
            self._watch()

    def drop(self, name: str) -> None:
        """Forget a page's visit."""
        with self._lock:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if name in self._visits:
            self._visits.pop(name)[0].begin()
            self._on_forget(name)

    def _forget(self) -> None:
        oldest = self._clock() - self._seconds
        for name in [name for name, (_, used) in self._visits.items() if used < oldest]:
            self._drop(name)

    def _watch(self) -> None:
        """Look again later, as long as there is anything to forget."""
        if self._timer is None and self._visits:
            self._timer = Timer(self._seconds, self._sweep)
            self._timer.daemon = True
            self._timer.start()

    def _sweep(self) -> None:
        with self._lock:
            self._timer = None
            self._forget()
            self._watch()
