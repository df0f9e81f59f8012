"""Score the answers of stage_3_inference_det.sh: accuracy, precision, recall, F1."""

from __future__ import annotations

from dataclasses import dataclass

from llava.core.config import parse, setting
from llava.core.runtime import write_json
from llava.core.terminal import console
from llava.evaluation.judgement import judgement_report, read_agreement, read_judgements
from llava.evaluation.tables import agreement_table, judgement_tables, run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to score and how."""

    predict_path: str = setting("outputs/DDVQA/DDVQA_det_c40.jsonl", "answers, one json {image, text} per line")
    gt_path: str | None = setting(None, "truth: csv or jsonl with image and label; default: the DD-VQA file names")
    published: bool = setting(False, "the original parser, which drops what it cannot read")
    n_boot: int = setting(2000, "resamples of the group bootstrap")
    seed: int = setting(0, "seed of the bootstrap")
    json: str | None = setting(None, "write the report to this file as well")


def main() -> None:
    """Print the tables, and write the report when asked."""
    settings = parse(Settings, description=__doc__ or "")
    answers = read_judgements(settings.predict_path, settings.gt_path, settings.published)
    report = judgement_report(answers, settings.n_boot, settings.seed)
    report["agreement"] = read_agreement(settings.predict_path, answers)
    out = console()
    for part in (*judgement_tables(report), *report["notes"]):
        out.print(part)
    if report["agreement"]:
        out.print(agreement_table(report["agreement"]))
    if settings.json:
        write_json(settings.json, report)


if __name__ == "__main__":
    run_script(main)
