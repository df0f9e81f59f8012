"""The published csv and its scoring: golden numbers, hand cases, exact round trips, the slip and its repair."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import forked
import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from ffpp_world import SPLITS, write_splits
from PIL import Image

from llava import cli
from llava.core.types import Record
from llava.data.public_sets import keys_of
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.evaluation.predictions import Prediction, Predictions, read_csv, write_csv
from llava.evaluation.published_csv import (
    KINDS,
    VideoScores,
    published_ids,
    published_scores,
    read_predictions,
    read_published,
    write_published,
)

ROOT = Path(__file__).resolve().parents[1]
HEAD = "image_id,ground_truth,prediction\n"


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> Path:
    folder = shared_data.parent / "golden" / "dev"
    if not folder.is_dir():
        pytest.skip("the golden cases do not lie beside this checkout (../shared/golden/dev)")
    return folder


def write_frames(path: Path, videos: dict[str, list[float]]) -> Path:
    """Write P(real) of the frames of each video, `FILE_KEY`, as the published inference does."""
    rows = [f"{v},{int(v[0] == '0')},{p!r}\n" for v, ps in videos.items() for p in ps]
    names = [f"{v}_{i}" for v, ps in videos.items() for i in range(len(ps))]
    path.write_text(HEAD + "".join(n + r[r.index(",") :] for n, r in zip(names, rows, strict=True)))
    return path


def test_golden_csv_survives_a_round_trip(golden: Path, tmp_path: Path) -> None:
    before = read_predictions(golden / "metrics_frames.csv")
    write_published(tmp_path / "p.csv", before)
    assert read_published(tmp_path / "p.csv") == before
    files = [list(csv.DictReader(path.open())) for path in (golden / "metrics_frames.csv", tmp_path / "p.csv")]
    for ours, theirs in zip(*files, strict=True):
        assert (ours["image_id"], ours["ground_truth"]) == (theirs["image_id"], theirs["ground_truth"])
        assert float(ours["prediction"]) == pytest.approx(float(theirs["prediction"]), abs=2e-16)


def test_labels_videos_and_groups_follow_from_the_names(tmp_path: Path) -> None:
    videos = {"0_071": [0.75], "1_071_054": [0.25, 0.5], "4_054_071": [0.0], "0_003": [1.0]}
    found = read_published(write_frames(tmp_path / "p.csv", videos))
    assert [(p.id, p.label, p.class_name, p.video, p.group, p.p_fake) for p in found] == [
        ("0_071_0", 0, "real", "0_071", "054", 0.25),
        ("1_071_054_0", 1, "Deepfakes", "1_071_054", "054", 0.75),
        ("1_071_054_1", 1, "Deepfakes", "1_071_054", "054", 0.5),
        ("4_054_071_0", 1, "Face2Face", "4_054_071", "054", 1.0),
        ("0_003_0", 0, "real", "0_003", "003", 0.0),
    ]
    assert KINDS[2:4] == ("FaceSwap", "NeuralTextures")


def test_the_slip_by_hand(tmp_path: Path) -> None:
    """Means .9, .8, .2 with the truths real, fake, real: .9 gets "fake", .8 gets "real", .2 is dropped."""
    outliers = [0.0] * 10, [1.0] * 10
    frames = {name: outliers[0] + [p] + outliers[1] for name, p in (("0_001", 0.9), ("1_001_002", 0.8), ("0_002", 0.2))}
    scores = published_scores(read_published(write_frames(tmp_path / "p.csv", frames)))
    assert scores["published"] == VideoScores(auc=0.0, best_accuracy=0.5, videos=2)
    assert scores["corrected"] == VideoScores(auc=0.5, best_accuracy=pytest.approx(2 / 3), videos=3)


def test_a_mean_at_the_threshold_is_called_real(tmp_path: Path) -> None:
    """At threshold 0 all are called real, two of three rightly; at any other one fake at most."""
    frames = {"0_001": [0.0] * 21, "0_002": [0.0] * 21, "1_001_002": [1.0] * 21}
    scores = published_scores(read_published(write_frames(tmp_path / "p.csv", frames)))
    assert scores["corrected"].best_accuracy == pytest.approx(2 / 3)


def test_the_slip_against_sklearn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"0_{i:03d}" for i in range(8)] + [f"3_{i:03d}_{i + 1:03d}" for i in range(9)]
    videos = {names[i]: rng.random(40).tolist() for i in rng.permutation(len(names))}
    scores = published_scores(read_published(write_frames(tmp_path / "p.csv", videos)))
    means = np.array([np.mean(sorted(ps)[10:-10]) for ps in videos.values()])
    is_real = np.array([name[0] == "0" for name in videos])
    for found, truth, p_real in (
        (scores["published"], is_real[1:], means[:-1]),
        (scores["corrected"], is_real, means),
    ):
        assert found.auc == pytest.approx(sk.roc_auc_score(truth, p_real), abs=1e-12)
        best = max(sk.accuracy_score(truth, p_real >= t) for t in (0, *(p_real + 1e-4)))
        assert found.best_accuracy == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ({"0_001": [0.5] * 21, "1_001_002": [0.5] * 20, "0_002": [0.5] * 21}, "1 of 2 videos have 20 frames or fewer"),
        ({"1_001_002": [0.5] * 21, "1_002_001": [0.5] * 21}, "videos of both classes"),
    ],
)
def test_what_the_published_way_cannot_score_is_said(videos: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        published_scores(read_published(write_frames(tmp_path / "p.csv", videos)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("5_071_054_0,0,0.5", "line 3: image_id '5_071_054_0' must be FILE_KEY_FRAME"),
        ("0_071,1,0.5", "line 3: image_id '0_071' must be FILE_KEY_FRAME"),
        ("0_071_054_0,1,0.5", "line 3: image_id '0_071_054_0': an original has one id"),
        ("1_071_0,0,0.5", "line 3: image_id '1_071_0': an original has one id in its key, a fake two"),
        ("0_071_0,0,0.5", "line 3: ground_truth '0' of '0_071_0'; 1 is real"),
        ("1_071_054_0,fake,0.5", "line 3: ground_truth 'fake'"),
        ("0_071_0,1,1.5", "line 3: prediction '1.5' must be P(real)"),
        ("0_071_0,1,nan", "line 3: prediction 'nan'"),
        ("0_071_0,1,", "line 3: prediction ''"),
        ("0_071_0,1", "line 3: not as many values"),
        ("0_070_0,1,0.5", "given more than once: '0_070_0'"),
    ],
)
def test_mistakes_in_a_published_csv_are_named(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f"{HEAD}0_070_0,1,0.5\n{row}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_predictions(tmp_path / "p.csv")


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_predictions(tmp_path / "none.csv")
    (tmp_path / "p.csv").write_text("image_id,prediction\n0_071_0,0.5\n")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) ground_truth"):
        read_published(tmp_path / "p.csv")


def prediction(video: str, frame: str, class_name: str, p_fake: float = 0.5) -> Prediction:
    label = int(class_name != "real")
    return Prediction(id=frame, label=label, p_fake=p_fake, video=video, group="g", class_name=class_name)


def test_every_score_survives_to_the_last_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = [0.0, 1.0, 0.1, 1e-300, 5e-324, float(np.nextafter(1, 0)), *rng.random(200), *(rng.random(50) * 1e-6)]
    items = [prediction("0_071", f"0_071_{i}", "real", float(p)) for i, p in enumerate(scores)]
    before = Predictions(tuple(items))
    write_published(tmp_path / "p.csv", before)
    assert read_published(tmp_path / "p.csv").p_fake.tolist() == before.p_fake.tolist()
    assert (tmp_path / "p.csv").read_text().splitlines()[3] == "0_071_2,1,0.9"
    write_csv(tmp_path / "ours.csv", before)
    assert read_predictions(tmp_path / "ours.csv") == read_csv(tmp_path / "ours.csv") == before


def test_names_of_any_source_on_faceforensics_become_image_ids() -> None:
    items = [
        prediction("manipulated_sequences/FaceSwap/c40/071_054", "FaceSwap/071_054/012.png", "FaceSwap"),
        prediction("original_sequences/youtube/c40/071", "071#7", "real"),
    ]
    assert published_ids(items) == ["2_071_054_12", "0_071_7"]
    record = Record(id="071/5", label=0, class_name="real", video="071", group="071", where="x")
    assert published_ids([record]) == ["0_071_5"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("FaceShifter/071_054", "a_1", "FaceShifter")], "no kind 'FaceShifter'. Allowed: Deepfakes, Face2Face"),
        ([("Deepfakes/071", "071_1", "Deepfakes")], "must end with its FaceForensics++ key"),
        ([("id0_0000", "id0_0000_1", "real")], "must end with its FaceForensics++ key"),
        ([("0_071", "0_071_x", "real")], "the number of its frame"),
        ([("0_071", "0_071", "real")], "the number of its frame"),
        (
            [("c23/071", "c23/071/1", "real"), ("c40/071", "c40/071/1", "real")],
            "image_id '0_071_1' would be given twice",
        ),
    ],
)
def test_what_has_no_image_id_is_refused(items: list[tuple[str, str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        published_ids([prediction(*item) for item in items])


def test_the_script_prints_both_ways_of_scoring(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name, first in (("val", 0), ("test", 100)):
        videos = {}
        for i in range(first, first + 8, 2):
            videos |= {f"0_{i:03d}": rng.uniform(0.4, 1, 30).tolist()}
            videos |= {f"1_{i:03d}_{i + 1:03d}": rng.uniform(0, 0.6, 30).tolist()}
        write_frames(tmp_path / f"{name}.csv", videos)
    done = run_script(
        "--predict_path", tmp_path / "test.csv", "--val_path", tmp_path / "val.csv", "--n_boot", 20,
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Trimmed means of videos as published" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["published_scoring"]["corrected"] == {"auc": 1.0, "best_accuracy": 1.0, "videos": 8}
    assert report["published_scoring"]["published"]["auc"] < 0.5, "reals and fakes alternate"
    assert report["video_trimmed"]["auc"]["value"] == 1.0 and report["threshold"] != 0.5 and report["trim"] == 0.1


def test_the_script_says_why_it_does_not_score_as_published(tmp_path: Path) -> None:
    write_frames(tmp_path / "p.csv", {"0_001": [0.9, 0.8], "1_001_002": [0.2]})
    done = run_script("--predict_path", tmp_path / "p.csv", "--n_boot", 20, "--json", tmp_path / "r.json")
    assert done.returncode == 0 and "Not scored as published: " in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["published_scoring"] is None


def run_script(*words: object) -> subprocess.CompletedProcess[str]:
    command = ["eval/eval_detection.py", *map(str, words)]
    return forked.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def test_evaluate_refuses_to_write_it_of_other_data(
    class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "detector").mkdir()
    words = ["--model", str(tmp_path / "detector"), "--data.path", str(class_folder), "--published"]
    assert cli.main(["evaluate", *words]) == 2, "before the detector, of which there is none, is loaded"
    assert "the published csv has no kind 'fake'" in capsys.readouterr().err


def test_evaluate_writes_videos_and_the_published_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_splits(tmp_path / "FaceForensics++")
    rng = np.random.default_rng(0)
    for kind, folder in (("original", "original_sequences/youtube"), ("FaceSwap", "manipulated_sequences/FaceSwap")):
        for key in keys_of(kind, SPLITS["test"]):
            frames = root / folder / "c40" / "frames" / key
            frames.mkdir(parents=True)
            for number in range(21):
                noise = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
                Image.fromarray(noise).save(frames / f"{number:03d}.png")
    torch.manual_seed(0)
    M2F2Det(M2F2DetConfig.tiny()).save(tmp_path / "detector")
    words = ["evaluate", "--model", str(tmp_path / "detector"), "--data.source", "ffpp", "--data.path", str(root)]
    words += ["--data.allow_missing", "--published", "--trim", "0.2", "--resamples", "20", "--device", "cpu"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert "videos.csv" in (shown := capsys.readouterr().out) and "published.csv" in shown
    ours, published = (read_predictions(tmp_path / "out" / name) for name in ("predictions.csv", "published.csv"))
    assert published.p_fake.tolist() == ours.p_fake.tolist() and published.groups.tolist() == ours.groups.tolist()
    assert published.items[0].id == "0_953_0" and published.items[-1].id == "2_974_953_20"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    videos = list(csv.DictReader((tmp_path / "out" / "videos.csv").open()))
    assert [row["frames"] for row in videos] == ["21"] * 4
    for level, column in (("video", "mean"), ("video_trimmed", "trimmed_mean")):
        auc = sk.roc_auc_score([int(row["label"]) for row in videos], [float(row[column]) for row in videos])
        assert report[level]["auc"]["value"] == pytest.approx(auc)
