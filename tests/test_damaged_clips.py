"""Clips that cannot be decoded: left out of training and scores with a count and a reason, and nothing else is."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import clip_detectors
import numpy as np
import pytest
import torch
from clips import grey, write_clip
from PIL import Image

from llava.core.config import build
from llava.core.runtime import item_rng
from llava.core.types import InputSpec, Record
from llava.data.dataset import DetectionDataset, collate
from llava.data.images import UnreadableImage, UnreadableVideo
from llava.data.sources import DataConfig, open_source, split_of
from llava.data.splits import group_hashes, near_duplicates
from llava.detectors import DETECTORS
from llava.detectors.base import create, load
from llava.train import stage_1
from llava.train.evaluate import ScoreConfig, score_split
from llava.train.recipe import PhaseData, Recipe, open_data
from llava.train.scoring import score, usable_data

CPU = torch.device("cpu")
CROP = InputSpec(size=16, views=("plain", "flip"), **clip_detectors.BLACK_AND_WHITE)
# What is left of a file, which part of it (an MP4 has its index first), and the words that tell it.
UNOPENED = ("cut.mkv", 0.05, "a video without a frame that has a time")
UNDECODED = ("cut.mp4", 0.05, "frame 0 is damaged, and no sound one follows it")
SHORT = ("short.mp4", 0.8)


class CropDetector(clip_detectors.EnergyDetector):
    """The energy of the image crop."""

    name = "crop"

    @property
    def inputs(self) -> dict[str, InputSpec]:
        return {"pixels": CROP}

    def forward(self, pixels, labels=None):
        return self.answer(pixels, labels)


clip_detectors.add_to_table()
DETECTORS.add("crop", "test_damaged_clips:CropDetector")


def noise(seed: int, count: int = 10) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(count)]


def write_part(path: Path, part: float, seed: int = 0) -> Path:
    """Write a clip of ten frames of noise and cut its file off."""
    write_clip(path, noise(seed), g="4", bf="0")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three splits of three sound clips a class, in each one that cannot be read, in training one cut short."""
    root = tmp_path_factory.mktemp("damaged")
    for number, split in enumerate(("train", "val", "test")):
        for label, class_name in enumerate(("real", "fake")):
            (root / split / class_name).mkdir(parents=True)
            for clip in range(3):
                place, seed = root / split / class_name / f"{clip}.mp4", 100 * number + 10 * label + clip
                write_clip(place, [frame // (1 + 3 * label) for frame in noise(seed)])
    for place, (name, part, _) in (("train/real", UNDECODED), ("val/fake", UNOPENED), ("test/fake", UNDECODED)):
        write_part(root / place / name, part)
    write_part(root / "train" / "fake" / SHORT[0], SHORT[1])
    return root


def own(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(source="clips", path=str(root), frames=2, **changes)


def named(records: Sequence[Record], name: str) -> Record:
    return next(record for record in records if record.video.endswith(name))


# ---- training and scores --------------------------------------------------------------------------------------------


def test_a_training_goes_on_without_what_cannot_be_decoded(clips: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    values: dict[str, Any] = {
        "detector": "crop",
        "data": {"source": "clips", "path": str(clips), "frames": 2},
        "output_dir": str(tmp_path / "out"),
        "epochs": 2,
        "batch_size": 4,
        "workers": 0,
        "precision": "fp32",
        "resamples": 20,
        "collapse": {"min_recall": 0, "min_sd": 0},
    }
    results = stage_1.train(build(Recipe, values))
    for count, place, use, (name, _, why) in (
        ("1 of 8", "train/real", "trained on", UNDECODED),
        ("1 of 13", "val/fake", "validated on", UNOPENED),
        ("1 of 13", "test/fake", "tested on", UNDECODED),
        ("1 of 13", "val/fake", "scored", UNOPENED),
    ):
        record = f"{place}/{name}" + "#0" * (use != "trained on")
        assert f"{count} records cannot be {use} (first: '{record}': {clips / place / name}: {why}); th" in caplog.text
    assert results["near_duplicates"] is not None
    trained_on = load(tmp_path / "out").trained_on
    assert group_hashes(["train/real/cut.mp4"]).isdisjoint(trained_on)
    assert group_hashes(["train/fake/short.mp4", "train/real/0.mp4"]) <= trained_on
    for split in ("val", "test"):
        rows = list(csv.DictReader((tmp_path / "out" / f"{split}.csv").open()))
        assert len(rows) == 12 and not any("cut" in row["id"] for row in rows)
    caplog.clear()
    report = score_split(
        ScoreConfig(model=str(tmp_path / "out"), data=own(clips), split="test", output_dir=str(tmp_path / "scores"))
    )
    assert report["frame"]["auc"]["n"] == 6 and "1 of 13 records cannot be scored (first: 'test/fake/cut" in caplog.text


def test_detectors_of_frames_leave_it_out_too(clips: Path, caplog) -> None:
    torch.manual_seed(0)
    detector, data = create("two_frame", {"size": 8}), open_data(own(clips), seed=0)
    whole = usable_data(detector, data)
    assert [len(part) for part in (data.train, whole.train, whole.val, whole.test)] == [8, 7, 12, 12]
    assert f"{clips}/val/fake/cut.mkv: {UNOPENED[2]}); they are left out" in caplog.text
    assert len(score(detector, data.source, data.test, CPU)) == 12


def test_no_class_vanishes_with_damaged_clips(clips: Path) -> None:
    data = open_data(own(clips), seed=0)
    left = [r for r in data.val if r.label == 0 or r.video.endswith("cut.mkv")]
    with pytest.raises(ValueError, match="No record that can be validated on is 'fake'; add some"):
        usable_data(create("crop", {}), replace(data, val=left))
    with pytest.raises(ValueError, match=rf"1 of 1 records cannot be scored .*{UNOPENED[2]}\); give data"):
        score(create("crop", {}), data.source, [named(left, "cut.mkv")], CPU)


def test_a_clip_that_breaks_off_gives_what_can_be_decoded(clips: Path) -> None:
    """Its last frame breaks off: who draws that one draws again, and each epoch gives the same one again."""
    source = open_source(own(clips))
    record = named(source.records, "short.mp4")
    assert source.why_unreadable(record) == ""
    dataset = DetectionDataset(source, [record], {"pixels": CROP})
    broken = []
    for epoch in range(30):
        try:
            source.load(record, item_rng(0, epoch, 0))
        except UnreadableVideo:
            broken.append(epoch)
    assert broken
    for epoch in broken:
        item = dataset[epoch, 0]["pixels"]
        assert item.isfinite().all() and torch.equal(item, dataset[epoch, 0]["pixels"])


# ---- one record -----------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_decoded_says_why(clips: Path) -> None:
    source = open_source(own(clips, class_names={"fake": "swap"}))
    bad, good = named(source.records, "val/fake/cut.mkv"), named(source.records, "val/fake/0.mp4")
    why = f"{clips}/val/fake/cut.mkv: {UNOPENED[2]}"
    assert (source.why_unreadable(bad), source.why_unreadable(good)) == (why, "")
    assert source.why_unreadable(named(source.records, "test/fake/cut.mp4")).endswith(UNDECODED[2])
    with pytest.raises(UnreadableVideo, match=UNOPENED[2]):
        source.load(bad)
    both = {"records": [good, bad], "inputs": {"pixels": CROP, "one": replace(CROP, views=("plain",))}}
    told = DetectionDataset(source, **both, with_views=True, mask_grid=2, with_reasons=True)
    batch = collate([told[0], told[1]])
    assert batch["lacks"] == ["", why] and batch["pixels"].shape == batch["one"].shape == (2, 2, 3, 16, 16)
    assert batch["pixels"][0].isfinite().all() and batch["one"][1].isnan().all() and (batch["masks"] == -1).all()
    dataset = DetectionDataset(source, **both)
    assert (dataset.why_unusable(0), dataset.why_unusable(1)) == ("", why)
    with pytest.raises(ValueError, match=rf"{UNOPENED[2]}; leave such records out"):
        dataset[1]


def test_frames_that_are_too_small_are_a_reason(tmp_path: Path) -> None:
    for class_name in ("real", "fake"):
        (tmp_path / class_name).mkdir()
        write_clip(tmp_path / class_name / "a.mkv", [grey(1, 8, 8)], codec="ffv1")
    source = open_source(own(tmp_path))
    assert "8x8 pixels is too small" in source.why_unreadable(source.records[0])


def test_public_sets_leave_it_out(tmp_path: Path, caplog) -> None:
    labels = {}
    for number in range(4):
        write_clip(tmp_path / f"{number}.mp4", noise(number))
        labels[f"{number}.mp4"] = {"label": "FAKE", "original": "o.mp4"} if number % 2 else {"label": "REAL"}
    write_part(tmp_path / "0.mp4", UNDECODED[1])
    (tmp_path / "metadata.json").write_text(json.dumps(labels))
    source = open_source(DataConfig(source="dfdc", path=str(tmp_path), frames=2))
    records = list(source.records)
    usable_data(create("crop", {}), PhaseData(source, records, records, records))
    assert f"1 of 4 records cannot be trained on (first: '0#0': {tmp_path}/0.mp4: frame 0 is damaged" in caplog.text
    bad, good = named(records, "0"), named(records, "1")
    assert near_duplicates(source, {"train": [bad, good], "val": [good]}) == [("1", "1", 0)]


# ---- what stays an error --------------------------------------------------------------------------------------------


def test_a_still_that_cannot_be_read_is_an_error_as_before(class_folder: Path) -> None:
    data = open_data(DataConfig(path=str(class_folder)), seed=0)
    path = Path(data.val[0].where)
    path.write_bytes(path.read_bytes()[:60])
    detector = create("crop", {})
    assert usable_data(detector, data) == data
    with pytest.raises(UnreadableImage, match=path.name) as caught:
        score(detector, data.source, data.val, CPU)
    assert not isinstance(caught.value, UnreadableVideo)


def test_a_damaged_picture_in_a_folder_of_frames_is_an_error_as_before(tmp_path: Path) -> None:
    labels = {"0.mp4": {"label": "REAL"}, "1.mp4": {"label": "FAKE", "original": "0.mp4"}}
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        Image.fromarray(grey(1)).save(tmp_path / name / "0.png")
    (tmp_path / "0" / "0.png").write_bytes(b"no picture")
    (tmp_path / "metadata.json").write_text(json.dumps(labels))
    source = open_source(DataConfig(source="dfdc", path=str(tmp_path), frames=1))
    record = named(split_of(source, "train"), "0")
    assert source.why_unreadable(record) == ""
    with pytest.raises(UnreadableImage, match=r"0\.png: not an image"):
        DetectionDataset(source, [record], {"pixels": CROP})[0]
