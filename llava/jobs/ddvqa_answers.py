"""Answer the DD-VQA questions with an explainer: the two files that judgement and explanation are scored on.

`python -m llava.jobs.ddvqa_answers det|exp`, started by `stage_3_inference_det.sh` and `stage_3_inference_exp.sh`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.core.config import parse, setting, to_dict
from llava.core.registry import nearest
from llava.core.runtime import ResumableJsonl, batched, setup_logging, write_run
from llava.core.terminal import progress
from llava.core.types import STARTER, Turn
from llava.data.answer_texts import flipped_question, stated_label
from llava.data.conversations import PROMPT_HEAD, read_conversations
from llava.data.images import IMAGE_SUFFIXES, ImageStore, open_store, read_image, stored_image
from llava.evaluation.captions import read_jsonl
from llava.pipeline.settings import ModelSettings

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline

log = logging.getLogger(__name__)

FOLDERS = ("test", "val", "train")
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(ModelSettings):
    """What both files are made from."""

    model_path: str = setting(STARTER, "merged explainer: starter, folder, name in checkpoints/, or hub id")
    images: str = setting("utils/DDVQA_images/c40", "folder (or zip) with the image folders test and train")
    max_new_tokens: int | None = setting(None, "longest answer, in tokens; none = the explainer's own limit")
    layout: str | None = setting(None, "prompt layout by name; default: the one the model was trained with")
    limit: int | None = setting(None, "only so many questions, the first in sorted order")
    evidence_p_fake: float | None = setting(None, "tell the explainer this p_fake, whatever the detector finds")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(InferenceSettings):
    """Answers to the question of authenticity."""

    questions: str | None = setting(
        None, "jsonl of {key: {question, answer}} or a conversation json; default: `question`, of all test images"
    )
    question: str = setting("Determine the authenticity of this image.", "what is asked without a file of questions")
    output: str = setting("outputs/DDVQA/DDVQA_det_c40.jsonl", "file to write")


@dataclass(frozen=True, kw_only=True)
class ReasonSettings(InferenceSettings):
    """Answers to the questions about reasons."""

    questions: str = setting("utils/DDVQA_conversations/test/label_free.jsonl", "jsonl of {key: {question, answer}}")
    flip_stated_label: bool = setting(
        False, "ask with the other label stated, for eval_integrity.py; questions that state none are left out"
    )
    output: str = setting("outputs/DDVQA/DDVQA_exp_c40.jsonl", "file to write")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question about one image: `name` is the image's name below the image folder, `where` its place."""

    key: str
    name: str
    where: str
    question: str


def list_items(settings: JudgeSettings | ReasonSettings) -> list[Item]:
    """List the questions, sorted by image and number. Raises when an image or a question file is missing."""
    store = open_store(settings.images)
    if settings.questions is None:
        items = list(_asked_of_all(store, settings))
    elif settings.questions.endswith(".json"):
        items = list(_asked_in_conversations(store, settings.questions))
    else:
        items = list(_asked_in_file(store, settings.questions, settings.images))
    if isinstance(settings, ReasonSettings) and settings.flip_stated_label:
        items = _flipped(items, settings.questions)
    items.sort(key=lambda item: (item.name, [int(n) if n.isdigit() else n for n in _NUMBER.split(item.key)]))
    return items if settings.limit is None else items[: settings.limit]


def _flipped(items: list[Item], path: str) -> list[Item]:
    """State the other label in every question that states one. Raises ValueError when none does."""
    stating = [item for item in items if stated_label(item.question) is not None]
    if not stating:
        raise ValueError(f"{path!r}: no question states a label, so --flip_stated_label has nothing to flip.")
    if len(stating) < len(items):
        log.warning("%d of %d questions state no label and are left out", len(items) - len(stating), len(items))
    return [replace(item, question=flipped_question(item.question)) for item in stating]


