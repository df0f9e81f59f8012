"""From a clip to what inputs declare: which frames, which sound, in step; and why something is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from clips import grey, write_clip
from PIL import Image

from llava.core.input_specs import FramesSpec, MissingInput, NativeSpec, SoundSpec, TimesSpec
from llava.core.runtime import item_rng
from llava.core.types import Content, InputSpec, Record, Sample
from llava.data.clips import Hdf5Source
from llava.data.dataset import DetectionDataset, collate, degraded, input_tensors, to_tensor, view_tensors, wants_of
from llava.data.frames import open_clip, read_sound
from llava.data.images import read_image
from llava.data.sources import DataConfig, open_source, split_of
from llava.data.video_sources import ListingSource
from llava.ops.degrade import DegradeConfig, flip

SMALL = InputSpec(size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
TWO = {"frames": FramesSpec(count=2, rate_hz=5, image=SMALL), "times": TimesSpec(count=2, rate_hz=5)}
SOUND = {"sound": SoundSpec(seconds=0.25)}
ALL = {"image": SMALL, **TWO, **SOUND}
CLOCK = np.arange(16000, dtype=np.float32) / 16000  # sound that tells its time, in seconds


def record(name: str = "a.png", split: str = "") -> Record:
    return Record(id=name, label=0, class_name="real", video=name, group=name, where=name, split=split)


def dfdc(root: Path, clips: dict[str, dict]) -> ListingSource:
    """Write clips of one second, 25 frames, as DFDC has them, each with its own changes; the first one is real."""
    part, labels = root / "dfdc_train_part_0", {}
    part.mkdir(parents=True)
    for number, (name, changes) in enumerate(clips.items()):
        write_clip(part / name, **{"frames": [grey(i * 10) for i in range(25)], "codec": "ffv1", **changes})
        labels[name] = {"label": "FAKE", "original": "x.mkv"} if number else {"label": "REAL"}
    (part / "metadata.json").write_text(json.dumps(labels))
    return ListingSource(DataConfig(source="dfdc", path=str(root), frames=3))


def frame_numbers(sample: Sample) -> list[int]:
    return [round(frame.mean() / 10) for frame in sample.frames]


# ---- which frames, which sound --------------------------------------------------------------------------------------


def test_a_training_clip_draws_a_window_and_its_sound_is_in_step(tmp_path: Path) -> None:
    source, wants = dfdc(tmp_path, {"a.mkv": {"sound": CLOCK}, "b.mkv": {}}), wants_of(ALL)
    record = source.records[0]
    samples = [source.load(record, item_rng(0, 0, index), wants) for index in range(20)]
    for sample in samples:
        first, second = frame_numbers(sample)
        assert second - first == 5 and int(sample.record.tags["frame"]) == first
        assert sample.seconds == pytest.approx([first / 25, second / 25])
        assert np.array_equal(sample.image, sample.frames[0])
        assert sample.audio.shape == (4000,) and sample.audio[0] == pytest.approx(first / 25, abs=1e-3)
        np.testing.assert_allclose(np.diff(sample.audio), 1 / 16000, atol=1e-6)
    starts = {frame_numbers(sample)[0] for sample in samples}
    assert len(starts) > 5 and min(starts) >= 0 and max(starts) <= 18
    again = source.load(record, item_rng(0, 0, 3), wants)
    assert np.array_equal(again.audio, samples[3].audio) and frame_numbers(again) == frame_numbers(samples[3])
    assert frame_numbers(source.load(record, None, wants)) == [9, 14]  # of 19 starts, 0 to 18, the middle one


def test_without_wants_a_source_gives_what_it_always_gave(tmp_path: Path) -> None:
    source = dfdc(tmp_path, {"a.mkv": {"sound": CLOCK}, "b.mkv": {}})
    sample = source.load(source.records[0], item_rng(0, 0, 0))
    assert sample.frames is None and sample.audio is None and not sample.lacks
    assert round(sample.image.mean() / 10) == int(item_rng(0, 0, 0).integers(25)) == int(sample.record.tags["frame"])
    assert wants_of({"image": SMALL, "pixels": NativeSpec(size=8, mean=(0,) * 3, std=(1,) * 3)}) is None


def test_other_splits_are_spread_over_what_is_whole(tmp_path: Path) -> None:
    source = dfdc(tmp_path, {"a.mkv": {}, "b.mkv": {}})
    clip = source.records[0].where.removesuffix("*")
    places = [replace(source.records[0], where=f"{clip}{n}") for n in (4, 12, 20)]
    numbers = [frame_numbers(source.load(each, None, wants_of(TWO))) for each in places]
    assert numbers == [[3, 8], [9, 14], [16, 21]]  # of 20 starts, 0 to 19


def test_frames_at_other_rates_are_the_nearest(tmp_path: Path) -> None:
    frames = [grey(i * 10) for i in range(7)]
    source = dfdc(tmp_path, {"a.mkv": {"stamps": [0, 40, 120, 240, 280, 400, 600], "frames": frames}, "b.mkv": {}})
    place = replace(source.records[0], where=source.records[0].where.replace("*", "0"))
    sample = source.load(place, None, wants_of(TWO))
    assert frame_numbers(sample) == [0, 3]
    tensors, reasons = input_tensors(sample, TWO)
    assert not reasons and tensors["times"].tolist() == pytest.approx([0, 0.24])


def test_no_frame_stands_for_two_moments() -> None:
    spec = TimesSpec(count=3, rate_hz=10)
    assert spec.numbers([1.0, 1.04, 1.12, 1.22]) == [0, 2, 3]
    for seconds in ([0.0, 0.15], [0.0, 0.1]):
        with pytest.raises(MissingInput, match="3 of one face are needed"):
            spec.numbers(seconds)


def test_hdf5_clips_have_frames_where_their_rate_is_known_and_no_sound(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("one", data=np.stack([grey(i * 10, 16, 16) for i in range(20)])).attrs["label"] = "real"
    path, wants = str(tmp_path / "a.h5"), wants_of(ALL)
    known = Hdf5Source(DataConfig(source="hdf5", path=path, frame_rate=10.0))
    sample = known.load(known.records[5], None, wants)
    assert np.diff(frame_numbers(sample)).tolist() == [2]
    tensors, reasons = input_tensors(sample, ALL)
    assert reasons == {"sound": "clips in HDF5 files have no sound"} and tensors["sound"].isnan().all()
    unknown = open_source(DataConfig(source="hdf5", path=path, class_names={"x": "y"}))
    _, reasons = input_tensors(unknown.load(unknown.records[5], None, wants), ALL)
    assert set(reasons) == {"frames", "times", "sound"} and "--data.frame_rate" in reasons["frames"]
    assert reasons["sound"] == "clips in HDF5 files have no sound"
    with pytest.raises(ValueError, match="frame_rate: 0"):
        DataConfig(path=path, frame_rate=0)


def test_folders_of_frames_have_a_rate_and_no_sound(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "validation" / "frames" / "a").mkdir(parents=True)
    for number in range(9):
        Image.fromarray(grey(number * 10)).save(root / "validation" / "frames" / "a" / f"{number}.png")
    (root / "validation" / "labels.csv").write_text("filename,label\na.mp4,0\n")
    source = ListingSource(DataConfig(source="dfdc", path=str(root), frames=1, frame_rate=10.0))
    sample = source.load(source.records[0], None, wants_of(ALL))
    assert frame_numbers(sample) == [3, 5] and sample.lacks == {"sound": "a folder of frames has no sound"}


def test_of_a_track_the_same_face_is_cut_out(tmp_path: Path, shared_data: Path) -> None:
    face = Image.fromarray(read_image(shared_data / "public_domain" / "portrait_cc0_1.png")).resize((160, 160))
    frames = []
    for x in (10, 40):
        frames += [np.full((200, 260, 3), 90, np.uint8) for _ in range(5)]
        for frame in frames[-5:]:
            frame[20:180, x : x + 160] = np.asarray(face)
    source = dfdc(tmp_path, {"a.mkv": {"frames": frames}, "b.mkv": {}})
    source.config = replace(source.config, face_crop=True)
    sample = source.load(source.records[0], None, wants_of(TWO))
    first, second = (frame.astype(int) for frame in sample.frames)
    assert 90 < first.shape[0] < 160 and abs(first[:90, :90] - second[:90, :90]).mean() < 12
    x, y, width, height = sample.face
    assert x > 5 and y > 5 and x + width < first.shape[1] and y + height < first.shape[0]
    assert sample.record.tags["face"] == "one"


@pytest.mark.parametrize(("name", "tolerance"), [("a.mkv", 1e-3), ("a.mp4", 0.15)])
def test_sound_starts_when_the_frame_is_shown(tmp_path: Path, name: str, tolerance: float) -> None:
    seconds = np.arange(3 * 16000, dtype=np.float32) / 16000
    beeps = np.where(seconds % 1 < 0.5, np.sin(2 * np.pi * 440 * seconds) * 0.5, 0).astype(np.float32)
    codec = "ffv1" if name == "a.mkv" else "libx264rgb"
    clip = open_clip(write_clip(tmp_path / name, [grey(i) for i in range(75)], codec=codec, sound=beeps))
    for start in (0.0, 0.4, 1.92):
        begin = round(start * 16000)
        heard = read_sound(clip, start, 1.0)
        assert heard.shape == (16000,) and heard.dtype == np.float32
        np.testing.assert_allclose(heard[600:-600], beeps[begin + 600 : begin + 15400], atol=tolerance)


def test_what_sound_lacks_is_said(tmp_path: Path) -> None:
    frames = [grey(i) for i in range(25)]
    short = open_clip(write_clip(tmp_path / "short.mkv", frames, codec="ffv1", sound=CLOCK[:8000]))
    assert read_sound(short, 0.2, 0.35)[-1] == 0  # 0.05 s of silence at the end
    for start, seconds in ((0.2, 0.5), (0.8, 0.2)):
        with pytest.raises(MissingInput, match="its sound lacks a part of the"):
            read_sound(short, start, seconds)
    silent = open_clip(write_clip(tmp_path / "none.mkv", frames, codec="ffv1"))
    with pytest.raises(MissingInput, match="the clip has no sound"):
        read_sound(silent, 0.0, 0.5)


# ---- from a sample to tensors ---------------------------------------------------------------------------------------


def test_every_input_of_a_clip_becomes_its_tensor() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (size, size, 3), np.uint8) for size in (12, 14, 16)]
    content = Content(image=frames[0], frames=frames, seconds=(2.0, 2.1, 2.2), audio=CLOCK[:5000])
    tensors, reasons = input_tensors(content, ALL)
    assert not reasons and {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: spec.shape for name, spec in ALL.items()
    }
    assert torch.equal(tensors["frames"], torch.stack([to_tensor(frames[n], SMALL) for n in (0, 2)]))
    assert tensors["times"].tolist() == pytest.approx([0, 0.2])
    assert torch.equal(tensors["sound"], torch.from_numpy(CLOCK[:4000]))


def test_an_input_with_fewer_views_repeats_them() -> None:
    flipped = replace(SMALL, views=("flip", "plain"))
    inputs = {**SOUND, "image": SMALL, "frames": replace(TWO["frames"], image=flipped)}
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    content = Content(image=image, frames=[image, image[::-1]], seconds=(0, 0.2), audio=CLOCK)
    tensors, _ = input_tensors(content, inputs, with_views=True)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: (2, *s.shape) for n, s in inputs.items()}
    assert torch.equal(tensors["frames"][:, 0], view_tensors(image, flipped))
    assert torch.equal(tensors["frames"][0], tensors["frames"][1].flip(-1))
    assert torch.equal(tensors["image"], view_tensors(image, SMALL).expand(2, -1, -1, -1))
    assert torch.equal(tensors["sound"][0], tensors["sound"][1])


@pytest.mark.parametrize(
    ("changes", "missing", "words"),
    [
        ({"frames": None, "audio": None}, {"frames", "times", "sound"}, "it is a still image"),
        ({"frames": None, "lacks": {"frames": "no rate"}}, {"frames", "times"}, "no rate"),
        ({"audio": None, "lacks": {"sound": "the clip has no sound"}}, {"sound"}, "the clip has no sound"),
        ({"audio": np.zeros(4000, np.float32)}, {"sound"}, "its sound is silent"),
        ({"audio": np.full(4000, 5e-4, np.float32)}, {"sound"}, "its sound is silent"),
        ({"seconds": (0.0, 0.08)}, {"frames", "times"}, "too few frames: 2 of one face are needed, 0.2 s"),
        ({"seconds": (0.0, 0.35)}, {"frames", "times"}, "too few frames"),
        ({"seconds": (0.0,), "frames": [grey(1)]}, {"frames", "times"}, "too few frames"),
    ],
    ids=["still", "unknown_rate", "no_sound", "silent", "nearly_silent", "too_close", "too_far", "one"],
)
def test_what_is_missing_is_nan_with_its_reason(changes: dict, missing: set[str], words: str) -> None:
    whole = Content(image=grey(1), frames=[grey(1), grey(2)], seconds=(0.0, 0.2), audio=CLOCK[:4000])
    assert not input_tensors(whole, ALL)[1]
    tensors, reasons = input_tensors(replace(whole, **changes), ALL)
    assert set(reasons) == missing and all(words in reason for reason in reasons.values())
    for name, tensor in tensors.items():
        assert tensor.shape == ALL[name].shape
        assert tensor.isnan().all() if name in missing else tensor.isfinite().all()


def test_native_pixels_are_those_around_the_face() -> None:
    spec = NativeSpec(size=20, ring=0.25, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    content = Content(image=image, face=(30, 20, 16, 14))
    tensors, reasons = input_tensors(content, {"pixels": spec})  # the square is 24 wide, around (38, 27)
    assert not reasons
    seen = tensors["pixels"].permute(1, 2, 0).round().to(torch.uint8).numpy()
    assert np.array_equal(seen, image[17:37, 28:48])
    whole = input_tensors(Content(image=image), {"pixels": spec})[0]["pixels"].permute(1, 2, 0)
    assert np.array_equal(whole.round().numpy(), image[20:40, 30:50])
    small = replace(content, face=(30, 20, 12, 14))
    assert input_tensors(small, {"pixels": replace(spec, ring=0.3)})[1] == {}  # 14 * 1.6 = 22 wide
    tensors, reasons = input_tensors(small, {"pixels": replace(spec, ring=0.1)})  # 17 wide
    assert tensors["pixels"].isnan().all() and "17 pixels wide, and 20 are needed" in reasons["pixels"]


def test_a_degradation_does_the_same_to_every_frame_and_moves_the_face() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    sample = Sample(record=record(), image=image, face=(2, 3, 8, 9), frames=[image, image], seconds=(0, 0.2))
    plain = DegradeConfig(blur_probability=1.0, noise_probability=1.0, flip_probability=0.0)
    for config, face in ((plain, (2, 3, 8, 9)), (replace(plain, flip_probability=1.0), (20, 3, 8, 9))):
        found = degraded(sample, config, item_rng(0, 0, 0))
        assert np.array_equal(found.image, config(image, None, item_rng(0, 0, 0))[0])
        assert not np.array_equal(found.image, flip(image)) and not np.array_equal(found.image, image)
        assert all(np.array_equal(frame, found.image) for frame in found.frames)
        assert found.face == face
    smaller = degraded(sample, lambda image, mask, rng: (image[::2, ::2], mask), item_rng(0, 0, 0))
    assert smaller.face is None and smaller.frames[0].shape == (10, 15, 3)


# ---- records that cannot be used ------------------------------------------------------------------------------------


def test_a_window_without_sound_is_drawn_again(tmp_path: Path) -> None:
    """The first half of the clip is silent: no epoch gives a window of it, and each gives the same one again."""
    half = np.where(CLOCK < 0.45, 0, CLOCK).astype(np.float32)
    source = dfdc(tmp_path, {"a.mkv": {"sound": half}, "b.mkv": {"sound": 0 * CLOCK}})
    dataset = DetectionDataset(source, source.records, SOUND)
    items = [dataset[epoch, 0]["sound"] for epoch in range(12)]
    assert all(item.isfinite().all() and item.abs().max() > 0.1 for item in items)
    assert len({float(item[-1]) for item in items}) > 3
    assert torch.equal(items[3], dataset[3, 0]["sound"])
    assert dataset.why_unusable(0) == "" and dataset.why_unusable(1) == "its sound is silent"
    with pytest.raises(ValueError, match=r"b' cannot be used: its sound is silent; leave such records out"):
        dataset[0, 1]
    told = DetectionDataset(source, source.records, SOUND, with_reasons=True)
    assert collate([told[0], told[1]])["lacks"][1] == "its sound is silent"
    with pytest.raises(ValueError, match="'lacks' is taken"):
        DetectionDataset(source, source.records, {"lacks": SMALL})


def test_an_image_has_neither_frames_nor_sound(class_folder: Path) -> None:
    source = open_source(DataConfig(path=str(class_folder)))
    sample = source.load(split_of(source, "val")[0], None, wants_of(ALL))
    assert set(input_tensors(sample, ALL)[1]) == {"frames", "times", "sound"}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FramesSpec(count=1, rate_hz=5, image=SMALL),
        lambda: TimesSpec(count=2, rate_hz=0),
        lambda: SoundSpec(seconds=0.05),
        lambda: NativeSpec(size=0, mean=(0.0,) * 3, std=(1.0,) * 3),
    ],
)
def test_an_input_that_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"(count|seconds|size): "):
        wrong()
