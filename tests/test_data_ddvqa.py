"""DD-VQA files: published wording reproduced, label-free questions that do not leak, groups kept whole."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data.answer_texts import label_free_answer, label_free_question, published_pair, reason_sentences
from llava.data.ddvqa import DdvqaConfig, build_ddvqa
from llava.data.sources import DataConfig, open_source
from llava.data.splits import LeakError, check_leaks

HEAD = "<image>\n<deepfake>\n"


def annotation(verdict: str, reasons: dict[str, list[str]]) -> dict[str, Any]:
    whole = [f"The image looks {verdict}. {text}" for text in reasons["whole"]]
    entry = {"0": {"question": "Does the image looks real/fake?", "answer": whole}}
    answers = [f"The person's nose looks {verdict}. {text}" for text in reasons["nose"]]
    return {**entry, "1": {"question": "Does the person's nose look real/fake?", "answer": answers}}


REAL_SAID = {"whole": ["Proper hair and hairstyles."], "nose": ["The person has naturally straight nose."]}
FAKE_SAID = {
    "whole": ["The person's nose looks very fake because the nose lookes curved. The person has mismatched bangs."],
    "nose": ["The person's nose looks a bit fake because the nose lookes curved.", "It could be real. Nose too long."],
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Write a small DD-VQA: training pairs (001, 002) and (003, 004), one test pair."""
    keys = {"train": ["5_001", "0_001_002", "5_003", "1_003_004", "5_900"], "test": ["5_005", "6_005_006"]}
    for part, names in keys.items():
        folder = tmp_path / "annotations" / f"{part}_set"
        folder.mkdir(parents=True)
        said = {k: annotation("real", REAL_SAID) if k[0] == "5" else annotation("fake", FAKE_SAID) for k in names}
        (folder / "all.json").write_text(json.dumps(said))
        (tmp_path / "c40" / part).mkdir(parents=True)
        for key in set(names) - {"5_900"}:
            Image.new("RGB", (20, 20)).save(tmp_path / "c40" / part / f"{key}.jpg")
    return tmp_path


def config_of(root: Path, **changes: Any) -> DdvqaConfig:
    values = {"annotations": str(root / "annotations"), "images": str(root / "c40"), "output": str(root / "out")}
    return DdvqaConfig(**{**values, **changes})


