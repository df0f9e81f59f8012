"""Pointing game, counterfactual check and confusion picture against hand values, and the commands behind them."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_world import draw

from llava import cli
from llava.core.runtime import item_rng
from llava.core.terminal import text_of
from llava.data.sources import DataConfig
from llava.data.stills import CsvSource
from llava.evaluation.blind import TrainingPair
from llava.evaluation.captions import CaptionItem
from llava.evaluation.grounding import (
    REGION,
    CounterfactualCase,
    Pointing,
    PointingCase,
    cell_coverage,
    counterfactual_report,
    highest,
    naming_report,
    pointing_report,
    read_counterfactual,
    read_pointing,
)
from llava.evaluation.integrity import confusion_columns, grounding_tables
from llava.evaluation.pictures import draw_confusion
from llava.jobs.maps import CounterfactualSettings, versions
from llava.ops.face_regions import face_regions
from llava.ops.forge import blur_region, random_region

ROOT = Path(__file__).resolve().parents[1]
WHOLE = "Does this image look real or fake? Give the reasons."
SIDE = 64
COLUMNS = ("file", "label", "split", "group", "region", "mask", "untouched")


def values(report: dict[str, Any], *names: str) -> list[Any]:
    return [pytest.approx(report[name]["value"]) for name in names]


# Pointing game


def test_a_cell_is_covered_by_its_part_of_the_mask_in_the_central_square() -> None:
    mask = np.zeros((4, 8), np.uint8)
    mask[:2, 2:3] = 9  # the left half of the upper left cell of the square, columns 2 to 6
    mask[:, 7] = 255  # outside of it
    assert cell_coverage(mask, (2, 2)).tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert cell_coverage(mask, (1, 1), seen=0.5).tolist() == [[0.0]]
    mask[1, 3] = 1  # one of the four pixels in the middle
    assert cell_coverage(mask, (1, 1), seen=0.5).tolist() == [[0.25]]
    assert highest(np.array([[0.1, 0.7], [0.7, 0.2]])).tolist() == [0, 0.5, 0.5, 0]
    with pytest.raises(ValueError, match="fewer pixels than the map"):
        cell_coverage(mask, (5, 5))


def pointed(group: str, region: str, cell: int, covered: list[float]) -> Pointing:
    return Pointing(group, region, np.eye(4)[cell], np.array(covered))


def test_the_pointing_game_by_hand() -> None:
    images = (
        pointed("a", "nose", 0, [1, 0, 0, 0]),  # hit; mask area 1/4
        pointed("a", "eyes", 1, [0.5, 0.5, 0, 0]),  # half; 1/4
        pointed("b", "nose", 3, [0, 1, 1, 0]),  # miss; 1/2
        pointed("c", "face", 1, [1, 1, 1, 1]),
    )
    report = pointing_report(PointingCase(images, np.eye(4)[1], {"without mask": 2}), n_boot=200)
    assert (report["n"], report["groups"]) == (3, 2)
    assert report["left_out"] == {"without mask": 2, "edited as a whole": 1}
    assert values(report, "hit", "best", "chance", "centre") == [1.5 / 3, 2.5 / 3, 1 / 3, 1.5 / 3]
    # others of a: maps of b (3) and c (1): on 1000 none, on 5500 a quarter; of b: 0, 1, 1 on 0110: two thirds
    assert values(report, "other") == [(0 + 0.25 + 2 / 3) / 3]
    assert values(report["gain"], "chance", "centre") == [0.5 - 1 / 3, 0]
    assert {name: row["n"] for name, row in report["by_region"].items()} == {"eyes": 1, "face": 1, "nose": 2}
    assert values(report["by_region"]["nose"], "hit") == [0.5] and report["by_region"]["eyes"]["hit"]["low"] is None


def write_forged(folder: Path) -> Path:
    """Write a manifest of a real face, a local edit of the nose, a whole-face edit and an edit of another split."""
    rows = []
    for number, (split, region) in enumerate((("test", ""), ("test", "nose"), ("test", "face"), ("val", "nose"))):
        name = f"images/{split}/{number:05d}_0.png"
        mask = f"masks/{number}.png" if region else ""
        image = draw(int(bool(region)), number, SIDE)
        for path, pixels in (
            (name, image),
            (mask, (255 * face_regions(SIDE, SIDE)[region or "nose"]).astype(np.uint8)),
        ):
            if path:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / path)
        label = "fake" if region else "real"
        rows.append((name, label, split, f"g{number}", region, mask, "images/test/00000_0.png"))
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return folder / "manifest.csv"


def write_maps(path: Path, ids: list[str], maps: np.ndarray) -> Path:
    np.savez(path, ids=np.array(ids), maps=maps, seen=1.0)
    return path


def test_maps_meet_their_masks_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    manifest = write_forged(tmp_path)
    names = [f"images/test/0000{n}_0.png" for n in range(3)]
    maps = np.zeros((2, 4, 4))
    maps[1, 2, 2] = 1.0
    case = read_pointing(write_maps(tmp_path / "m.npz", names[:2], maps), manifest)
    assert case.left_out == {"without map": 1, "without mask": 1}  # the whole-face edit; the real face
    (nose,) = case.images
    assert (nose.group, nose.region, nose.points.reshape(4, 4)[2, 2]) == ("g1", "nose", 1)
    assert nose.covered.mean() == pytest.approx((face_regions(SIDE, SIDE)["nose"] * 255 >= 1).mean(), abs=1e-6)
    for ids, wrong, message in (
        (["x.png"], maps[:1], "'x.png' is not in"),
        (names[:1], maps[:1], "has a mask"),
        (names, maps, "one finite map"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pointing(write_maps(tmp_path / "m.npz", ids, wrong), manifest)
    with pytest.raises(FileNotFoundError, match="m2f2 maps"):
        read_pointing(tmp_path / "none.npz", manifest)


# Counterfactual


def item(key: str, region: str | None = None, answer: str = "") -> CaptionItem:
    own = {"question": WHOLE, "references": ("x",), "group": key, "label": 1}
    return CaptionItem(key=key, answer=answer, region=region, **own)


def line(key: str, named: str, scores: tuple[float, ...], **more: Any) -> dict[str, Any]:
    own = {"p_fake": scores[0], "p_fake_named": scores[1], "p_fake_random": list(scores[2:])}
    return {"key": key, "edit": "blur", "named": named, **own, **more}


def read(path: Path, *rows: dict[str, Any]) -> CounterfactualCase:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_counterfactual(path, [item("a_0", "nose"), item("b_0", "mouth"), item("c_0")])


def test_the_drop_the_rank_and_the_truth_by_hand(tmp_path: Path) -> None:
    rows = (
        line("a_0", "nose", (0.9, 0.4, 0.9, 0.7)),  # falls by 0.5, random by 0.1: both random ones fall less
        line("b_0", "eyes", (0.8, 0.8, 0.8, 0.6)),  # by 0, random by 0.1: one ties, one falls more
    )
    report = counterfactual_report(read(tmp_path / "r", *rows, {"key": "c_0", "left_out": "names no region"}), 50)
    assert (report["edit"], report["n"], report["random_regions"]) == ("blur", 2, 2)
    assert report["left_out"] == {"names no region": 1}
    assert values(report["drop"], "named", "random", "difference") == [0.25, 0.1, 0.15]
    assert values(report, "rank") == [(1 + 0.25) / 2]
    by_truth = {name: (row["n"], row["difference"]["value"]) for name, row in report["by_truth"].items()}
    assert by_truth == {"right": (1, pytest.approx(0.4)), "wrong": (1, pytest.approx(-0.1))}
    assert counterfactual_report(read(tmp_path / "r", {"key": "c_0", "left_out": "why"}))["n"] == 0


def test_scores_of_another_kind_are_refused(tmp_path: Path) -> None:
    good = line("a_0", "nose", (0.9, 0.4, 0.9))
    for rows, message in (
        ((good, good), "line 2: key 'a_0' is given twice"),
        ((line("z", "nose", (0.9, 0.4, 0.9)),), "no key of the truth"),
        ((line("a_0", "chin", (0.9, 0.4, 0.9)),), "expected `edit`, a region"),
        ((good | {"p_fake": 1.5},), "must lie in"),
        ((good, line("b_0", "nose", (0.9, 0.4, 0.9, 0.9))), "differ in edit or number"),
        ((good, line("b_0", "nose", (0.9, 0.4, 0.9), edit="restore")), "differ in edit or number"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "r", *rows)


def test_a_random_region_has_exactly_the_area_lies_within_and_is_its_seed_s() -> None:
    face = face_regions(SIDE, SIDE)["face"] > 0
    regions = [random_region(face, 200, item_rng(0, n, 5)) for n in (0, 0, 1)]
    assert all(region.sum() == 200 and not (region & ~face).any() for region in regions)
    assert (regions[0] == regions[1]).all() and (regions[0] != regions[2]).any()
    assert (random_region(face, int(face.sum()), item_rng(0, 0, 0)) == face).all()
    with pytest.raises(ValueError, match="allowed: 1 to"):
        random_region(face, 0, item_rng(0, 0, 0))


def test_only_the_region_is_blurred() -> None:
    image = draw(1, 3, SIDE)
    region = np.zeros((SIDE, SIDE), bool)
    region[:24, :24] = True
    blurred = blur_region(image, region, 4.0)
    assert (blurred[32:] == image[32:]).all() and (blurred[:, 32:] == image[:, 32:]).all()
    assert blurred[:16, :16].std() < 0.5 * image[:16, :16].std()


def test_restoring_takes_the_untouched_photo_s_pixels_in_the_region_alone(tmp_path: Path) -> None:
    source = CsvSource(DataConfig(source="csv", path=str(write_forged(tmp_path))))
    untouched, forged = (source.load(record).image for record in source.records[:2])
    settings = CounterfactualSettings(
        manifest="", predict_path="", gt_path="", edit="restore", random_regions=3, seed=1
    )
    whole, named, *random = versions(source, source.records[1], "mouth", settings)
    mouth = face_regions(SIDE, SIDE)["mouth"] > 0
    assert (whole == forged).all() and (named == np.where(mouth[..., None], untouched, forged)).all()
    changed = [(each != forged).any(axis=-1).sum() for each in random]
    assert len(random) == 3 and all(0 < area <= mouth.sum() for area in changed)
    source.records[1].tags.pop("untouched")
    with pytest.raises(ValueError, match="does not know its untouched photo"):
        list(versions(source, source.records[1], "mouth", settings))


# The picture and the commands


def test_the_confusion_picture_and_tables_show_every_column(tmp_path: Path) -> None:
    items = [item("a_0", "nose", "The nose."), item("b_0", "mouth", "The eyes."), item("c_0", None, "The skin.")]
    part = naming_report(REGION, items, [TrainingPair(question=WHOLE, answer="The nose.", label=1)], n_boot=20)
    assert part is not None
    columns = confusion_columns(REGION, part)
    assert columns == ["skin", "eyes", "nose", "mouth", "none", "several"]
    draw_confusion(tmp_path / "c.png", "region", part, columns)
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > picture.height > 200
    report = {"regions": part, "artefacts": None, "pointing": None, "counterfactual": None}
    shown = text_of(*grounding_tables(report))
    assert "chance (one of 2)" in shown and "(other fake images)" in shown


def run_integrity(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_integrity.py", *map(str, words)])
    monkeypatch.setenv("PATH", "")  # no Java
    runpy.run_path(str(ROOT / "eval" / "eval_integrity.py"), run_name="__main__")


def test_the_commands_write_what_the_suite_reads(
    tiny_explainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocoevalcap")
    manifest, detector = write_forged(tmp_path), tiny_explainer.parent / "detector"
    said = {"00000_0_0": "The image is real.", "00001_0_0": "The nose is odd.", "00002_0_0": "The eyes and the nose."}
    truth = {key: {"question": WHOLE, "answer": [text], "label": "fake"} for key, text in said.items()}
    truth["00001_0_0"]["region"] = "nose"
    (tmp_path / "gt.jsonl").write_text("".join(json.dumps({k: row}) + "\n" for k, row in truth.items()))
    answers = "".join(json.dumps({"key": k, "text": text}) + "\n" for k, text in said.items())
    (tmp_path / "p.jsonl").write_text(answers)
    turns = [{"from": "human", "value": f"<image>\n{WHOLE}"}, {"from": "gpt", "value": "The image is fake."}]
    rows = [{"image": f"{n}.png", "label": label, "conversations": turns} for n, label in enumerate(("real", "fake"))]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    model = ["--model", str(detector), "--device", "cpu"]
    assert cli.main(["maps", str(manifest), *model, "--output", str(tmp_path / "m.npz")]) == 0
    files = ["--predict_path", str(tmp_path / "p.jsonl"), "--gt_path", str(tmp_path / "gt.jsonl")]
    scores: dict[str, list[dict[str, Any]]] = {}
    for edit in ("blur", "restore"):
        words = [str(manifest), *model, *files, "--edit", edit, "--random_regions", "2", "--batch_size", "2"]
        for name in (edit, "again"):
            assert cli.main(["counterfactual", *words, "--output", str(tmp_path / name)]) == 0
        assert (tmp_path / edit).read_bytes() == (tmp_path / "again").read_bytes()
        scores[edit] = [json.loads(row) for row in (tmp_path / edit).read_text().splitlines()]
        assert [row.get("left_out") for row in scores[edit]] == ["names no region", None, "names several regions"]
    assert len(scores["blur"][1]["p_fake_random"]) == 2
    out = ["--maps_path", tmp_path / "m.npz", "--manifest_path", manifest, "--json", tmp_path / "r.json"]
    suite = [*files, "--train_path", tmp_path / "t.json", "--n_boot", 20, *out, "--pictures", tmp_path]
    run_integrity(monkeypatch, *suite, "--counterfactual_path", tmp_path / "restore")
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["pointing"]["n"], report["pointing"]["left_out"]["edited as a whole"]) == (1, 1)
    assert report["counterfactual"]["edit"] == "restore" and (tmp_path / "regions.png").is_file()
    assert "named region restored" in capsys.readouterr().out


def test_what_cannot_be_done_is_said_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_forged(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"key": "elsewhere_0", "text": "The nose."}\n')
    row = {"question": WHOLE, "answer": ["x"], "label": "fake"}
    (tmp_path / "gt.jsonl").write_text(json.dumps({"elsewhere_0": row}) + "\n")
    files = ["--predict_path", str(tmp_path / "p.jsonl"), "--gt_path", str(tmp_path / "gt.jsonl")]
    assert cli.main(["counterfactual", str(manifest), *files]) == 2
    assert "'elsewhere_0' is about an image that split 'test'" in capsys.readouterr().err
    for words, message in ((["--random_regions", "0"], "random_regions: 0"), (["--blur", "0"], "blur: 0.0")):
        with pytest.raises(SystemExit):
            cli.main(["counterfactual", str(manifest), *files, *words])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="belong together"):
        run_integrity(monkeypatch, *files, "--maps_path", "m.npz")
