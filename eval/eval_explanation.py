"""Score the answers of stage_3_inference_exp.sh: BLEU, ROUGE-L, CIDEr, METEOR, SPICE, per question type."""

from __future__ import annotations

from dataclasses import dataclass

from llava.core.config import parse, setting
from llava.core.runtime import write_json
from llava.core.terminal import console
from llava.evaluation.captions import read_caption_set, score_captions
from llava.evaluation.tables import caption_table, run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to score and how."""

    predict_path: str = setting("outputs/DDVQA/DDVQA_exp_c40.jsonl", "answers, one json {key, text} per line")
    gt_path: str = setting(
        "utils/DDVQA_conversations/test/label_free.jsonl", "truth, one json {key: {question, answer: [...]}} per line"
    )
    ptb: bool = setting(False, "the literature's PTB tokenisation (needs Java); default: as published")
    n_boot: int = setting(2000, "resamples of the group bootstrap")
    seed: int = setting(0, "seed of the bootstrap")
    json: str | None = setting(None, "write the report to this file as well")


def main() -> None:
    """Print the table, and write the report when asked."""
    settings = parse(Settings, description=__doc__ or "")
    captions = read_caption_set(settings.predict_path, settings.gt_path)
    report = score_captions(captions, settings.ptb, settings.n_boot, settings.seed)
    out = console()
    out.print(caption_table(report))
    for name in ("missing", "extra"):
        if keys := report["n"][name]:
            out.print(f"{len(keys)} {name}: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}")
    for name, reason in report["skipped"].items():
        out.print(f"{name.upper()} skipped: {reason}.")
    if settings.json:
        write_json(settings.json, report)


if __name__ == "__main__":
    run_script(main)
