"""Answer the DD-VQA questions with an explainer: the two files that judgement and explanation are scored on.

`python -m llava.pipeline.ddvqa det|exp`, started by `stage_3_inference_det.sh` and `stage_3_inference_exp.sh`.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from llava.core.config import parse, to_dict
from llava.core.jsonl import ResumableJsonl
from llava.core.logs import setup_logging
from llava.core.registry import nearest
from llava.core.runtime import batched, write_run
from llava.core.types import Turn
from llava.data.images import read_image
from llava.data.storage import stored_image
from llava.pipeline.ddvqa_items import Item, JudgeSettings, ReasonSettings, list_items, row_of

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline

log = logging.getLogger(__name__)
Settings = JudgeSettings | ReasonSettings
TASKS: dict[str, type[JudgeSettings] | type[ReasonSettings]] = {"det": JudgeSettings, "exp": ReasonSettings}


def main(argv: Sequence[str] | None = None) -> int:
    """Write one of the two files; gives the exit code."""
    setup_logging()
    words = list(sys.argv[1:] if argv is None else argv)
    task = words[0] if words else ""
    try:
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}. {nearest(task, TASKS)}")
        prog = f"stage_3_inference_{task}.sh"
        settings = parse(TASKS[task], words[1:], (TASKS[task].__doc__ or "").strip(), prog=prog)
        path = answer_all(settings)
    except (ValueError, FileNotFoundError) as error:
        log.error("%s", error)
        return 2
    log.info("wrote %s", path)
    return 0


def answer_all(settings: Settings) -> Path:
    """Answer every question, batch by batch, and give the finished file; an interrupted run is continued.

    Rows: {image, prompt, text, metadata}, with a `key` for reasons. Raises ValueError or FileNotFoundError.
    """
    items = list_items(settings)
    output = Path(settings.output)
    write_run(output.with_name(f"{output.stem}_run"), to_dict(settings), None)
    images = [list(group) for _, group in groupby(items, key=lambda item: item.where)]
    batches = list(batched(images, settings.batch_size))
    pipeline = _load(settings)
    file = ResumableJsonl(output, _identity(settings, items))
    done = file.resume([sum(map(len, batch)) for batch in batches])
    console = Console(stderr=True)
    for batch in track(batches[done:], "answering", console=console, disable=not console.is_terminal):
        file.append(_rows(pipeline, batch, settings))
    return file.finish()


def _load(settings: Settings) -> Pipeline:
    """Load the explainer. Raises ValueError when its evidence is not (p_real, p_fake) and another one is to be told."""
    from transformers.utils.logging import disable_progress_bar

    from llava.explainer.prompts import layout_named  # here, so that --help loads no torch
    from llava.pipeline.pipeline import Pipeline

    disable_progress_bar()
    if settings.layout is not None:
        layout_named(settings.layout)
    told = settings.evidence_p_fake
    if told is not None and not 0.0 <= told <= 1.0:
        raise ValueError(f"--evidence_p_fake: {told} is not usable; allowed: 0 to 1.")
    pipeline = Pipeline.from_pretrained(
        settings.model_path, settings.device, settings.precision, settings.quantization, batch_size=settings.batch_size
    )
    pipeline.needed_explainer()
    names = pipeline.detector.evidence_names
    if told is not None and names != ("p_real", "p_fake"):
        raise ValueError(f"--evidence_p_fake needs the evidence (p_real, p_fake); {settings.model_path!r} has {names}.")
    return pipeline


def _rows(pipeline: Pipeline, batch: Sequence[Sequence[Item]], settings: Settings) -> Iterator[dict[str, Any]]:
    """Answer all questions about a batch of images; each image is encoded once."""
    import torch

    from llava.explainer.prompts import lay_out
    from llava.pipeline.faces import Face
    from llava.pipeline.pipeline import generation_settings

    explainer = pipeline.needed_explainer()
    words = generation_settings(settings.max_new_tokens, layout=settings.layout)
    layout = settings.layout or explainer.model.config.layout
    faces = [
        Face(image=items[0].name, pixels=read_image(stored_image(items[0].where), items[0].where)) for items in batch
    ]
    found, encoded = pipeline.look(faces)
    assert encoded is not None
    asked = [(number, item) for number, items in enumerate(batch) for item in items]
    told = settings.evidence_p_fake
    for part in batched(asked, settings.batch_size):
        conversations = [[Turn(role="human", text=item.question)] for _, item in part]
        evidence = None if told is None else torch.tensor([[1 - told, told]] * len(part))
        texts = explainer.answer(encoded.take([number for number, _ in part]), conversations, words, evidence)
        for (number, item), turns, text in zip(part, conversations, texts, strict=True):
            verdict = found[number].verdict
            metadata = {
                "p_fake": verdict.p_fake,
                "raw_p_fake": verdict.raw_p_fake,
                "label": str(verdict.label),
                "detector": pipeline.detector.name,
                "model": settings.model_path,
                **({} if told is None else {"evidence_p_fake": told}),
            }
            prompt = lay_out(turns, layout)[0].text
            yield row_of(item, prompt, text, metadata, settings.images, isinstance(settings, ReasonSettings))


def _identity(settings: Settings, items: Sequence[Item]) -> dict[str, Any]:
    """Name everything that the rows depend on; weight files by name, size and time, because they may be large."""
    from llava.core.calibration import CALIBRATION_NAME
    from llava.core.weights import CONFIG_NAME
    from llava.explainer.convert import ready

    folder = ready(settings.model_path)
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*.safetensors"))]
    parts = [(folder / CONFIG_NAME).read_text(encoding="utf-8"), repr(files), *map(repr, items)]
    if (folder / CALIBRATION_NAME).is_file():
        parts.append((folder / CALIBRATION_NAME).read_text(encoding="utf-8"))
    chosen = {name: value for name, value in to_dict(settings).items() if name != "output"}
    return {"sha256": hashlib.sha256("\n".join(parts).encode()).hexdigest(), "settings": chosen}


if __name__ == "__main__":
    raise SystemExit(main())
