"""Score a split with a trained detector: csv, json and a ROC picture; the threshold comes from validation only."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llava.core.config import build, parse, setting
from llava.core.logs import setup_logging
from llava.core.runtime import pick_device, write_json, write_run
from llava.core.weights import resolve
from llava.data.sources import DataConfig, open_source, split_of
from llava.data.splits import require_both_classes
from llava.detectors.base import load
from llava.evaluation.metrics import detection_report
from llava.evaluation.pictures import draw_roc
from llava.evaluation.predictions import write_csv
from llava.train.calibrate import measured
from llava.train.scoring import score
from llava.train.stage_1 import describe_level

log = logging.getLogger("llava.train.infer")  # run with -m, __name__ is another


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What is scored with which detector, and where the results go."""

    model: str = setting(
        "checkpoints/stage_1/m2f2_tiny", "folder, name in checkpoints/ or hub id of a trained detector"
    )
    data: DataConfig | None = setting(None, "where images come from (default: what the detector was trained on)")
    split: str = setting("test", "split to score; all = every image")
    output_dir: str = setting("outputs/stage_1", "folder of predictions.csv, report.json and roc.png")
    batch_size: int = setting(32, "images per batch")
    workers: int = setting(0, "processes that prepare images; 0 = none beside the scoring")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where it runs")
    resamples: int = setting(2000, "bootstrap resamples behind each interval")


def main(argv: Sequence[str] | None = None) -> int:
    """Score by flags; gives 0, or 2 for a mistake in what was asked. `--debug` shows where an error came from."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words
    setup_logging(is_debug)
    words = [word for word in words if word != "--debug"]
    config = parse(ScoreConfig, words, "Score a split with a trained detector.", prog="stage_1_inference.sh")
    try:
        score_split(config)
    except (ValueError, FileNotFoundError) as error:
        log.error("%s", error, exc_info=is_debug)
        return 2
    return 0


def score_split(config: ScoreConfig) -> dict[str, Any]:
    """Write predictions.csv, report.json and roc.png into `config.output_dir` and give the report.

    Raises ValueError or FileNotFoundError.
    """
    folder = resolve(config.model)
    data = config.data or _data_of_training(folder)
    source = open_source(data)
    records = split_of(
        source, {"train": data.train, "val": data.val, "test": data.test}.get(config.split, config.split)
    )
    require_both_classes(records, f"Split {config.split!r} of {data.path!r}")
    detector = load(folder)
    output = Path(config.output_dir)
    write_run(output, asdict(config), seed=None)
    predictions = score(detector, source, records, pick_device(config.device), config.batch_size, config.workers)
    report = {
        "model": config.model,
        "detector": detector.name,
        "decision": asdict(detector.decision),
        "split": config.split,
        **detection_report(predictions, detector.decision.threshold, config.resamples),
        "calibration": measured(detector.calibration, predictions, config.resamples),
    }
    write_csv(output / "predictions.csv", predictions)
    write_json(output / "report.json", report)
    draw_roc(output / "roc.png", predictions, config.resamples, threshold=detector.decision.threshold)
    _log_report(report, output)
    return report


def _data_of_training(folder: Path) -> DataConfig:
    """Give the data settings of the last phase that trained the detector. Raises ValueError when unknown."""
    record = folder / "run.json"
    recipe = json.loads(record.read_text(encoding="utf-8")).get("config", {}) if record.is_file() else {}
    settings = dict(recipe.get("data") or {})
    for phase in recipe.get("phases", []):
        settings |= phase.get("data") or {}
    if not settings:
        raise ValueError(f"{str(folder)!r} does not say what it was trained on; give --data.path FOLDER_OR_CSV.")
    return build(DataConfig, settings, where="data")


def _log_report(report: dict[str, Any], output: Path) -> None:
    for level in ("frame", "video"):
        log.info("%s", describe_level(f"{report['split']} {level}", report[level]))
    for name, numbers in report["classes"].items():
        log.info(
            "%s: AUC %.3f, recall %.3f", name, numbers["frame"]["auc"]["value"], numbers["frame"]["recall"]["value"]
        )
    decision = report["decision"]
    log.info("threshold %.3f, chosen on %s", decision["threshold"], decision["chosen_on"])
    if decision["chosen_on"] == "default":
        log.warning("no threshold was chosen on validation: 0.5 is only a convention")
    log.info("predictions.csv, report.json and roc.png are in %s", output)


if __name__ == "__main__":
    sys.exit(main())
