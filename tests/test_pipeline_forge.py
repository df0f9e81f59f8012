"""`m2f2 data forge`: what it writes is exact, truthful, deterministic, divided by person and leak-free."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from llava.core.types import FAKE, LABEL_NAMES, REAL, REGIONS
from llava.data.answer_texts import SIGNS, Truth, truthful_answer
from llava.data.conversations import ConversationSource
from llava.data.faces import FaceBox, find_faces
from llava.data.images import read_image
from llava.data.sources import DataConfig, open_source
from llava.data.splits import LeakError, check_leaks
from llava.data.stills import CsvSource
from llava.evaluation.blind import read_training
from llava.evaluation.captions import read_caption_set
from llava.evaluation.grounding import ARTEFACT, REGION, naming_report
from llava.evaluation.text import parse_verdict
from llava.jobs.ddvqa_answers import ReasonSettings, list_items
from llava.jobs.forged_faces import ForgeDataConfig, build_forgeries, divide, regions_by_eyes
from llava.ops.face_regions import FACE, eyes_in_box, face_regions
from llava.ops.forge import ARTEFACTS, ForgeConfig

HEAD = "<image>\n<deepfake>\n"
SIDE = 96
# Pupils in grace_hopper.jpg, read off an enlarged print; (x, y) in pixels.
GRACE_HOPPERS_EYES = ((223.6, 190.4), (307.0, 187.4))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write textured stand-ins for faces: persons ann (3 photos), bob (2) and three single files."""
    rng = np.random.default_rng(0)
    for name in ("ann/1.png", "ann/2.png", "ann/deep/3.png", "bob/1.png", "bob/2.png", "cy.png", "di.png", "ed.png"):
        layers = [ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE, 3)), (s, s, 0)) for s in (1, 3, 10)]
        values = 128 + 22 * sum(layer / layer.std() for layer in layers)
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(path)
    return tmp_path / "photos"


def config_of(photos: Path, **changes: Any) -> ForgeDataConfig:
    values = {"photos": str(photos), "output": str(photos.parent / "out"), "face": "off", "per_image": 3}
    return ForgeDataConfig(**{**values, **changes})


