"""Clips in HDF5 files: what is listed, which frame is read, by whom, and what is said when something is missing."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
from collections import Counter
from io import BytesIO
from pathlib import Path
from zlib import crc32

import h5py
import numpy as np
import pytest
from ffpp_world import SPLITS, write_ffpp, write_kind, write_splits
from PIL import Image
from torch.utils.data import DataLoader

from llava.core.runtime import item_rng
from llava.core.types import InputSpec
from llava.data.clips import ClipFiles, Hdf5Source, UnreadableClip
from llava.data.dataset import DetectionDataset, collate
from llava.data.frames import spread_frames
from llava.data.images import MEMBER_MARK
from llava.data.public_sets import group_names, keys_of, read_pairs
from llava.data.sources import DataConfig, open_source, split_of
from llava.data.splits import check_leaks, near_duplicates
from llava.evaluation.predictions import by_video, from_records, read_csv, write_csv
from llava.train.recipe import open_data

SMALL = {"pixel_values": InputSpec(size=16, mean=(0, 0, 0), std=(1, 1, 1))}


def config(folder, **changes):
    settings = {"splits": str(folder / "splits"), "frames": 3, **changes}
    return DataConfig(source="hdf5", path=str(folder), **settings)


@pytest.fixture
def ffpp(tmp_path):
    return write_ffpp(tmp_path / "ffpp", ["original", "Deepfakes"])


# ---- listing --------------------------------------------------------------------------------------------------------


def test_both_orders_of_a_pair_are_fakes():
    pairs = [("071", "054"), ("054", "071")]
    assert keys_of("original", pairs) == ["071", "054"]
    assert keys_of("NeuralTextures", pairs) == ["071_054", "054_071"]


def test_the_official_splits_give_the_counts_of_the_paper(shared_data):
    folder = shared_data / "ddvqa" / "annotations" / "FFPP_split"
    splits = {name: read_pairs(folder / f"{name}.json") for name in ("train", "val", "test")}
    assert {name: len(keys_of("Deepfakes", pairs)) for name, pairs in splits.items()} == {
        "train": 720,
        "val": 140,
        "test": 140,
    }
    groups = group_names(splits)
    assert len(groups) == 1000 and len(set(groups.values())) == 500
    assert groups["071"] == groups["054"] == "054"


def test_records_of_training_are_clips_and_of_the_other_splits_frames(ffpp):
    source = open_source(config(ffpp))
    train = split_of(source, "train")
    assert [r.id for r in train] == [
        *("original/071", "original/054", "original/087", "original/081"),
        *("Deepfakes/071_054", "Deepfakes/054_071", "Deepfakes/087_081", "Deepfakes/081_087"),
    ]
    val = split_of(source, "val")
    assert [r.id for r in val[:4]] == ["original/720#0", "original/720#2", "original/720#4", "original/672#0"]
    assert Counter((r.video, r.label, r.class_name, r.group) for r in val) == {
        ("original/720", 0, "real", "672"): 3,
        ("original/672", 0, "real", "672"): 3,
        ("Deepfakes/720_672", 1, "Deepfakes", "672"): 3,
        ("Deepfakes/672_720", 1, "Deepfakes", "672"): 3,
    }
    check_leaks({name: split_of(source, name) for name in SPLITS})
    assert [r.group for r in train] == ["054", "054", "081", "081"] * 2


def test_a_pair_across_splits_is_a_leak(tmp_path):
    splits = SPLITS | {"test": [("953", "071")]}
    with pytest.raises(ValueError, match="'train' and 'test' share 1 groups"):
        open_data(config(write_ffpp(tmp_path, ["original", "FaceSwap"], splits)), seed=0)


def test_test_only_files_serve_the_test_split(ffpp):
    write_kind(ffpp, "Deepfakes", ["953_974", "974_953"], lambda *_: np.full((4, 16, 16, 3), 200, np.uint8), True)
    source = open_source(config(ffpp))
    means = {r.video: source.load(r).image.mean() for r in split_of(source, "test")}
    assert means["Deepfakes/953_974"] == 200 and means["original/953"] < 5
    assert all(source.load(r).image.mean() < 5 for r in split_of(source, "val"))


def test_only_test_files_are_enough_to_score(tmp_path, caplog):
    for kind, keys in (("original", ["953", "974"]), ("FaceShifter", ["953_974", "974_953"])):
        write_kind(tmp_path, kind, keys, is_test_only=True)
    write_splits(tmp_path / "splits")
    with caplog.at_level(logging.INFO, "llava.data.clips"):
        source = open_source(config(tmp_path))
    assert {r.split for r in source.records} == {"test"} and len(source.records) == 12
    assert "split train: found nothing" in caplog.text


def test_the_log_says_which_kinds_are_there_and_counts_what_no_split_names(ffpp, caplog):
    with h5py.File(ffpp / "FF++_original_c40.h5", "a") as file:
        file["999"] = np.zeros((1, 16, 16, 3), np.uint8)
    with caplog.at_level(logging.INFO, "llava.data.clips"):
        open_source(config(ffpp))
    assert (
        "split val: found original, Deepfakes; absent: Face2Face, FaceSwap, NeuralTextures, FaceShifter" in caplog.text
    )
    assert "FF++_original_c40.h5: no split names 1 of its 9 videos" in caplog.text


def test_missing_videos_are_an_error_with_counts_and_names(ffpp):
    with h5py.File(ffpp / "FF++_Deepfakes_c40.h5", "a") as file:
        for key in ("071_054", "720_672"):
            del file[key]
    with pytest.raises(ValueError, match=r"2 videos .* FF\+\+_Deepfakes_c40.h5: 2 \(071_054, 720_672\).*allow_missing"):
        open_source(config(ffpp))


def test_missing_videos_may_be_left_out_with_a_warning_that_names_them(ffpp, caplog):
    keys = [f"{a}_{b}" for pairs in SPLITS.values() for pair in pairs for a, b in (pair, pair[::-1])]
    with h5py.File(ffpp / "FF++_Deepfakes_c40.h5", "a") as file:
        for key in keys[:6]:
            del file[key]
    source = open_source(config(ffpp, allow_missing=True))
    assert f"FF++_Deepfakes_c40.h5 lacks 6 videos that the splits name: {', '.join(keys[:6])}" in caplog.text
    assert {r.video for r in source.records if r.label} == {f"Deepfakes/{key}" for key in keys[6:]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compression": "c23"}, FileNotFoundError, r"no 'FF\+\+_original_c23.h5' but FF\+\+_Deepfakes_c40.h5, "),
        ({"splits": "nowhere"}, FileNotFoundError, "train.json' does not exist; give `splits`"),
        ({"cache": True}, ValueError, "--data.cache false"),
        ({"face_crop": True}, ValueError, "pack_hdf5.py --face_crop"),
        ({"frames": 0}, ValueError, "frames: 0 is not usable"),
        ({"splits": None}, ValueError, "carries no attribute `label`; give --data.splits"),
    ],
)
def test_what_cannot_be_used_is_named(ffpp, changes, error, message):
    with pytest.raises(error, match=message):
        open_source(config(ffpp, **changes))


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[["071"]]', "[[71, 54]]", '[["071_054", "1"]]'])
def test_a_split_file_of_another_form_is_refused(ffpp, text):
    (ffpp / "splits" / "val.json").write_text(text)
    with pytest.raises(ValueError, match=r"val\.json"):
        open_source(config(ffpp))


def test_originals_are_required(ffpp):
    (ffpp / "FF++_original_c40.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 'FF\+\+_original_c40.h5': no real faces"):
        open_source(config(ffpp))


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 16, 16, 1), (0, 16, 16, 3)])
def test_a_data_set_that_is_no_clip_is_refused(ffpp, shape):
    with h5py.File(ffpp / "FF++_original_c40.h5", "a") as file:
        del file["720"]
        file["720"] = np.zeros(shape, np.uint8)
    with pytest.raises(UnreadableClip, match=r"FF\+\+_original_c40.h5/720"):
        open_source(config(ffpp))


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_spread_frames_are_the_middles_of_equal_parts():
    assert spread_frames(10, 5) == [1, 3, 5, 7, 9]
    assert spread_frames(3, 32) == [0, 1, 2] and spread_frames(100, 1) == [50]
    parts = np.array_split(np.arange(300), 100)
    assert spread_frames(300, 100) == [int(part[1]) for part in parts]


def test_any_frame_is_drawn_as_often_as_any_other_and_the_last_too(ffpp):
    source = open_source(config(ffpp))
    record = split_of(source, "train")[0]
    samples = [source.load(record, item_rng(0, epoch, 0)) for epoch in range(400)]
    numbers = [int(sample.record.tags["frame"]) for sample in samples]
    assert [int(sample.image[0, 0, 0]) for sample in samples] == numbers
    counts = Counter(numbers)
    assert set(counts) == {0, 1, 2, 3, 4}
    # 400 draws of 5: mean 80, standard deviation 8
    assert all(48 < count < 112 for count in counts.values())
    assert int(source.load(record).record.tags["frame"]) == 2, "without a generator the middle one"


def test_a_draw_is_a_function_of_seed_epoch_and_index(ffpp):
    source = open_source(config(ffpp))
    train = split_of(source, "train")
    first = DetectionDataset(source, train, SMALL, seed=3)
    again = DetectionDataset(open_source(config(ffpp)), train, SMALL, seed=3)
    items = [(epoch, index) for epoch in range(5) for index in (5, 0)]
    values = [float(first[item]["pixel_values"].mean()) for item in items]
    assert values == [float(again[item]["pixel_values"].mean()) for item in reversed(items)][::-1]
    assert len(set(values)) > 1


def test_clips_of_one_frame_are_fine(tmp_path):
    folder = write_ffpp(tmp_path, ["original", "FaceSwap"], draw=lambda *_: np.full((1, 16, 16, 3), 7, np.uint8))
    source = open_source(config(folder))
    for record in source.records:
        sample = source.load(record, np.random.default_rng(0))
        assert sample.image.shape == (16, 16, 3) and sample.image.max() == 7
    assert [r.id for r in split_of(source, "val")][:2] == ["original/720#0", "original/672#0"]


def test_near_duplicates_are_found_without_a_generator(tmp_path):
    def draw(kind, key):
        return np.random.default_rng(crc32((kind + key).encode())).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

    folder = write_ffpp(tmp_path, ["original", "FaceSwap"], draw=draw)
    with h5py.File(folder / "FF++_original_c40.h5", "a") as file:
        file["953"][2] = file["071"][1]  # the middle frame of a training clip
    source = open_source(config(folder))
    pairs = near_duplicates(source, {name: split_of(source, name) for name in SPLITS}, max_distance=0)
    assert pairs == [("original/071", "original/953#2", 0)]


def test_records_survive_predictions_csv(ffpp, tmp_path):
    records = split_of(open_source(config(ffpp)), "test")
    write_csv(tmp_path / "test.csv", from_records(records, np.linspace(0, 1, len(records))))
    found = read_csv(tmp_path / "test.csv")
    for record, item in zip(records, found, strict=True):
        assert (item.id, item.video, item.group, item.class_name, item.label, item.split) == (
            *(record.id, record.video, record.group, record.class_name, record.label),
            "test",
        )
    assert [v.id for v in by_video(found)] == ["original/953", "original/974", "Deepfakes/953_974", "Deepfakes/974_953"]


# ---- handles --------------------------------------------------------------------------------------------------------


def test_a_handle_is_opened_once_for_each_process(ffpp):
    files, path = ClipFiles(), str(ffpp / "FF++_original_c40.h5")
    own = files.dataset(f"{path}{MEMBER_MARK}071").file
    assert files.dataset(f"{path}{MEMBER_MARK}054").file.id == own.id
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child():
        inherited = files._files[path]
        clip = files.dataset(f"{path}{MEMBER_MARK}071")
        queue.put(
            (bool(inherited), files._files[path] is inherited, int(clip[4, 0, 0, 0]), files._process == os.getpid())
        )

    process = context.Process(target=child)
    process.start()
    assert queue.get(timeout=20) == (False, False, 4, True)
    process.join()
    assert int(files.dataset(f"{path}{MEMBER_MARK}071")[3, 0, 0, 0]) == 3, "the parent's handle still works"


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.e2e)])
def test_workers_read_the_same_frames_as_one_process(ffpp, start):
    source = open_source(config(ffpp))
    dataset = DetectionDataset(source, split_of(source, "train"), SMALL, seed=1)
    expected = [float(item["pixel_values"].mean()) for item in DataLoader(dataset, batch_size=None)]
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate, multiprocessing_context=start)
    found = [float(image.mean()) for batch in loader for image in batch["pixel_values"]]
    assert found == expected


def test_a_source_can_be_pickled_while_it_is_open(ffpp):
    source = open_source(config(ffpp))
    record = split_of(source, "val")[0]
    source.load(record)
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.load(record).image, source.load(record).image)


def test_only_the_frame_is_read(tmp_path):
    big = np.zeros((60, 160, 160, 3), np.uint8)
    folder = write_ffpp(
        tmp_path, ["original", "FaceSwap"], {"train": [("1", "2")], "val": [], "test": []}, lambda *_: big
    )
    source = Hdf5Source(config(folder))
    record = source.records[0]
    source.load(record)
    before = read_bytes()
    for seed in range(10):
        source.load(record, np.random.default_rng(seed))
    assert 10 * big[0].nbytes <= read_bytes() - before < 11 * big[0].nbytes


def read_bytes():
    """Bytes that this process has read from files so far, the page cache's included."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_is_refused_with_its_name(ffpp):
    path = ffpp / "FF++_original_c40.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UnreadableClip, match=r"FF\+\+_original_c40.h5: damaged, or no HDF5 file"):
        open_source(config(ffpp))
    path.write_text("no HDF5 at all")
    with pytest.raises(UnreadableClip, match="damaged, or no HDF5 file"):
        open_source(config(ffpp))