def read(root: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((root / "out" / name).read_text())


def truths(root: Path, name: str) -> dict[str, Any]:
    return {k: v for line in (root / "out" / name).read_text().splitlines() for k, v in json.loads(line).items()}


def test_styles_are_written_and_open_as_a_source(tiny: Path) -> None:
    (tiny / "val.txt").write_text("5_003.jpg\n1_003_004.jpg\n")
    counts = build_ddvqa(config_of(tiny, val_list=str(tiny / "val.txt")))
    assert counts["annotated_without_image"] == 1
    assert counts["train/label_free.json"] == counts["train/published.json"] == 5
    assert counts["val/verdict_only.json"] == 2
    assert counts["test/label_free.json"] == 5
    assert counts["test/label_free.jsonl"] == 4  # two answers to one question are two references of one row
    row = read(tiny, "train/label_free.json")[2]
    assert row == {
        "id": "0_001_002_2",
        "image": "train/0_001_002.jpg",
        "label": "fake",
        "class_name": "Deepfakes",
        "group": "001",
        "conversations": [
            {"from": "human", "value": HEAD + "Does the person's nose look real or fake? Give the reason."},
            {"from": "gpt", "value": "The image is fake. Nose too long."},
        ],
    }
    first = read(tiny, "train/verdict_only.json")[0]["conversations"]
    assert first[0]["value"] == HEAD + "Determine the authenticity of this image."
    assert first[1]["value"] == "The image is fake."
    truth = truths(tiny, "test/label_free.jsonl")["6_005_006_1"]
    assert truth["answer"] == ["The image is fake. The nose looks curved.", "The image is fake. Nose too long."]
    path, images = str(tiny / "out" / "train" / "label_free.json"), str(tiny / "c40")
    source = open_source(DataConfig(source="conversations", path=path, root=images))
    assert Counter(r.class_name for r in source.records) == {"Deepfakes": 3, "real": 2}


def dialogues(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Give the (question, answer) pairs by id, without the head of the first question."""
    said = {row["id"]: [turn["value"].removeprefix(HEAD) for turn in row["conversations"]] for row in rows}
    return {key: list(zip(values[::2], values[1::2], strict=True)) for key, values in said.items()}


def test_dialogues_ask_everything_in_rounds(tiny: Path) -> None:
    (tiny / "val.txt").write_text("5_003.jpg\n1_003_004.jpg\n")
    counts = build_ddvqa(config_of(tiny, val_list=str(tiny / "val.txt")))
    assert [counts[f"{split}/dialogue.json"] for split in ("train", "val", "test")] == [3, 3, 3]
    assert "test/dialogue.jsonl" not in counts and not (tiny / "out/test/dialogue.jsonl").exists()
    rows = {row["id"]: row for row in read(tiny, "train/dialogue.json")}
    verdict = ("Determine the authenticity of this image.", "The image is fake.")
    nose = "Does the person's nose look real or fake? Give the reason."
    whole = "Does this image look real or fake? Give the reasons."
    said = dialogues(list(rows.values()))
    assert set(said["0_001_002_d0"]) == {
        verdict,
        (nose, "The image is fake. The nose looks curved."),
        (whole, "The image is fake. The nose looks curved. The person has mismatched bangs."),
    }
    assert set(said["0_001_002_d1"]) == {verdict, (nose, "The image is fake. Nose too long.")}
    assert said.keys() == {"5_001_d0", "0_001_002_d0", "0_001_002_d1"}
    row = rows["0_001_002_d1"]
    assert (row["image"], row["label"], row["class_name"], row["group"]) == (
        *("train/0_001_002.jpg", "fake", "Deepfakes", "001"),
    )
    for row in rows.values():
        values = [turn["value"] for turn in row["conversations"]]
        assert [HEAD in value for value in values] == [True] + [False] * (len(values) - 1)
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(values) // 2)


def test_the_order_of_a_dialogue_is_a_function_of_the_seed(tiny: Path) -> None:
    def order(seed: int) -> dict[str, list[tuple[str, str]]]:
        build_ddvqa(config_of(tiny, val_fraction=0.5, seed=seed))
        return dialogues(read(tiny, "test/dialogue.json"))

    first = order(0)
    assert order(0) == first
    others = [order(seed) for seed in range(1, 6)]
    assert any(other != first for other in others)
    assert all({k: set(v) for k, v in other.items()} == {k: set(v) for k, v in first.items()} for other in others)


def test_validation_without_a_list_takes_whole_groups(tiny: Path) -> None:
    build_ddvqa(config_of(tiny, val_fraction=0.5))
    groups = {split: {r["group"] for r in read(tiny, f"{split}/verdict_only.json")} for split in ("train", "val")}
    assert sorted(len(g) for g in groups.values()) == [1, 1]
    assert not groups["train"] & groups["val"]


def test_ddvqa_mistakes_are_named(tiny: Path) -> None:
    (tiny / "val.txt").write_text("5_003.jpg\n")
    with pytest.raises(ValueError, match=r"1 groups stand in training and validation .first id: 003"):
        build_ddvqa(config_of(tiny, val_list=str(tiny / "val.txt")))
    (tiny / "val.txt").write_text("5_777.jpg\n")
    with pytest.raises(ValueError, match="first: 5_777"):
        build_ddvqa(config_of(tiny, val_list=str(tiny / "val.txt")))
    with pytest.raises(FileNotFoundError, match="train_set"):
        build_ddvqa(config_of(tiny, annotations=str(tiny)))
    with pytest.raises(FileNotFoundError, match="no images in 'train'"):
        build_ddvqa(config_of(tiny, images=str(tiny / "annotations")))


def test_published_wording_by_hand() -> None:
    ask = "Does the image looks real/fake?"
    assert published_pair(ask, "The image looks fake. The nose and the eyes differ.", "fake") == (
        "This image is fake. Describe the authenticity of the image based on nose, eyes.",
        "The nose and the eyes differ.",
    )
    question, answer = published_pair(ask, "The image looks real. the skin is even/smooth.", "real")
    assert question.startswith("The skin in the image is real, tell me why.")
    assert answer == "The skin is even or smooth."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "The image looks fake. The person's mouth looks a bit fake because overly large mouth the mouth looks too "
            "rigid to convey expressions. . Overly pointed chin.",
            [
                "The mouth is overly large.",
                "The mouth looks too rigid to convey expressions.",
                "The chin is overly pointed.",
            ],
        ),
        (
            "The person's skin looks fake. There are stains/flaws on the person's face such as the nose is red. "
            "There area of looking unnaturally darker. There area of looking unnaturally darker.",
            [
                "There are stains or flaws on the person's face such as the nose is red.",
                "There are areas looking unnaturally darker.",
            ],
        ),
        ("The person's nose looks fake. Real. It could be real. Na.", []),
        ("The image looks real. Unrealistic? not at all.", ["Unrealistic? not at all."]),
    ],
)
def test_reasons_are_readable_sentences(answer: str, expected: list[str]) -> None:
    assert reason_sentences(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # A clause that is still open is not cut.
        (
            "The person has the lighting in the image is inconsistent, unrealistic shadows.",
            ["The lighting and shadows do not match."],
        ),
        ("Brighter around the mouth is too bright.", ["Brighter around the mouth is too bright."]),
        # What was typed behind a sentence of the tool is a reason of its own, or a scrap.
        (
            "The mouth is misaligned with other facial features bottom right of mouth looks strange.",
            ["The mouth is misaligned with other facial features.", "Bottom right of mouth looks strange."],
        ),
        ("There area of looking unnaturally darker yes.", ["There are areas looking unnaturally darker."]),
        (
            "The person has blurry hairlines mismatched beard.",
            ["The person has blurry hairlines.", "The person has a mismatched beard."],
        ),
        (
            "There area of looking unnaturally darker such as nose.",
            ["There are areas looking unnaturally darker such as nose."],
        ),
        # Examples without content go.
        ("There are stains/flaws on the person's face such as.", ["There are stains or flaws on the person's face."]),
        (
            "There are stains/flaws on the person's face such as very bad.",
            ["There are stains or flaws on the person's face."],
        ),
        # The second half of a list of features gets its beginning back.
        (
            "The person has smooth there are lines. Skin, arched eyebrows, full mouth.",
            ["There are lines.", "The person has arched eyebrows, full mouth."],
        ),
        # Words of the tool that need a sentence around them.
        (
            "One single eyebrow. No eyebrow. No mouth.",
            ["There is only one eyebrow.", "There is no eyebrow.", "There is no mouth."],
        ),
        (
            "Blurry hairlines. Left broken eyebrows.",
            ["The person has blurry hairlines.", "The left eyebrow is broken."],
        ),
        ("The person has naturally dull eyes eyes.", ["The person has naturally dull eyes."]),
        ("The person has naturally round yes eyes.", ["The person has naturally round eyes."]),
        ("He has no eyebrows. The color is not too bad.", ["He has no eyebrows.", "The color is not too bad."]),
        # Fragments and scraps are left out.
        ("The person has. The nose is. The bottom of. The inside of the.", []),
        (
            "The person has na. The person has naturally arched. The person has smooth even. The person has no image.",
            [],
        ),
        ("Beautiful. Very bad. Nothing nothing nothing. Yes.", []),
    ],
)
def test_fragments_are_mended_or_left_out(answer: str, expected: list[str]) -> None:
    assert reason_sentences(answer) == expected


def test_verdict_comes_first_and_alone_when_no_reason_is_left() -> None:
    assert label_free_answer("The person's nose looks fake. Fake.", "fake") == "The image is fake."
    assert label_free_answer("The image looks real. Good.", "real") == "The image is real."


@pytest.fixture(scope="module")
def built(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ddvqa")
    data = shared_data / "ddvqa"
    build_ddvqa(
        DdvqaConfig(
            annotations=str(data / "annotations" / "DQ_FFpp"),
            images=str(data / "images" / "c40"),
            val_list=str(data / "splits" / "heldval_300.txt"),
            output=str(root / "out"),
        )
    )
    return root


def test_all_published_pairs_are_reproduced(built: Path, shared_data: Path) -> None:
    reference = json.loads((shared_data / "ddvqa/annotations/c40/rebuilt/train_teststyle.json").read_text())
    ours = read(built, "train/published.json") + read(built, "val/published.json")

    def pairs(rows: list[dict[str, Any]]) -> Counter:
        return Counter((Path(r["image"]).name, *(t["value"] for t in r["conversations"])) for r in rows)

    assert len(reference) == 9252
    assert pairs(ours) == pairs(reference)


def test_published_test_file_is_reproduced(built: Path, shared_data: Path) -> None:
    lines = (shared_data / "ddvqa/annotations/c40/test.jsonl").read_text().splitlines()
    published = {k: v for line in lines for k, v in json.loads(line).items()}
    ours = truths(built, "test/published.jsonl")
    assert ours.keys() == published.keys()
    assert sum(ours[k]["question"] == published[k]["question"] for k in ours) == 1070
    assert sum(ours[k]["answer"][0].strip() == published[k]["answer"][0].strip() for k in ours) == 1069


@pytest.mark.parametrize("style", ["label_free", "verdict_only"])
def test_questions_do_not_leak_the_label(built: Path, style: str) -> None:
    """Both labels are asked the same questions, and each names both verdicts or neither."""
    for split in ("train", "val", "test"):
        asked = defaultdict(set)
        for row in read(built, f"{split}/{style}.json"):
            asked[row["label"]].add(row["conversations"][0]["value"])
        assert asked["real"] == asked["fake"]
        assert len(asked["real"]) == (6 if style == "label_free" else 1)
        for question in asked["real"]:
            words = set(re.findall(r"[a-z]+", question.lower()))
            assert ("real" in words) == ("fake" in words)
            assert not words & {"forged", "genuine", "manipulated", "natural", "naturally", "why", "unnatural"}


def test_answers_say_the_labels_verdict_and_no_other(built: Path) -> None:
    for split in ("train", "val", "test"):
        for row in read(built, f"{split}/label_free.json"):
            answer = row["conversations"][1]["value"]
            other = "real" if row["label"] == "fake" else "fake"
            assert answer.startswith(f"The image is {row['label']}.")
            assert not re.search(rf"\b{other}\b", answer), answer


def test_dialogues_use_every_answer_once_and_begin_with_every_question(built: Path) -> None:
    for split in ("train", "val", "test"):
        single = Counter(
            (row["image"], *(turn["value"].removeprefix(HEAD) for turn in row["conversations"]))
            for style in ("label_free", "verdict_only")
            for row in read(built, f"{split}/{style}.json")
        )
        rows = read(built, f"{split}/dialogue.json")
        said = Counter((row["image"], *pair) for row in rows for pair in dialogues([row])[row["id"]])
        verdicts = {key for key in said if key[1].startswith("Determine")}
        assert {key: said[key] for key in single.keys() - verdicts} == {
            key: single[key] for key in single.keys() - verdicts
        }
        assert said.keys() == single.keys()
        assert sum(said[key] for key in verdicts) == len(rows)
        first = Counter(row["conversations"][0]["value"] for row in rows)
        assert len(first) == 7 and min(first.values()) > len(rows) / 20


def test_no_answer_breaks_off(built: Path) -> None:
    loose = re.compile(r"\b(?:of|the|a|an|and|or|is|are|has|such as|with|to|from|naturally)\.(?:\s|$)", re.IGNORECASE)
    for row in read(built, "train/label_free.json"):
        answer = row["conversations"][1]["value"]
        assert not loose.search(answer), answer
        assert min(len(sentence.split()) for sentence in answer.split(". ")) >= 3


def test_splits_are_those_of_the_list_and_share_no_group(built: Path, shared_data: Path) -> None:
    rows = {split: read(built, f"{split}/verdict_only.json") for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 1039, "val": 300, "test": 144}
    sources = {
        split: open_source(
            DataConfig(
                source="conversations",
                path=str(built / "out" / split / "verdict_only.json"),
                root=str(shared_data / "ddvqa" / "images" / "c40"),
            )
        )
        for split in rows
    }
    check_leaks({split: source.records for split, source in sources.items()})
    with pytest.raises(LeakError):
        check_leaks({"train": sources["train"].records, "val": sources["train"].records[:1]})


def test_label_free_questions_by_hand() -> None:
    assert label_free_question(None) == "Does this image look real or fake? Give the reasons."
    assert label_free_question("eyes") == "Do the person's eyes look real or fake? Give the reason."
