"""Caption scores against pycocoevalcap's own totals, hand values and the published numbers."""

import json
import shutil

import numpy as np
import pytest

from llava.evaluation import caption_metrics
from llava.evaluation.captions import (
    CaptionItem,
    CaptionSet,
    image_groups,
    question_type,
    read_caption_set,
    score_captions,
)

pytest.importorskip("pycocoevalcap")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and the PTB tokeniser need Java")

ANSWERS = ["the nose is curved", "the eyes look odd and odd", "", "the mouth is fine", "a b"]
REFERENCES = [
    ("the nose is curved",),
    ("the eyes look unnaturally odd", "both eyes are odd"),
    ("the skin is smooth",),
    ("the mouth is misaligned with other features",),
    ("a b c d e f",),
]


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="module")
def meteor():
    """Start METEOR, which reads its tables for seconds."""
    return caption_metrics.Meteor()


def keyed():
    return {i: list(r) for i, r in enumerate(REFERENCES)}, {i: [a] for i, a in enumerate(ANSWERS)}


def caption_set(answers=ANSWERS, references=REFERENCES):
    items = (
        CaptionItem(key=str(i), question="The nose", answer=a, references=r, group=f"g{i % 3}")
        for i, (a, r) in enumerate(zip(answers, references, strict=True))
    )
    return CaptionSet(items=tuple(items))


def test_bleu_sums_equal_the_library():
    truths, results = keyed()
    theirs, _ = caption_metrics.library("bleu.bleu").Bleu(4).compute_score(truths, results, verbose=0)
    ours = caption_metrics.bleu(caption_metrics.bleu_statistics(ANSWERS, REFERENCES).sum(axis=0))
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_bleu_hand_value():
    # 2 of 2 words and 1 of 1 pairs match; brevity exp(1 - 6 / 2).
    ours = caption_metrics.bleu(caption_metrics.bleu_statistics(["a b"], [("a b c d e f",)])[0])
    assert ours[:2] == pytest.approx(np.exp(-2), rel=1e-6)
    assert ours[3] < 1e-3


def test_rouge_and_cider_means_equal_the_library():
    truths, results = keyed()
    rouge, _ = caption_metrics.library("rouge.rouge").Rouge().compute_score(truths, results)
    cider, _ = caption_metrics.library("cider.cider").Cider().compute_score(truths, results)
    assert caption_metrics.rouge_scores(ANSWERS, REFERENCES).mean() == pytest.approx(rouge)
    assert caption_metrics.cider_scores(ANSWERS, REFERENCES).mean() == pytest.approx(cider)


@pytest.mark.e2e
@needs_java
def test_meteor_sums_equal_the_corpus_score(meteor):
    truths, results = keyed()
    theirs, _ = meteor._process.compute_score(truths, results)
    rows = meteor.statistics(ANSWERS, REFERENCES)
    doubled = meteor.statistics(ANSWERS * 2, REFERENCES * 2)
    assert meteor.scores(np.stack([rows.sum(0), doubled.sum(0)])) == pytest.approx([theirs, theirs], abs=1e-12)


@needs_java
def test_ptb_lowers_case_and_drops_punctuation():
    assert caption_metrics.ptb_tokenised(["The nose, isn't odd.", "", "A\nB"]) == ["the nose is n't odd", "", "a b"]


@pytest.mark.e2e
@needs_java
def test_ptb_scores_forgive_case_and_full_stops(meteor, monkeypatch):
    monkeypatch.setattr(caption_metrics, "Meteor", lambda: meteor)
    report = score_captions(caption_set(["The Nose."], [("the nose",)]), ptb=True, n_boot=5)
    assert report["scores"]["all"]["rouge_l"]["value"] == pytest.approx(1) and "meteor" in report["scores"]["all"]


def test_without_java_meteor_is_skipped_and_ptb_refused(no_java):
    report = score_captions(caption_set(), n_boot=20)
    assert "java" in report["skipped"]["meteor"]
    assert "meteor" not in report["scores"]["all"]
    with pytest.raises(ValueError, match="PTB tokeniser needs Java"):
        score_captions(caption_set(), ptb=True)