def test_a_damaged_frame_is_refused_with_its_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "one.h5", "w") as file:
        clip = file.create_dataset("clip", data=noise, chunks=(1, 16, 16, 3), compression="gzip", fletcher32=True)
        clip.attrs["label"] = "real"
        place = clip.id.get_chunk_info(2)
    content = bytearray((tmp_path / "one.h5").read_bytes())
    content[place.byte_offset + 40 : place.byte_offset + 80] = bytes(40)
    (tmp_path / "one.h5").write_bytes(content)
    source = open_source(DataConfig(source="hdf5", path=str(tmp_path / "one.h5")))
    assert np.array_equal(source.load(source.records[1]).image, noise[1])
    with pytest.raises(UnreadableClip, match=r"one\.h5/clip: frame 2 is damaged"):
        source.load(source.records[2])


def test_a_clip_that_went_away_is_named(ffpp):
    source = open_source(config(ffpp))
    with h5py.File(ffpp / "FF++_original_c40.h5", "a") as file:
        del file["071"]
    with pytest.raises(UnreadableClip, match="clip '071' is not there or damaged"):
        source.load(split_of(source, "train")[0])


# ---- packs that describe themselves ---------------------------------------------------------------------------------


def encoded(pixels, form="PNG"):
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.fixture
def pack(tmp_path):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "pack.h5", "w") as file:
        for name, given in {
            "ann": {"label": 0, "class_name": "YouTube-real", "split": "train", "group": "ann"},
            "fakes/ann_bob": {"label": "fake", "class_name": "FaceSwap", "split": "train", "group": "ann"},
            "fakes/eve": {"label": 1, "split": "test"},
        }.items():
            clip = file.create_dataset(name, (6,), h5py.vlen_dtype(np.uint8))
            for n in range(6):
                clip[n] = encoded(rng.integers(0, 256, (16 + n, 18, 3), dtype=np.uint8))
            clip.attrs.update(given)
    return tmp_path / "pack.h5"


