"""The Kaggle set in its real layout, small: copied, gone on with, checked; without a client it says what to do."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from llava import cli
from llava.data.kaggle import KaggleSettings, build_kaggle
from llava.data.sources import DataConfig, open_source
from llava.train.recipe import open_data

COUNTS = {"train": 3, "valid": 2, "test": 2}


def picture(seed: int) -> bytes:
    out = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "archive.zip"
    with ZipFile(path, "w") as file:
        file.writestr("train.csv", "id,label\n")
        for split, count in COUNTS.items():
            for number in range(count):
                for class_name in ("real", "fake"):
                    name = f"real_vs_fake/real-vs-fake/{split}/{class_name}/{number:05}.jpg"
                    file.writestr(name, picture(hash(name) % 1000))
    return path


def test_the_set_becomes_class_folders_that_open(archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = build_kaggle(KaggleSettings(archive=str(archive), output=str(output)))
    statistics = {"train": {"real": 3, "fake": 3}, "val": {"real": 2, "fake": 2}, "test": {"real": 2, "fake": 2}}
    assert found["statistics"] == statistics and found["total_images"] == 14 and found["there_already"] == 0
    about = json.loads((output / "metadata.json").read_text())
    assert about["statistics"] == statistics and len(about["archive_sha256"]) == 64
    with ZipFile(archive) as file:
        inside = file.read("real_vs_fake/real-vs-fake/valid/fake/00001.jpg")
    assert (output / "val" / "fake" / "00001.jpg").read_bytes() == inside
    data = open_data(DataConfig(path=str(output)), seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (6, 4, 4)
    assert len(open_source(DataConfig(path=str(output))).records) == 14


def test_nothing_is_overwritten_and_an_interrupted_copy_is_gone_on_with(archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    mine = output / "train" / "real" / "00000.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    found = build_kaggle(KaggleSettings(archive=str(archive), output=str(output)))
    assert mine.read_bytes() == b"mine" and found["there_already"] == 1 and found["total_images"] == 14
    assert build_kaggle(KaggleSettings(archive=str(archive), output=str(output)))["there_already"] == 14


def test_what_cannot_be_read_is_left_out_and_named(archive: Path, tmp_path: Path) -> None:
    with ZipFile(archive, "a") as file:
        file.writestr("real_vs_fake/real-vs-fake/train/real/bad.jpg", b"no picture")
    found = build_kaggle(KaggleSettings(archive=str(archive), output=str(tmp_path / "out")))
    assert found["left_out_count"] == 1 and found["left_out"][0].startswith("train/real/bad.jpg: ")
    assert found["total_images"] == 14 and not (tmp_path / "out" / "train" / "real" / "bad.jpg").exists()


def test_an_unpacked_folder_will_do(archive: Path, tmp_path: Path) -> None:
    with ZipFile(archive) as file:
        file.extractall(tmp_path / "unpacked")
    found = build_kaggle(KaggleSettings(archive=str(tmp_path / "unpacked"), output=str(tmp_path / "out")))
    assert found["total_images"] == 14 and found["archive_sha256"] is None


@pytest.mark.parametrize("client", [True, False])
def test_without_client_or_key_one_sentence_says_what_to_do(
    client: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    if client:
        (tools / "kaggle").write_text("#!/bin/sh\nexit 9\n")
        (tools / "kaggle").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["data", "kaggle140k", "--output", str(tmp_path / "data" / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'm2f2-det[kaggle]'" in said and "~/.kaggle/kaggle.json" in said
    if client:
        monkeypatch.setenv("KAGGLE_USERNAME", "me")
        monkeypatch.setenv("KAGGLE_KEY", "secret")
        monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
        assert cli.main(["data", "kaggle140k", "--output", str(tmp_path / "data" / "out")]) == 2
        said = capsys.readouterr().err
        assert "gave no 140k-real-and-fake-faces.zip (exit code 9)" in said and "secret" not in said
    assert not (tmp_path / "data" / "out").exists()


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "nothing")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    for name, message in (
        ("other.zip", "holds no real-vs-fake/"),
        ("broken.zip", "is no zip, or an incomplete one"),
        ("nowhere.zip", "does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build_kaggle(KaggleSettings(archive=str(tmp_path / name), output=str(tmp_path / "out")))
