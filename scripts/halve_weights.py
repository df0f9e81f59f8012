"""Store a model with half the bytes: float32 weights rounded to half precision, and loaded into float32 again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging
from llava.explainer.merge import halve


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command line of this script."""

    model_path: str = setting(help="detector or merged explainer: folder, name in checkpoints/ or hub id")
    save_path: str = setting(help="where the smaller copy is written")


def main() -> None:
    """Write the copy; the log says what changed, certificate.json proves it."""
    setup_logging()
    options = parse(Options, description=__doc__ or "")
    try:
        halve(options.model_path, Path(options.save_path))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"halve: error: {error}") from error


if __name__ == "__main__":
    main()
