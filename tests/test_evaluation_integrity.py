"""The integrity suite against hand values, pycocoevalcap, brute force and the published files."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.core.terminal import console
from llava.data.answer_texts import REGIONS, flipped_question, published_pair, stated_label
from llava.evaluation import caption_metrics
from llava.evaluation.blind import (
    Lookup,
    TrainingPair,
    flip_report,
    label_reader,
    leak_report,
    own_verdict_answers,
    read_flipped,
    read_training,
    template_answers,
    template_report,
)
from llava.evaluation.captions import CaptionItem, CaptionSet, read_caption_set
from llava.evaluation.grounding import ARTEFACT, REGION, named_artefact, named_region, naming_report
from llava.evaluation.integrity import integrity_report, integrity_tables, read_prompts, verdict
from llava.evaluation.swap import N_BLEU, PairScorer, caption_swap, pair_scores, swap_gap
from llava.jobs.ddvqa_answers import ReasonSettings, list_items

pytest.importorskip("pycocoevalcap")
ROOT = Path(__file__).resolve().parents[1]
WHOLE = "Does this image look real or fake? Give the reasons."
NOSE = "Does the person's nose look real or fake? Give the reason."
NAMES = ("real", "fake")
PARTS = ("nose", "mouth", "skin", "chin", "brow", "ear")


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


def item(image, answer, references=("x",), question=WHOLE, number=0, **more):
    own = {"group": image, "label": int(not image.startswith("5"))} | more
    return CaptionItem(key=f"{image}_{number}", question=question, answer=answer, references=references, **own)


def pair(question, answer, label):
    return TrainingPair(question=question, answer=answer, label=label)


def stating(label, region="nose"):
    return published_pair(f"The person's {region}?", f"The {region} is {NAMES[label]} because it is.", NAMES[label])[0]


# Leaks


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("This image is fake. Describe it.", 1),
        ("The skin in the image is REAL, tell me why.", 0),
        (WHOLE, None),
        ("Determine the authenticity of this image.", None),
        ("Is it unrealistic, surreal or a non-fake?", None),
    ],
)
def test_a_label_is_stated_by_whole_words(question, expected):
    assert stated_label(question) == expected


@pytest.mark.parametrize("region", REGIONS)
def test_a_published_region_question_is_flipped_as_a_whole_and_back(region):
    real, fake = (stating(label, region) for label in (0, 1))
    assert (stated_label(real), stated_label(fake)) == (0, 1)
    assert (flipped_question(real), flipped_question(fake)) == (fake, real)


def test_other_questions_change_the_word_only():
    assert flipped_question("This image is fake. Why?") == "This image is real. Why?"
    with pytest.raises(ValueError, match="states no label"):
        flipped_question(WHOLE)


def test_the_question_text_predicts_the_label_as_counted_by_hand(no_java):
    # Training: "a" 2 fake 1 real, "b" 2 real, and 3 real elsewhere -> fake for "a", real for "b" and in all.
    training = [pair("a", "x", label) for label in (1, 1, 0)] + [pair("b", "x", 0)] * 2 + [pair("c", "x", 0)] * 3
    items = [item("1_1", "", question="a"), item("5_2", "", question="a"), item("5_3", "", question="b")]
    report = leak_report([*items, item("5_4", "", question="unseen")], training, n_boot=50)
    told = {name: interval["value"] for name, interval in report["predictability"].items()}
    assert told == {"question": pytest.approx(3 / 4), "prior": pytest.approx(3 / 4), "gain": pytest.approx(0)}
    assert (report["unseen_questions"], report["distinct_questions"]) == (1, 3)
    told = leak_report(items[:1] + items[2:], training, n_boot=50)["predictability"]
    assert (told["question"]["value"], told["prior"]["value"]) == (1, 0.5)


def test_statements_are_counted_and_compared_with_the_image():
    items = [item("1_1", "", question=stating(1)), item("5_2", "", question=stating(1)), item("5_3", "")]
    report = leak_report(items, [pair(stating(0), "x", 0), pair(WHOLE, "x", 1)], n_boot=20)
    assert report["test"] == {"n": 3, "stated": 2, "true": 1, "false": 1}
    assert report["training"] == {"n": 2, "stated": 1, "true": 1, "false": 0}


def test_an_image_without_label_is_refused():
    with pytest.raises(ValueError, match="'a_0': the label is unknown"):
        leak_report([item("a", "", label=None)], [pair("a", "x", 1)])
    with pytest.raises(ValueError, match="No training record tells its label"):
        leak_report([item("1_1", "")], [pair("a", "x", None)])


# Template


def test_the_template_takes_the_most_frequent_answer_and_breaks_ties_by_characters():
    training = [pair(NOSE, text, 1) for text in ("b", "c", "c", "b", "a")] + [pair(WHOLE, "w", 0)]
    items = [item("1_1", "", question=q) for q in (NOSE, WHOLE, "Do the eyes shine?", "The nose, is it good?")]
    assert template_answers(items, training, "kind") == ["b", "w", "b", "b"]
    assert template_answers(items, training[::-1], "kind") == ["b", "w", "b", "b"]
    with pytest.raises(ValueError, match="nothing to look up"):
        Lookup([])


def test_the_whole_question_goes_before_the_kind():
    first, second = "This image is fake. Look at the nose.", "This image is fake. Look at the skin."
    training = [pair(first, "nose", 1), pair(second, "skin", 1), pair(second, "skin", 1)]
    items = [item("1_1", "", question=first), item("1_2", "", question="This image is fake. Look.")]
    assert template_answers(items, training, "question") == ["nose", "skin"]
    assert template_answers(items, training, "kind") == ["skin", "skin"]


def test_a_template_told_the_models_own_verdict(no_java):
    training = [pair(WHOLE, "The image is real.", 0)] * 3 + [pair(WHOLE, "The image is fake.", 1)] * 2
    items = [item("1_1", "The image is fake. Odd."), item("5_2", "The image is real. Fine."), item("5_3", "Hm.")]
    assert own_verdict_answers(items, training) == ["The image is fake.", *["The image is real."] * 2]
    assert own_verdict_answers([items[2]], training) is None
    report = template_report(items, training, n_boot=20)
    assert list(report["scores"]) == ["predictions", "kind", "own_verdict"]


def test_a_recited_template_differs_by_nothing_and_a_better_answer_wins(no_java):
    training = [pair(WHOLE, "the nose is odd", 1)] * 2
    truths = [f"the {part} looks rather {how}" for part, how in pairwise(PARTS)]
    recited = [item(f"1_{i}", "the nose is odd", (truth,)) for i, truth in enumerate(truths)]
    report = template_report(recited, training, n_boot=50)
    assert report["difference"]["kind"]["cider"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 5, "redrawn": 0}
    perfect = template_report([replace(i, answer=i.references[0]) for i in recited], training, n_boot=50)
    assert perfect["scores"]["predictions"]["rouge_l"]["value"] == pytest.approx(1)
    assert perfect["difference"]["kind"]["rouge_l"]["low"] > 0


# Pairs and swap

ANSWERS = ["the nose is curved", "the eyes look odd and odd", "", "a b"]
REFERENCES = [
    ("the nose is curved",),
    ("the eyes look unnaturally odd", "both eyes are odd"),
    ("the skin  is smooth",),
    ("a b c d e f", "the nose is odd", "x"),
]


@pytest.mark.parametrize("shift", range(4))
def test_pair_scores_equal_the_library_on_any_pairing(shift):
    # The references stay the same, so the library's document frequencies do as well.
    answers = ANSWERS[shift:] + ANSWERS[:shift]
    table = PairScorer(REFERENCES).table(answers, REFERENCES)
    own = table[range(4), range(4)]
    assert own[:, :N_BLEU] == pytest.approx(caption_metrics.bleu_statistics(answers, REFERENCES))
    assert own[:, N_BLEU] == pytest.approx(caption_metrics.rouge_scores(answers, REFERENCES))
    assert own[:, N_BLEU + 1] == pytest.approx(caption_metrics.cider_scores(answers, REFERENCES), abs=1e-12)
    bleu = caption_metrics.bleu(own.sum(axis=0)[:N_BLEU])[3]
    assert pair_scores(own.sum(axis=0), 4) == pytest.approx([bleu, own[:, N_BLEU].mean(), own[:, N_BLEU + 1].mean()])


def test_long_texts_have_the_library_s_rouge():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdef"), 90)) for _ in range(6)]
    ours = PairScorer([(t,) for t in texts]).table(texts, [(t,) for t in texts])[:, :, N_BLEU]
    theirs = [caption_metrics.rouge_scores([a] * 6, [(t,) for t in texts]) for a in texts]
    assert ours == pytest.approx(np.stack(theirs))


def three_images():
    texts = ("the nose is odd", "the mouth is very odd", "the skin")
    return [item(f"1_{i}", text, (text,)) for i, text in enumerate(texts)]


def test_the_swap_gap_equals_a_loop_over_the_library():
    items = [
        replace(i, answer=a) for i, a in zip(three_images(), ("the nose is odd", "the skin", "a mouth"), strict=True)
    ]
    lonely = item("1_9", "the nose", ("the nose",), question=NOSE)
    report = caption_swap([*items, lonely], n_boot=20)
    rouge = caption_metrics.rouge_scores
    own = np.mean([rouge([i.answer], [i.references])[0] for i in items])
    others = np.mean([rouge([i.answer], [j.references])[0] for i in items for j in items if i is not j])
    assert report["own"]["rouge_l"]["value"] == pytest.approx(own)
    assert report["swapped"]["rouge_l"]["value"] == pytest.approx(others)
    assert report["gap"]["rouge_l"]["value"] == pytest.approx(own - others)
    assert (report["n"], report["alone"]) == (3, 1)


def test_rows_about_one_image_are_no_others_of_each_other():
    twice = [item("1_1", "a", ("a",)), item("1_1", "a", ("b",), number=1)]
    assert caption_swap(twice, n_boot=5) == {"n": 0, "alone": 2}
    report = caption_swap([*twice, item("1_2", "a", ("a a",))], n_boot=5)
    # 1_1 twice against "a a" (F of 1 and 1/2), 1_2 against "a" (1) and "b" (0)
    half = (1 + 1.2**2) * 0.5 / (0.5 + 1.2**2)
    assert report["swapped"]["rouge_l"]["value"] == pytest.approx((2 * half + 0.5) / 3)


def test_reciting_has_no_gap_and_describing_has_one():
    recited = [replace(i, answer="the nose is odd") for i in three_images()]
    # every answer is the same text: own minus others cancels in the sum over images
    assert caption_swap(recited, n_boot=5)["gap"]["rouge_l"]["value"] == pytest.approx(0)
    report = caption_swap(three_images(), n_boot=200)
    assert all(report["gap"][name]["value"] > 0 for name in ("bleu_4", "rouge_l", "cider"))


def test_a_resample_equals_the_same_items_written_out():
    rng = np.random.default_rng(1)
    values = rng.random((5, 5))
    items = [item(f"1_{i}", str(i), question="q" if i < 4 else "other") for i in range(5)]
    seen = []

    def table(chosen):
        numbers = [int(i.answer) for i in chosen]
        return values[np.ix_(numbers, numbers)][:, :, None]

    def spy(sums, n):
        seen.append((float(sums[0]), n))
        return sums / n

    report = swap_gap(items, table, spy, ("value",), n_boot=30, seed=7)
    draws, checked = np.random.default_rng(7), 0
    for own, other in zip(seen[2::2], seen[3::2], strict=True):
        kept = []
        while not kept:  # a resample in which no answer has another image is drawn again
            drawn = np.bincount(draws.integers(5, size=5), minlength=5)
            written = [n for n in np.repeat(np.arange(5), drawn) if n < 4]
            means = {n: [values[n, m] for m in written if m != n] for n in written}
            kept = [n for n in written if means[n]]
        assert own == (pytest.approx(sum(values[n, n] for n in kept)), len(kept))
        assert other == (pytest.approx(sum(np.mean(means[n]) for n in kept)), len(kept))
        checked += 1
    assert checked == 30 and (report["n"], report["alone"]) == (4, 1)


def test_a_right_verdict_alone_makes_no_gap_within_a_label():
    items = [item(f"{5 if i % 2 else 1}_{i}", f"The image is {NAMES[1 - i % 2]}.") for i in range(8)]
    items = [replace(i, references=(f"{i.answer} Because {n}.",)) for n, i in enumerate(items)]
    assert caption_swap(items, n_boot=200)["gap"]["rouge_l"]["low"] > 0
    assert caption_swap(items, n_boot=200, same_label=True)["gap"]["rouge_l"]["value"] == pytest.approx(0)
    stated = [replace(i, question=stating(i.label)) for i in items]
    assert caption_swap(stated, n_boot=5, same_label=True) is None


# Label flip


def flip_training():
    texts = {0: "The person has naturally straight nose.", 1: "The nose lacks details, such as pores."}
    return [pair(stating(label), text, label) for label, text in texts.items()] * 5, texts


def test_answers_that_follow_the_statement_are_counted():
    training, texts = flip_training()
    items = [item(f"{5 if label == 0 else 1}_{n}", texts[label], (texts[label],), stating(label))
             for n, label in enumerate((0, 0, 1, 1))]  # fmt: skip
    unstated = item("5_9", "x")
    obeying = {i.key: texts[1 - i.label] for i in items}
    report = flip_report([*items, unstated], training, obeying, n_boot=20)
    assert (report["n"], report["left_out"]) == (4, 1)
    assert [report[name]["value"] for name in ("follows", "before", "both", "unchanged", "reader")] == [1, 1, 1, 0, 1]
    looking = flip_report(items, training, {i.key: i.answer for i in items}, n_boot=20)
    assert [looking[name]["value"] for name in ("follows", "before", "both", "unchanged")] == [0, 1, 0, 1]
    half = obeying | {i.key: i.answer for i in items if i.label}
    by_label = flip_report(items, training, half, n_boot=20)["by_label"]
    assert (by_label["real"]["value"], by_label["fake"]["value"]) == (1, 0)


def test_the_reader_takes_the_verdict_before_the_wording():
    training, texts = flip_training()
    read = label_reader(training)
    assert read([texts[0], texts[1], f"The image is fake. {texts[0]}"]) == [0, 1, 1]
    with pytest.raises(ValueError, match="about real and about fake"):
        label_reader(training[:1])


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_that_is_not_flipped_is_refused(tmp_path):
    items = [item("5_1", "x", question=stating(0)), item("5_2", "x")]
    row = {"key": "5_1_0", "prompt": f"USER: {stating(1)} ASSISTANT:", "text": "<s> y</s>"}
    assert read_flipped(write_lines(tmp_path / "good", [row]), items) == {"5_1_0": "y"}
    for rows, message in (
        ([row | {"prompt": stating(0)}], "does not state 'fake'"),
        ([row, row], "line 2: key '5_1_0' is given twice"),
        ([{"key": "5_1_0", "text": "y"}], "expected the fields key, prompt and text"),
        ([row | {"key": "5_2_0"}], "answers no question that states a label"),
    ):
        with pytest.raises(ValueError, match=message):
            read_flipped(write_lines(tmp_path / "bad", rows), items)


def test_inference_asks_flipped_questions_and_counts_the_others(tmp_path, caplog):
    (tmp_path / "test").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "test" / "5_1.png")
    rows = [{f"5_1_{n}": {"question": q, "answer": ["x"]}} for n, q in enumerate((stating(0), WHOLE))]
    path = write_lines(tmp_path / "questions.jsonl", rows)
    settings = ReasonSettings(images=str(tmp_path), questions=str(path), flip_stated_label=True)
    with caplog.at_level(logging.WARNING):
        assert [(i.key, i.question) for i in list_items(settings)] == [("5_1_0", stating(1))]
    assert "1 of 2 questions state no label" in caplog.text
    write_lines(path, rows[1:])
    with pytest.raises(ValueError, match="nothing to flip"):
        list_items(settings)


# Regions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The image is fake. The mouth shows a colour mismatch.", "mouth"),
        ("The left eye is blurred; both Eyes are.", "eyes"),
        ("The brow and the eyebrows are blurred.", "eyebrows"),
        ("The eyes and the eyebrows are blurred.", "several"),
        ("The eyelids and the mouthpiece are skinny.", "none"),
        ("The image is real. The nose shows a warp.", "none"),
        ("The image is fake, but the nose shows no signs of editing.", "none"),
        ("The image is fake. The nose shows no signs of editing, the mouth shows a warp.", "mouth"),
        ("", "none"),
    ],
)
def test_a_region_is_named_by_whole_words(text, expected):
    assert named_region(text) == expected


def regions(said, true):
    return [
        item(f"1_{n}", f"The image is fake. {s}", region=t) for n, (s, t) in enumerate(zip(said, true, strict=True))
    ]


def test_region_accuracy_confusion_baselines_and_swap_by_hand():
    training = [pair(WHOLE, f"The {r} is blurred.", 1) for r in ("nose", "skin", "nose")] + [pair(NOSE, "The skin.", 1)]
    training += [pair(WHOLE, "The image is real.", 0)] * 3
    items = regions(["The nose.", "The nose.", "The skin.", "Hm."], ["nose", "mouth", "skin", "skin"])
    other_question = item("1_0", "The image is fake, but the mouth is fine.", question=NOSE, number=1, region="nose")
    elsewhere = [item("5_7", "The image is real."), item("1_8", "The mouth and the nose.")]
    report = naming_report(REGION, [*items, other_question, *elsewhere], training, n_boot=100)
    assert (report["n"], report["accuracy"]["value"]) == (4, 0.5)
    assert report["named"] == {"one": 3, "none": 1, "several": 0}
    assert report["chance"] == {"of": 3, "value": pytest.approx(1 / 3)}
    assert (report["guess"]["names"], report["guess"]["accuracy"]["value"]) == (["nose"], 0.25)
    assert (report["template"]["names"], report["template"]["accuracy"]["value"]) == (["none"], 0)
    gain = {name: interval["value"] for name, interval in report["gain"].items()}
    assert gain == {"chance": pytest.approx(1 / 6), "guess": 0.25, "template": 0.5}
    # nose said of 1_0: others are mouth, skin, skin; of 1_1: nose, skin, skin; skin said of 1_2: 1 of 3; none: 0
    assert report["swap"]["swapped"]["accuracy"]["value"] == pytest.approx((0 + 1 / 3 + 1 / 3 + 0) / 4)
    assert report["confusion"] == {"skin": {"skin": 1, "none": 1}, "nose": {"nose": 1}, "mouth": {"nose": 1}}
    assert report["elsewhere"] == {"real": {"none": 1}, "fake": {"several": 1}}


def test_artefacts_are_named_in_the_words_of_the_forger_and_guessed_among_those_that_occur():
    said = {
        "blur": "The nose shows local blur.",
        "warp": "a WARP",
        "none": "It is warped.",
        "several": "a warp, local blur",
    }
    assert {named_artefact(text) for text in said.values()} == set(said)
    assert all(named_artefact(text) == name for name, text in said.items())
    assert named_artefact("The image is real. The nose shows a warp.") == "none"
    training = [pair(WHOLE, "a blend with a changed copy of itself", 1)] * 3 + [pair(WHOLE, "a warp", 1)]
    items = [item(f"1_{n}", said[a], region="nose", artefact=b) for n, (a, b) in enumerate((("blur", "blur"),
             ("none", "warp"), ("warp", "blur")))]  # fmt: skip
    report = naming_report(ARTEFACT, items, training, n_boot=20)
    assert (report["n"], report["accuracy"]["value"], report["chance"]["of"]) == (3, pytest.approx(1 / 3), 2)
    # self_blended is what training says most often, but no local edit is one
    assert (report["guess"]["names"], report["guess"]["accuracy"]["value"]) == (["warp"], pytest.approx(1 / 3))
    assert report["template"]["names"] == ["self_blended"]
    assert report["confusion"] == {"blur": {"blur": 1, "warp": 1}, "warp": {"none": 1}}


def test_without_regions_there_is_no_report_and_unknown_ones_are_refused():
    assert naming_report(REGION, [item("5_1", "x")], []) is None
    with pytest.raises(ValueError, match="region 'chin' is unknown"):
        naming_report(REGION, regions(["The chin."], ["chin"]), [])


# The whole


def world(tmp_path, describes):
    """Write truth, training and answers: locally forged images, described truly or recited."""
    gt, predictions, records = [], [], []
    for n in range(40):
        region = REGIONS[n % 5]
        truth = f"The image is fake. The {region} shows a colour mismatch."
        row = {"question": WHOLE, "answer": [truth], "label": "fake", "region": region, "group": f"g{n // 2}"}
        gt.append({f"face{n}_0": row})
        said = truth if describes else "The image is fake. The nose shows a colour mismatch."
        predictions.append({"key": f"face{n}_0", "prompt": f"USER: {WHOLE}", "text": said})
        turns = [{"from": "human", "value": f"<image>\n<deepfake>\n{WHOLE}"}, {"from": "gpt", "value": truth}]
        records.append({"image": f"t{n}.png", "label": "fake", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(records))
    return (
        write_lines(tmp_path / "p.jsonl", predictions),
        write_lines(tmp_path / "gt.jsonl", gt),
        tmp_path / "train.json",
    )


def test_the_verdict_says_who_looks_at_the_image(tmp_path, no_java):
    found = {}
    for describes in (True, False):
        answers, truth, training = world(tmp_path, describes)
        captions = read_caption_set(answers, truth)
        assert captions.items[3].group == "g1"
        report = integrity_report(captions, read_training(training), read_prompts(answers), n_boot=100)
        assert report["leak"]["prompts"] == {"n": 40, "stated": 0, "true": 0, "false": 0}
        found[describes] = " ".join(report["verdict"])
        json.dumps(report, allow_nan=False)
    assert "beats the blind template" in found[True] and "depends on the image (ROUGE-L" in found[True]
    assert "in 100.0% of 40 images, more often than chance and a blind guess and the blind" in found[True]
    assert "; it falls when images are swapped (17.9%; chance is 20.0%)" in found[True]  # 7 of the 39 others
    assert "does not beat the blind template" in found[False] and "No dependence on the image" in found[False]
    assert "in 20.0% of 40 images, not clearly more often than chance and a blind guess" in found[False]
    assert "; it does not clearly fall when images are swapped (20.0%;" in found[False]


def test_missing_answers_and_a_foreign_training_style_are_said(no_java):
    items = (item("5_1", "", question=stating(0)), item("1_2", "The image is fake.", question=stating(1)))
    training = [pair(WHOLE, "The image is fake.", 1)]
    report = integrity_report(CaptionSet(items=items, missing=("5_1_0",)), training, n_boot=20)
    assert "training lacks the kind of 2 of 2 questions" in report["verdict"][-2]
    assert report["verdict"][-1] == "1 of 2 questions have no answer and count as empty ones."
    assert report["verdict"][0].startswith("2 of 2 questions state the image's label: the scores measure how")
    assert report["leak"]["prompts"] is None


def test_an_undefined_interval_is_no_evidence():
    none = {"value": 1.0, "low": None, "high": None}
    report = {
        "n": {"items": 1, "missing": []},
        "leak": {"test": {"true": 0, "n": 1}, "predictability": {"gain": none}},
        "template": {
            "difference": {"kind": dict.fromkeys(("rouge_l", "cider", "bleu_4"), none)},
            "unseen": {"kind": 0},
        },
        "swap": {"all": {"n": 0}, "same_label": None},
        **dict.fromkeys(("flip", "regions", "artefacts", "pointing", "counterfactual")),
    }
    said = verdict(report)
    assert "does not beat the blind template: ROUGE-L no clear difference" in said[1]
    assert said[2] == "No two images share a question, so nothing can be said of image dependence."


def test_every_part_has_its_table(no_java):
    training, texts = flip_training()
    asked = [item(f"{5 - 4 * label}_{n}", texts[label], (texts[1 - label],), stating(label))
             for n, label in enumerate((1, 0, 1, 0))]  # fmt: skip
    items = (*asked, *regions(["The nose."] * 2, ["nose", "skin"]))
    report = integrity_report(CaptionSet(items=items), training, None, {i.key: i.answer for i in asked}, n_boot=20)
    out = console()
    with out.capture() as capture:
        for table in integrity_tables(report):
            out.print(table)
    for words in (
        "give the label away",
        "Predictions minus template",
        "Swap gap",
        "Label flip",
        "Edited region (rows)",
    ):
        assert words in capture.get()


def test_the_script_prints_a_verdict_and_writes_the_report(tmp_path, monkeypatch, capsys, no_java):
    answers, truth, training = world(tmp_path, True)
    words = ["--predict_path", answers, "--gt_path", truth, "--train_path", training, "--n_boot", 20]
    monkeypatch.setattr(sys, "argv", ["eval_integrity.py", *map(str, words), "--json", str(tmp_path / "out.json")])
    runpy.run_path(str(ROOT / "eval" / "eval_integrity.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "Verdict: 0 of 40 questions" in said and "METEOR skipped" in said
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["files"]["train_path"] == str(training) and report["regions"]["n"] == 40
    monkeypatch.setattr(sys, "argv", ["eval_integrity.py", "--predict_path", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit, match=r"error: .*none\.jsonl"):
        runpy.run_path(str(ROOT / "eval" / "eval_integrity.py"), run_name="__main__")


def test_dialogues_train_with_every_round(tmp_path):
    turns = [("human", f"<image>\n<deepfake>\n{WHOLE}"), ("gpt", "A."), ("human", NOSE), ("gpt", "<s> B.</s>")]
    said = [{"from": role, "value": text} for role, text in turns]
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"image": "train/5_001.jpg", "conversations": said}]))
    assert read_training(path) == [pair(WHOLE, "A.", 0), pair(NOSE, "B.", 0)]


# The published files


@pytest.fixture(scope="module")
def published(shared_data):
    folder = shared_data / "ddvqa"
    truth = folder / "annotations/c40/test.jsonl"
    captions = read_caption_set(folder / "published_predictions/DDVQA_exp_c40.jsonl", truth)
    return captions, read_training(folder / "annotations/c40/rebuilt/train_teststyle.json")


def test_every_published_question_states_the_label(published):
    report = leak_report(published[0].items, published[1], n_boot=20)
    assert report["test"] == {"n": 1070, "stated": 1070, "true": 1070, "false": 0}
    assert report["training"] == {"n": 9252, "stated": 9252, "true": 9252, "false": 0}
    assert report["predictability"]["question"]["value"] == 1


@pytest.mark.parametrize(("by", "rouge", "cider"), [("kind", 0.6754, 4.2700), ("question", 0.7213, 4.6233)])
def test_the_blind_template_beats_the_published_answers(published, by, rouge, cider):
    items, training = published[0].items, published[1]
    answers = template_answers(items, training, by)
    assert len(set(answers)) == {"kind": 12, "question": 58}[by]
    references = [i.references for i in items]
    assert caption_metrics.rouge_scores(answers, references).mean() == pytest.approx(rouge, abs=5e-5)
    assert caption_metrics.cider_scores(answers, references).mean() == pytest.approx(cider, abs=5e-5)
    mode = Counter(p.answer for p in training if p.question == items[1].question).most_common(1)[0][0]
    assert by == "kind" or answers[1] == mode


def test_the_published_answers_fit_other_images_as_well(published):
    report = caption_swap(published[0].items, n_boot=200)
    gap = report["gap"]["rouge_l"]
    assert (report["n"], report["alone"]) == (1053, 17)
    assert gap["value"] == pytest.approx(-0.0040, abs=5e-5)
    assert gap["low"] < 0 < gap["high"]
