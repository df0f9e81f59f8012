"""Frames of videos as pictures: names that cannot meet, a table that opens, calls that go on, what cannot be read."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from clips import grey, write_clip
from PIL import Image

from llava import cli
from llava.core.runtime import Incomplete
from llava.data.frame_folders import FramesConfig, write_frames
from llava.data.sources import DataConfig, open_source


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two manipulations with a video of one name, and two real ones."""
    for number, name in enumerate(("Deepfakes/000_003", "FaceSwap/000_003", "real/000", "real/003")):
        path = tmp_path / "videos" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, [grey(50 * number + n) for n in range(20)])
    return tmp_path / "videos"


def settings(videos: Path, **changes: object) -> FramesConfig:
    given = {"folder": str(videos), "output": str(videos.parent / "out"), "face_crop": False, "frames": 3, "workers": 1}
    return FramesConfig(**given | changes)


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [1, 2])
def test_names_do_not_meet_and_the_table_opens(videos: Path, workers: int) -> None:
    said = write_frames(settings(videos, form="png", workers=workers))
    out = videos.parent / "out"
    assert said == f"12 frames of 4 videos are in {out / 'manifest.csv'}"
    for number, name in enumerate(("Deepfakes/000_003", "FaceSwap/000_003", "real/000", "real/003")):
        shown = [np.array(Image.open(file))[0, 0, 0] for file in sorted((out / name).iterdir())]
        assert shown == [50 * number + n for n in (3, 10, 16)], "evenly spread"
    source = open_source(DataConfig(source="csv", path=str(out / "manifest.csv")))
    found = {(r.video, r.label, r.class_name, r.group) for r in source.records}
    assert ("FaceSwap/000_003", 1, "FaceSwap", "FaceSwap/000_003") in found and (
        "real/003",
        0,
        "real",
        "real/003",
    ) in found
    assert len(source.records) == 12 and len(found) == 4


def test_an_interrupted_call_is_gone_on_with_and_another_one_refused(videos: Path) -> None:
    write_frames(settings(videos))
    out = videos.parent / "out"
    mine = out / "real" / "000" / "0000.jpg"
    mine.write_bytes(b"kept")
    (out / "manifest.csv").unlink()
    for file in (out / "real" / "003").iterdir():
        file.unlink()
    (out / "real" / "003").rmdir()
    write_frames(settings(videos))
    assert mine.read_bytes() == b"kept" and len(list((out / "real" / "003").iterdir())) == 3
    with (out / "manifest.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    with pytest.raises(ValueError, match=r"was begun with other settings \(frames\)"):
        write_frames(settings(videos, frames=4))


def test_what_cannot_be_read_is_counted_and_nothing_of_it_stays(
    videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos / "real" / "bad.mp4").write_bytes(b"no video")
    out = videos.parent / "out"
    with pytest.raises(Incomplete, match=r"1 videos or pictures cannot be read .*bad\.mp4"):
        write_frames(settings(videos))
    assert not (out / "manifest.csv").exists() and not (out / "real" / "bad").exists()
    words = ["data", "frames", str(videos), "--output", str(out), "--face_crop", "false", "--frames", "3"]
    assert cli.main([*words, "--workers", "1", "--skip_unreadable", "true"]) == 0
    assert (
        "12 frames of 4 videos" in (said := capsys.readouterr().out) and "1 problems, named above, were skipped" in said
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"form": "raw"}, "form: raw pixels are no pictures"), ({"workers": 0}, "workers: 0 is not usable")],
)
def test_settings_that_can_not_be_are_refused(videos: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(videos, **changes)


def test_videos_without_a_class_are_refused(videos: Path) -> None:
    with pytest.raises(ValueError, match="nothing says whether it is real; put videos into class folders"):
        write_frames(settings(videos / "real"))
    assert "6 frames of 2 videos" in write_frames(settings(videos / "real", label="real"))
