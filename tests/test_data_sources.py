"""Folders, tables, zips and conversations become records; every mistake is named."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.core.config import build
from llava.core.types import FAKE, REAL
from llava.data.conversations import ConversationSource
from llava.data.sources import DataConfig, open_source, split_of
from llava.data.stills import CsvSource, FolderSource


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), "grey").save(path)
    return path


def test_listing_sources_imports_neither_torch_data_nor_opencv() -> None:
    code = "import sys, llava.data; print([m for m in ('cv2', 'PIL', 'torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_class_folders_with_splits(class_folder: Path) -> None:
    source = open_source(DataConfig(path=str(class_folder)))
    assert Counter((r.split, r.label) for r in source.records) == {
        ("train", REAL): 8,
        ("train", FAKE): 8,
        ("val", REAL): 4,
        ("val", FAKE): 4,
        ("test", REAL): 4,
        ("test", FAKE): 4,
    }
    record = split_of(source, "val")[0]
    assert (record.id, record.class_name, record.video) == ("val/fake/00.png", "fake", "val/fake/00.png")
    sample = source.load(record)
    assert sample.image.shape == (48, 48, 3)
    assert np.array_equal(sample.image, np.asarray(Image.open(class_folder / record.id)))


def test_class_folders_without_splits_and_their_class_names(tmp_path: Path) -> None:
    for name in ("0_real/a.png", "Original/b.png", "Deepfakes/c.png", "FaceSwap/d.png"):
        picture(tmp_path / name)
    source = FolderSource(DataConfig(path=str(tmp_path)))
    assert {(r.id, r.label, r.class_name, r.split) for r in source.records} == {
        ("0_real/a.png", REAL, "real", ""),
        ("Original/b.png", REAL, "real", ""),
        ("Deepfakes/c.png", FAKE, "Deepfakes", ""),
        ("FaceSwap/d.png", FAKE, "FaceSwap", ""),
    }
    assert len(split_of(source, "all")) == 4
    with pytest.raises(ValueError, match=r"Split 'train' has no records. Splits here: '' \(4\)"):
        split_of(source, "train")


def test_folders_below_a_class_are_videos_when_they_hold_several_frames(tmp_path: Path) -> None:
    for name in ("real/clip1/0.png", "real/clip1/1.png", "real/clip2/0.png", "real/9.png", "fake/8.png"):
        picture(tmp_path / name)
    videos = {r.id: (r.video, r.group) for r in FolderSource(DataConfig(path=str(tmp_path))).records}
    assert videos["real/clip1/0.png"] == videos["real/clip1/1.png"] == ("real/clip1", "real/clip1")
    assert videos["real/clip2/0.png"][0] == "real/clip2/0.png"
    assert videos["real/9.png"][0] == "real/9.png"


def test_folder_mistakes_are_named(class_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FolderSource(DataConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        FolderSource(DataConfig(path=str(tmp_path / "empty")))
    picture(class_folder / "train" / "loose.png")
    with pytest.raises(ValueError, match=r"loose.png"):
        FolderSource(DataConfig(path=str(class_folder)))


def test_unknown_source_and_split_name_the_nearest(class_folder: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'folder'"):
        open_source(DataConfig(source="folders", path="x"))
    with pytest.raises(ValueError, match=r"'train' \(16\).*Did you mean 'train'"):
        split_of(FolderSource(DataConfig(path=str(class_folder))), "trian")


def test_settings_come_from_a_recipe() -> None:
    config = build(DataConfig, {"path": "t.csv", "source": "csv", "columns": {"group": "ids"}, "real_names": ["live"]})
    assert config.real_names == ("live",)
    assert config.columns == {"group": "ids"}
    with pytest.raises(ValueError, match="Did you mean 'face_crop'"):
        build(DataConfig, {"path": "x", "facecrop": True})


def test_csv_labels_groups_and_videos(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        picture(tmp_path / name)
    rows = [
        {"file": "0.png", "label": "real", "kind": "Original", "set": "train", "ids": "001", "clip": "a"},
        {"file": "1.png", "label": "1", "kind": "FaceSwap", "set": "train", "ids": "001_002", "clip": "b"},
        {"file": "2.png", "label": "fake", "kind": "Deepfakes", "set": "heldval", "ids": "003_002", "clip": ""},
        {"file": "3.png", "label": "", "kind": "", "set": "test", "ids": "", "clip": ""},
        {"file": "LICENSE", "label": "", "kind": "", "set": "", "ids": "", "clip": ""},
    ]
    columns = {"split": "set", "group": "ids", "video": "clip", "class_name": "kind"}
    path = table(tmp_path / "t.csv", rows)
    source = CsvSource(DataConfig(source="csv", path=str(path), columns=columns, group_ids=True))
    assert [(r.label, r.class_name, r.group, r.video) for r in source.records] == [
        (REAL, "real", "001", "a"),
        (FAKE, "FaceSwap", "001", "b"),
        (FAKE, "Deepfakes", "001", "2.png"),
        (None, "unknown", "3.png", "3.png"),
    ]
    assert source.rows_left_out == 1
    assert all(not r.tags for r in source.records)
    other = CsvSource(DataConfig(source="csv", path=str(path), columns={"class_name": "kind"}))
    assert other.records[1].tags == {"set": "train", "ids": "001_002", "clip": "b"}
    plain = CsvSource(DataConfig(source="csv", path=str(path), columns=columns))
    assert [r.group for r in plain.records] == ["001", "001_002", "003_002", "3.png"]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"file": "0.png", "label": "rael"}], {}, "line 2: label 'rael' is unknown.*columns.class_name"),
        ([{"file": "0.png", "label": "real"}] * 2, {}, "'0.png' more than once"),
        ([{"name": "0.png", "label": "real"}], {}, "no column file"),
        ([{"file": "0.png", "truth": "real"}], {}, "no column class_name or label"),
        ([{"file": "0.png", "label": "real"}], {"columns": {"group": "lable"}}, "no column 'lable' for group.*'label'"),
        ([{"file": "0.png", "label": "real"}], {"columns": {"grup": "label"}}, "unknown field 'grup'.*'group'"),
        ([{"file": "0.png", "label": "real", "class_name": "FaceSwap"}], {}, "label real but class 'FaceSwap'"),
    ],
)
def test_csv_mistakes_are_named(tmp_path: Path, rows: list[dict], settings: dict, message: str) -> None:
    picture(tmp_path / "0.png")
    path = table(tmp_path / "t.csv", rows)
    with pytest.raises(ValueError, match=message):
        CsvSource(DataConfig(source="csv", path=str(path), **settings))


def test_missing_files_are_counted_in_one_error(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    path = table(tmp_path / "t.csv", [{"file": f"{i}.png", "label": "real"} for i in range(9)])
    with pytest.raises(FileNotFoundError, match=r"8 of 9 files are missing .first: 1.png, 2.png.*5.png."):
        CsvSource(DataConfig(source="csv", path=str(path)))
    with pytest.raises(FileNotFoundError, match=r"other.csv"):
        CsvSource(DataConfig(source="csv", path=str(tmp_path / "other.csv")))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("faces_rvf", {}, {"train": (358, 358), "val": (71, 71), "test": (71, 71)}),
        ("dfdc", {}, {"train": (1700, 1700), "val": (250, 250), "test": (250, 250)}),
        (
            "three_class",
            {"columns": {"class_name": "label", "group": "group"}, "group_ids": True},
            {"train": (120, 240), "val": (30, 60), "test": (30, 60)},
        ),
        (
            "ddvqa",
            {"columns": {"group": "ffpp_ids", "class_name": "manipulation"}, "group_ids": True, "val": "heldval"},
            {"train": (353, 686), "heldval": (102, 198), "test": (72, 72), "test_c23": (84, 158)},
        ),
    ],
)
def test_shared_tables_are_read_without_leaks(shared_data: Path, name: str, settings: dict, expected: dict) -> None:
    from llava.data.splits import check_leaks

    config = DataConfig(source="csv", path=str(shared_data / name / "manifest.csv"), **settings)
    source = open_source(config)
    counts = Counter((r.split, r.label) for r in source.records)
    assert {s: (counts[s, REAL], counts[s, FAKE]) for s in {r.split for r in source.records}} == expected
    check_leaks({s: split_of(source, s) for s in (config.train, config.val, config.test)})
    assert source.load(source.records[0]).image.ndim == 3


def test_cached_and_fresh_images_are_equal_and_the_cache_saves_reading(class_folder: Path) -> None:
    fresh = FolderSource(DataConfig(path=str(class_folder)))
    cached = FolderSource(DataConfig(path=str(class_folder), cache=True))
    record = fresh.records[3]
    first = cached.load(record).image
    assert np.array_equal(first, fresh.load(record).image)
    Path(record.where).unlink()
    assert cached.load(record).image is first
    assert not first.flags.writeable
    with pytest.raises(FileNotFoundError):
        fresh.load(record)


def test_face_crop_says_what_it_found(shared_data: Path, tmp_path: Path) -> None:
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
    shutil.copy(shared_data / "public_domain" / "grace_hopper.jpg", tmp_path / "real" / "a.jpg")
    Image.new("RGB", (90, 60), "grey").save(tmp_path / "fake" / "b.png")
    source = FolderSource(DataConfig(path=str(tmp_path), face_crop=True))
    found = {r.id: source.load(r) for r in source.records}
    assert found["fake/b.png"].record.tags["face"] == "none"
    assert found["fake/b.png"].image.shape == (60, 90, 3)
    face = found["real/a.jpg"]
    assert face.record.tags["face"] == "one"
    assert face.image.shape[0] == face.image.shape[1] < 512
    assert source.face_counts == {"none": 1, "one": 1}


def talk(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\n<deepfake>\nReal?"}, {"from": "gpt", "value": "The image is fake."}]
    return {"id": "a", "image": "0.png", "conversations": turns, **changes}


def conversations(folder: Path, items: list[Any]) -> ConversationSource:
    picture(folder / "images" / "0.png")
    path = folder / "c.json"
    path.write_text(json.dumps(items))
    return ConversationSource(DataConfig(source="conversations", path=str(path), root=str(folder / "images")))


def test_conversations_are_read_with_labels_and_turns(tmp_path: Path) -> None:
    labelled = talk(label="fake", class_name="FaceSwap", group="001", tags={"region": "nose"})
    source = conversations(tmp_path, [talk(), labelled, talk(id="b", label="real", class_name="Original")])
    assert [(r.id, r.label, r.class_name, r.group) for r in source.records] == [
        ("a", None, "unknown", "0"),
        ("a#2", FAKE, "FaceSwap", "001"),
        ("b", REAL, "real", "0"),
    ]
    assert [r.tags for r in source.records[:2]] == [{"image": "0.png"}, {"region": "nose", "image": "0.png"}]
    sample = source.load(source.records[1])
    assert [(t.role, t.text) for t in sample.turns] == [
        ("human", "<image>\n<deepfake>\nReal?"),
        ("assistant", "The image is fake."),
    ]
    assert sample.image.shape == (20, 20, 3)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"id": "a", "conversations": []}, "record 1: no `image`"),
        (talk(conversations=[]), "record 1: no `conversations`"),
        (talk(conversations=[{"from": "human", "value": "Real?"}]), r"record 1: .*no <image>.*'<image>\\n<deepfake>"),
        (talk(conversations=[{"from": "user", "value": "<image>"}]), "unknown `from` 'user'. Allowed: gpt, human"),
        (talk(conversations=[{"from": "gpt", "value": "<image>"}]), "turn 0: .*must alternate"),
        (talk(conversations=talk()["conversations"][:1] * 2), "turn 1: .*must alternate"),
        (talk(label="maybe"), "record 1: label 'maybe'"),
        (talk(tags=["nose"]), r"record 1: `tags` is \['nose'\]"),
        ("text", "record 1"),
    ],
)
def test_conversation_mistakes_name_the_record(tmp_path: Path, item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversations(tmp_path, [talk(), item])


def test_conversation_files_and_images_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files are missing .first: gone.png"):
        conversations(tmp_path, [talk(), talk(image="gone.png")])
    with pytest.raises(FileNotFoundError, match="ddvqa"):
        ConversationSource(DataConfig(source="conversations", path=str(tmp_path / "no.json")))
    (tmp_path / "bad.json").write_text("[{")
    with pytest.raises(ValueError, match=r"bad.json is not valid json"):
        ConversationSource(DataConfig(source="conversations", path=str(tmp_path / "bad.json")))


@pytest.mark.parametrize("prefix", ["", "c40/"])
def test_images_may_lie_in_a_zip(tmp_path: Path, prefix: str) -> None:
    picture(tmp_path / "images" / "0.png")
    with zipfile.ZipFile(tmp_path / "c40.zip", "w") as archive:
        for name in ("train/0.png", "test/1.png"):
            archive.write(tmp_path / "images" / "0.png", f"{prefix}{name}")
    path = tmp_path / "c.json"
    path.write_text(json.dumps([talk(image="train/0.png")]))
    for root in ("c40", "c40.zip"):
        source = open_source(DataConfig(source="conversations", path=str(path), root=str(tmp_path / root)))
        assert source.load(source.records[0]).image.shape == (20, 20, 3)
    with pytest.raises(FileNotFoundError, match=r"c41.zip"):
        open_source(DataConfig(source="conversations", path=str(path), root=str(tmp_path / "c41")))
