"""Packing clips: what is kept of each frame, how an interrupted run goes on, what is said of the unreadable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest
from clips import grey, write_clip, write_damaged
from PIL import Image

from llava.core.runtime import Incomplete
from llava.data import hdf5_pack
from llava.data.clips import Hdf5Source
from llava.data.faces import FaceBox
from llava.data.hdf5_pack import FrameConfig, PackConfig, keep_frames, pack
from llava.data.sources import DataConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "pack_hdf5.py")]


def noise(seed, height=20, width=24):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def crops(tmp_path):
    """Three clips: two of JPEG files, one of PNG files."""
    for clip, suffix, count in (("071", "jpg", 3), ("054", "jpeg", 2), ("087", "png", 4)):
        folder = tmp_path / "crops" / clip
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(i)).save(folder / f"{i:03}.{suffix}", **{"jpg": {"quality": 70}}.get(suffix, {}))
    return tmp_path / "crops"


def settings(folder, **changes):
    return PackConfig(**{"folder": str(folder), "output": str(folder.parent / "pack.h5"), **changes})


def stored(path):
    """Give clip -> frames as they lie in the file."""
    with h5py.File(path) as file:
        return {name: [np.asarray(frame) for frame in clip] for name, clip in file.items()}


def decoded(content):
    return np.array(Image.open(BytesIO(content.tobytes())))


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_jpeg_files_are_kept_byte_for_byte_and_others_encoded(crops):
    clips = stored(pack(settings(crops)))
    assert list(clips) == ["054", "071", "087"] and [len(clips[name]) for name in clips] == [2, 3, 4]
    for name, suffix in (("071", "jpg"), ("054", "jpeg")):
        for i, frame in enumerate(clips[name]):
            assert frame.tobytes() == (crops / name / f"{i:03}.{suffix}").read_bytes()
    buffer = BytesIO()
    Image.fromarray(noise(3)).save(buffer, "JPEG", quality=95, subsampling=0)
    assert clips["087"][3].tobytes() == buffer.getvalue()


@pytest.mark.parametrize("form", ["png", "raw"])
def test_other_forms_lose_nothing(crops, form):
    clips = stored(pack(settings(crops, form=form)))
    for i in range(4):
        assert np.array_equal(clips["087"][i] if form == "raw" else decoded(clips["087"][i]), noise(i))
    shown = np.array(Image.open(crops / "071" / "002.jpg"))
    assert np.array_equal(clips["071"][2] if form == "raw" else decoded(clips["071"][2]), shown)


def test_raw_frames_lie_in_chunks_of_one(crops):
    with h5py.File(pack(settings(crops, form="raw"))) as file:
        assert file["087"].chunks == (1, 20, 24, 3) and file["087"].dtype == np.uint8
        assert dict(file.attrs) == {}


def test_frames_may_be_fewer_and_of_another_size(crops):
    clips = stored(pack(settings(crops, form="raw", frames=2, size=16)))
    assert {len(frames) for frames in clips.values()} == {2}
    assert clips["087"][0].shape == (16, 19, 3)
    expected = Image.fromarray(noise(1)).resize((19, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(clips["087"][0], np.array(expected)), "of 4 frames the middles of two halves are 1 and 3"


def test_frames_of_two_sizes_do_not_fit_raw(crops):
    Image.fromarray(noise(9, 30, 30)).save(crops / "087" / "004.png")
    with pytest.raises(ValueError, match="frames of 2 sizes; give --size"):
        pack(settings(crops, form="raw"))


def test_videos_are_packed_under_their_names(tmp_path):
    (tmp_path / "videos" / "c40").mkdir(parents=True)
    write_clip(tmp_path / "videos" / "071.mp4", [grey(n) for n in range(12)])
    write_clip(tmp_path / "videos" / "c40" / "054.mkv", [grey(100 + n) for n in range(6)])
    path = pack(settings(tmp_path / "videos", form="raw", frames=4))
    with h5py.File(path) as file:
        assert file["071"][:, 0, 0, 0].tolist() == [1, 4, 7, 10]
        assert file["c40/054"][:, 0, 0, 0].tolist() == [100, 102, 103, 105]


def test_a_face_is_followed_and_cut_out(tmp_path, monkeypatch):
    left, right = FaceBox(x=4, y=8, width=20, height=20, score=1), FaceBox(x=36, y=4, width=24, height=24, score=1)
    found = iter([[right, left], [left], [], [left]])
    monkeypatch.setattr(hdf5_pack, "find_faces", lambda pixels: next(found))
    frames = [noise(n, 48, 64) for n in range(4)]
    write_clip(tmp_path / "a.mp4", frames)
    kept = keep_frames(tmp_path / "a.mp4", FrameConfig(form="raw", face_crop=True, margin=0.1))
    assert (len(kept.frames), kept.without_face, kept.problems) == (3, 1, [])
    for frame, n in zip(kept.frames, (0, 1, 3), strict=True):
        assert np.array_equal(frame, frames[n][6:30, 2:26]), "24 pixels: 10 % wider on every side"


def test_a_clip_without_a_face_is_named(tmp_path):
    write_clip(tmp_path / "a.mp4", [grey(n) for n in range(3)])
    kept = keep_frames(tmp_path / "a.mp4", FrameConfig(face_crop=True))
    assert kept.frames == [] and kept.problems == [f"{tmp_path / 'a.mp4'}: no face was found in 3 frames"]


@pytest.mark.parametrize("changes", [{"quality": 0}, {"quality": 101}, {"frames": 0}, {"size": 8}, {"margin": -0.1}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: .* is not usable"):
        FrameConfig(**changes)


# ---- names and attributes -------------------------------------------------------------------------------------------


def test_a_kind_gives_the_published_name_and_says_what_it_is(crops, tmp_path):
    for kind, label, class_name in (("original", 0, "real"), ("FaceSwap", 1, "FaceSwap")):
        path = pack(settings(crops, kind=kind, output=str(tmp_path / "out"), compression="c23"))
        assert path == tmp_path / "out" / f"FF++_{kind}_c23.h5"
        source = Hdf5Source(DataConfig(source="hdf5", path=str(path)))
        assert {(r.label, r.class_name) for r in source.records} == {(label, class_name)}
        assert source.load(source.records[0]).image.shape == (20, 24, 3)


def test_given_attributes_are_written_beside_every_clip(crops):
    path = pack(settings(crops, label="fake", class_name="lab", split="val", group="ann"))
    source = Hdf5Source(DataConfig(source="hdf5", path=str(path)))
    assert {(r.label, r.class_name, r.split, r.group) for r in source.records} == {(1, "lab", "val", "ann")}


def test_names_must_be_unique_and_clips_apart(crops, tmp_path):
    with pytest.raises(ValueError, match="put the frames of each clip into a folder"):
        pack(settings(crops / "071"))
    with pytest.raises(ValueError, match=r"must end in .h5 or .hdf5, or give --kind"):
        pack(settings(crops, output="pack"))
    (crops / "087" / "inner").mkdir()
    Image.fromarray(noise(0)).save(crops / "087" / "inner" / "0.png")
    with pytest.raises(ValueError, match="'087/inner' stands for two things or lies inside another"):
        pack(settings(crops))
    write_clip(crops / "071.mp4", [grey(0)])
    with pytest.raises(ValueError, match="'071' stands for two things"):
        pack(settings(crops))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither pictures nor videos"):
        pack(settings(tmp_path / "empty"))


@pytest.fixture
def celebdf(tmp_path):
    """Celeb-DF v2 with one test video and one that its list names and that is not there."""
    for n, name in enumerate(("Celeb-real/id0_0000", "Celeb-synthesis/id0_id1_0000", "YouTube-real/00000")):
        path = tmp_path / "celebdf" / f"{name}.mp4"
        path.parent.mkdir(parents=True)
        write_clip(path, [grey(50 * n + i) for i in range(4)])
    listed = "1 YouTube-real/00000.mp4\n1 YouTube-real/00001.mp4\n"
    (tmp_path / "celebdf" / "List_of_testing_videos.txt").write_text(listed)
    return tmp_path / "celebdf"


def test_a_public_set_is_packed_with_what_its_lists_say(celebdf):
    asked = {"listing": "celebdf_v2", "form": "raw", "frames": 2}
    with pytest.raises(Incomplete, match=r"YouTube-real/00001: listed, but not there"):
        pack(settings(celebdf, **asked))
    path = pack(settings(celebdf, **asked, skip_unreadable=True))
    source = Hdf5Source(DataConfig(source="hdf5", path=str(path), frames=1))
    found = {r.video: (r.label, r.class_name, r.split) for r in source.records}
    assert found == {
        "pack/Celeb-real/id0_0000": (0, "real", "train"),
        "pack/Celeb-synthesis/id0_id1_0000": (1, "Celeb-synthesis", "train"),
        "pack/YouTube-real/00000": (0, "real", "test"),
    }
    groups = {r.video: r.group for r in source.records}
    assert groups["pack/Celeb-real/id0_0000"] == groups["pack/Celeb-synthesis/id0_id1_0000"]
    assert groups["pack/YouTube-real/00000"] != groups["pack/Celeb-real/id0_0000"]
    shown = {source.load(r).image.mean() for r in source.records}
    assert shown == {3, 53, 103}, "the second of two frames, 1 and 3, of each clip"


def test_frames_are_taken_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "crops" / "a").mkdir(parents=True)
    for n in range(12):
        Image.fromarray(grey(n)).save(tmp_path / "crops" / "a" / f"{n}.png")
    assert [frame[0, 0, 0] for frame in stored(pack(settings(tmp_path / "crops", form="raw")))["a"]] == list(range(12))


# ---- what cannot be read --------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_and_mended_or_skipped(crops, caplog):
    good = (crops / "071" / "001.jpg").read_bytes()
    (crops / "071" / "001.jpg").write_bytes(good[:100])
    with pytest.raises(Incomplete, match=r"1 pictures or videos cannot be read \(first: .*001.jpg.*--skip_unreadable"):
        pack(settings(crops))
    assert not (crops.parent / "pack.h5").exists()
    assert list(stored(crops.parent / "pack.h5.part")) == ["054", "087"], "whole clips are kept"
    path = pack(settings(crops, skip_unreadable=True))
    assert [len(frames) for frames in stored(path).values()] == [2, 2, 4]
    assert "001.jpg" in caplog.text
    path.unlink()
    (crops / "071" / "001.jpg").write_bytes(good)
    assert len(stored(pack(settings(crops)))["071"]) == 3


def test_a_damaged_video_is_named_with_its_count(tmp_path):
    (tmp_path / "videos").mkdir()
    write_damaged(tmp_path / "videos" / "a.mp4")
    (tmp_path / "videos" / "b.mp4").write_bytes(b"no video")
    with pytest.raises(Incomplete, match="Nothing could be packed"):
        pack(settings(tmp_path / "videos"))
    clips = stored(pack(settings(tmp_path / "videos", skip_unreadable=True)))
    assert list(clips) == ["a"] and len(clips["a"]) == 23, "of 30 frames the seven damaged ones are left out"


# ---- going on -------------------------------------------------------------------------------------------------------


def test_a_finished_file_and_an_unfinished_one_of_other_settings_are_left_alone(crops):
    (crops / "071" / "001.jpg").write_bytes(b"")
    with pytest.raises(Incomplete):
        pack(settings(crops))
    with pytest.raises(ValueError, match=r"begun with other settings \(form, quality\)"):
        pack(settings(crops, form="raw", quality=90))
    (crops / "054").rename(crops / "055")
    with pytest.raises(ValueError, match=r"holds clips that .* lacks \(first: 054\)"):
        pack(settings(crops))
    (crops / "055").rename(crops / "054")
    path = pack(settings(crops, skip_unreadable=True))
    with pytest.raises(ValueError, match="exists already; delete it"):
        pack(settings(crops))
    path.with_name("pack.h5.part").write_bytes(path.read_bytes()[:500])
    path.unlink()
    with pytest.raises(ValueError, match="in use or damaged"):
        pack(settings(crops))


@pytest.mark.e2e
def test_a_killed_packer_goes_on_and_ends_with_the_same_clips(tmp_path):
    folder = tmp_path / "crops"
    for clip in range(40):
        (folder / f"{clip:03}").mkdir(parents=True)
        for i in range(10):
            Image.fromarray(noise(100 * clip + i, 96, 96)).save(folder / f"{clip:03}" / f"{i}.png")
    command = [*SCRIPT, str(folder), "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    whole, broken = tmp_path / "whole.h5", tmp_path / "broken.h5"
    subprocess.run([*command, str(whole)], env=environment, check=True, capture_output=True)
    kept: list[int] = []
    while not broken.exists() and len(kept) < 3:
        process = subprocess.Popen([*command, str(broken)], env=environment, stderr=subprocess.DEVNULL)
        wait_until_larger(broken.with_name("broken.h5.part"), process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept.append(len(stored(broken.with_name("broken.h5.part"))))
    assert kept == sorted(kept) and 0 < kept[-1] < 40
    done = subprocess.run([*command, str(broken)], env=environment, check=True, capture_output=True, text=True)
    assert f"going on: {kept[-1]} of 40 clips are packed already" in done.stderr
    first, second = stored(whole), stored(broken)
    assert first.keys() == second.keys()
    assert all(a.tobytes() == b.tobytes() for name in first for a, b in zip(first[name], second[name], strict=True))
    again = subprocess.run([*command, str(broken)], env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr


def wait_until_larger(part, process, by=1_000_000):
    """Wait until a running packer has written so many bytes more."""
    start = part.stat().st_size if part.exists() else 0
    while process.poll() is None and (not part.exists() or part.stat().st_size < start + by):
        time.sleep(0.002)


@pytest.mark.e2e
def test_the_script_s_exit_code_tells_of_gaps(crops):
    (crops / "071" / "001.jpg").write_bytes(b"")
    command = [*SCRIPT, str(crops), "--output", str(crops.parent / "pack.h5")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
        for more in ([], ["--skip_unreadable", "true"])
    ]
    assert [run.returncode for run in runs] == [1, 0]
    assert all("001.jpg" in run.stderr for run in runs)
