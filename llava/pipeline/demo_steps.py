"""The steps of `m2f2 demo`: training, answers, scores, each by what its own command calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llava.core.config import build
from llava.core.runtime import write_json
from llava.evaluation.agreement import read_agreement
from llava.evaluation.captions import read_caption_set, score_captions
from llava.evaluation.integrity import integrity_report, read_prompts
from llava.evaluation.judgement import judgement_report, read_judgements
from llava.evaluation.questions import read_training
from llava.pipeline import ddvqa
from llava.pipeline.demo_data import CONFIGS, Plan
from llava.train import infer, stage_1, stages
from llava.train.tiny_base import TinyBaseConfig, make_tiny_base

log = logging.getLogger(__name__)


class Clock:
    """Says which step begins when, and remembers how long each took, in seconds."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def run(self, title: str, work: Callable[[], Any]) -> Any:
        """Do one step and give its result. Raises ValueError when that is an exit code other than 0."""
        begun = time.monotonic()
        log.info("== %s (%.0f s)", title, begun - self.started)
        result = work()
        if isinstance(result, int) and result:
            raise ValueError(f"The step {title!r} ended with {result}; its message stands above.")
        self.seconds[title] = round(time.monotonic() - begun, 1)
        return result


def train(plan: Plan, out: Path, explainer: Path, clock: Clock) -> None:
    """Train the detector, the tiny base, the adapter and LoRA, by what the stage scripts call."""
    images = ["--image_folder", str(plan.images)]
    clock.run("stage 1: the detector", lambda: stage_1.main(["--output_dir", str(out / "stage_1"), *plan.stage_1]))
    scored = infer.ScoreConfig(model=str(out / "stage_1"), output_dir=str(out / "scores"))
    clock.run("stage 1: scores on test", lambda: infer.score_split(scored))
    base = {"image_folder": str(plan.images), "detector": str(out / "stage_1"), "out": str(out / "base"), **plan.base}
    clock.run("the tiny LLaVA base", lambda: make_tiny_base(build(TinyBaseConfig, base)))
    second = {
        "config": CONFIGS / "stage_2" / "m2f2_tiny.yaml",
        "merge.base": out / "base" / "model",
        "merge.detector": out / "stage_1",
        "merge.start": out / "stage_2-start",
        "output_dir": out / "stage_2-delta",
    }
    clock.run("stage 2: the adapter", lambda: stages.main(["2", *flags(second), *images, *plan.stage_2]))
    third = {
        "config": CONFIGS / "stage_3" / "m2f2_tiny.yaml",
        "merge.base_of_delta": out / "stage_2-start",
        "merge.delta": out / "stage_2-delta",
        "merge.start": out / "stage_2",
        "merge.final": explainer,
        "output_dir": out / "stage_3-delta",
    }
    clock.run("stage 3: LoRA", lambda: stages.main(["3", *flags(third), *images, *plan.stage_3]))


def answer(plan: Plan, out: Path, explainer: Path, clock: Clock) -> None:
    """Ask the explainer about the test images: the verdict, and the reasons where the data have them."""
    asked = {"det": "verdict_only.json", "exp": "label_free.jsonl"}
    for task, file in asked.items():
        if task == "det" or plan.reasons:
            settings = {
                "model_path": explainer,
                "images": plan.images,
                "questions": plan.conversations / "test" / file,
                "output": out / f"{task}.jsonl",
            }
            clock.run(f"answers: {task}", partial(ddvqa.main, [task, *flags(settings)]))


def judge_answers(plan: Plan, out: Path) -> None:
    """Write judgement.json and, where there are reasons, explanation.json and integrity.json."""
    answers = read_judgements(out / "det.jsonl", plan.conversations / "test" / "verdict_only.json")
    write_json(out / "judgement.json", {**judgement_report(answers), "agreement": read_agreement(out / "det.jsonl")})
    if plan.reasons:
        captions = read_caption_set(out / "exp.jsonl", plan.conversations / "test" / "label_free.jsonl")
        write_json(out / "explanation.json", score_captions(captions))
        training = read_training(plan.conversations / "train" / "label_free.json")
        write_json(out / "integrity.json", integrity_report(captions, training, read_prompts(out / "exp.jsonl")))


def flags(settings: dict[str, Any]) -> list[str]:
    """Write settings as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]