def test_a_pack_says_itself_what_it_holds(pack):
    for path in (pack, pack.parent):
        source = open_source(DataConfig(source="hdf5", path=str(path), frames=2))
        assert [(r.id, r.label, r.class_name, r.group, r.split) for r in source.records] == [
            ("pack/ann", 0, "real", "ann", "train"),
            ("pack/fakes/ann_bob", 1, "FaceSwap", "ann", "train"),
            ("pack/fakes/eve#1", 1, "fake", "pack/fakes/eve", "test"),
            ("pack/fakes/eve#4", 1, "fake", "pack/fakes/eve", "test"),
        ]
        assert source.load(source.records[2]).image.shape == (17, 18, 3)


def test_frames_of_pictures_are_those_that_were_encoded(pack):
    rng = np.random.default_rng(0)
    expected = [rng.integers(0, 256, (16 + n, 18, 3), dtype=np.uint8) for n in range(6)]
    source = open_source(DataConfig(source="hdf5", path=str(pack), train="none", frames=6))
    found = [source.load(record).image for record in source.records[:6]]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_wrong_label_is_named(pack):
    with h5py.File(pack, "a") as file:
        file["ann"].attrs["label"] = "maybe"
    with pytest.raises(ValueError, match=r"pack.h5/ann: label 'maybe' is unknown"):
        open_source(DataConfig(source="hdf5", path=str(pack)))


def test_a_folder_without_hdf5_files_is_refused(ffpp):
    with pytest.raises(FileNotFoundError, match="no HDF5 file and no folder that holds one"):
        open_source(DataConfig(source="hdf5", path=str(ffpp / "splits")))
