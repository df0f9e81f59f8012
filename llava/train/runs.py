"""What an output folder holds of an earlier run: its settings, and the last checkpoint that is complete."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def other_settings(folder: Path, settings: Mapping[str, Any], compared: Collection[str]) -> list[str]:
    """Name the settings in which the run of `run.json` differs from this one; none when there was no run."""
    record = folder / "run.json"
    if not record.is_file():
        return []
    old = json.loads(record.read_text(encoding="utf-8")).get("config", {})
    new = json.loads(json.dumps(dict(settings), default=str))
    return [key for key in compared if key in new and old.get(key) != new[key]]


def last_checkpoint(folder: Path) -> Path | None:
    """Give the newest checkpoint that was written to its end; Trainer writes its state last."""
    complete = [p for p in folder.glob("checkpoint-*") if _is_complete(p)]
    return max(complete, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        log.warning("%s is not complete and is passed over", checkpoint)
        return False
    return True