def table(output: Path) -> list[dict[str, str]]:
    with (output / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(output: Path) -> dict[str, bytes]:
    found = (p for p in sorted(output.rglob("*")) if p.is_file() and p.name != "run.json")
    return {p.relative_to(output).as_posix(): p.read_bytes() for p in found}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_sources_read_what_is_written(photos: Path) -> None:
    out = photos.parent / "out"
    counts = build_forgeries(config_of(photos, test_groups=("bob",), val_groups=("cy",)))
    assert counts["photos"] == 8 and counts["forgeries_too_faint"] == 0
    assert (counts["train/real"], counts["train/fake"]) == (5, 15)
    assert (counts["val/real"], counts["val/fake"], counts["test/real"], counts["test/fake"]) == (1, 3, 2, 6)
    assert counts["test/label_free.json"] == counts["test/label_free.jsonl"] == 8 * 6
    assert counts["test/verdict_only.json"] == 8 < counts["test/dialogue.json"] < 8 * 7
    source = open_source(DataConfig(source="csv", path=str(out / "manifest.csv")))
    groups = {s: {r.group for r in source.records if r.split == s} for s in ("train", "val", "test")}
    assert groups == {"train": {"ann", "di", "ed"}, "val": {"cy"}, "test": {"bob"}}
    for record in source.records:
        assert set(record.tags) == {"region", "artefact", "mask", "original", "untouched"}
        assert (photos / record.tags["original"]).is_file()
        is_fake = record.label == FAKE
        assert record.class_name == (record.tags["artefact"] if is_fake else "real")
        assert bool(record.tags["region"]) == bool(record.tags["mask"]) == is_fake
        assert not is_fake or (out / record.tags["mask"]).is_file()
    talks = ConversationSource(DataConfig(source="conversations", path=str(out), root=str(out / "images")))
    seen = [(r.label, r.class_name, r.group, r.split, r.tags["mask"]) for r in talks.records]
    assert Counter(seen) == Counter((r.label, r.class_name, r.group, r.split, r.tags["mask"]) for r in source.records)
    settings = ReasonSettings(images=str(out / "images"), questions=str(out / "val" / "label_free.jsonl"))
    assert {item.name for item in list_items(settings)} == {
        r.id.removeprefix("images/") for r in source.records if r.split == "val"
    }


def test_pictures_without_a_face_are_for_training_and_for_no_conversation(photos: Path) -> None:
    plain, out = photos.parent / "plain", photos.parent / "out"
    build_forgeries(config_of(photos, output=str(plain), versions=2))
    counts = build_forgeries(config_of(photos, versions=2, leaves=2, longest_side=SIDE))
    assert counts["leaves"] == 2 * 4 and counts["manifest.csv"] == len(table(plain)) + 8
    without, there = files(plain), files(out)
    numbers = [f"leaves/0000{picture}_{k}.png" for picture in (0, 1) for k in range(4)]
    assert there.keys() - without.keys() == {
        *(f"images/{name}" for name in numbers),
        *(f"masks/{name}" for name in numbers if not name.endswith("_0.png")),
    }
    assert {name for name in without if there[name] != without[name]} == {"manifest.csv"}
    rows = table(out)[len(table(plain)) :]
    assert table(out)[: -len(rows)] == table(plain)
    assert {(row["split"], row["group"]) for row in rows} == {("train", "leaves/00000"), ("train", "leaves/00001")}
    source = CsvSource(DataConfig(source="csv", path=str(out / "manifest.csv"), masks=True))
    assert len(source.records) == len(table(out))


def test_the_truth_can_be_scored_by_region(photos: Path) -> None:
    out = photos.parent / "out"
    build_forgeries(config_of(photos, test_groups=("bob",), val_groups=("cy",)))
    truth = out / "test" / "label_free.jsonl"
    rows = [json.loads(line) for line in truth.read_text(encoding="utf-8").splitlines()]
    answers = [{"key": key, "text": row["answer"][0]} for found in rows for key, row in found.items()]
    (out / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers), encoding="utf-8")
    items = read_caption_set(out / "answers.jsonl", truth).items
    tagged = {Path(row["file"]).stem: row for row in table(out)}
    for item in items:
        row = tagged[item.key.rpartition("_")[0]]
        assert (item.label, item.group) == (LABEL_NAMES.index(row["label"]), row["group"])
        assert item.region == (row["region"] if row["region"] in REGIONS else None)
        assert item.artefact == (row["artefact"] if item.region else None)
    for naming in (REGION, ARTEFACT):
        report = naming_report(naming, items, read_training(out / "train" / "label_free.json"), n_boot=50)
        assert report is not None and report["accuracy"]["value"] == 1.0
        assert report["n"] == sum(row["split"] == "test" and row["region"] in REGIONS for row in tagged.values()) > 1


def test_masks_are_exact_and_reals_untouched(photos: Path) -> None:
    out = photos.parent / "out"
    build_forgeries(config_of(photos))
    for row in table(out):
        original = pixels(photos / row["original"])
        image = pixels(out / row["file"])
        if row["label"] == "real":
            assert np.array_equal(image, original)
            continue
        mask, changed = pixels(out / row["mask"]), (image != original).any(axis=2)
        assert mask.dtype == np.uint8 and mask.shape == (SIDE, SIDE)
        assert changed.any() and not (changed & (mask == 0)).any()


def test_the_same_settings_give_the_same_files(photos: Path) -> None:
    for name in ("a", "b"):
        build_forgeries(config_of(photos, output=str(photos.parent / name), per_image=1))
    assert files(photos.parent / "a") == files(photos.parent / "b")


def test_a_forgery_is_a_function_of_seed_photo_and_number(photos: Path) -> None:
    base = photos.parent
    for name, changes in {"first": {}, "other": {"seed": 1}, "more": {"per_image": 2}}.items():
        build_forgeries(config_of(photos, output=str(base / name), **{"per_image": 1, **changes}))
    first, other, more = (files(base / name) for name in ("first", "other", "more"))
    images = {name: content for name, content in first.items() if name.startswith(("images/", "masks/"))}
    # Asking for more adds forgeries and changes none.
    assert images.items() < more.items()
    forged = {content for name, content in images.items() if name.startswith("images/") and name.endswith("_1.png")}
    assert len(forged) == 8 and not forged & set(other.values())
    originals = {content for name, content in (first | other).items() if name.endswith("_0.png")}
    assert len(originals) == 8


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_the_encoding_says_nothing_of_the_label(photos: Path, kind: str) -> None:
    out = photos.parent / "out"
    build_forgeries(config_of(photos, format=kind, jpeg_quality=90))
    seen = {}
    for row in table(out):
        with Image.open(out / row["file"]) as image:
            tables = getattr(image, "quantization", None)
            what = (image.format, image.mode, image.size, Path(row["file"]).suffix, str(tables), sorted(image.info))
        seen.setdefault(row["label"], set()).add(str(what))
        assert what[0] == kind.upper()
    assert seen["real"] == seen["fake"] and len(seen["real"]) == 1


