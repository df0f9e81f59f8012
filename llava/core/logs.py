"""Logging for every entry point: rank 0 speaks, one format, warnings of third parties kept short."""

from __future__ import annotations

import logging
import os


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
