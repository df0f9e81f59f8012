"""DD-VQA annotation files to training and test files for the explainer, in four styles."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.core.config import setting
from llava.data.answer_texts import (
    VERDICT_QUESTION,
    Pair,
    label_free_answer,
    label_free_question,
    published_pair,
    region_of,
    verdict_sentence,
)
from llava.data.conversations import (
    Row,
    Subject,
    shuffled_dialogue,
    single_questions,
    write_conversations,
    write_ground_truth,
)
from llava.data.images import ImageStore, open_store
from llava.data.splits import choose_groups, connected_groups

log = logging.getLogger(__name__)

STYLES = ("published", "label_free", "verdict_only", "dialogue")
# First part of a DD-VQA image name, as the data set's own README numbers the FaceForensics++ methods.
MANIPULATIONS = {
    "0": "Deepfakes",
    "1": "Face2Face",
    "2": "FaceShifter",
    "3": "FaceSwap",
    "5": "real",
    "6": "NeuralTextures",
}
Annotation = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DdvqaConfig:
    """Say where annotations and images lie, which images validate, and where the files go."""

    annotations: str = setting(help="DD-VQA folder with train_set/*.json and test_set/*.json")
    output: str = setting(help="folder to write; it gets train/, val/ and test/")
    images: str = setting("utils/DDVQA_images/c40", "folder (or zip) with the image folders train and test")
    val_list: str | None = setting(None, "text file with one training image name per line that becomes validation")
    val_fraction: float = setting(0.2, "part of the training images to validate on when no val_list is given")
    seed: int = setting(0, "seed of the questions' order in dialogues, and of the validation split without a val_list")


@dataclass(frozen=True)
class _Face(Subject):
    """One annotated image."""

    annotation: Annotation

    def said(self) -> Iterable[Pair]:
        """Give (question, answer) of every annotator, question by question."""
        for number in sorted(self.annotation, key=int):
            entry = self.annotation[number]
            yield from ((entry["question"], answer) for answer in entry["answer"])

    def label_free(self) -> list[Pair]:
        """Give (question, answer) like `said`, in label-free words."""
        return [(label_free_question(region_of(q)), label_free_answer(a, self.label_name)) for q, a in self.said()]


def build_ddvqa(config: DdvqaConfig) -> dict[str, int]:
    """Write {train,val,test}/{published,label_free,verdict_only,dialogue}.json, and for val and test what to score by.

    That is a .jsonl of every style but dialogue, whose answers are those of label_free. Images in the files are named
    `train/<file>` or `test/<file>`, relative to `images`. Groups are connected components of FaceForensics++ video ids
    over training and test images. Returns the number of conversations or truths per file, and of annotated images left
    out because `images` lacks them. Raises ValueError or FileNotFoundError.
    """
    store = open_store(config.images)
    annotated = {part: _annotations(Path(config.annotations) / f"{part}_set") for part in ("train", "test")}
    faces, left_out = _faces(annotated, store, config.images)
    validating = _validation_names(config, faces["train"])
    splits = {
        "train": [f for f in faces["train"] if f.key not in validating],
        "val": [f for f in faces["train"] if f.key in validating],
        "test": faces["test"],
    }
    counts = {}
    for split, members in splits.items():
        for style in STYLES:
            rows = [row for face in members for row in _rows(face, style, config.seed)]
            path = Path(config.output) / split / f"{style}.json"
            counts[f"{split}/{path.name}"] = write_conversations(path, rows)
            if split != "train" and style != "dialogue":
                path = path.with_suffix(".jsonl")
                counts[f"{split}/{path.name}"] = write_ground_truth(path, rows, merge=style != "published")
    counts["annotated_without_image"] = left_out
    log.info("wrote %s: %s", config.output, counts)
    return counts


def _annotations(folder: Path) -> dict[str, Annotation]:
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no annotation files; give `annotations`, the DD-VQA folder with train_set and "
            "test_set (one json per manipulation)."
        )
    found: dict[str, Annotation] = {}
    for path in files:
        found.update(json.loads(path.read_text(encoding="utf-8")))
    return found


def _faces(
    annotated: Mapping[str, Mapping[str, Annotation]], store: ImageStore, images: str
) -> tuple[dict[str, list[_Face]], int]:
    files = {part: {Path(name).stem: name for name in store.names(part)} for part in annotated}
    empty = [part for part, names in files.items() if not names]
    if empty:
        raise FileNotFoundError(f"{images!r} holds no images in {empty[0]!r}; expected the folders train and test.")
    keys = [(part, key) for part in annotated for key in sorted(files[part].keys() & annotated[part].keys())]
    groups = connected_groups([key.split("_")[1:] for _, key in keys])
    faces: dict[str, list[_Face]] = {part: [] for part in annotated}
    for (part, key), group in zip(keys, groups, strict=True):
        file = f"{part}/{files[part][key]}"
        faces[part].append(_Face(key, file, _class_of(key), group, annotated[part][key]))
    left_out = sum(len(names) for names in annotated.values()) - len(keys)
    return faces, left_out


def _class_of(key: str) -> str:
    method = key.split("_")[0]
    if method not in MANIPULATIONS:
        raise ValueError(f"Image {key!r}: unknown manipulation number {method!r}; allowed: {', '.join(MANIPULATIONS)}.")
    return MANIPULATIONS[method]


def _validation_names(config: DdvqaConfig, faces: Sequence[_Face]) -> set[str]:
    """Give the keys that validate, from the list or by choosing whole groups. Refuses a list that cuts a group."""
    if config.val_list is None:
        chosen = choose_groups([f.group for f in faces], config.val_fraction, config.seed)
        return {f.key for f in faces if f.group in chosen}
    path = Path(config.val_list)
    if not path.is_file():
        raise FileNotFoundError(f"val_list {config.val_list!r} does not exist; give a text file of image names.")
    wanted = {Path(line.strip()).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    unknown = sorted(wanted - {f.key for f in faces})
    if unknown:
        raise ValueError(f"{config.val_list}: {len(unknown)} names are no training images here (first: {unknown[0]}).")
    cut = {f.group for f in faces if f.key in wanted} & {f.group for f in faces if f.key not in wanted}
    if cut:
        raise ValueError(
            f"{config.val_list}: {len(cut)} groups stand in training and validation (first id: {min(cut)}); "
            "list all images that share a video id, or none."
        )
    return wanted


def _rows(face: _Face, style: str, seed: int) -> list[Row]:
    """Give the conversations about one image in one style."""
    if style == "dialogue":
        return [shuffled_dialogue(face, pairs, number, seed) for number, pairs in enumerate(_rounds(face))]
    if style == "verdict_only":
        return single_questions(face, [(VERDICT_QUESTION, verdict_sentence(face.label_name))])
    if style == "label_free":
        return single_questions(face, face.label_free())
    return single_questions(face, [published_pair(q, a, face.label_name) for q, a in face.said()])


def _rounds(face: _Face) -> Iterator[list[Pair]]:
    """Give the questions of dialogues about one image: round j asks all that has a j-th answer, and for the verdict.

    They are put in random order later, so that any question is the first one somewhere.
    """
    answers: dict[str, list[str]] = {}
    for question, answer in face.label_free():
        answers.setdefault(question, []).append(answer)
    for number in range(max(map(len, answers.values()), default=0)):
        pairs = [(VERDICT_QUESTION, verdict_sentence(face.label_name))]
        yield pairs + [(question, said[number]) for question, said in answers.items() if number < len(said)]
