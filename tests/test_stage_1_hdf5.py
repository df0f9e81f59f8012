"""Stage 1 from FaceForensics++ in HDF5: pictures packed, official-style splits, killed, resumed, scored by video."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from ffpp_world import write_splits
from killed_run import whole_and_broken
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from tiny_world import draw

from llava import cli
from llava.data.public_sets import keys_of
from llava.evaluation.predictions import by_video, read_csv

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {
    name: [(f"{first + 2 * i:03}", f"{first + 2 * i + 1:03}") for i in range(pairs)]
    for name, first, pairs in (("train", 0, 12), ("val", 200, 5), ("test", 400, 5))
}
RECIPE = ["--config", str(ROOT / "scripts" / "configs" / "stage_1" / "m2f2_tiny.yaml")]
# The tiny recipe, smaller still, so that it learns a checkerboard in half a minute.
SMALL_TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL = {
    **{f"model.vision.{name}": value for name, value in SMALL_TOWER.items()},
    "model.vision.num_attention_heads": 2,
    "optim.lr": 3e-3,
    "batch_size": 12,
    "steps": 48,
    "eval_steps": 12,
    "data.cache": "false",
    "data.frames": 4,
    "near_duplicates": "false",
    "resamples": 50,
    "collapse.min_recall": 0,
    "collapse.min_sd": 0,
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Draw crops of two kinds, pack them by the script under the published names, and write the split files."""
    folder = tmp_path_factory.mktemp("ffpp")
    pairs = [pair for part in SPLITS.values() for pair in part]
    for label, kind in enumerate(("original", "NeuralTextures")):
        for i, key in enumerate(keys_of(kind, pairs)):
            (folder / kind / key).mkdir(parents=True)
            for n in range(6):
                Image.fromarray(draw(label, 6 * i + n)).save(folder / kind / key / f"{n:03}.png")
        command = ["scripts/pack_hdf5.py", str(folder / kind), "--output", str(folder), "--kind", kind]
        forked.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    write_splits(folder / "splits", SPLITS)
    return folder


def words(packed: Path, output: Path) -> list[str]:
    source = ["--data.source", "hdf5", "--data.path", str(packed), "--data.splits", str(packed / "splits")]
    changes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return [*RECIPE, *source, *changes, "--output_dir", str(output)]


@pytest.mark.e2e
def test_a_killed_training_from_hdf5_goes_on_exactly_and_is_scored_by_video(packed, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said = whole_and_broken(words(packed, whole), words(packed, broken), broken)
    assert "split train: found original, NeuralTextures; absent: Deepfakes, Face2Face" in said
    expected, found = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for file in ("val.csv", "test.csv"):
        assert (whole / file).read_text() == (broken / file).read_text()
    numbers = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, broken)]
    assert numbers[0]["test"] == numbers[1]["test"]
    assert numbers[1]["data"]["splits"]["train"]["records"] == numbers[1]["data"]["splits"]["train"]["videos"] == 48
    assert numbers[1]["data"]["splits"]["test"]["records"] == 4 * 20
    check_videos(broken, numbers[1]["test"], tmp_path)


def check_videos(model: Path, numbers: dict, tmp_path: Path) -> None:
    frames = read_csv(model / "test.csv")
    videos = by_video(frames)
    assert len(frames) == 80 and len(videos) == 20 and len(set(videos.groups)) == 5
    assert numbers["video"]["auc"]["value"] == pytest.approx(roc_auc_score(videos.labels, videos.p_fake))
    assert numbers["video"]["auc"]["value"] > 0.8, "it has learned"
    assert (
        cli.main(["evaluate", "--model", str(model), "--output_dir", str(tmp_path / "scores"), "--resamples", "20"])
        == 0
    )
    with (tmp_path / "scores" / "videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [v.video for v in videos]
    means = [float(row["mean"]) for row in rows]
    np.testing.assert_allclose(means, videos.p_fake, atol=1e-5)
