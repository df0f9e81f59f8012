"""Do the answers rest on the image? Leak, blind template, swap gap, label flip, regions, pointing, counterfactual."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from llava.core.config import parse, setting, to_dict
from llava.core.runtime import write_json
from llava.core.terminal import console
from llava.evaluation.blind import read_flipped, read_training
from llava.evaluation.captions import read_caption_set
from llava.evaluation.grounding import ARTEFACT, REGION, read_counterfactual, read_pointing
from llava.evaluation.integrity import confusion_columns, integrity_report, integrity_tables, read_prompts
from llava.evaluation.pictures import draw_confusion
from llava.evaluation.tables import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to test and how."""

    predict_path: str = setting("outputs/DDVQA/DDVQA_exp_c40.jsonl", "answers, one json {key, text} per line")
    gt_path: str = setting(
        "utils/DDVQA_conversations/test/label_free.jsonl", "truth, one json {key: {question, answer: [...]}} per line"
    )
    train_path: str = setting(
        "utils/DDVQA_conversations/train/label_free.json", "conversation json whose answers the template may use"
    )
    flipped_predict_path: str | None = setting(
        None, "answers of stage_3_inference_exp.sh --flip_stated_label true, for the label-flip test"
    )
    maps_path: str | None = setting(None, "maps that `m2f2 maps` wrote, for the pointing game; needs manifest_path")
    manifest_path: str | None = setting(None, "manifest.csv of the forged images; its masks lie beside it")
    counterfactual_path: str | None = setting(None, "scores of edited images that `m2f2 counterfactual` wrote")
    pictures: str | None = setting(None, "draw the confusion matrices into this folder")
    n_boot: int = setting(2000, "resamples of the group bootstrap")
    seed: int = setting(0, "seed of the bootstrap")
    json: str | None = setting(None, "write the report to this file as well")


def main() -> None:
    """Print the tables and the verdict, and write the report and the pictures when asked."""
    settings = parse(Settings, description=__doc__ or "")
    report = _report(settings)
    out = console()
    for name, file in report["files"].items():
        if file:
            out.print(Text(f"{name}: {file}"))
    for table in integrity_tables(report):
        out.print(table)
    for name, reason in report["template"]["skipped"].items():
        out.print(Text(f"{name.upper()} skipped: {reason}."))
    out.print(Text("Verdict: " + " ".join(report["verdict"])))
    if settings.json:
        write_json(settings.json, report)
    for part, naming in (("regions", REGION), ("artefacts", ARTEFACT)):
        if settings.pictures and report[part] is not None:
            columns = confusion_columns(naming, report[part])
            draw_confusion(Path(settings.pictures) / f"{part}.png", naming.field, report[part], columns)


def _report(settings: Settings) -> dict[str, Any]:
    if bool(settings.maps_path) != bool(settings.manifest_path):
        raise ValueError("--maps_path and --manifest_path belong together: give both, or none of them.")
    captions = read_caption_set(settings.predict_path, settings.gt_path)
    training = read_training(settings.train_path)
    flipped, maps, scores = settings.flipped_predict_path, settings.maps_path, settings.counterfactual_path
    report = integrity_report(
        captions,
        training,
        read_prompts(settings.predict_path),
        read_flipped(flipped, captions.items) if flipped else None,
        read_pointing(maps, settings.manifest_path) if maps and settings.manifest_path else None,
        read_counterfactual(scores, captions.items) if scores else None,
        settings.n_boot,
        settings.seed,
    )
    return report | {"files": {name: value for name, value in to_dict(settings).items() if name.endswith("_path")}}


if __name__ == "__main__":
    run_script(main)
