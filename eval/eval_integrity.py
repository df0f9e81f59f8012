"""Do the answers rest on the image? Leaked labels, blind template, swap gap, label flip, named regions."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from llava.core.config import parse, setting
from llava.core.runtime import write_json
from llava.evaluation.captions import read_caption_set
from llava.evaluation.flip import read_flipped
from llava.evaluation.integrity import integrity_report, read_prompts
from llava.evaluation.integrity_tables import integrity_tables
from llava.evaluation.questions import read_training
from llava.evaluation.report import console, run_script


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
    n_boot: int = setting(2000, "resamples of the group bootstrap")
    seed: int = setting(0, "seed of the bootstrap")
    json: str | None = setting(None, "write the report to this file as well")


def main() -> None:
    """Print the tables and the verdict, and write the report when asked."""
    settings = parse(Settings, description=__doc__ or "")
    captions = read_caption_set(settings.predict_path, settings.gt_path)
    training = read_training(settings.train_path)
    path = settings.flipped_predict_path
    flipped = read_flipped(path, captions.items) if path else None
    report = integrity_report(
        captions, training, read_prompts(settings.predict_path), flipped, settings.n_boot, settings.seed
    )
    files = {name: getattr(settings, name) for name in ("predict_path", "gt_path", "train_path")}
    report |= {"files": files | {"flipped_predict_path": path}}
    out = console()
    for name, file in files.items():
        out.print(Text(f"{name}: {file}"))
    for table in integrity_tables(report):
        out.print(table)
    for name, reason in report["template"]["skipped"].items():
        out.print(Text(f"{name.upper()} skipped: {reason}."))
    out.print(Text("Verdict: " + " ".join(report["verdict"])))
    if settings.json:
        write_json(settings.json, report)


if __name__ == "__main__":
    run_script(main)
