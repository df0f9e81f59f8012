"""Forgeries: exact masks, untouched surroundings, every artefact against an independent computation."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import cv2
import numpy as np
import pytest
from scipy import ndimage

from llava.core.config import build
from llava.core.runtime import item_rng
from llava.core.types import REGIONS
from llava.ops.augment import AugmentConfig, augment, dead_leaves, power_law_noise
from llava.ops.face_regions import FACE, disjoint, eyes_in_box, face_regions
from llava.ops.forge import (
    ARTEFACTS,
    PAIRS,
    SELF_BLENDED,
    ForgeConfig,
    Forgery,
    blending_boundary,
    blur,
    colour_mismatch,
    draw_kind,
    forge,
    lay_over,
    over_smooth,
    resampling,
    warp,
)
from llava.ops.self_blend import SelfBlendConfig, self_blend

SIDE = 128
KINDS = [(region, artefact) for region, allowed in PAIRS.items() for artefact in allowed]


def textured(seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Give an image with structure at every scale, so that every edit changes something."""
    rng = np.random.default_rng(seed)
    layers = [ndimage.gaussian_filter(rng.normal(size=(side, side, 3)), (s, s, 0)) for s in (1, 3, 12)]
    total = sum(layer / layer.std() for layer in layers)
    return np.clip(np.rint(128 + 22 * total), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.8])
def test_noise_of_a_power_law_has_its_slope(exponent: float) -> None:
    noise = power_law_noise(256, exponent, np.random.default_rng(0))
    assert abs(noise.mean()) < 1e-9 and noise.std() == pytest.approx(1)
    amplitude = np.abs(np.fft.rfft2(noise))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None])
    rings = [(frequency > low) & (frequency <= 1.3 * low) for low in 0.02 * 1.3 ** np.arange(11)]
    centres, means = ([np.log(values[ring].mean()) for ring in rings] for values in (frequency, amplitude))
    assert np.polyfit(centres, means, 1)[0] == pytest.approx(-exponent, abs=0.05)