def test_answers_are_true_of_the_pixels(photos: Path) -> None:
    """Each answer about a region is held against the pixels of that region, and each verdict against the label."""
    out = photos.parent / "out"
    build_forgeries(config_of(photos, per_image=8))
    rows = {row["file"].removeprefix("images/"): row for row in table(out)}
    assert {row["artefact"] for row in rows.values()} == {"", *ARTEFACTS}
    regions = regions_by_eyes(pixels(photos / "cy.png"), FaceBox(x=18, y=18, width=60, height=60, score=0))
    told: Counter[str] = Counter()
    for split in ("train", "val", "test"):
        for item in json.loads((out / split / "label_free.json").read_text()):
            row, (question, answer) = rows[item["image"]], (turn["value"] for turn in item["conversations"])
            assert parse_verdict(answer) == (REAL if row["label"] == "real" else FAKE), answer
            asked = re.search(r"person's (\w+)", question)
            changed = (pixels(out / row["file"]) != pixels(photos / row["original"])).any(axis=2)
            if asked is None:
                named = (
                    "No region"
                    if row["label"] == "real"
                    else f"The {'whole face' if row['region'] == FACE else row['region']} show"
                )
                assert named in answer
                continue
            is_changed = bool((changed & (regions[asked.group(1)] > 0)).any())
            assert ("no signs of editing" in answer) == (not is_changed), (row, answer)
            assert is_changed or row["region"] != asked.group(1)
            told[answer.split(".")[0].split(",")[0] + str(is_changed)] += 1
    assert told.keys() == {"The image is realFalse", "The image is fakeFalse", "The image is fakeTrue"}


def test_the_words() -> None:
    mouth = Truth(region="mouth", artefact="colour_mismatch", touched=("mouth",))
    face = Truth(region=FACE, artefact="self_blended", touched=("nose", "eyes"))
    assert truthful_answer(None, None) == "The image is real. No region shows signs of editing."
    assert truthful_answer("eyes", None) == "The image is real. The eyes show no signs of editing."
    assert truthful_answer(None, mouth) == truthful_answer("mouth", mouth)
    assert truthful_answer(None, mouth) == "The image is fake. The mouth shows a colour mismatch."
    assert truthful_answer("nose", mouth) == "The image is fake, but the nose shows no signs of editing."
    assert truthful_answer(None, face).startswith("The image is fake. The whole face shows a blend")
    assert truthful_answer("eyes", face) == "The image is fake. The eyes show signs of the blend that covers the face."
    assert truthful_answer("skin", face) == "The image is fake, but the skin shows no signs of editing."
    assert set(SIGNS) == set(ARTEFACTS)


def test_questions_do_not_leak_the_label(photos: Path) -> None:
    out = photos.parent / "out"
    build_forgeries(config_of(photos))
    for style in ("verdict_only", "label_free", "dialogue"):
        asked: dict[str, set[str]] = {"real": set(), "fake": set()}
        for item in json.loads((out / "train" / f"{style}.json").read_text()):
            asked[item["label"]] |= {
                t["value"].removeprefix(HEAD) for t in item["conversations"] if t["from"] == "human"
            }
        assert (
            asked["real"] == asked["fake"]
            and len(asked["real"]) == {"verdict_only": 1, "label_free": 6, "dialogue": 7}[style]
        )


def test_dialogues_of_any_length_hold_every_question_of_an_image_once(photos: Path) -> None:
    build_forgeries(config_of(photos))
    asked: dict[str, list[str]] = {}
    lengths = Counter[int]()
    for item in json.loads((photos.parent / "out" / "train" / "dialogue.json").read_text()):
        questions = [turn["value"] for turn in item["conversations"] if turn["from"] == "human"]
        assert [question.startswith(HEAD) for question in questions] == [True] + [False] * (len(questions) - 1)
        asked.setdefault(item["image"], []).extend(question.removeprefix(HEAD) for question in questions)
        lengths[len(questions)] += 1
    assert all(len(questions) == len(set(questions)) == 7 for questions in asked.values())
    assert len({tuple(questions) for questions in asked.values()}) > 2
    assert lengths[1] > lengths[3] and max(lengths) > 3


