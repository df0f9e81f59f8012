"""How detectors of three and more classes are scored, against scikit-learn and resamples written out."""

import json
import math
from functools import partial

import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from llava.core.types import Record
from llava.evaluation.metrics import CLASS_METRICS, LEVELS, auc_interval, class_confusion, detection_report
from llava.evaluation.pictures import draw_class_confusion
from llava.evaluation.predictions import by_video, from_records
from llava.evaluation.tables import interval_text, multiclass_lines

CLASSES = ("real", "deepfake", "ai_generated", "swap")
SHARES = (0.5, 0.3, 0.17, 0.03)  # of the videos; a class in few groups is missing from many resamples


def drawn(classes=CLASSES, groups=14, videos=4, frames=3, seed=0, held=None):
    """Give predictions with ties, in which the last class is rare; held: the classes that have items."""
    rng = np.random.default_rng(seed)
    held, k = range(len(classes)) if held is None else held, len(classes)
    shares = np.array([SHARES[i] for i in held])
    records, targets, scores = [], [], []
    for g in range(groups):
        for v in range(videos):
            target = int(rng.choice(held, p=shares / shares.sum()))
            for f in range(frames):
                name = f"{g}_{v}"
                records.append(
                    Record(id=f"{name}_{f}", label=int(target > 0), class_name=f"kind {target}", video=name,
                           group=f"g{g}", where="")
                )  # fmt: skip
                raw = np.round(rng.random(k) + 0.4 * (np.arange(k) == target), 1) + 0.1
                targets.append(target)
                scores.append(raw / raw.sum())
    table = np.array(scores)
    return from_records(records, np.clip(1 - table[:, 0], 0, 1), targets, table, classes)


def written_out(groups, n_boot, seed):
    """Yield the items of each resample, as often as their group is drawn."""
    names = np.unique(groups)
    rng = np.random.default_rng(seed)
    for _ in range(n_boot):
        yield np.concatenate([np.flatnonzero(groups == names[g]) for g in rng.integers(len(names), size=len(names))])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_numbers_equal_sklearn(level, seed):
    frames = drawn(seed=seed)
    items = {"frame": frames, "video": by_video(frames), "video_trimmed": by_video(frames, 0.34)}[level]
    part = detection_report(frames, n_boot=5, trim=0.34)["multiclass"][level]
    truth, answers = items.targets, items.scores.argmax(axis=1)
    assert part["confusion"]["classes"] == list(CLASSES)
    assert part["confusion"]["counts"] == sk.confusion_matrix(truth, answers, labels=range(4)).tolist()
    assert part["accuracy"]["value"] == pytest.approx(sk.accuracy_score(truth, answers))
    assert part["macro_f1"]["value"] == pytest.approx(sk.f1_score(truth, answers, average="macro"))
    assert part["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(truth, answers))
    theirs = sk.precision_recall_fscore_support(truth, answers, labels=range(4), zero_division=np.nan)
    for k, (name, row) in enumerate(part["classes"].items()):
        assert name == CLASSES[k]
        values = [math.nan if row[m]["value"] is None else row[m]["value"] for m in ("precision", "recall", "f1")]
        assert values == pytest.approx([column[k] for column in theirs[:3]], nan_ok=True)
        assert row["n"] == theirs[3][k] > 0
        assert row["auc"]["value"] == pytest.approx(sk.roc_auc_score(truth == k, items.scores[:, k]))


def test_a_class_without_items_is_left_out_of_the_means():
    frames = drawn(held=(0, 1, 2))
    part = detection_report(frames, n_boot=50)["multiclass"]["frame"]
    truth, answers = frames.targets, frames.scores.argmax(axis=1)
    row = part["classes"]["swap"]
    assert row["n"] == 0 and {row[m]["value"] for m in ("recall", "auc")} == {None} == {row["recall"]["low"]}
    assert (row["precision"]["value"], row["f1"]["value"]) == (0, 0), "it has answers"
    recalls = sk.recall_score(truth, answers, labels=range(3), average="macro")
    assert part["balanced_accuracy"]["value"] == pytest.approx(recalls)
    # classes in truth or answers: all four
    assert part["macro_f1"]["value"] == pytest.approx(sk.f1_score(truth, answers, average="macro"))
    assert part["accuracy"]["low"] is not None
    assert json.loads(json.dumps(part, allow_nan=False)) == part


def test_a_class_without_items_and_answers_has_no_f1():
    counts = class_confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 3)
    assert counts.counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert np.isnan([counts.recall[2], counts.precision[2], counts.f1[2]]).all()
    assert counts.f1[:2] == pytest.approx([2 / 3, 2 / 3])
    assert (counts.macro_f1, counts.balanced_accuracy) == (pytest.approx(2 / 3), 0.75)
    weighted = class_confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 3, np.array([3.0, 0.0, 2.0]))
    assert weighted.counts.tolist() == [[3, 0, 0], [0, 2, 0], [0, 0, 0]]


