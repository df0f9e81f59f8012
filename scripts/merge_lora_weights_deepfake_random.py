"""Merge a stage-1 detector into a LLaVA base with a fresh adapter: where stage 2 starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging
from llava.explainer.merge import merge_detector


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command line of this script."""

    model_path: str = setting(help="LLaVA-1.5 base: folder, name in checkpoints/ or hub id")
    save_model_path: str = setting(help="where the merged model is written")
    deepfake_model_path: str | None = setting(
        None, "stage-1 folder (default: deepfake_model_path of the base's config)"
    )
    evidence_tokens: int = setting(1, "tokens that stand for the detector's evidence")
    layout: str = setting("v1", "prompt layout")
    seed: int = setting(0, "seed of the fresh adapter")


def main() -> None:
    """Merge; the log says what changed, certificate.json proves it."""
    setup_logging()
    options = parse(Options, description=__doc__ or "")
    try:
        merge_detector(
            options.model_path,
            options.deepfake_model_path,
            Path(options.save_model_path),
            seed=options.seed,
            evidence_tokens=options.evidence_tokens,
            layout=options.layout,
        )
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"merge: error: {error}") from error


if __name__ == "__main__":
    main()
