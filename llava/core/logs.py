"""What every entry point shares: one format of log lines, rank 0 speaks, and the exception of a run with gaps."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime


class Incomplete(Exception):
    """A result is there, but not for everything that was asked; the message counts what is missing."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and each of a record's `fields` by its key."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line of a record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False)


def log_json() -> None:
    """Write the log as JSON lines from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())


def setup_logging(verbose: bool = False) -> None:
    """Send this package's log to standard error; other ranks only report errors."""
    level = logging.DEBUG if verbose else logging.INFO
    if int(os.environ.get("RANK", "0")) != 0:
        level = logging.ERROR
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    for name in ("llava", "__main__"):  # a module run by `python -m` logs as __main__
        logging.getLogger(name).setLevel(level)