def test_persons_never_cross_a_split(photos: Path) -> None:
    groups = [f"person {i % 20}" for i in range(60)]
    splits = divide(groups, config_of(photos, test_fraction=0.2, val_fraction=0.25))
    assert Counter(splits.values()) == {"train": 12, "val": 4, "test": 4}
    assert divide(groups, config_of(photos, test_fraction=0, val_fraction=0)).keys() == set(groups)
    assert set(divide(groups, config_of(photos, test_fraction=0, val_fraction=0)).values()) == {"train"}
    with pytest.raises(ValueError, match=r"there is no 'bop'.*Did you mean 'bob'"):
        build_forgeries(config_of(photos, test_groups=("bop",)))
    with pytest.raises(ValueError, match="'bob' stands in test_groups and val_groups"):
        build_forgeries(config_of(photos, test_groups=("bob",), val_groups=("bob",)))
    with pytest.raises(ValueError, match="No photo is left to train on"):
        divide(["a", "b"], config_of(photos, test_groups=("a",), val_groups=("b",)))


def test_a_table_says_who_is_who_and_who_tests(photos: Path) -> None:
    rows = ["ann/1.png,real,train,ann", "ann/2.png,fake,train,ann", "bob/1.png,0,val,bob", "cy.png,real,test,someone"]
    rows += ["di.png,real,test_b,di"]
    (photos / "people.csv").write_text("\n".join(["file,label,split,group", *rows]))
    config = config_of(photos / "people.csv", output=str(photos.parent / "out"))
    assert build_forgeries(config)["photos"] == 3
    made = {(row["original"], row["split"], row["group"]) for row in table(photos.parent / "out")}
    assert made == {("ann/1.png", "train", "ann"), ("bob/1.png", "val", "bob"), ("cy.png", "test", "someone")}
    with pytest.raises(ValueError, match="the table says who tests and validates"):
        build_forgeries(replace(config, test_groups=("ann",)))
    (photos / "people.csv").write_text("\n".join(["file,label,split,group", *rows[1:2], *rows[4:]]))
    with pytest.raises(ValueError, match=r"people.csv' names no real photo in a split train, val, test"):
        build_forgeries(config)


def test_an_output_that_holds_something_else_is_refused(photos: Path) -> None:
    build_forgeries(config_of(photos, per_image=1))
    before = files(photos.parent / "out")
    build_forgeries(config_of(photos, per_image=1))
    assert files(photos.parent / "out") == before
    (photos.parent / "out").rename(photos.parent / "moved")
    build_forgeries(config_of(photos, per_image=1, output=str(photos.parent / "moved")))
    (photos.parent / "moved").rename(photos.parent / "out")
    with pytest.raises(ValueError, match=r"another forged data set \(different: per_image\)"):
        build_forgeries(config_of(photos, per_image=2))
    with pytest.raises(ValueError, match=r"different: forge\)"):
        build_forgeries(config_of(photos, per_image=1, forge=ForgeConfig(blur_sigma=(2.0, 3.0))))
    (photos / "cy.png").unlink()
    with pytest.raises(ValueError, match=r"different: photos\)"):
        build_forgeries(config_of(photos, per_image=1))
    with pytest.raises(ValueError, match="not empty and was not written by"):
        build_forgeries(config_of(photos, output=str(photos.parent)))
    with pytest.raises(ValueError, match="would be taken for photos"):
        build_forgeries(config_of(photos, output=str(photos / "out")))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build_forgeries(config_of(photos / "no"))


def test_what_cannot_be_forged_is_left_out_and_counted(photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"no image")

    def only_ann(image: np.ndarray, box: FaceBox | None) -> Mapping[str, np.ndarray] | None:
        is_ann = any(np.array_equal(image, pixels(p)) for p in (photos / "ann").rglob("*.png"))
        return face_regions(*image.shape[:2]) if is_ann else None

    counts = build_forgeries(config_of(photos, test_groups=("bob",), val_fraction=0), only_ann)
    assert (counts["photos"], counts["left_out_unreadable"], counts["left_out_without_face"]) == (9, 1, 5)
    assert (counts["train/real"], counts["train/fake"], counts["manifest.csv"]) == (3, 9, 12)
    with pytest.raises(ValueError, match=r"no photo has a usable face .*'left_out_without_face': 8"):
        build_forgeries(config_of(photos, output=str(photos.parent / "other"), face="auto"))


