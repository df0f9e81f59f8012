"""How strong and how obvious forgeries are, against hand values, scipy, and data whose answer is known."""

from __future__ import annotations

import csv
import json
import math
import runpy
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny_world import draw

from llava.core.terminal import text_of
from llava.core.types import FAKE, REAL
from llava.data.splits import LeakError
from llava.evaluation.forgeries import (
    RINGS,
    measure,
    open_forged,
    ring_spectrum,
    ssim,
    strength_report,
    strength_tables,
)
from llava.jobs.forged_faces import ForgeDataConfig, build_forgeries

pytest.importorskip("skimage")
ROOT = Path(__file__).resolve().parents[1]
SIDE = 32
Forge = Callable[[np.ndarray], np.ndarray]


def flat(value: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def checkered(image: np.ndarray) -> np.ndarray:
    return (image + 45 * (np.indices(image.shape[:2]).sum(0) % 2)[..., None]).clip(0, 255).astype(np.uint8)


def row_of(name: str, label: str, split: str, artefact: str, group: str, untouched: str) -> dict[str, str]:
    region = {"": "", "self_blended": "face"}.get(artefact, "nose")
    mask = f"masks/{name}" if artefact else ""
    shared = {"file": name, "label": label, "split": split, "group": group}
    return {**shared, "region": region, "artefact": artefact, "mask": mask, "untouched": untouched}


def write_pairs(
    folder: Path, splits: dict[str, Sequence[np.ndarray]], forge: Forge, artefacts: Sequence[str] = ("blur",)
) -> Path:
    """Write reals by split and one forgery of each, its mask the upper quarter; gives the manifest."""
    (folder / "masks").mkdir()
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[: SIDE // 4] = 1
    rows = []
    for split, pictures in splits.items():
        for i, picture in enumerate(pictures):
            real, fake, group = f"{split}{i}_0.png", f"{split}{i}_1.png", f"{split}{i}"
            Image.fromarray(picture).save(folder / real)
            Image.fromarray(forge(picture)).save(folder / fake)
            Image.fromarray(mask).save(folder / "masks" / fake)
            rows.append(row_of(real, "real", split, "", group, real))
            rows.append(row_of(fake, "fake", split, artefacts[i % len(artefacts)], group, real))
    return write_table(folder / "manifest.csv", rows)


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def noise(count: int, first: int = 0) -> list[np.ndarray]:
    return [draw(REAL, first + i, SIDE) for i in range(count)]


def flat_ssim(a: float, b: float) -> float:
    """Wang et al. 2004, eq. 13 without variances."""
    c1 = (0.01 * 255) ** 2
    return (2 * a * b + c1) / (a * a + b * b + c1)


def test_ssim_is_wang_s() -> None:
    assert ssim(flat(100), flat(120)) == pytest.approx(flat_ssim(100, 120), abs=1e-9)
    assert ssim(flat(100), flat(120)) == pytest.approx(0.98361, abs=1e-5)
    first, second = (np.repeat(draw(label, 3, SIDE)[..., :1], 3, axis=2) for label in (REAL, FAKE))
    x, y = first[..., 0].astype(float), second[..., 0].astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    cov, var = mean(x * y) - mean(x) * mean(y), mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    lightness = (2 * mean(x) * mean(y) + c1) / (mean(x) ** 2 + mean(y) ** 2 + c1)
    assert ssim(first, second) == pytest.approx((lightness * (2 * cov + c2) / (var + c2)).mean(), abs=1e-9)
    assert ssim(first, first) == 1


def test_ssim_is_of_grey_images() -> None:
    """Red 200 is grey 0.299 * 200, rounded."""
    red = flat(0)
    red[..., 0] = 200
    assert ssim(red, flat(100)) == pytest.approx(flat_ssim(60, 100), abs=1e-9)


@pytest.mark.parametrize("cycles", [(12, 0), (0, 64), (128, 128)])
def test_a_wave_is_in_the_ring_of_its_frequency(cycles: tuple[int, int]) -> None:
    y, x = np.mgrid[:256, :256]
    wave = 60 * np.cos(2 * np.pi * (cycles[0] * y + cycles[1] * x) / 256)[..., None]
    picture = np.random.default_rng(0).normal(128, 8, (256, 256, 1)).repeat(3, axis=2)
    plain, waved = (ring_spectrum(np.rint(values).astype(np.uint8)) for values in (picture, picture + wave))
    rings = waved - plain
    radius = math.hypot(*cycles) / math.hypot(128, 128)
    assert rings.shape == (RINGS,)
    assert rings.argmax() == min(int(RINGS * radius), RINGS - 1)


def test_rings_hold_the_mean_log_power_of_every_frequency() -> None:
    picture = draw(FAKE, 5, 256)
    grey = np.asarray(Image.fromarray(picture).convert("L"), float)
    power = np.abs(np.fft.fft2((grey - grey.mean()) * np.hanning(256)[:, None] * np.hanning(256))) ** 2
    steps = np.minimum(np.arange(256), 256 - np.arange(256)) / 128  # of the highest frequency
    radius = np.sqrt((steps[:, None] ** 2 + steps**2) / 2)
    edges = np.arange(RINGS + 1) / RINGS
    edges[-1] = 2
    wanted = [np.log(1 + power[(radius >= a) & (radius < b)]).mean() for a, b in pairwise(edges)]
    np.testing.assert_allclose(ring_spectrum(picture), wanted, rtol=1e-6)
    assert np.all(ring_spectrum(flat(77)) == 0)


def test_numbers_are_summed_up_by_artefact(tmp_path: Path) -> None:
    brightness = (40, 60, 80, 100, 120, 140)
    pictures = [flat(value) for value in brightness]
    table = write_pairs(tmp_path, {"test": pictures}, lambda p: p + 20, ("blur", "warp", "self_blended"))
    report = strength_report(open_forged(table), n_boot=20)
    scores = np.array([flat_ssim(b, b + 20) for b in brightness])
    assert {name: row["n"] for name, row in report["artefacts"].items()} == {"blur": 2, "self_blended": 2, "warp": 2}
    for part, chosen in (("all", [0, 1, 2, 3, 4, 5]), ("local_edits", [0, 1, 3, 4])):
        assert report[part]["n"] == len(chosen)
        assert report[part]["ssim_median"] == pytest.approx(np.median(scores[chosen]))
        assert report[part]["ssim_quantile_10"] == pytest.approx(np.quantile(scores[chosen], 0.1))
        assert report[part]["covered_median"] == 0.25
    assert report["artefacts"]["warp"]["ssim_median"] == pytest.approx(scores[[1, 4]].mean())
    shown = text_of(*strength_tables(report))
    assert "6 forgeries of split 'test'" in shown and f"{np.median(scores):.4f}" in shown
    assert "no real or fake images in split 'train' to train on" in " ".join(shown.split())


def test_the_baseline_sees_a_checkerboard(tmp_path: Path) -> None:
    source = open_forged(write_pairs(tmp_path, {"train": noise(20), "test": noise(10, 20)}, checkered))
    part = strength_report(source, n_boot=50)["spectrum"]
    assert part["reason"] is None and part["auc"]["value"] > 0.9
    assert part["n"] == {"trained": {"real": 20, "fake": 20}, "scored": {"real": 10, "fake": 10}}
    assert part["auc"]["n"] == 10 and part["auc"]["low"] <= part["auc"]["value"] <= part["auc"]["high"]


def test_the_baseline_sees_nothing_where_nothing_was_done(tmp_path: Path) -> None:
    splits = {"train": noise(20), "val": noise(4, 40), "test": noise(10, 20)}
    report = strength_report(open_forged(write_pairs(tmp_path, splits, lambda p: p)), "all", n_boot=50)
    assert report["all"] == {"n": 34, "ssim_median": 1, "ssim_quantile_10": 1, "covered_median": 0.25}
    assert report["spectrum"]["n"]["scored"] == {"real": 14, "fake": 14}  # never what was trained on
    assert report["spectrum"]["auc"]["value"] == 0.5


def test_what_the_baseline_lacks_is_said(tmp_path: Path) -> None:
    table = write_pairs(tmp_path, {"train": noise(2), "test": noise(2, 20)}, checkered)
    report = strength_report(open_forged(table), "train", n_boot=20)
    assert report["all"]["n"] == 2 and report["spectrum"]["auc"] is None
    assert "no real or fake images in split 'train' to score" in report["spectrum"]["reason"]
    rows = read_table(table)
    write_table(table, [row for row in rows if (row["label"], row["split"]) != ("fake", "train")])
    assert strength_report(open_forged(table))["spectrum"]["reason"] == "no fake images in split 'train' to train on"
    write_table(table, [row for row in rows if (row["label"], row["split"]) != ("fake", "test")])
    report = strength_report(open_forged(table))
    assert report["all"]["n"] == 0 and "no fake images in split 'test' to score" in report["spectrum"]["reason"]
    assert "-" in text_of(*strength_tables(report))
    with pytest.raises(ValueError, match="'val' has no records"):
        strength_report(open_forged(table), "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"untouched": ""}, "'test0_1.png' needs"),
        ({"untouched": "test0_1.png"}, "a real image of the table"),
        ({"artefact": ""}, "artefact"),
        ({"label": ""}, "needs a label"),
        ({"file": "gone.png"}, "1 of 2 files are missing"),
        ({"mask": "gone.png"}, "its mask 'gone.png' does not exist"),
    ],
)
def test_a_row_that_forge_did_not_write_is_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    table = write_pairs(tmp_path, {"test": noise(1)}, checkered)
    real, fake = read_table(table)
    write_table(table, [real, fake | change])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        strength_report(open_forged(table))


def test_other_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        open_forged(tmp_path / "nowhere.csv")
    table = write_pairs(tmp_path, {"train": noise(2), "test": noise(2, 20)}, checkered)
    rows = read_table(table)
    write_table(table, [{name: value for name, value in row.items() if name != "untouched"} for row in rows])
    with pytest.raises(ValueError, match="no column untouched; give"):
        open_forged(table)
    write_table(table, [row | {"group": "one"} for row in rows])
    with pytest.raises(LeakError, match="'trained' and 'scored' share 1 groups"):
        strength_report(open_forged(table))
    write_table(table, rows)
    source = open_forged(table)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ValueError, match=r"m2f2-det\[eval\]"):
        measure(source, [record for record in source.records if record.label == FAKE])
    monkeypatch.undo()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "test0_0.png")
    with pytest.raises(ValueError, match=r"test0_1\.png: \(32, 32\) pixels, its untouched image \(40, 40\)"):
        measure(source, [record for record in source.records if record.id == "test0_1.png"])


