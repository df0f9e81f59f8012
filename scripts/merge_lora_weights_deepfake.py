"""Fold what a stage trained (adapter, or LoRA with projectors) into the model it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging
from llava.explainer.merge import merge_delta


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command line of this script."""

    model_base: str = setting(help="the model that training started from")
    model_path: str = setting(help="the stage's output folder (its checkpoints work too)")
    save_model_path: str = setting(help="where the merged model is written")


def main() -> None:
    """Merge; the log says what changed, certificate.json proves it."""
    setup_logging()
    options = parse(Options, description=__doc__ or "")
    try:
        merge_delta(options.model_base, options.model_path, Path(options.save_model_path))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"merge: error: {error}") from error


if __name__ == "__main__":
    main()
