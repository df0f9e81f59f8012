"""A file of JSON lines that is written batch by batch, survives an interruption and appears only when complete."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.core.runtime import atomic_path

log = logging.getLogger(__name__)


class ResumableJsonl:
    """Rows on their way to `path`; until they are complete they lie beside it in `.<name>.partial`.

    identity: everything that the rows depend on. A partial file of another identity is not continued.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self._head = json.dumps(identity, sort_keys=True)

    def resume(self, batch_sizes: Sequence[int]) -> int:
        """Begin, or take up a partial file; gives how many batches are done. Rows of a cut batch are dropped.

        Whole batches only, so that a resumed run forms the same batches as an unbroken one and writes the same file.
        """
        rows = self._rows()
        done = kept = 0
        for size in batch_sizes:
            if kept + size > len(rows):
                break
            done, kept = done + 1, kept + size
        if kept:
            log.info("continuing %s: %d rows are there", self.partial, kept)
        with atomic_path(self.partial) as staged:
            staged.write_text("".join(f"{line}\n" for line in (self._head, *rows[:kept])), encoding="utf-8")
        return done

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of one batch; they are on disk when this returns."""
        with self.partial.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> Path:
        """Move the complete rows into place."""
        with atomic_path(self.path) as staged:
            staged.write_text("".join(f"{line}\n" for line in self._rows()), encoding="utf-8")
        self.partial.unlink()
        return self.path

    def _rows(self) -> list[str]:
        """Give the complete lines of a partial file of the same identity."""
        if not self.partial.is_file():
            return []
        head, *rows = self.partial.read_text(encoding="utf-8", errors="replace").split("\n")
        if head != self._head:
            log.warning("%s belongs to another model or other settings; starting afresh", self.partial)
            return []
        return rows[:-1]  # what follows the last line feed was cut off while it was written
