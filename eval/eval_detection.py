"""Score a detector's predictions: AUC, AP, EER, accuracy per frame and video, with intervals and pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llava.core.config import parse, setting
from llava.core.runtime import write_json
from llava.core.terminal import console
from llava.evaluation.metrics import TRIM, ThresholdRule, detection_report, threshold_from_validation
from llava.evaluation.pictures import draw_histogram, draw_roc
from llava.evaluation.predictions import Predictions
from llava.evaluation.published_csv import is_published, published_scores, read_predictions
from llava.evaluation.tables import detection_tables, published_table, run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to score and how."""

    predict_path: str = setting(
        help="csv with id, label, p_fake, video, group, class_name; or published: image_id, ground_truth, prediction"
    )
    val_path: str | None = setting(None, "csv of the validation split (either kind), to choose the threshold on")
    rule: ThresholdRule = setting("youden", "how to choose it: youden, eer or accuracy")
    threshold: float = setting(0.5, "fake from this p_fake on, when no val_path is given")
    trim: float = setting(TRIM, "part of a video's frames dropped at each end for the trimmed mean")
    n_boot: int = setting(2000, "resamples of the group bootstrap")
    seed: int = setting(0, "seed of the bootstrap")
    json: str | None = setting(None, "write the report to this file as well")
    pictures: str | None = setting(None, "folder for roc.png and scores.png")


def main() -> None:
    """Print the tables, and write report and pictures when asked."""
    settings = parse(Settings, description=__doc__ or "")
    predictions = read_predictions(settings.predict_path)
    threshold = settings.threshold
    if settings.val_path:
        threshold = threshold_from_validation(read_predictions(settings.val_path), predictions, settings.rule)
    report = detection_report(predictions, threshold, settings.n_boot, settings.seed, settings.trim)
    out = console()
    for table in detection_tables(report):
        out.print(table)
    if is_published(settings.predict_path):
        report["published_scoring"] = compare_with_published(predictions, out)
    if settings.json:
        write_json(settings.json, report)
    if settings.pictures:
        draw_roc(Path(settings.pictures) / "roc.png", predictions, settings.n_boot, settings.seed)
        draw_histogram(Path(settings.pictures) / "scores.png", predictions, threshold)


def compare_with_published(predictions: Predictions, out: Console) -> dict[str, Any] | None:
    """Print the published scoring beside the corrected one, or why there is none; give both as plain values."""
    try:
        scores = published_scores(predictions)
    except ValueError as error:
        out.print(f"Not scored as published: {error}")
        return None
    out.print(published_table(scores))
    return {name: asdict(each) for name, each in scores.items()}


if __name__ == "__main__":
    run_script(main)