def test_dead_leaves_are_pictures_of_their_generator() -> None:
    one, same, other = (dead_leaves(96, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (96, 96, 3) and one.dtype == np.uint8
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert one.std() > 15 and len(np.unique(one.reshape(-1, 3), axis=0)) > 1000


def disc(side: int = SIDE, radius: float = 30.0) -> np.ndarray:
    y, x = np.indices((side, side)) - side // 2
    return (np.hypot(y, x) <= radius).astype(np.float32)


def forged(region: str, artefact: str, seed: int = 0, image: np.ndarray | None = None) -> Forgery:
    image = textured() if image is None else image
    found = forge(image, face_regions(*image.shape[:2])[region], region, artefact, item_rng(seed, 1, 0))
    assert found is not None
    return found


@pytest.mark.parametrize(("region", "artefact"), KINDS)
def test_the_mask_is_exact_and_the_rest_untouched(region: str, artefact: str) -> None:
    image = textured()
    for seed in range(4):
        result = forged(region, artefact, seed)
        changed = (result.image != image).any(axis=2)
        assert result.image.dtype == np.uint8 and result.mask.dtype == np.float32
        assert result.mask.min() >= 0 and result.mask.max() <= 1
        assert not (changed & (result.mask == 0)).any()
        assert changed.sum() > 0.5 * (result.mask > 0).sum()
        if region != FACE:
            assert not (changed & (face_regions(SIDE, SIDE)[region] == 0)).any()


@pytest.mark.parametrize(("region", "artefact"), KINDS)
def test_a_forgery_is_a_function_of_its_generator(region: str, artefact: str) -> None:
    first, again, other = (forged(region, artefact, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)


def test_the_input_is_left_as_it_is() -> None:
    image = textured()
    for region, artefact in KINDS:
        forged(region, artefact, image=image)
    assert np.array_equal(image, textured())


def test_allowed_pairs() -> None:
    assert set(PAIRS) == {*REGIONS, FACE}
    assert {artefact for _, artefact in KINDS} == set(ARTEFACTS)
    assert [region for region, allowed in PAIRS.items() if "over_smooth" in allowed] == ["skin"]
    image, mask = textured(), disc()
    with pytest.raises(ValueError, match="'over_smooth' cannot be put on the mouth"):
        forge(image, mask, "mouth", "over_smooth", item_rng(0, 0, 0))
    with pytest.raises(ValueError, match="'chin' is unknown"):
        forge(image, mask, "chin", "blur", item_rng(0, 0, 0))
    with pytest.raises(ValueError, match="not empty"):
        forge(image, np.zeros_like(mask), "nose", "blur", item_rng(0, 0, 0))
    with pytest.raises(ValueError, match=r"mask: expected \(128, 128\)"):
        forge(image, mask[:60], "nose", "blur", item_rng(0, 0, 0))
    with pytest.raises(ValueError, match="expected uint8"):
        forge(image.astype(np.float32), mask, "nose", "blur", item_rng(0, 0, 0))


def test_what_cannot_be_seen_is_no_forgery() -> None:
    flat = np.full((SIDE, SIDE, 3), 120, np.uint8)
    mask = face_regions(SIDE, SIDE)["nose"]
    for artefact in ("blur", "resampling", "warp"):
        assert forge(flat, mask, "nose", artefact, item_rng(0, 0, 0)) is None
    assert forge(flat, mask, "nose", "colour_mismatch", item_rng(0, 0, 0)) is not None


def test_kinds_are_drawn_as_configured() -> None:
    regions, rng = face_regions(SIDE, SIDE), item_rng(0, 0, 0)
    drawn = [draw_kind(regions, ForgeConfig(self_blend_share=0.25), rng) for _ in range(4000)]
    assert set(drawn) == set(KINDS)
    shares = {region: np.mean([r == region for r, _ in drawn]) for region in PAIRS}
    assert shares.pop(FACE) == pytest.approx(0.25, abs=0.025)
    assert all(share == pytest.approx(0.15, abs=0.025) for share in shares.values())
    assert {draw_kind(regions, ForgeConfig(self_blend_share=1.0), rng) for _ in range(20)} == {(FACE, SELF_BLENDED)}
    hidden = {**regions, "mouth": np.zeros((SIDE, SIDE), np.float32)}
    assert "mouth" not in {draw_kind(hidden, ForgeConfig(self_blend_share=0.0), rng)[0] for _ in range(300)}
    with pytest.raises(ValueError, match="larger crop"):
        draw_kind(face_regions(16, 16), ForgeConfig(self_blend_share=0.0), rng)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="self_blend_share"):
        ForgeConfig(self_blend_share=1.5)
    with pytest.raises(ValueError, match="blur_sigma"):
        ForgeConfig(blur_sigma=(2.0, 1.0))
    with pytest.raises(ValueError, match="elastic"):
        ForgeConfig(self_blend=SelfBlendConfig(elastic=(-1.0, 1.0)))
    with pytest.raises(ValueError, match="blend_ratio"):
        ForgeConfig(self_blend=SelfBlendConfig(blend_ratio=(0.5, 1.5)))
    assert build(ForgeConfig, {"self_blend": {"elastic": [0, 1]}}).self_blend.elastic == (0.0, 1.0)


def test_blur_is_scipys_gaussian() -> None:
    image, mask = textured(), disc()
    content, weight = blur(image, mask, 2.0)
    expected = ndimage.gaussian_filter(image.astype(np.float64), (2.0, 2.0, 0), mode="reflect", truncate=4.0)
    assert np.abs(content - expected).max() < 0.6
    assert weight is mask


def cielab(rgb: np.ndarray) -> np.ndarray:
    """Convert by the definition: IEC 61966-2-1 (sRGB, D65) and CIE 15."""
    v = rgb / 255.0
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def test_colour_mismatch_shifts_cielab() -> None:
    image = np.full((8, 8, 3), (150, 120, 110), np.uint8)
    shift = np.array([4.0, -6.0, 8.0])
    content, _ = colour_mismatch(image, np.ones((8, 8), np.float32), shift)
    assert np.allclose(cielab(content) - cielab(image), shift, atol=0.5)


def test_a_seam_falls_from_the_outline_inwards() -> None:
    image, mask = np.full((SIDE, SIDE, 3), 100, np.uint8), disc()
    mask[60:68, 60:68] = 0
    result = lay_over(image, blending_boundary(image, mask, np.array([30.0, 20.0, 10.0]), 5.0))
    row = result[SIDE // 2].astype(int) - 100
    first = int(np.flatnonzero(mask[SIDE // 2])[0])
    assert row[first - 1].tolist() == [0, 0, 0] and row[first].tolist() == [30, 20, 10]
    assert (np.diff(row[first : first + 7, 0]) <= 0).all() and row[first + 7, 0] == 0
    assert (result[55:73, 55:73] == 100).all()  # the hole has no seam


def test_over_smoothing_takes_texture_and_keeps_edges() -> None:
    rng = np.random.default_rng(0)
    step = np.where(np.arange(SIDE) < SIDE // 2, 60.0, 180.0)[None, :, None]
    image = np.clip(step + rng.normal(0, 6, (SIDE, SIDE, 1)), 0, 255).repeat(3, axis=2).astype(np.uint8)
    content, _ = over_smooth(image, disc(), sigma=3.0, tolerance=15.0)
    assert content[20:-20, 10:50].std() < 0.4 * image[20:-20, 10:50].std()
    edge = content[20:-20, SIDE // 2] - content[20:-20, SIDE // 2 - 1]
    assert float(edge.mean()) > 100


def test_resampling_repeats_one_pixel_per_cell() -> None:
    image = textured()
    content, _ = resampling(image, disc(), 4.0, (0.0, 0.0))
    expected = image[2::4, 2::4].repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(content, expected)


def test_a_warp_pushes_the_middle_and_never_folds() -> None:
    ramp = np.linspace(0, 250, SIDE, dtype=np.float32)[None, :, None].repeat(SIDE, axis=0).repeat(3, axis=2)
    mask = disc(radius=8.0)
    for seed in range(8):
        content, weight = warp(ramp, mask, 40.0, item_rng(seed, 0, 0))
        moved = (content - ramp)[..., 0] / (250 / (SIDE - 1))
        # 40 pixels are cut to 0.6 of the disc's depth, which is about 9.
        assert 0 < np.abs(moved).max() <= 0.6 * 9.5
        assert (np.diff(content[..., 0], axis=1) > -1e-3).all()
        assert np.abs(moved[weight == 0]).max() < 1e-3


def test_self_blending_keeps_to_its_settings() -> None:
    image, mask = textured(), face_regions(SIDE, SIDE)[FACE]
    still = {
        "colour_shift",
        "hue_shift",
        "saturation_change",
        "contrast_change",
        "sharpen_amount",
        "resize",
        "translate",
    }
    config = replace(SelfBlendConfig(), **dict.fromkeys(still, (0.0, 0.0)), shrink_factor=(1.0, 1.0))
    _, (content, weight) = self_blend(image, mask, replace(config, blend_ratio=(0.7, 0.7)), item_rng(0, 0, 0))
    assert np.abs(content - image).max() < 1.5  # through HSV and back
    assert weight.max() == pytest.approx(0.7, abs=1e-3)
    config = replace(config, elastic=(0.0, 0.0), mask_blur=(0.0, 0.0), blend_ratio=(1.0, 1.0))
    assert np.abs(self_blend(image, mask, config, item_rng(0, 0, 0))[1][1] - mask).max() < 0.1
    moved = self_blend(image, mask, replace(config, translate=(5.0, 5.0)), item_rng(0, 0, 0))[1][0]
    shift = 5 * SIDE / 100
    candidates = [
        ndimage.shift(image.astype(float), (a * shift, b * shift, 0), order=3) for a in (-1, 1) for b in (-1, 1)
    ]
    inner = np.s_[20:-20, 20:-20]
    assert min(np.abs(moved[inner] - c[inner]).mean() for c in candidates) < 3


def test_regions_lie_where_the_eyes_say() -> None:
    eyes = ((80.0, 90.0), (160.0, 90.0))
    regions = face_regions(256, 240, eyes)
    assert set(regions) == {*REGIONS, FACE}
    assert all(mask.shape == (256, 240) and mask.dtype == np.float32 for mask in regions.values())
    centres = {name: ndimage.center_of_mass(mask) for name, mask in regions.items()}
    assert centres["eyes"] == pytest.approx((90, 120), abs=1)
    assert centres["eyebrows"][0] < 75 and centres["eyebrows"][1] == pytest.approx(120, abs=1)
    assert centres["nose"] == pytest.approx((90 + 0.43 * 80, 120), abs=1)
    assert 160 < centres["mouth"][0] < 190
    assert all(regions["eyes"][int(y), int(x)] == 1 for x, y in eyes)
    for first, second in combinations(REGIONS, 2):
        assert not ((regions[first] > 0) & (regions[second] > 0)).any(), (first, second)
    # Eyes and lids lie outside the skin but within the face.
    assert all((regions[FACE] > 0)[regions[name] > 0].mean() > 0.98 for name in REGIONS)


def test_regions_follow_mirror_and_rotation() -> None:
    eyes = ((70.0, 90.0), (150.0, 100.0))
    plain = face_regions(240, 240, eyes)
    mirrored = face_regions(240, 240, ((239 - 150.0, 100.0), (239 - 70.0, 90.0)))
    turned = face_regions(240, 240, ((90.0, 239 - 70.0), (100.0, 239 - 150.0)))  # a quarter turn, anticlockwise
    for name, mask in plain.items():
        assert np.allclose(mirrored[name], mask[:, ::-1], atol=1e-4)
        assert np.allclose(turned[name], np.rot90(mask), atol=1e-4)


def test_without_eyes_the_usual_crop_is_assumed() -> None:
    box = (160 * 0.3 / 1.6, 160 * 0.3 / 1.6, 100.0, 100.0)
    by_box = face_regions(160, 160, eyes_in_box(*box))
    assert all(np.allclose(mask, by_box[name]) for name, mask in face_regions(160, 160).items())
    with pytest.raises(ValueError, match="less than a pixel apart"):
        face_regions(160, 160, ((50.0, 50.0), (50.0, 50.0)))


def test_plugged_in_regions_are_made_disjoint() -> None:
    masks = {name: np.ones((20, 20), np.float32) for name in (*REGIONS, FACE)}
    masks["eyes"][:10] = 0
    masks["eyebrows"][10:] = 0
    separate = disjoint(masks, 20, 20)
    assert separate["eyebrows"].sum() == separate["eyes"].sum() == 200
    assert separate["nose"].sum() == separate["mouth"].sum() == separate["skin"].sum() == 0
    assert separate[FACE].sum() == 400
    with pytest.raises(ValueError, match="'mouth' is missing"):
        disjoint({name: mask for name, mask in masks.items() if name != "mouth"}, 20, 20)
    with pytest.raises(ValueError, match="'face' has shape"):
        disjoint(masks, 20, 30)


def structural_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Give the mean SSIM of the grey images (Wang et al. 2004, Gaussian window of sigma 1.5)."""
    a, b = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64) for image in (first, second))

    def smooth(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, truncate=3.5)

    ma, mb = smooth(a), smooth(b)
    va, vb, cov = smooth(a * a) - ma * ma, smooth(b * b) - mb * mb, smooth(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))[5:-5, 5:-5].mean())


@pytest.mark.parametrize(("region", "artefact"), KINDS)
def test_a_forgery_stays_close_to_the_original(region: str, artefact: str) -> None:
    smooth = np.rint(ndimage.gaussian_filter(textured(), (1, 1, 0))).astype(np.uint8)
    close = []
    for seed in range(5):
        found = forge(smooth, face_regions(SIDE, SIDE)[region], region, artefact, item_rng(seed, 1, 0))
        close += [structural_similarity(smooth, found.image)] if found else []
    assert 0.9 < np.median(close) < 1


def test_a_version_moves_image_and_regions_together() -> None:
    image = textured()
    regions = face_regions(SIDE, SIDE)
    # Paint a region white on black, so that its version says where it went.
    marked = (np.repeat(regions["nose"][..., None], 3, axis=2) * 255).astype(np.uint8)
    unlit = AugmentConfig(gain=0, colour=0, gamma=0)
    for seed in range(6):
        moved, masks = augment(marked, regions, unlit, item_rng(seed, 0, 0))
        assert np.abs(moved[..., 0] / 255 - masks["nose"]).mean() < 0.005
        assert masks.keys() == regions.keys() and all(m.min() >= 0 and m.max() <= 1 for m in masks.values())
    again = [augment(image, regions, AugmentConfig(), item_rng(1, 0, 0))[0] for _ in range(2)]
    assert np.array_equal(*again) and again[0].dtype == np.uint8 and not np.array_equal(again[0], image)


def test_a_version_without_limits_is_the_photo() -> None:
    image = textured()
    still = AugmentConfig(rotation=0, scale=0, shift=0, gain=0, colour=0, gamma=0, flip_probability=0)
    same, masks = augment(image, {"nose": disc()}, still, item_rng(0, 0, 0))
    assert np.array_equal(same, image) and np.array_equal(masks["nose"], disc())
    mirrored, _ = augment(image, {}, replace(still, flip_probability=1), item_rng(0, 0, 0))
    assert np.array_equal(mirrored, image[:, ::-1])
    sharper, grainy, flat = (replace(still, sharpness=1), replace(still, grain=8), np.full((64, 64, 3), 100, np.uint8))
    detail = image - ndimage.gaussian_filter(image.astype(float), (1, 1, 0))
    found = augment(image, {}, sharper, item_rng(0, 0, 0))[0].astype(float) - image
    inside = (image > 60) & (image < 200)
    weight = np.polyfit(detail[inside], found[inside], 1)[0]
    assert 0.01 < abs(weight) < 1 and np.abs(found - weight * detail)[inside].mean() < 0.5
    assert np.array_equal(augment(flat, {}, sharper, item_rng(0, 0, 0))[0], flat)
    noise = [augment(flat, {}, grainy, item_rng(seed, 0, 0))[0].std() for seed in range(40)]
    assert max(noise) < 8.5 and 3 < np.mean(noise) < 5
    brighter, _ = augment(np.full((8, 8, 3), 100, np.uint8), {}, replace(still, gamma=0.2), item_rng(0, 0, 0))
    assert brighter.std() == 0 and brighter[0, 0, 0] != 100


def test_a_version_may_be_wider_and_smaller_than_the_photo() -> None:
    still = AugmentConfig(rotation=0, scale=0, shift=0, gain=0, colour=0, gamma=0, flip_probability=0)
    regions = face_regions(SIDE, SIDE)
    marked = (np.repeat(regions["nose"][..., None], 3, axis=2) * 255).astype(np.uint8)
    spans, sides = [], []
    for seed in range(8):
        wide, masks = augment(marked, regions, replace(still, stretch=0.4), item_rng(seed, 0, 0))
        rows, columns = (np.flatnonzero((masks["nose"] > 0.5).any(axis=axis)) for axis in (1, 0))
        spans.append(np.ptp(columns) / np.ptp(rows))
        assert abs(np.mean(columns) - (SIDE - 1) / 2) < 1.5 and wide.shape == marked.shape
        small, masks = augment(marked, regions, replace(still, smallest=0.3), item_rng(seed, 0, 0))
        assert np.abs(small[..., 0] / 255 - masks["nose"]).mean() < 0.005
        sides.append(len(small) / SIDE)
        assert disjoint(masks, *small.shape[:2]).keys() == regions.keys()
    before = np.ptp(np.flatnonzero((regions["nose"] > 0.5).any(axis=0))) / np.ptp(
        np.flatnonzero((regions["nose"] > 0.5).any(axis=1))
    )
    assert min(spans) < 0.85 * before and max(spans) > 1.15 * before
    assert 0.3 <= min(sides) < 0.5 and 0.8 < max(sides) <= 1


@pytest.mark.parametrize("wrong", [{"rotation": 90}, {"scale": -0.1}, {"flip_probability": 2}, {"smallest": 0}])
def test_impossible_versions_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)