def test_a_faint_forgery_is_left_out_and_counted(photos: Path) -> None:
    changes = {"forge": ForgeConfig(least_change=200.0), "per_image": 1}
    counts = build_forgeries(config_of(photos, **changes))
    assert counts["forgeries_too_faint"] == 8 and counts["manifest.csv"] == 8


def test_large_photos_are_shrunk_alike(photos: Path) -> None:
    build_forgeries(config_of(photos, longest_side=64))
    out = photos.parent / "out"
    assert {pixels(out / row["file"]).shape for row in table(out)} == {(64, 64, 3)}
    assert {pixels(out / row["mask"]).shape for row in table(out) if row["mask"]} == {(64, 64)}


def test_a_leak_would_be_refused(photos: Path) -> None:
    out = photos.parent / "out"
    build_forgeries(config_of(photos))
    records = open_source(DataConfig(source="csv", path=str(out / "manifest.csv"))).records
    parts = {s: [r for r in records if r.split == s] for s in ("train", "val", "test")}
    check_leaks(parts)
    with pytest.raises(LeakError):
        check_leaks({"train": parts["train"], "val": parts["train"][:1]})


def test_a_real_portrait_is_cropped_and_forged(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("grace_hopper.jpg", "portrait_cc0_2.png"):
        (tmp_path / "photos" / name).write_bytes((shared_data / "public_domain" / name).read_bytes())
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "photos" / "wall.png")
    with Image.open(tmp_path / "photos" / "grace_hopper.jpg") as photo:
        photo.rotate(90, expand=True).save(tmp_path / "photos" / "lying.png")
    config = config_of(tmp_path / "photos", face="auto", per_image=2, test_groups=("grace_hopper",), val_fraction=0)
    counts = build_forgeries(config)
    assert (counts["left_out_without_face"], counts["left_out_doubtful_face"]) == (1, 1)
    assert (counts["test/real"], counts["test/fake"], counts["train/real"], counts["train/fake"]) == (1, 2, 1, 2)
    crop = pixels(tmp_path / "out" / "images" / "test" / "00000_0.png")
    portrait = read_image(tmp_path / "photos" / "grace_hopper.jpg")
    assert crop.shape[0] == crop.shape[1] < min(portrait.shape[:2])
    (box,) = find_faces(portrait)
    assert box.eyes is not None
    assert np.allclose(box.eyes, GRACE_HOPPERS_EYES, atol=8)
    regions = regions_by_eyes(portrait, box)
    assert all(regions["eyes"][round(y), round(x)] > 0 for x, y in GRACE_HOPPERS_EYES)
    assert set(REGIONS) < set(regions)


def test_no_eyes_where_there_are_none() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (120, 120, 3), dtype=np.uint8)
    for picture in (noise, np.full_like(noise, 128)):
        assert find_faces(picture) == []
        box = FaceBox(x=10, y=10, width=100, height=100, score=1.0)
        assert box.eyes is None and box.roll is None
        assert (
            regions_by_eyes(picture, box)["eyes"] == face_regions(120, 120, eyes_in_box(10, 10, 100, 100))["eyes"]
        ).all()


def test_versions_of_a_photo_each_have_their_untouched_face_and_forgeries(photos: Path) -> None:
    out = photos.parent / "out"
    counts = build_forgeries(config_of(photos, versions=3, per_image=2, test_groups=("bob",), val_groups=("cy",)))
    assert (counts["train/real"], counts["train/fake"]) == (15, 30)
    first = [row for row in table(out) if row["original"] == "ann/1.png"]
    assert [row["label"] for row in first] == ["real", "fake", "fake"] * 3
    real = [pixels(out / row["file"]) for row in first if row["label"] == "real"]
    assert np.array_equal(real[0], pixels(photos / "ann" / "1.png"))
    assert not np.array_equal(real[1], real[0]) and not np.array_equal(real[2], real[1])
    for number, row in enumerate(first):
        if row["label"] == "fake":
            mask, forged = pixels(out / row["mask"]), pixels(out / row["file"])
            assert np.array_equal(forged[mask == 0], real[number // 3][mask == 0]), "edited on its own version"
