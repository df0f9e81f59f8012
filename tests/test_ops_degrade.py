"""Degradations against scipy, Pillow and hand values; all randomness from the generator."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.ndimage import rotate as scipy_rotate

from llava.core.runtime import item_rng
from llava.ops.degrade import DegradeConfig, add_noise, blur, compress_jpeg, degrade, flip, rescale, rotate

NOTHING = {f"{name}_probability": 0.0 for name in ("blur", "rescale", "noise", "jpeg", "flip")}


@pytest.fixture
def image() -> np.ndarray:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:40, 0:56]
    waves = 128 + 60 * np.sin(x / 5)[..., None] + 40 * np.cos(y / 7)[..., None] * np.array([1, 0.5, -0.5])
    return np.clip(waves + rng.normal(0, 8, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma", [0.6, 1.5, 3.0])
def test_blur_equals_scipy(image: np.ndarray, sigma: float) -> None:
    expected = gaussian_filter(image.astype(float), sigma=(sigma, sigma, 0), mode="reflect", truncate=4.0)
    # OpenCV rounds its 8-bit kernel: one grey level at most.
    assert np.abs(blur(image, sigma) - expected).max() <= 1.0 + 0.5


def test_blur_of_sigma_zero_is_the_image(image: np.ndarray) -> None:
    assert np.array_equal(blur(image, 0.0), image)


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_is_close_to_pillows(image: np.ndarray, quality: int) -> None:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    pillow = np.asarray(Image.open(buffer)).astype(float)
    assert np.abs(compress_jpeg(image, quality) - pillow).mean() < 1.0


def test_lower_quality_means_more_loss(image: np.ndarray) -> None:
    losses = [np.abs(compress_jpeg(image, q).astype(int) - image).mean() for q in (30, 60, 95)]
    assert losses[0] > losses[1] > losses[2] > 0


def test_noise_has_the_sigma_it_was_given() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    noise = add_noise(grey, 6.0, np.random.default_rng(0)).astype(float) - 128
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert noise.std() == pytest.approx(6.0, rel=0.02)


def test_noise_is_clipped_not_wrapped() -> None:
    white = np.full((50, 50, 3), 255, np.uint8)
    assert add_noise(white, 5.0, np.random.default_rng(0)).min() > 200


def test_rescale_keeps_shape_and_removes_fine_detail() -> None:
    checks = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)[..., None].repeat(3, -1)
    half = rescale(checks, 0.5)
    assert half.shape == checks.shape
    assert half.std() < 0.05 * checks.std()
    assert np.array_equal(rescale(checks, 1.0), checks)


def test_flip_mirrors_columns(image: np.ndarray) -> None:
    assert np.array_equal(flip(image)[:, 0], image[:, -1])
    assert np.array_equal(flip(flip(image)), image)


def test_same_generator_same_image_other_epoch_other_image(image: np.ndarray) -> None:
    config = DegradeConfig(blur_probability=1, noise_probability=1, jpeg_probability=1, rescale_probability=1)
    first, again = (degrade(image, None, config, item_rng(7, 2, 5))[0] for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, degrade(image, None, config, item_rng(7, 3, 5))[0])
    assert first.dtype == np.uint8
    assert first.shape == image.shape


def test_all_chances_zero_leave_the_image_and_input_is_never_written(image: np.ndarray) -> None:
    image.setflags(write=False)
    assert np.array_equal(degrade(image, None, DegradeConfig(**NOTHING), np.random.default_rng(0))[0], image)
    always = DegradeConfig(**dict.fromkeys(NOTHING, 1.0))
    degrade(image, None, always, np.random.default_rng(0))


def test_chances_are_those_of_the_recipe(image: np.ndarray) -> None:
    changed = {"blur": 0, "jpeg": 0, "flip": 0}
    for name in changed:
        config = DegradeConfig(**{**NOTHING, f"{name}_probability": getattr(DegradeConfig(), f"{name}_probability")})
        outputs = (config(image, None, item_rng(0, 0, i))[0] for i in range(1000))
        changed[name] = sum(not np.array_equal(out, image) for out in outputs)
    assert changed["blur"] == pytest.approx(100, abs=30)
    assert changed["jpeg"] == pytest.approx(100, abs=30)
    assert changed["flip"] == pytest.approx(500, abs=50)


def test_jpeg_quality_is_a_range_with_both_ends(image: np.ndarray) -> None:
    config = DegradeConfig(**{**NOTHING, "jpeg_probability": 1.0, "jpeg_quality": (30, 32)})
    possible = {compress_jpeg(image, q).tobytes(): q for q in (30, 31, 32)}
    seen = {possible[config(image, None, item_rng(0, 0, i))[0].tobytes()] for i in range(60)}
    assert seen == {30, 31, 32}


def test_a_mask_is_flipped_with_its_image_and_else_left_alone(image: np.ndarray) -> None:
    mask = np.arange(image.shape[0] * image.shape[1]).reshape(image.shape[:2])
    config = DegradeConfig(blur_probability=1, jpeg_probability=1, flip_probability=0.5)
    seen = [degrade(image, mask, config, item_rng(0, 0, i))[1] for i in range(20)]
    mirrored = [np.array_equal(out, mask[:, ::-1]) for out in seen]
    assert all(np.array_equal(out, mask) != is_mirrored for out, is_mirrored in zip(seen, mirrored, strict=True))
    assert 0 < sum(mirrored) < 20


@pytest.mark.parametrize(
    "setting",
    [{"blur_probability": 1.5}, {"jpeg_quality": (0, 50)}, {"jpeg_quality": (90, 30)}, {"rescale_factor": (0.5, 2)}],
)
def test_impossible_settings_are_refused_by_name(setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        DegradeConfig(**setting)


def test_rotation_turns_counter_clockwise_as_scipy_does(image: np.ndarray) -> None:
    square = np.ascontiguousarray(image[:, :40])
    assert np.array_equal(rotate(square, 90), np.rot90(square))
    expected = scipy_rotate(square.astype(float), 10, axes=(0, 1), reshape=False, order=1, mode="reflect")
    assert np.abs(rotate(square, 10) - expected).mean() < 1.0, "OpenCV places pixels on a grid of 1/32"


def test_image_and_mask_are_rotated_alike_within_the_limit(image: np.ndarray) -> None:
    spot = np.zeros((41, 41), np.uint8)
    spot[18:23, 34:39] = 255
    config = DegradeConfig(**NOTHING, rotation=10)
    angles = []
    for i in range(200):
        turned, mask = degrade(np.repeat(spot[..., None], 3, axis=2), spot, config, item_rng(0, 0, i))
        assert mask is not None and set(np.unique(mask)) == {0, 255}
        places = [np.argwhere(part > 127).mean(axis=0) for part in (turned[..., 0], mask)]
        assert np.allclose(*places, atol=0.4)
        angles.append(np.degrees(np.arctan2(20 - places[1][0], places[1][1] - 20)))
    assert -11 < min(angles) < -8 and 8 < max(angles) < 11
    still, _ = degrade(image, None, DegradeConfig(**NOTHING), item_rng(0, 0, 0))
    assert np.array_equal(still, image)


def test_smoothing_all_over_flattens_texture_and_keeps_edges() -> None:
    rng = np.random.default_rng(0)
    step = np.where(np.arange(64) < 32, 60.0, 180.0)[None, :, None]
    image = np.clip(step + rng.normal(0, 5, (64, 64, 1)), 0, 255).repeat(3, axis=2).astype(np.uint8)
    config = DegradeConfig(**NOTHING, smooth_probability=1.0, smooth_tolerance=(15.0, 15.0))
    smooth, _ = degrade(image, None, config, item_rng(0, 0, 0))
    assert smooth[:, :28].std() < 0.4 * image[:, :28].std()
    assert float(smooth[:, 33].mean()) - float(smooth[:, 30].mean()) > 100


def test_sharpening_adds_fine_detail(image: np.ndarray) -> None:
    soft = np.clip(image, 60, 200).astype(np.uint8)
    detail = soft - gaussian_filter(soft.astype(float), (1, 1, 0))
    amounts = []
    for seed in range(20):
        config = DegradeConfig(**NOTHING, sharpen_probability=1.0)
        sharp, _ = degrade(soft, None, config, item_rng(seed, 0, 0))
        inside = (sharp > 0) & (sharp < 255)
        gained = (sharp - soft.astype(float))[inside]
        amounts.append(np.polyfit(detail[inside], gained, 1)[0])
        assert np.abs(gained - amounts[-1] * detail[inside]).mean() < 1
    assert 0 <= min(amounts) < 0.4 and 1.6 < max(amounts) < 2.05


def test_colour_can_be_taken_away_and_light_changed(image: np.ndarray) -> None:
    grey, _ = degrade(image, None, DegradeConfig(**NOTHING, grey_probability=1.0), item_rng(0, 0, 0))
    weights = image @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(grey - weights[..., None]).max() <= 1
    gains = []
    for seed in range(40):
        lit, _ = degrade(image, None, DegradeConfig(**NOTHING, gain=0.2), item_rng(seed, 0, 0))
        darker = image[(image > 100) & (image < 200)]
        gains.append(float((lit[(image > 100) & (image < 200)] / darker).mean()))
    assert 0.8 <= min(gains) < 0.85 and 1.15 < max(gains) <= 1.2 + 0.005
    with pytest.raises(ValueError, match="grey_probability"):
        DegradeConfig(grey_probability=1.5)
