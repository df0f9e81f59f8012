"""Public sets of videos in their own layouts: what is listed, how it is grouped and split, which frames are read."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import grey, write_clip, write_damaged
from ffpp_world import SPLITS, write_splits
from PIL import Image
from torch.utils.data import DataLoader

from llava.core.types import InputSpec, Record
from llava.data.dataset import DetectionDataset, collate
from llava.data.frames import FrameReader, frame_files
from llava.data.images import UnreadableImage
from llava.data.public_sets import KINDS, LISTINGS, VAL_PART, ListedVideo, VideoTree, keys_of
from llava.data.sources import DataConfig, open_source, split_of
from llava.data.splits import LeakError
from llava.evaluation.predictions import from_records
from llava.evaluation.published_csv import published_ids
from llava.train.recipe import open_data

Listed = dict[str, ListedVideo]


def write_frames(folder: Path, count: int = 5) -> Path:
    """Write pictures 000.png, 001.png, ... of which number n has the grey level n."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(grey(number, 16, 16)).save(folder / f"{number:03d}.png")
    return folder


def touch(path: Path) -> Path:
    """Write a file that only a listing looks at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def listed(name: str, root: Path, **settings: Any) -> Listed:
    videos = LISTINGS[name](VideoTree(root), DataConfig(source=name, path=str(root), **settings))
    by_name = {video.name: video for video in videos}
    assert len(by_name) == len(videos)
    return by_name


def source_of(name: str, root: Path, **settings: Any) -> Any:
    return open_source(DataConfig(source=name, path=str(root), **settings))


def seen(source: Any, record: Record, rng: np.random.Generator | None = None) -> int:
    """Give the number of the frame by its grey level."""
    return int(source.load(record, rng).image.mean().round())


# ---- FaceForensics++ ------------------------------------------------------------------------------------------------


def ffpp_folder(root: Path, kind: str, compression: str = "c40") -> Path:
    base = "original_sequences/youtube" if kind == "original" else f"manipulated_sequences/{kind}"
    return root / base / compression


@pytest.fixture
def ffpp(tmp_path: Path) -> Path:
    """Write face crops of originals and Deepfakes as DeepfakeBench does, the splits in the root."""
    root = write_splits(tmp_path / "FaceForensics++")
    for kind in ("original", "Deepfakes"):
        for pairs in SPLITS.values():
            for key in keys_of(kind, pairs):
                write_frames(ffpp_folder(root, kind) / "frames" / key)
    return root


def test_faceforensics_is_listed_by_its_official_splits(ffpp: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    videos = listed("ffpp", ffpp)
    assert Counter((v.split, v.class_name) for v in videos.values()) == {
        ("train", "real"): 4, ("train", "Deepfakes"): 4, ("val", "real"): 2, ("val", "Deepfakes"): 2,
        ("test", "real"): 2, ("test", "Deepfakes"): 2,
    }  # fmt: skip
    assert videos["Deepfakes/054_071"] == ListedVideo(
        name="Deepfakes/054_071", place="manipulated_sequences/Deepfakes/c40/054_071", label=1, class_name="Deepfakes",
        split="train", group="054",
    )  # fmt: skip
    assert videos["original/071"].group == "054" and videos["original/071"].label == 0
    assert "absent: Face2Face, FaceSwap, NeuralTextures, FaceShifter" in caplog.text


def test_every_kind_of_fake_is_found_in_files(tmp_path: Path) -> None:
    write_splits(tmp_path / "splits")
    for kind in KINDS:
        touch(ffpp_folder(tmp_path, kind, "c23") / "videos" / "720.mp4")
    videos = listed("ffpp", tmp_path, splits=str(tmp_path / "splits"), compression="c23")
    assert Counter(v.class_name for v in videos.values()) == {"real": 8} | dict.fromkeys(KINDS[1:], 8)
    with pytest.raises(FileNotFoundError, match=r"original_sequences/youtube/c40' does not exist: no real faces"):
        listed("ffpp", tmp_path, splits=str(tmp_path / "splits"))
    with pytest.raises(FileNotFoundError, match=r"train\.json' does not exist"):
        listed("ffpp", tmp_path, compression="c23")


def test_frames_of_a_listing_can_be_trained_and_published(ffpp: Path) -> None:
    config = DataConfig(source="ffpp", path=str(ffpp), frames=3)
    data = open_data(config, seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4 * 3, 4 * 3)
    assert [r.id for r in data.test][:3] == ["original/953#0", "original/953#2", "original/953#4"]
    assert [seen(data.source, r) for r in data.test][:3] == [0, 2, 4]
    assert published_ids(data.test)[-1] == "1_974_953_4"
    spec = InputSpec(size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    dataset = DetectionDataset(data.source, data.train, {"pixels": spec}, seed=3)
    one, two = (
        [batch["pixels"] for batch in DataLoader(dataset, batch_size=4, num_workers=n, collate_fn=collate)]
        for n in (0, 2)
    )
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert len({float(x.mean()) for batch in one for x in batch}) > 1, "any frame may be drawn"
    assert from_records(data.test, [0.5] * 12).videos[0] == "original/953"


# ---- Celeb-DF v2 ----------------------------------------------------------------------------------------------------

CELEB_TESTS = "1 YouTube-real/00170.mp4\n1 Celeb-real/id0_0000.mp4\n\n0 Celeb-synthesis/id0_id1_0000.mp4\n"
CELEB_TRAIN = ("Celeb-real/id0_0001", "Celeb-real/id2_0000", "Celeb-synthesis/id2_id3_0000", "YouTube-real/00001")


def celebdf(root: Path, tests: str = CELEB_TESTS, train: tuple[str, ...] = CELEB_TRAIN, form: str = "{}.mp4") -> Path:
    """Write empty files of the listed videos and of those for training, and the list."""
    names = [line.split()[1].removesuffix(".mp4") for line in tests.splitlines() if line]
    for name in (*names, *train):
        touch(root / form.format(name))
    (root / "List_of_testing_videos.txt").write_text(tests)
    return root


def test_celebdf_says_one_for_real_and_who_is_in_it(tmp_path: Path) -> None:
    videos = listed("celebdf_v2", celebdf(tmp_path))
    assert {v.name: (v.label, v.class_name, v.split, v.group) for v in videos.values() if v.split == "test"} == {
        "YouTube-real/00170": (0, "real", "test", "YouTube-real/00170"),
        "Celeb-real/id0_0000": (0, "real", "test", "id0"),
        "Celeb-synthesis/id0_id1_0000": (1, "Celeb-synthesis", "test", "id0"),
    }
    assert {name for name, v in videos.items() if v.split != "test"} == set(CELEB_TRAIN)
    assert videos["Celeb-synthesis/id2_id3_0000"].group == videos["Celeb-real/id2_0000"].group == "id2"
    assert videos["Celeb-real/id0_0001"].group == "id0", "the same person as in the test list"
    lender = celebdf(tmp_path / "lender", train=("Celeb-real/id1_0005",))
    assert listed("celebdf_v2", lender)["Celeb-real/id1_0005"].group == "id0", "whose face a fake in the list shows"


@pytest.mark.parametrize(
    "form", ["{0[0]}/{0[1]}.mp4", "{0[0]}/videos/{0[1]}.mp4", "{0[0]}/frames/{0[1]}/000.png", "{0[0]}/{0[1]}/000.png"]
)
def test_the_usual_layouts_are_the_same_set(form: str, tmp_path: Path) -> None:
    (tmp_path / "List_of_testing_videos.txt").write_text(CELEB_TESTS)
    names = ["YouTube-real/00170", "Celeb-real/id0_0000", "Celeb-synthesis/id0_id1_0000", *CELEB_TRAIN]
    files = {name: touch(tmp_path / form.format(name.split("/"))) for name in names}
    assert set(listed("celebdf_v2", tmp_path)) == set(names)
    places = VideoTree(tmp_path).locate(names)
    assert places == {name: file if file.suffix == ".mp4" else file.parent for name, file in files.items()}


def test_crops_and_whole_frames_are_not_mixed(tmp_path: Path) -> None:
    root = celebdf(tmp_path)
    write_frames(root / "YouTube-real" / "frames" / "00170")
    (root / "YouTube-real" / "frames" / "00001").mkdir()
    tree = VideoTree(root)
    assert set(tree.locate(list(listed("celebdf_v2", root)))) == {"YouTube-real/00170"}
    message = r"6 videos that the splits name are missing.*Celeb-real/id0_0000"
    with pytest.raises(ValueError, match=message):
        source_of("celebdf_v2", root)


def test_missing_videos_are_counted_and_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "List_of_testing_videos.txt").write_text(CELEB_TESTS)
    for name in ("Celeb-real/id0_0000", "Celeb-synthesis/id0_id1_0000", "Celeb-real/id2_0000"):
        write_frames(tmp_path / name)
    with pytest.raises(ValueError, match=r"1 videos .* are missing.*YouTube-real/00170.*allow_missing"):
        source_of("celebdf_v2", tmp_path)
    source = source_of("celebdf_v2", tmp_path, allow_missing=True, frames=2)
    assert "lacks 1 videos that the splits name: YouTube-real/00170" in caplog.text
    assert [r.id for r in source.records if r.split == "test"] == [
        f"{name}#{n}" for name in ("Celeb-real/id0_0000", "Celeb-synthesis/id0_id1_0000") for n in (1, 3)
    ]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("0 Celeb-real/id0_0000.mp4\n", "line 1: '0 Celeb-real/id0_0000.mp4' is no `1 REAL_VIDEO`"),
        ("1 Celeb-synthesis/id0_id1_0000.mp4\n", "line 1: '1 Celeb-synthesis/id0_id1_0000.mp4'"),
        ("1 YouTube-real/00001.mp4\n2 YouTube-real/00170.mp4\n", "line 2: '2 YouTube-real/00170.mp4'"),
        ("1 elsewhere/00170.mp4\n", "line 1: '1 elsewhere/00170.mp4'"),
        ("YouTube-real/00170.mp4\n", "line 1: 'YouTube-real/00170.mp4'"),
        ("1 Celeb-real/00170.mp4\n", "'Celeb-real/00170' does not say who is in it"),
    ],
)
def test_a_test_list_of_another_form_is_refused(tests: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "List_of_testing_videos.txt").write_text(tests)
    with pytest.raises(ValueError, match=re.escape(message)):
        listed("celebdf_v2", tmp_path)


def test_without_its_list_celebdf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"List_of_testing_videos\.txt' does not exist"):
        listed("celebdf_v2", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        source_of("celebdf_v2", tmp_path / "nowhere")


def test_validation_is_whole_groups_the_same_ones_every_time(tmp_path: Path) -> None:
    """Twelve people with a real and a fake each can be cut; one crowd of 8 videos, a quarter and more, cannot."""
    people = [f"Celeb-real/id{i}_0000" for i in range(20, 32)]
    fakes = [f"Celeb-synthesis/id{i}_id{i + 100}_0000" for i in range(20, 32)]
    crowd = [f"Celeb-synthesis/id{i}_id{i + 1}_0000" for i in range(10)]
    root = celebdf(tmp_path, train=(*people, *fakes, *crowd))
    videos = listed("celebdf_v2", root)
    val = [v for v in videos.values() if v.split == "val"]
    assert len(val) == 4 and {v.label for v in val} == {0, 1}, "10 % of 34, in pairs"
    groups = {split: {v.group for v in videos.values() if v.split == split} for split in ("train", "val", "test")}
    assert not groups["val"] & groups["train"] and not groups["val"] & groups["test"]
    assert videos == listed("celebdf_v2", root) and pytest.approx(0.1) == VAL_PART


def test_groups_too_large_to_cut_leave_no_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    videos = listed("celebdf_v2", celebdf(tmp_path, train=("Celeb-real/id5_0000", "Celeb-synthesis/id5_id6_0000")))
    assert Counter(v.split for v in videos.values()) == {"test": 3, "train": 2}
    assert "no validation split: 2 training videos" in caplog.text


def test_people_of_the_test_list_are_a_leak_unless_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    people = [name for i in range(20, 32) for name in (f"Celeb-real/id{i}_0000", f"Celeb-synthesis/id{i}_id{i}9_0000")]
    root = tmp_path / "set"
    for name in ("YouTube-real/00170", "Celeb-real/id0_0000", "Celeb-synthesis/id0_id1_0000", "Celeb-real/id0_0001"):
        write_frames(root / name, 1)
    for name in people:
        write_frames(root / name, 1)
    (root / "List_of_testing_videos.txt").write_text(CELEB_TESTS)
    config = DataConfig(source="celebdf_v2", path=str(root))
    with pytest.raises(LeakError, match=r"'train' and 'test' share 1 groups \('id0'"):
        open_data(config, 0)
    data = open_data(DataConfig(source="celebdf_v2", path=str(root), allow_leaks=True), 0)
    assert len(data.test) == 3 and "trained all the same, by data.allow_leaks: Leak between splits" in caplog.text


# ---- DFDC -----------------------------------------------------------------------------------------------------------


def dfdc_part(folder: Path, videos: dict[str, dict[str, str]], form: str = "{}.mp4") -> None:
    for name in videos:
        touch(folder / form.format(name.removesuffix(".mp4")))
    (folder / "metadata.json").write_text(json.dumps(videos))


def real() -> dict[str, str]:
    return {"label": "REAL", "split": "train"}


def fake_of(original: str) -> dict[str, str]:
    return {"label": "FAKE", "split": "train", "original": original}


@pytest.mark.parametrize("base", ["", "train"])
def test_dfdc_is_read_from_parts_and_labels(base: str, tmp_path: Path) -> None:
    for part in range(2):
        videos = {f"r{part}{i}.mp4": real() for i in range(10)}
        videos |= {f"f{part}{i}.mp4": fake_of(f"r{part}{i}.mp4") for i in range(10)}
        dfdc_part(tmp_path / base / f"dfdc_train_part_{part}", videos)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "labels.csv").write_text("filename,label\nx.mp4,1\ny.mp4,0\n")
    videos = listed("dfdc", tmp_path)
    place = f"{base}/dfdc_train_part_1/f13".lstrip("/")
    assert (videos[place].label, videos[place].class_name, videos[place].group) == (1, "fake", "r13")
    assert videos[place].split == videos[place.replace("f13", "r13")].split
    assert Counter((v.split, v.label) for v in videos.values()) == {
        ("train", 0): 18, ("train", 1): 18, ("val", 0): 2, ("val", 1): 2, ("test", 0): 1, ("test", 1): 1,
    }  # fmt: skip
    assert videos["test/x"] == ListedVideo(
        name="test/x", place="test/x", label=1, class_name="fake", split="test", group="x"
    )


def test_dfdc_validation_set_is_taken_where_it_is(tmp_path: Path) -> None:
    dfdc_part(tmp_path / "dfdc_train_part_0", {f"r{i}.mp4": real() for i in range(20)})
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "labels.csv").write_text("filename,label\nv.mp4,0\n")
    videos = listed("dfdc", tmp_path)
    assert [v.name for v in videos.values() if v.split == "val"] == ["validation/v"]


def test_a_single_dfdc_part_can_be_the_root(tmp_path: Path) -> None:
    dfdc_part(tmp_path, {"a.mp4": real(), "b.mp4": fake_of("a.mp4")})
    assert {(v.place, v.label, v.group) for v in listed("dfdc", tmp_path).values()} == {("a", 0, "a"), ("b", 1, "a")}
    assert set(VideoTree(tmp_path).locate(["a", "b"])) == {"a", "b"}


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "holds no dfdc_train_part_*"),
        ({"dfdc_train_part_0/a.mp4": ""}, FileNotFoundError, "dfdc_train_part_0/metadata.json' does not exist"),
        ({"dfdc_train_part_0/metadata.json": "[]"}, ValueError, "expected a mapping of video names"),
        ({"dfdc_train_part_0/metadata.json": "{"}, ValueError, "metadata.json: not JSON"),
        ({"metadata.json": '{"a.mp4": {"label": "fake"}}'}, ValueError, "'a.mp4': label must be REAL, or FAKE"),
        ({"metadata.json": '{"a.mp4": {"label": "FAKE"}}'}, ValueError, "'a.mp4': label must be REAL, or FAKE with"),
        ({"test/x.mp4": ""}, FileNotFoundError, "test/labels.csv' does not exist"),
        ({"test/labels.csv": "filename,label\nx.mp4,0\ny.mp4,FAKE\n"}, ValueError, "labels.csv, line 3: expected"),
    ],
)
def test_mistakes_in_dfdc_are_named(files: dict[str, str], error: type, message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        touch(tmp_path / name).write_text(text)
    with pytest.raises(error, match=re.escape(message)):
        listed("dfdc", tmp_path)


# ---- DFDCP ----------------------------------------------------------------------------------------------------------

DFDCP = {
    "original_videos/643049/643049_A_001.mp4": {
        "label": "real", "target_id": 643049, "swapped_id": None, "set": "test",
    },
    "method_A/643049/643049_A/1255229_643049_A_001.mp4": {
        "label": "fake", "target_id": 643049, "swapped_id": 1255229, "set": "test", "source_video": "643049_A_001",
    },
    "original_videos/77/77_A_001.mp4": {"label": "real", "target_id": 77, "swapped_id": None, "set": "train"},
    "method_B/77/77_A/88_77_A_001.mp4": {"label": "fake", "target_id": 77, "swapped_id": 88, "set": "train"},
}  # fmt: skip


def test_the_preview_is_read_from_its_json(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(DFDCP))
    videos = listed("dfdcp", tmp_path)
    assert [(v.place, v.label, v.class_name, v.split, v.group) for v in videos.values()] == [
        ("original_videos/643049/643049_A_001", 0, "real", "test", "1255229"),
        ("method_A/643049/643049_A/1255229_643049_A_001", 1, "method_A", "test", "1255229"),
        ("original_videos/77/77_A_001", 0, "real", "train", "77"),
        ("method_B/77/77_A/88_77_A_001", 1, "method_B", "train", "77"),
    ]
    for place in videos:
        name = place.rpartition("/")[2]
        write_frames(tmp_path / place.partition("/")[0] / "frames" / name, 2)
    records = split_of(source_of("dfdcp", tmp_path), "test")
    assert [(r.video, r.label) for r in records][::2] == [(v.name, v.label) for v in list(videos.values())[:2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"label": "FAKE"}, "expected label"), ({"set": "dev"}, "'dev'"), ({"target_id": None}, "and a target_id")],
)
def test_mistakes_in_the_preview_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    name = "original_videos/77/77_A_001.mp4"
    (tmp_path / "dataset.json").write_text(json.dumps({name: DFDCP[name] | changes}))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        listed("dfdcp", tmp_path)
    assert name in str(caught.value)


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def celeb_videos(tmp_path: Path) -> Path:
    """Write Celeb-DF as video files of 40 frames, frame n with the grey level 5 n."""
    (tmp_path / "List_of_testing_videos.txt").write_text(CELEB_TESTS)
    names = ["YouTube-real/00170", "Celeb-real/id0_0000", "Celeb-synthesis/id0_id1_0000", "Celeb-real/id2_0000"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_clip(tmp_path / f"{name}.mp4", [grey(5 * number) for number in range(40)], g="10")
    return tmp_path


def test_evenly_spread_frames_of_video_files_are_read_in_any_order(celeb_videos: Path) -> None:
    source = source_of("celebdf_v2", celeb_videos, frames=4)
    test = split_of(source, "test")
    assert [r.id for r in test[:4]] == [f"Celeb-real/id0_0000#{n}" for n in (5, 15, 25, 35)]
    assert [seen(source, r) for r in test[:4]] == [25, 75, 125, 175]
    assert [seen(source, r) for r in (test[3], test[1], test[1], test[8], test[2])] == [175, 75, 75, 25, 125]
    assert source.load(test[2]).record.tags["frame"] == "25"
    assert [seen(pickle.loads(pickle.dumps(source)), r) for r in test[:2]] == [25, 75]


def test_workers_read_the_same_frames_of_video_files_as_one_process(celeb_videos: Path) -> None:
    noise = np.random.default_rng(0)
    first = celeb_videos / "Celeb-real" / "id0_0000.mp4"
    write_clip(first, [noise.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(40)], g="10")
    source, again = (source_of("celebdf_v2", celeb_videos, frames=8) for _ in range(2))
    test = split_of(source, "test")
    assert test[7].video == "Celeb-real/id0_0000"
    expected = [again.load(record).image for record in test]
    spec = InputSpec(size=48, mean=(0.0,) * 3, std=(1.0,) * 3)
    dataset = DetectionDataset(source, test, {"pixels": spec})
    alone = [DetectionDataset(again, test, {"pixels": spec})[i]["pixels"] for i in range(len(test))]
    source.load(test[5])  # the worker that begins with the next frame inherits a file that is being decoded
    loader = DataLoader(dataset, batch_size=6, num_workers=2, collate_fn=collate)
    together = [pixels for batch in loader for pixels in batch["pixels"]]
    assert all((a == b).all() for a, b in zip(together, alone, strict=True))
    assert all((source.load(test[i]).image == expected[i]).all() for i in (6, 7)), "nobody moved our place in it"


def test_any_frame_of_a_training_video_is_drawn(celeb_videos: Path) -> None:
    source = source_of("celebdf_v2", celeb_videos, frames=4)
    (record,) = split_of(source, "train")
    assert record.id == "Celeb-real/id2_0000"
    rng = np.random.default_rng(0)
    drawn = [source.load(record, rng) for _ in range(30)]
    assert all(int(s.image.mean().round()) == 5 * int(s.record.tags["frame"]) for s in drawn)
    assert len({s.record.tags["frame"] for s in drawn}) > 15
    assert seen(source, record) == 100, "without a generator the middle one"
    assert seen(source, record, np.random.default_rng(1)) == seen(source, record, np.random.default_rng(1))


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("9.png", "10.png", "100.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in frame_files(tmp_path)] == ["9.png", "10.png", "100.png"]


def test_a_damaged_frame_gives_way_to_the_next_sound_one(tmp_path: Path) -> None:
    frames = write_damaged(tmp_path / "x.mp4")
    reader = FrameReader(count=30)
    found = [reader.read(tmp_path / "x.mp4", number) for number in (12, 13, 14, 19, 20, 21)]
    sound = [12, 20, 20, 20, 20, 21]
    assert all((pixels == frames[number]).all() for pixels, number in zip(found, sound, strict=True))
    assert (FrameReader(count=1).read(tmp_path / "x.mp4", 13) == frames[20]).all()


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    source = source_of("celebdf_v2", celebdf(tmp_path))
    record = next(r for r in source.records if r.video == "Celeb-real/id0_0000")
    assert record.split == "test" and [r.video for r in source.records].count(record.video) == 1, "so it is counted"
    with pytest.raises(UnreadableImage, match=r"Celeb-real/id0_0000\.mp4"):
        source.load(record)


def test_faces_can_be_cut_out_and_what_there_is_not_is_refused(ffpp: Path) -> None:
    source = source_of("ffpp", ffpp, frames=1, face_crop=True)
    assert source.load(split_of(source, "test")[0]).record.tags == {"frame": "2", "face": "none"}
    for name in ("masks", "cache"):
        with pytest.raises(ValueError, match=f"{name}: .*give --data.{name} false"):
            source_of("ffpp", ffpp, **{name: True})