def test_spice_never_downloads(no_java, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("urllib.request.urlretrieve", refuse)
    assert score_captions(caption_set(), n_boot=5)["skipped"]["spice"]


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.bleu", None)
    monkeypatch.delitem(__import__("sys").modules, "pycocoevalcap.bleu.bleu_scorer", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'm2f2-det\[eval\]'"):
        caption_metrics.library("bleu.bleu_scorer")


def test_bootstrap_of_the_corpus_score_holds_the_value(no_java):
    rng = np.random.default_rng(0)
    words = np.array(["nose", "eye", "skin", "odd", "smooth", "the"])
    references = [(" ".join(rng.choice(words, 6)),) for _ in range(60)]
    answers = [" ".join(rng.permutation(r[0].split())) for r in references]
    scores = score_captions(caption_set(answers, references), n_boot=200)["scores"]["all"]
    for name in ("bleu_1", "bleu_2", "rouge_l", "cider"):
        assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"], name
        assert scores[name]["n"] == 3
    assert scores["bleu_1"]["value"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("The skin in the image is fake, tell me why. Answer in one sentence", "skin"),
        ("The eyebrows in the image are real, tell me why.", "eyebrows"),
        ("Do the person's eyes look real or fake? Give the reason.", "eyes"),
        ("Does the person's mouth look real or fake? Give the reason.", "mouth"),
        ("This image is fake. Describe the authenticity of the image based on nose, eyebrows.", "image"),
        ("Determine the authenticity of this image.", "image"),
        ("Does this image look real or fake? Give the reasons.", "image"),
    ],
)
def test_question_types(question, expected):
    assert question_type(question) == expected


def test_images_that_share_a_video_share_a_group():
    groups = image_groups(["5_454", "1_454_527", "0_527_454", "3_001_002", "portrait_2", "454"])
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[0], *groups[3:]}) == 4


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_unmatched_keys_are_counted_not_dropped(tmp_path, no_java):
    truth = write_lines(
        tmp_path / "gt.jsonl",
        [{f"5_001_{i}": {"question": "The nose", "answer": ["the nose is straight"]}} for i in range(3)],
    )
    answers = write_lines(
        tmp_path / "p.jsonl",
        [{"key": "5_001_0", "text": "<s> the nose is straight</s>"}, {"key": "5_009_0", "text": "x"}],
    )
    captions = read_caption_set(answers, truth)
    assert (captions.missing, captions.extra) == (("5_001_1", "5_001_2"), ("5_009_0",))
    report = score_captions(captions, n_boot=5)
    assert report["scores"]["all"]["rouge_l"]["value"] == pytest.approx(1 / 3)
    assert report["n"]["verbatim"] == 1


def test_bad_files_are_named(tmp_path):
    good = write_lines(tmp_path / "gt.jsonl", [{"a_0": {"question": "q", "answer": ["x"]}}])
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_caption_set(tmp_path / "none.jsonl", good)
    answer = {"key": "a_0", "text": "x"}
    twice = write_lines(tmp_path / "twice.jsonl", [answer, answer])
    with pytest.raises(ValueError, match="line 2: key 'a_0' is given twice"):
        read_caption_set(twice, good)
    (tmp_path / "broken.jsonl").write_text('{"key": "a_0", "text": "x"}\n{"key":')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_caption_set(tmp_path / "broken.jsonl", good)
    other = write_lines(tmp_path / "other.jsonl", [{"key": "b_0", "text": "x"}])
    with pytest.raises(ValueError, match="answers no key"):
        read_caption_set(other, good)
    with pytest.raises(ValueError, match="line 1: expected"):
        read_caption_set(other, write_lines(tmp_path / "bad_gt.jsonl", [{"a_0": {"question": "q", "answer": []}}]))


def test_published_numbers(shared_data, no_java):
    folder = shared_data / "ddvqa"
    captions = read_caption_set(
        folder / "published_predictions/DDVQA_exp_c40.jsonl", folder / "annotations/c40/test.jsonl"
    )
    scores = score_captions(captions, n_boot=5)["scores"]["all"]
    expected = {
        "bleu_1": 0.5374, "bleu_2": 0.4782, "bleu_3": 0.4361, "bleu_4": 0.4000, "bleu_mean": 0.4629,
        "rouge_l": 0.6433, "cider": 3.3851,
    }  # fmt: skip
    assert {name: scores[name]["value"] for name in expected} == pytest.approx(expected, abs=5e-5)
    assert (scores["n"], captions.missing, captions.extra) == (1070, (), ())
