"""Score a split under every degradation and every version of the stability rule: robustness.json and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from llava.core.runtime import write_json
from llava.core.types import Record
from llava.data.sources import Source
from llava.detectors.base import Detector
from llava.evaluation.pictures import draw_robustness
from llava.evaluation.predictions import Predictions
from llava.evaluation.robustness import robustness_report
from llava.ops.delivery import Change, every_change
from llava.train.scoring import score


def degraded_scores(
    detector: Detector,
    source: Source,
    records: Sequence[Record],
    device: torch.device,
    batch_size: int = 32,
    workers: int = 0,
    seed: int = 0,
) -> dict[Change, np.ndarray]:
    """Give the raw p_fake (N,) of the records after each change; noise is a function of (seed, index)."""
    console = Console(stderr=True)
    changes = track(every_change(), "degrading", console=console, transient=True, disable=not console.is_terminal)
    return {
        change: score(
            detector, source, records, device, batch_size, workers, degrade=partial(_changed, change), seed=seed
        ).p_fake
        for change in changes
    }


def _changed(
    change: Change, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Change an image that is scored; nobody reads its mask."""
    return change(image, rng), mask


def write_robustness(
    folder: Path,
    detector: Detector,
    predictions: Predictions,
    degraded: dict[Change, np.ndarray],
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Write robustness.json and robustness.png into `folder` and give the report."""
    calibration = detector.calibration
    by = f"threshold {detector.decision.threshold:.3f}, not calibrated" if calibration is None else str(calibration)
    report = {"verdicts": by, **robustness_report(predictions, degraded, detector.labels, n_boot, seed)}
    write_json(folder / "robustness.json", report)
    draw_robustness(folder / "robustness.png", report)
    return report


def rule_lines(report: dict[str, Any]) -> list[str]:
    """Give a table of the flip rates over all strengths of each degradation, and what the stability rule does."""
    rows = [["verdicts by " + report["verdicts"], "REAL <-> FAKE", "after the rule", "any other verdict"]]
    for kind, numbers in report["degradations"].items():
        mild, strong = numbers["points"][0]["strength"], numbers["points"][-1]["strength"]
        rates = (_share_text(numbers["any"][name]) for name in ("flips_before", "flips_after", "differs"))
        rows.append([f"{kind} {mild:g} to {strong:g} ({numbers['unit']})", *rates])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = report["rule"]
    return [
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
        f"the rule makes UNCERTAIN {_share_text(rule['become_uncertain'])} clear verdicts; right of the clear ones: "
        f"{_share_text(rule['right_before'])} before, {_share_text(rule['right_after'])} after",
    ]


def _share_text(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "none to look at"
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}] of {share['images']}"
