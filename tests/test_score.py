"""`m2f2 score`: one row for each image, exactly once, here and over Ray, whole and killed."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pandas as pd
import pytest
import torch
from bad_images import plant
from forked import Forked
from PIL import Image
from processes import processes_with
from pyarrow.parquet import read_schema
from tiny_world import SCOPE, draw, train_detector

from llava.core.cluster import ClusterSettings
from llava.core.runtime import Incomplete
from llava.jobs.bulk import ScoreSettings, score
from llava.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "utils" / "demo_faces" / "grace_hopper.jpg"
GOOD, PART_ROWS = 60, 10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write sixty pictures, every other one forged, the last with a name that is no Unicode, and ten bad files."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(GOOD):
        name = f"{index:03d}.png".encode() if index < GOOD - 1 else b"caf\xe9.png"
        Image.fromarray(draw(index % 2, index)).save(os.fsencode(folder) + b"/" + name, "PNG")
    plant(folder)
    return folder


@pytest.fixture(scope="module")
def settings(images: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoreSettings:
    folder = tmp_path_factory.mktemp("scores")
    train_detector(folder / "detector")
    return ScoreSettings(
        source=str(images),
        out=str(folder / "whole"),
        model=str(folder / "detector"),
        face="off",
        stability=False,
        part_rows=PART_ROWS,
    )


def run(settings: ScoreSettings) -> tuple[str, str]:
    """Score; gives what was printed and what was said at the end."""
    said: list[str] = []
    with pytest.raises(Incomplete) as ended:
        for piece in score(settings):
            said.append(piece)
    return "".join(said), str(ended.value)


def test_rows_hold_the_landmarks(settings: ScoreSettings, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(PHOTO, tmp_path / "images" / "0.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "1.png")
    found = replace(settings, source=str(tmp_path / "images"), out=str(tmp_path / "out"), face="largest")
    assert "".join(score(found))
    face, none = rows(found).to_dict("records")
    eyes = [face[f"{name}_{axis}"] for name in ("left_eye", "right_eye") for axis in "xy"]
    assert eyes == pytest.approx([223.6, 190.4, 307.0, 187.4], abs=8)
    assert face["face_roll"] == pytest.approx(-2.1, abs=3) and face["mouth_right_y"] > face["nose_y"] > eyes[1]
    assert pd.isna(none["nose_x"]) and pd.isna(none["face_roll"])


def rows(settings: ScoreSettings) -> pd.DataFrame:
    return pd.read_parquet(Path(settings.out) / "rows")


@pytest.fixture(scope="module")
def whole(settings: ScoreSettings) -> tuple[pd.DataFrame, str, str]:
    """Score all of it without a break, in this process."""
    said = run(settings)
    return rows(settings), *said


def test_every_image_has_one_row_with_its_verdict(
    whole: tuple[pd.DataFrame, str, str], images: Path, settings: ScoreSettings
) -> None:
    table, said, _ = whole
    good = table[table.status == "ok"]
    assert list(good.path) == [str(images / f"{index:03d}.png") for index in range(GOOD - 1)] + [
        f"{images}/caf\\xe9.png"
    ]
    assert list(good.label) == ["REAL", "FAKE"] * (GOOD // 2)
    pipeline = Pipeline.from_pretrained(settings.model, faces=FaceSettings(face="off"), stability=False)
    for path, p_fake, detector in zip(good.path[:8], good.p_fake, good.detector, strict=False):
        (verdict,) = pipeline.detect(path)
        assert p_fake == pytest.approx(verdict.p_fake, abs=1e-6) and detector == verdict.detector
    assert (good.probability_fake - good.p_fake).abs().max() < 1e-6
    assert good.faces.eq(1).all() and good.sha256.str.fullmatch("[0-9a-f]{64}").all() and good.problem.isna().all()
    assert f"Scope of the detector: {SCOPE}" in " ".join(said.split())
    for part in Path(settings.out, "rows").glob("*.parquet"):
        assert read_schema(part).metadata[b"scope"].decode() == SCOPE
    assert "scope" not in table, "it is of the run, not of a row"
    assert re.search(r"ok +│ +60 │", said) and re.search(r"FAKE +│ +30 │", said) and "70 images in" in said


def test_bad_files_have_a_row_each_that_says_why(whole: tuple[pd.DataFrame, str, str], settings: ScoreSettings) -> None:
    table, _, ended = whole
    bad = table[table.status == "bad"]
    assert len(bad) == 10 and bad.path.str.contains("/bad_").all() and bad.problem.str.len().gt(10).all()
    assert bad[["label", "p_fake", "faces", "detector"]].isna().all(axis=None)
    with (Path(settings.out) / "bad_files.csv").open(newline="") as file:
        assert list(csv.reader(file))[1:] == bad[["path", "problem"]].to_numpy().tolist()
    assert ended == f"10 of 70 images could not be read; {settings.out}/bad_files.csv says why."


def test_a_finished_run_is_not_done_again_and_missing_parts_are(
    whole: tuple[pd.DataFrame, str, str], settings: ScoreSettings
) -> None:
    parts = sorted(Path(settings.out, "rows").glob("*.parquet"))
    assert len(parts) == 7
    left = parts[0].with_name(".part-00002.parquet.killed")
    left.mkdir()
    before = [part.stat().st_mtime_ns for part in parts]
    parts[2].unlink()
    said, _ = run(settings)
    assert "10 images in" in said and rows(settings).equals(whole[0]) and not left.exists()
    assert [p.stat().st_mtime_ns == t for p, t in zip(parts, before, strict=True)] == [True, True, False, *[True] * 4]


def test_another_run_is_not_mixed_in(
    whole: tuple[pd.DataFrame, str, str], settings: ScoreSettings, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"begun with other settings.*\(face was \"off\", now \"largest\"\)"):
        list(score(replace(settings, face="largest")))
    other = tmp_path / "detector"
    shutil.copytree(settings.model, other)
    assert run(replace(settings, model=str(other)))  # the same model under another name
    config = other / "config.json"
    config.write_text(config.read_text().replace("0.5", "0.75"))
    with pytest.raises(ValueError, match="model was "):
        list(score(replace(settings, model=str(other))))
    source = tmp_path / "list.txt"
    source.write_text("a.png\n")
    with pytest.raises(ValueError, match="images was 70, now 1; names was"):
        list(score(replace(settings, source=str(source))))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files and no run"):
        list(score(replace(settings, out=str(tmp_path / "full"))))


def test_a_zip_is_scored_and_what_is_locked_in_it_is_bad(settings: ScoreSettings, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with ZipFile(path, "w") as archive:
        for name in ("000.png", "001.png"):
            archive.write(images / name, name)
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the first member is said to be encrypted, here and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    packed = replace(settings, source=str(path), out=str(tmp_path / "out"))
    run(packed)
    table = rows(packed)
    assert list(table.status) == ["bad", "ok"] and list(table.label)[1] == "FAKE"
    assert "locked" in table.problem[0] and list(table.path) == [f"{path}::000.png", f"{path}::001.png"]


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong, match in (
        ({"out": "a.parquet"}, "give a folder"),
        ({"workers": 2}, "only --engine ray"),
        ({"part_rows": 0}, "part_rows: 0"),
        ({"engine": "ray", "workers": 0}, "workers: 0"),
    ):
        with pytest.raises(ValueError, match=match):
            ScoreSettings(**({"source": "a", "out": "b"} | wrong))
    with pytest.raises(ValueError, match="store_mb: 10 is not usable"):
        ClusterSettings(store_mb=10)


@pytest.mark.e2e
def test_killed_runs_go_on_and_end_as_an_unbroken_one(
    whole: tuple[pd.DataFrame, str, str], settings: ScoreSettings, tmp_path: Path
) -> None:
    broken = replace(settings, out=str(tmp_path / "broken"))
    times = killed_after(broken, parts=2)
    times |= killed_after(replace(broken, engine="ray", workers=2, cluster=ClusterSettings(cpus=2)), parts=4)
    assert 4 <= len(times) < 7, "it was to be killed in the middle"
    run(broken)
    assert rows(broken).equals(whole[0])
    assert {name: stamp for name, stamp in parts_of(broken).items() if name in times} == times


def killed_after(settings: ScoreSettings, parts: int) -> dict[str, int]:
    """Score in processes that are killed once so many parts are there; gives the times of those parts."""
    words = [f"--{name}={getattr(settings, name)}" for name in ("out", "model", "face", "stability", "part_rows")]
    words += ["--engine", settings.engine, *(["--cluster.cpus", "2"] if settings.engine == "ray" else [])]
    command = ["-m", "llava.cli", "score", settings.source, *words]
    threads = str(torch.get_num_threads())  # the last digits of a score depend on them
    place = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "M2F2_TEST": settings.out}
    process = Forked(command, env=place, start_new_session=True)
    deadline = time.monotonic() + 300
    while process.poll() is None and len(parts_of(settings)) < parts and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while alive := processes_with(f"M2F2_TEST={settings.out}"):
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.2)
    return parts_of(settings)


def parts_of(settings: ScoreSettings) -> dict[str, int]:
    """Give the parts that are there, with their times."""
    return {path.name: path.stat().st_mtime_ns for path in Path(settings.out, "rows").glob("part-*.parquet")}
