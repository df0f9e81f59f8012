"""Sizes by memory and cores: counted, bounded, written down, and kept by a run that goes on."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from llava.core.config import build, parse
from llava.detectors.base import create
from llava.train import sizes, stage_1
from llava.train.recipe import Recipe
from llava.train.sizes import LADDER, activation_bytes, fitting_batch, spare_cores

CNN = {"backbone": "conv_tiny", "image_size": 32, "width": 8}
Memory = namedtuple("Memory", "available")


def test_what_an_image_leaves_in_memory_grows_with_its_area() -> None:
    small, large = (activation_bytes(create("cnn", CNN | {"image_size": side})) for side in (32, 64))
    assert 3.5 < large / small < 4.5
    images = 4 * 3 * 32 * 32  # bytes of the image itself, which the first layer keeps
    assert small > 5 * images


def test_the_batch_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    detector = create("cnn", CNN)
    states = sum(4 * weight.nbytes for weight in detector.parameters())
    image = activation_bytes(detector)

    def free_for(count: float) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory((states + count * image) / sizes.SPARE))

    for count, found in ((8.5, 8), (40, 32), (1000, 128)):
        free_for(count)
        assert fitting_batch(detector, images=1000) == found
    assert fitting_batch(detector, images=50) == 32 and fitting_batch(detector, images=3) == LADDER[0]
    free_for(7.5)
    with pytest.raises(ValueError, match="batch_size: auto finds no room for 8 images"):
        fitting_batch(detector, images=1000)


@pytest.mark.parametrize(("cores", "batches", "found"), [(1, 50, 0), (2, 50, 1), (64, 50, 8), (4, 2, 2)])
def test_workers_are_the_cores_that_are_left(cores: int, batches: int, found: int) -> None:
    assert spare_cores(cores, batches) == found


def test_flags_and_recipes_may_say_auto() -> None:
    recipe = parse(Recipe, ["--batch_size", "auto", "--workers", "auto", "--data.path", "x"])
    assert (recipe.batch_size, recipe.workers) == ("auto", "auto")
    with pytest.raises(ValueError, match="batch_size: 'many' is not usable"):
        build(Recipe, {"batch_size": "many"})


@pytest.mark.e2e
def test_a_run_that_goes_on_keeps_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for class_name in ("real", "fake"):
            folder = tmp_path / "images" / split / class_name
            folder.mkdir(parents=True)
            for number in range(10):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    values = {"detector": "cnn", "model": CNN, "data": {"path": str(tmp_path / "images")}, "epochs": 1, "resamples": 20}
    values |= {"output_dir": str(tmp_path / "out"), "batch_size": "auto", "workers": "auto", "near_duplicates": False}
    values |= {"precision": "fp32", "collapse": {"min_recall": 0.0, "min_sd": 0.0}}
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    stage_1.train(build(Recipe, values))
    record = tmp_path / "out" / "sizes.json"
    assert json.loads(record.read_text()) == [{"batch_size": 16, "workers": 0}], (
        "20 images: 16 are the most of the ladder"
    )
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["batch_size"] == "auto"
    (tmp_path / "out" / "metrics.json").unlink()
    record.write_text(json.dumps([{"batch_size": 8, "workers": 0}]))
    stage_1.train(build(Recipe, values))
    assert json.loads(record.read_text()) == [{"batch_size": 8, "workers": 0}], "also on another machine"
    stage_1.train(build(Recipe, values | {"resume": False}))
    assert json.loads(record.read_text()) == [{"batch_size": 16, "workers": 0}]