def run_script(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_forgeries.py", *map(str, words)])
    runpy.run_path(str(ROOT / "eval" / "eval_forgeries.py"), run_name="__main__")


def test_the_script_reads_what_forge_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.fromarray(draw(REAL, i, 96)).save(tmp_path / "photos" / f"{i}.png")
    config = ForgeDataConfig(photos=str(tmp_path / "photos"), output=str(tmp_path / "out"), face="off", per_image=3)
    build_forgeries(config)
    table, written = tmp_path / "out" / "manifest.csv", tmp_path / "report.json"
    run_script(monkeypatch, "--manifest_path", table, "--split", "all", "--n_boot", 20, "--json", written)
    report, rows = json.loads(written.read_text()), read_table(table)
    kinds = {row["artefact"] for row in rows} - {""}
    assert set(report["artefacts"]) == kinds
    assert sum(row["n"] for row in report["artefacts"].values()) == report["all"]["n"] == len(rows) - 6
    assert 0 < report["all"]["ssim_median"] < 1 and 0 < report["local_edits"]["covered_median"] < 0.5
    assert report["manifest_path"] == str(table)
    assert 0 <= report["spectrum"]["auc"]["value"] <= 1
    out = capsys.readouterr().out
    assert all(kind in out for kind in kinds) and "24 rings" in out and "AUC" in out
    with pytest.raises(SystemExit, match=r"error: Table .*gone"):
        run_script(monkeypatch, "--manifest_path", tmp_path / "gone.csv")