def _asked_of_all(store: ImageStore, settings: JudgeSettings | ReasonSettings) -> Iterator[Item]:
    folder = FOLDERS[0]
    names = [name for name in store.names(folder) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise FileNotFoundError(f"{settings.images!r} holds no images in {folder!r}; give --images.")
    assert isinstance(settings, JudgeSettings)
    for name in names:
        where = store.locate(f"{folder}/{name}")
        assert where is not None
        yield Item(key=Path(name).stem, name=f"{folder}/{name}", where=where, question=settings.question)


def _asked_in_file(store: ImageStore, path: str, images: str) -> Iterator[Item]:
    by_stem = {Path(name).stem: f"{folder}/{name}" for folder in reversed(FOLDERS) for name in store.names(folder)}
    missing: list[str] = []
    for where, row in read_jsonl(path):
        for key, truth in row.items():
            name = by_stem.get(key.rpartition("_")[0])
            place = store.locate(name) if name else None
            if not isinstance(truth, dict) or not truth.get("question"):
                raise ValueError(f"{where}: expected {{key: {{question, answer}}}}, got {key!r}: {truth!r}.")
            if name is None or place is None:
                missing.append(key)
                continue
            yield Item(key=key, name=name, where=place, question=truth["question"])
    if missing:
        raise FileNotFoundError(
            f"{images!r} lacks the images of {len(missing)} questions of {path!r} (first: {missing[0]}); give --images."
        )


def _asked_in_conversations(store: ImageStore, path: str) -> Iterator[Item]:
    """Ask the first question of every record of a conversation json."""
    for number, record in enumerate(read_conversations(path)):
        place = store.locate(record["image"])
        if place is None:
            raise FileNotFoundError(f"{path}, record {number}: image {record['image']!r} is not there; give --images.")
        question = record["conversations"][0]["value"].removeprefix(PROMPT_HEAD)
        yield Item(key=str(record.get("id", number)), name=record["image"], where=place, question=question)


def row_of(
    item: Item, prompt: str, text: str, metadata: dict[str, Any], images: str, is_reason: bool
) -> dict[str, Any]:
    """Give a row with the published fields: reasons name the bare image, judgements its path."""
    if is_reason:
        return {"key": item.key, "image": Path(item.name).name, "prompt": prompt, "text": text, "metadata": metadata}
    folder = Path(images).as_posix()
    is_absolute = Path(images).is_absolute() or Path(item.name).is_absolute()
    path = (Path(folder) / item.name).as_posix() if is_absolute else f"./{folder}/{item.name}"
    return {"image": path, "prompt": prompt, "text": text, "metadata": metadata}


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
    for batch in progress(batches[done:], "answering", is_kept=True):
        file.append(_rows(pipeline, batch, settings))
    return file.finish()


def _load(settings: Settings) -> Pipeline:
    """Load the explainer. Raises ValueError for a p_fake that can not be told, and a layout that is unknown."""
    from transformers.utils.logging import disable_progress_bar

    from llava.explainer.prompts import layout_named  # here, so that --help loads no torch
    from llava.pipeline.pipeline import Pipeline

    disable_progress_bar()
    if settings.layout is not None:
        layout_named(settings.layout)
    p_fake = settings.evidence_p_fake
    if p_fake is not None and not 0.0 <= p_fake <= 1.0:
        raise ValueError(f"--evidence_p_fake: {p_fake} is not usable; allowed: 0 to 1.")
    pipeline = Pipeline.from_pretrained(
        settings.model_path, settings.device, settings.precision, settings.quantization, batch_size=settings.batch_size
    )
    pipeline.needed_explainer()
    return pipeline


def _rows(pipeline: Pipeline, batch: Sequence[Sequence[Item]], settings: Settings) -> Iterator[dict[str, Any]]:
    """Answer all questions about a batch of images; each image is encoded once."""
    import torch

    from llava.explainer.prompts import lay_out
    from llava.pipeline.crops import Face
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
    p_fake = settings.evidence_p_fake
    for part in batched(asked, settings.batch_size):
        conversations = [[Turn(role="human", text=item.question)] for _, item in part]
        seen = encoded.take([number for number, _ in part])
        told = None if p_fake is None else torch.full((len(part),), p_fake)
        evidence = None if told is None else pipeline.detector.with_p_fake(seen.evidence, told)
        texts = explainer.answer(seen, conversations, words, evidence)
        for (number, item), turns, text in zip(part, conversations, texts, strict=True):
            verdict = found[number].verdict
            metadata = {
                "p_fake": verdict.p_fake,
                "raw_p_fake": verdict.raw_p_fake,
                "label": str(verdict.label),
                "detector": pipeline.detector.name,
                "model": settings.model_path,
                **({} if p_fake is None else {"evidence_p_fake": p_fake}),
            }
            prompt = lay_out(turns, layout)[0].text
            yield row_of(item, prompt, text, metadata, settings.images, isinstance(settings, ReasonSettings))


def _identity(settings: Settings, items: Sequence[Item]) -> dict[str, Any]:
    """Name everything that the rows depend on; weight files by name, size and time, because they may be large."""
    from llava.core.score_map import CALIBRATION_NAME
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
