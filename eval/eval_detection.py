"""Score a detector's predictions: AUC, AP, EER, accuracy per frame and video, with intervals and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.core.config import parse, setting
from llava.core.runtime import write_json
from llava.evaluation.metrics import ThresholdRule, detection_report, threshold_from_validation
from llava.evaluation.pictures import draw_histogram, draw_roc
from llava.evaluation.predictions import read_csv
from llava.evaluation.report import console, detection_tables, run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to score and how."""

    predict_path: str = setting(help="csv with id, label, p_fake, video, group, class_name")
    val_path: str | None = setting(None, "csv of the validation split, to choose the threshold on")
    rule: ThresholdRule = setting("youden", "how to choose it: youden, eer or accuracy")
    threshold: float = setting(0.5, "fake from this p_fake on, when no val_path is given")
    trim: float = setting(0.0, "part of a video's frames dropped at each end before averaging (published: 0.1)")
    n_boot: int = setting(2000, "resamples of the group bootstrap")
    seed: int = setting(0, "seed of the bootstrap")
    json: str | None = setting(None, "write the report to this file as well")
    pictures: str | None = setting(None, "folder for roc.png and scores.png")


def main() -> None:
    """Print the tables, and write report and pictures when asked."""
    settings = parse(Settings, description=__doc__ or "")
    predictions = read_csv(settings.predict_path)
    threshold = settings.threshold
    if settings.val_path:
        threshold = threshold_from_validation(read_csv(settings.val_path), predictions, settings.rule)
    report = detection_report(predictions, threshold, settings.n_boot, settings.seed, settings.trim)
    out = console()
    for table in detection_tables(report):
        out.print(table)
    if settings.json:
        write_json(settings.json, report)
    if settings.pictures:
        draw_roc(Path(settings.pictures) / "roc.png", predictions, settings.n_boot, settings.seed, settings.trim)
        draw_histogram(Path(settings.pictures) / "scores.png", predictions, threshold)


if __name__ == "__main__":
    run_script(main)
