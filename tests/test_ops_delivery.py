"""Delivered versions and degradations against slices, Pillow and hand values."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from llava.core.runtime import item_rng
from llava.ops.degrade import DEGRADATIONS, VERSIONS, Change, compress_jpeg, crop_sides, delivered, every_change, resize


@pytest.fixture
def image() -> np.ndarray:
    y, x = np.mgrid[0:40, 0:60]
    waves = 128 + 60 * np.sin(x / 5)[..., None] + 40 * np.cos(y / 7)[..., None] * np.array([1, 0.5, -0.5])
    return (waves + item_rng(1, 0, 0).normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8)


def test_half_size_is_the_mean_of_four(image: np.ndarray) -> None:
    means = image.reshape(20, 2, 30, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize(image, 0.5) - means).max() <= 0.5


def test_double_size_is_close_to_pillow_s(image: np.ndarray) -> None:
    pillow = np.asarray(Image.fromarray(image).resize((120, 80), Image.Resampling.BICUBIC)).astype(float)
    assert resize(image, 2.0).shape == (80, 120, 3)
    assert np.abs(resize(image, 2.0) - pillow).mean() < 2  # the two kernels differ: a = -0.75 and -0.5


def test_a_crop_takes_all_four_sides(image: np.ndarray) -> None:
    assert np.array_equal(crop_sides(image, 10), image[4:36, 6:54])
    assert np.array_equal(crop_sides(image, 1), image[:, 1:59])


def test_the_versions_are_what_their_names_say(image: np.ndarray) -> None:
    versions = dict(zip(VERSIONS, delivered(image), strict=True))
    assert len(versions) == 8
    for quality in (95, 70, 50, 30):
        assert np.array_equal(versions[f"JPEG {quality}"], compress_jpeg(image, quality))
    assert versions["half size"].shape == (20, 30, 3) and versions["double size"].shape == (80, 120, 3)
    assert versions["crop 3 %"].shape == (38, 56, 3) and versions["crop 6 %"].shape == (36, 52, 3)


def test_one_pixel_outlasts_every_change() -> None:
    dot = np.full((1, 1, 3), 77, np.uint8)
    for change in every_change():
        assert min(change(dot, item_rng(0, 0, 0)).shape) >= 1


def test_every_degradation_loses_more_as_it_grows(image: np.ndarray) -> None:
    for kind, degradation in DEGRADATIONS.items():
        if kind in ("resize", "crop"):
            continue  # the size is another one, so there is no difference to take
        changed = [Change(kind, s)(image, item_rng(0, 0, 0)) for s in degradation.strengths]
        losses = [np.abs(c.astype(int) - image).mean() for c in changed]
        assert losses == sorted(losses) and losses[0] < losses[-1], kind


def test_the_ends_are_those_that_are_promised() -> None:
    assert DEGRADATIONS["JPEG"].strengths[0] == 95 and DEGRADATIONS["JPEG"].strengths[-1] == 30
    assert DEGRADATIONS["resize"].strengths[0] == 2 and DEGRADATIONS["resize"].strengths[-1] == 0.5
    changes = every_change()
    assert len(set(changes)) == len(changes) and set(VERSIONS.values()) <= set(changes)


def test_changes_are_random_only_through_the_generator_and_leave_the_input(image: np.ndarray) -> None:
    image.setflags(write=False)
    for change in every_change():
        first, again = (change(image, item_rng(7, 0, 5)) for _ in range(2))
        assert np.array_equal(first, again) and first.dtype == np.uint8
        other = change(image, item_rng(7, 0, 6))
        assert np.array_equal(first, other) == (change.kind != "noise")


def test_a_change_travels_to_another_process(image: np.ndarray) -> None:
    change = pickle.loads(pickle.dumps(Change("JPEG", 30)))
    assert np.array_equal(change(image, item_rng(0, 0, 0)), compress_jpeg(image, 30))
