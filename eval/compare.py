"""Put the scores of several runs side by side: detection, judgement, explanation, integrity, each with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.core.config import parse, setting
from llava.core.terminal import console
from llava.evaluation.tables import comparison, run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which runs to compare."""

    runs: list[str] = setting(
        help="folders with scores/report.json, judgement.json, explanation.json or integrity.json, as written by --json"
    )


def main() -> None:
    """Print one table; a dash stands for what a run does not have."""
    settings = parse(Settings, description=__doc__ or "")
    console().print(comparison([Path(run) for run in settings.runs]))


if __name__ == "__main__":
    run_script(main)