def test_intervals_equal_resamples_written_out():
    frames = drawn(seed=1)
    part = detection_report(frames, n_boot=40, seed=5)["multiclass"]["frame"]
    truth, answers = frames.targets, frames.scores.argmax(axis=1)
    numbers = {
        "accuracy": sk.accuracy_score,
        "macro_f1": partial(sk.f1_score, average="macro"),
        "balanced_accuracy": lambda t, a: sk.recall_score(t, a, labels=np.unique(t), average="macro"),
    }
    resamples = list(written_out(frames.groups, 40, 5))
    assert any(len(set(truth[chosen])) < 4 for chosen in resamples), "the rare class must be missing at times"
    for name, number in numbers.items():
        values = [number(truth[chosen], answers[chosen]) for chosen in resamples]
        low, high = np.percentile(values, [2.5, 97.5])
        assert (part[name]["low"], part[name]["high"]) == (pytest.approx(low), pytest.approx(high)), name


def test_a_class_has_the_auc_interval_of_the_binary_question():
    frames = drawn(seed=1)
    part = detection_report(frames, n_boot=60, seed=3)["multiclass"]["frame"]
    redrawn = []
    for k, row in enumerate(part["classes"].values()):
        binary = auc_interval((frames.targets == k).astype(int), frames.scores[:, k], frames.groups, 60, 3)
        assert row["auc"] == binary.to_dict()
        assert all(row[m]["low"] <= row[m]["value"] <= row[m]["high"] for m in CLASS_METRICS)
        redrawn.append(binary.redrawn)
    assert redrawn[0] == 0 < redrawn[3], "the rare class conditions itself only"


def test_two_classes_have_the_old_report_only():
    frames = drawn(CLASSES[:2])
    report = detection_report(frames, n_boot=20)
    plain = from_records(
        [Record(id=p.id, label=p.label, class_name=p.class_name, video=p.video, group=p.group, where="")
         for p in frames], frames.p_fake,
    )  # fmt: skip
    assert report == detection_report(plain, n_boot=20) and "multiclass" not in report
    assert multiclass_lines(report) == []


def test_the_binary_numbers_are_those_of_p_fake():
    frames = drawn()
    report = detection_report(frames, n_boot=5)
    assert report["frame"]["auc"]["value"] == pytest.approx(sk.roc_auc_score(frames.labels, frames.p_fake))
    assert set(report["classes"]) == {"kind 1", "kind 2", "kind 3"}


def test_lines_show_every_number_under_its_title():
    report = detection_report(drawn(held=(0, 1, 2)), n_boot=20)
    for level in LEVELS:
        head, *rows = multiclass_lines(report, level)
        places = [head.index(title) for title in ("class", "n", "recall", "precision", "F1", "AUC")]
        part = report["multiclass"][level]
        cells = [[row[a:b].strip() for a, b in zip(places, [*places[1:], None], strict=True)] for row in rows]
        expected = [
            [name, str(row["n"]), *(interval_text(row[m]) for m in ("recall", "precision", "f1", "auc"))]
            for name, row in part["classes"].items()
        ]
        expected += [
            ["accuracy", "", interval_text(part["accuracy"]), "", "", ""],
            ["balanced accuracy", "", interval_text(part["balanced_accuracy"]), "", "", ""],
            ["macro F1", "", "", "", interval_text(part["macro_f1"]), ""],
        ]
        assert cells == expected
        assert cells[3][:3] == ["swap", "0", "-"]


def test_the_picture_names_classes_shares_and_counts(tmp_path):
    report = detection_report(drawn(held=(0, 1, 2)), n_boot=20)
    draw_class_confusion(tmp_path / "c.png", report)
    with Image.open(tmp_path / "c.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 500 and len(picture.getcolors(1 << 20)) > 100
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        draw_class_confusion(tmp_path / "c.svg", report, "video")
    drawn_text = (tmp_path / "c.svg").read_text()
    assert all(drawn_text.count(f">{name}<") == 2 for name in CLASSES), "on both axes"
    part = report["multiclass"]["video"]
    for row in part["confusion"]["counts"]:
        for count in row:
            assert f">({count})<" in drawn_text
            assert f">{count / max(sum(row), 1):.0%}<" in drawn_text
    assert "nan" not in drawn_text, "the row without items has shares of 0"
    accuracy = part["accuracy"]
    assert f"56 items: right {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in drawn_text


def test_the_picture_of_one_group_has_no_bounds(tmp_path):
    report = detection_report(drawn(CLASSES[:3], groups=1, videos=20), n_boot=20)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_class_confusion(tmp_path / "c.svg", report)
    accuracy = report["multiclass"]["frame"]["accuracy"]
    assert accuracy["low"] is None
    assert f">60 items: right {accuracy['value']:.3f}<" in (tmp_path / "c.svg").read_text()


def test_two_classes_have_no_picture(tmp_path):
    with pytest.raises(ValueError, match="three or more classes"):
        draw_class_confusion(tmp_path / "c.png", detection_report(drawn(CLASSES[:2]), n_boot=5))
