"""Videos of one's own as a source: class folders and tables of video files."""

from __future__ import annotations

import csv
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import grey, write_clip
from PIL import Image

from llava.core.runtime import item_rng
from llava.data.sources import DataConfig, open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    for split in ("train", "val"):
        for start, class_name in ((0, "real"), (100, "face_swap")):
            (root / split / class_name).mkdir(parents=True)
            for suffix in ("mp4", "mkv"):
                path = root / split / class_name / f"clip.{suffix}"
                write_clip(str(path), [grey(start + 8 * n) for n in range(6)])
    (root / "val" / "real" / "poster.png").write_bytes(b"no video, so it is none of its business")
    return root


def opened(path: Path, **changes: Any) -> Any:
    return open_source(DataConfig(source="clips", path=str(path), frames=3, **changes))


def test_a_folder_of_videos_is_a_record_a_training_clip_and_frames_of_all_others(folder: Path) -> None:
    source = opened(folder)
    train = [r for r in source.records if r.split == "train"]
    val = [r for r in source.records if r.split == "val"]
    assert [(r.video, r.label, r.class_name) for r in train] == [
        (f"train/{name}/clip.{suffix}", label, name)
        for name, label in (("face_swap", 1), ("real", 0))
        for suffix in ("mkv", "mp4")
    ]
    assert len(val) == 4 * 3 and len({r.video for r in val}) == 4 and len({r.id for r in val}) == 12
    assert all(r.group == r.video for r in source.records)
    levels = [round(float(source.load(r).image.mean())) for r in val if r.video == "val/real/clip.mp4"]
    assert levels == sorted(levels) and levels[0] < levels[-1] < 60, "three frames of this clip, in their order"
    drawn = {float(source.load(train[0], item_rng(0, epoch, 0)).image.mean()) for epoch in range(20)}
    assert len(drawn) > 3, "any frame of a training clip"


def test_videos_in_one_folder_are_none_of_each_others_frames(folder: Path, tmp_path: Path) -> None:
    """Pictures below the class folder are frames of one video, videos there are not."""
    for place in ("real/anna", "fake/bert"):
        (tmp_path / place).mkdir(parents=True)
        for name in ("1.mp4", "2.mp4"):
            (tmp_path / place / name).write_bytes((folder / "val" / "real" / "clip.mp4").read_bytes())
            Image.new("RGB", (32, 32)).save(tmp_path / place / f"{name}.png")
    assert {r.video for r in opened(tmp_path).records} == {
        f"{place}/{n}.mp4" for place in ("real/anna", "fake/bert") for n in (1, 2)
    }
    assert {r.video for r in open_source(DataConfig(path=str(tmp_path))).records} == {"real/anna", "fake/bert"}


def test_a_table_of_videos_says_class_video_and_group(folder: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "class_name", "split", "group"])
        rows.writerow(["train/real/clip.mp4", "real", "test", "anna"])
        rows.writerow(["train/face_swap/clip.mp4", "face_swap", "test", "anna"])
        rows.writerow(["val/real/poster.png", "real", "test", "anna"])
    source = opened(table, root=str(folder))
    assert "1 of 3 rows name no video and are left out" in caplog.text
    assert len(source.records) == 6 and {r.group for r in source.records} == {"anna"}
    assert {(r.label, r.class_name) for r in source.records} == {(0, "real"), (1, "face_swap")}
    assert np.asarray(source.load(source.records[0]).image).shape == (48, 64, 3)


def test_what_is_no_video_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    with pytest.raises(ValueError, match=r"holds no videos; expected <split>/<class>/\*.mp4"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="masks: videos have none"):
        opened(folder, masks=True)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(folder / "val" / "real" / "clip.mp4", "clip.mp4")
    (tmp_path / "t.csv").write_text("file,label\nclip.mp4,real\n")
    with pytest.raises(ValueError, match=r"clip.mp4' lies in a zip, where no video can be read; unpack it"):
        opened(tmp_path / "t.csv", root=str(tmp_path / "a.zip"))
    (tmp_path / "none.csv").write_text("file,label\nclip.jpg,real\n")
    with pytest.raises(ValueError, match=r"names no video; known are \.mp4"):
        opened(tmp_path / "none.csv")
