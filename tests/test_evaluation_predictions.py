"""Predictions: strict checks, csv, frames to videos."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import trim_mean

from llava.core.types import Record
from llava.evaluation.predictions import (
    Prediction,
    Predictions,
    by_video,
    from_records,
    read_csv,
    write_csv,
    write_videos_csv,
)


def make(id="a", label=0, p_fake=0.25, video="v", group="g", class_name="real", split="test"):
    return Prediction(id=id, label=label, p_fake=p_fake, video=video, group=group, class_name=class_name, split=split)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([make(), make()], "given more than once: 'a'"),
        ([make(), make(id="b", p_fake=math.nan)], "p_fake missing or outside [0, 1]: 'b'"),
        ([make(p_fake=1.2)], "p_fake missing or outside"),
        ([make(label=2)], "label other than 0 or 1: 'a'"),
        ([], "No predictions"),
    ],
)
def test_bad_predictions_are_named(items, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Predictions(tuple(items))


def test_a_long_list_of_bad_items_is_cut():
    with pytest.raises(ValueError, match=r"8 prediction\(s\).*and 3 more"):
        Predictions(tuple(make(id=str(i), label=7) for i in range(8)))


def test_csv_keeps_every_digit(tmp_path):
    scores = np.random.default_rng(0).random(20)
    before = Predictions(tuple(make(id=f'{i},"x"', p_fake=float(s)) for i, s in enumerate(scores)))
    write_csv(tmp_path / "out" / "p.csv", before)
    assert read_csv(tmp_path / "out" / "p.csv") == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.csv"]


def test_csv_mistakes_are_named(tmp_path):
    path = tmp_path / "p.csv"
    with pytest.raises(FileNotFoundError, match=r"p\.csv"):
        read_csv(path)
    path.write_text("id,label,p_fake\na,0,0.1\n")
    with pytest.raises(ValueError, match=r"lacks the column.*video, group, class_name"):
        read_csv(path)
    head = "id,label,p_fake,video,group,class_name\n"
    path.write_text(head + "a,0,0.1,v,g,real\nb,fake,0.1,v,g,real\n")
    with pytest.raises(ValueError, match="line 3: label 'fake'"):
        read_csv(path)
    path.write_text(head + "a,0,,v,g,real\n")
    with pytest.raises(ValueError, match=r"p_fake missing.*'a'"):
        read_csv(path)
    path.write_text(head + "a,0,0.3,v,,real\n")
    with pytest.raises(ValueError, match=r"empty field.*line 2"):
        read_csv(path)


def test_frames_become_videos():
    frames = [make(id=f"f{i}", p_fake=p) for i, p in enumerate([0.0, 0.5, 0.5, 0.5, 1.0])]
    frames += [make(id="w", video="w", label=1, p_fake=0.9, group="h", class_name="FaceSwap")]
    videos = by_video(Predictions(tuple(frames)))
    assert [(v.id, v.p_fake, v.group) for v in videos] == [("v", 0.5, "g"), ("w", pytest.approx(0.9), "h")]


def test_trimmed_mean_drops_ten_of_a_hundred():
    scores = np.random.default_rng(1).random(100)
    frames = Predictions(tuple(make(id=str(i), p_fake=float(p)) for i, p in enumerate(scores)))
    assert by_video(frames, trim=0.1).items[0].p_fake == pytest.approx(np.sort(scores)[10:90].mean())
    with pytest.raises(ValueError, match="trim"):
        by_video(frames, trim=0.5)


def test_a_video_with_two_labels_is_refused():
    with pytest.raises(ValueError, match=r"differ in label.*'v'"):
        by_video(Predictions((make(), make(id="b", label=1))))


def test_records_and_scores_join_in_order():
    record = Record(id="a", label=1, class_name="fake", video="v", group="g", where="a.png", split="val")
    joined = from_records([record], [0.75])
    assert joined.items == (make(label=1, p_fake=0.75, class_name="fake", split="val"),)
    unknown = Record(id="u", label=None, class_name="?", video="v", group="g", where="u.png")
    with pytest.raises(ValueError, match="label other than 0 or 1: 'u'"):
        from_records([unknown], [0.5])
    with pytest.raises(ValueError, match="shorter"):
        from_records([record], [])


def test_videos_are_written_with_both_means(tmp_path):
    frames = [make(id=f"f{i}", p_fake=p) for i, p in enumerate([0.0, 0.25, 0.5, 0.5, 1.0])]
    frames += [make(id="w", video="w", label=1, p_fake=0.75, group="h", class_name="FaceSwap")]
    write_videos_csv(tmp_path / "videos.csv", Predictions(tuple(frames)), trim=0.2)
    assert (tmp_path / "videos.csv").read_text().split() == [
        "id,label,group,class_name,split,frames,mean,trimmed_mean",
        f"v,0,g,real,test,5,0.45,{1.25 / 3!r}",
        "w,1,h,FaceSwap,test,1,0.75,0.75",
    ]


# ---- class scores -----------------------------------------------------------------------------------------------

THREE = ("real", "deepfake", "ai_generated")


def scored(target="real", scores=(0.5, 0.3, 0.2), classes=THREE, **changes):
    """Give a prediction of a detector with classes; p_fake is what is not real."""
    plain = make(label=int(target != "real"), p_fake=1 - scores[0], **changes)
    return replace(plain, target=target, scores=dict(zip(classes, scores, strict=True)))


def drawn(classes, n=12, seed=0):
    """Give n predictions with random scores in float64, whose P(fake) is p_fake where there is a class fake."""
    rng = np.random.default_rng(seed)
    items = []
    for i, (real, *rest) in enumerate(rng.dirichlet(np.ones(len(classes)), n).tolist()):
        scores = (real, 1 - real) if len(classes) == 2 else (real, *rest)
        items.append(scored(classes[i % len(classes)], scores, classes, id=str(i), video=f"v{i}"))
    return Predictions(tuple(items))


def test_scores_and_targets_stand_in_the_order_of_the_classes():
    data = Predictions((scored("ai_generated"), scored("real", (0.75, 0.0, 0.25), id="b")))
    assert data.classes == THREE
    assert data.scores.tolist() == [[0.5, 0.3, 0.2], [0.75, 0.0, 0.25]]
    assert data.targets.tolist() == [2, 0]
    turned = replace(data.items[1], scores={"ai_generated": 0.25, "deepfake": 0.0, "real": 0.75})
    assert Predictions((data.items[0], turned)).scores.tolist() == data.scores.tolist()


def test_without_scores_there_are_no_classes():
    data = Predictions((make(), make(id="b")))
    assert (data.classes, data.scores.shape) == ((), (2, 0))
    with pytest.raises(ValueError, match="hold p_fake only"):
        _ = data.targets


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([scored(), make(id="b")], "scores of other classes than (real, deepfake, ai_generated): 'b'"),
        ([make(id="b"), scored()], "scores of other classes than (none): 'a'"),
        ([scored(), scored(id="b", scores=(0.5, 0.5), classes=THREE[:2])], "scores of other classes than"),
        ([scored(), scored(id="b", scores=(0.5, 1.25, 0.0))], "class scores missing or outside [0, 1]: 'b'"),
        ([scored(), scored(id="b", scores=(0.5, -0.1, 0.6))], "class scores missing or outside [0, 1]: 'b'"),
        ([scored(), scored(id="b", scores=(0.5, math.nan, 0.1))], "class scores missing or outside [0, 1]: 'b'"),
        ([scored(), scored("FaceSwap", id="b")], "target outside the classes (real, deepfake, ai_generated): 'b'"),
        ([scored(), scored("", id="b")], "target outside the classes (real, deepfake, ai_generated): 'b'"),
        ([scored(), replace(scored("deepfake", id="b"), label=0)], "target that contradicts the label"),
        ([scored(), replace(scored(id="b"), label=1)], "target that contradicts the label (real is 0): 'b'"),
        ([scored(scores=(1.0,), classes=("real",))], "Classes (real): expected two or more"),
        ([scored(classes=("real", "fake", "deepfake"))], "`fake` in (real, fake) only: name the kinds of fake"),
        ([scored("real", (0.5, 0.5), ("fake", "real"))], "Classes (fake, real): expected two or more, and `fake` in"),
        ([scored(scores=(0.5, 0.49), classes=("real", "fake"))], "a score of the class fake that is not p_fake: 'a'"),
    ],
)  # fmt: skip
def test_bad_class_scores_are_named(items, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Predictions(tuple(items))


def test_float32_may_round_the_score_of_fake():
    assert len(Predictions((scored(scores=(0.5, 0.5 + 1e-7), classes=("real", "fake")),))) == 1


@pytest.mark.parametrize(
    ("classes", "columns"),
    [
        (("real", "fake"), "p_real"),
        (("real", "deepfake"), "p_real,p_deepfake"),
        (("deepfake", "real"), "p_deepfake,p_real"),
        (THREE, "p_real,p_deepfake,p_ai_generated"),
        (("ai_generated", "real", 'x,"y"'), 'p_ai_generated,p_real,"p_x,""y"""'),
    ],
)
def test_csv_keeps_classes_and_every_digit_of_their_scores(tmp_path, classes, columns):
    before = drawn(classes)
    write_csv(tmp_path / "p.csv", before)
    head = (tmp_path / "p.csv").read_text().splitlines()[0]
    assert head == f"id,label,p_fake,video,group,class_name,split,target,{columns}"
    after = read_csv(tmp_path / "p.csv")
    assert after == before and after.classes == classes
    assert np.array_equal(after.scores, before.scores) and np.array_equal(after.targets, before.targets)


def test_csv_without_scores_is_what_it_was(tmp_path):
    write_csv(tmp_path / "p.csv", Predictions((make(),)))
    assert (tmp_path / "p.csv").read_text().split() == [
        "id,label,p_fake,video,group,class_name,split",
        "a,0,0.25,v,g,real,test",
    ]
    named = Predictions((make(), replace(make(id="b"), target="real")))
    write_csv(tmp_path / "p.csv", named)
    assert read_csv(tmp_path / "p.csv") == named


def test_old_csv_files_are_read_as_before(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("id,label,p_fake,video,group,class_name,p_value\na,0,0.25,v,g,real,7\n")
    assert read_csv(path).items == (make(split=""),)


def test_csv_mistakes_of_class_scores_are_named(tmp_path):
    path = tmp_path / "p.csv"
    head = "id,label,p_fake,video,group,class_name,target,p_real,p_deepfake\n"
    path.write_text(head + "a,0,0.1,v,g,real,real,0.9,0.1\nb,0,0.1,v,g,real,real,0.9,much\n")
    with pytest.raises(ValueError, match=r"line 3: p_deepfake 'much' must be a number"):
        read_csv(path)
    path.write_text(head + "a,0,0.1,v,g,real,real,,0.1\nb,0,0.1,v,g,real,real,0.9\n")
    with pytest.raises(ValueError, match=r"2 prediction.*class scores missing.*'a', 'b'"):
        read_csv(path)
    path.write_text(head + "a,1,0.1,v,g,FaceSwap,,0.9,0.1\n")
    with pytest.raises(ValueError, match=r"target outside the classes \(real, deepfake\): 'a'"):
        read_csv(path)


def records_of(labels):
    return [
        Record(id=str(i), label=y, class_name=("real", "FaceSwap")[y], video=f"v{i}", group="g", where="")
        for i, y in enumerate(labels)
    ]


def test_records_join_the_scores_of_classes():
    scores = np.array([[0.75, 0.125, 0.125], [0.25, 0.25, 0.5]], dtype=np.float32)
    joined = from_records(records_of([0, 1]), [0.25, 0.75], np.array([0, 2]), scores, THREE)
    assert joined.items[1].scores == {"real": 0.25, "deepfake": 0.25, "ai_generated": 0.5}
    assert [(p.class_name, p.target) for p in joined] == [("real", "real"), ("FaceSwap", "ai_generated")]
    assert all(type(score) is float for p in joined for score in p.scores.values())
    assert (joined.classes, joined.targets.tolist()) == (THREE, [0, 2])


@pytest.mark.parametrize(
    ("targets", "scores", "classes", "message"),
    [
        ([0, 1], None, THREE, "belong together"),
        (None, np.full((2, 3), 0.5), THREE, "belong together"),
        ([0, 1], np.full((2, 3), 0.5), (), "belong together"),
        ([0, -1], np.full((2, 3), 0.5), THREE, "target outside 0 to 2 (real, deepfake, ai_generated): '1'"),
        ([0, 3], np.full((2, 3), 0.5), THREE, "target outside 0 to 2 (real, deepfake, ai_generated): '1'"),
        ([0, 1], np.full((2, 2), 0.5), THREE, "got (2,) and (2, 2)"),
        ([0, 1, 1], np.full((2, 3), 0.5), THREE, "got (3,) and (2, 3)"),
        ([0, 1], np.full((3, 3), 0.5), THREE, "got (2,) and (3, 3)"),
    ],
)
def test_scores_that_do_not_fit_the_records_are_refused(targets, scores, classes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_records(records_of([0, 1]), [0.5, 0.5], targets, scores, classes)


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_every_class_score_of_a_video_is_averaged_by_itself(trim):
    scores = np.random.default_rng(3).dirichlet((0.5, 0.5, 0.5), 10)
    frames = [scored("deepfake", tuple(row), id=str(i)) for i, row in enumerate(scores.tolist())]
    other = scored("real", (0.75, 0.25, 0.0), id="w", video="w")
    video, alone = by_video(Predictions((*frames, other)), trim)
    assert list(video.scores) == list(THREE)
    assert list(video.scores.values()) == pytest.approx(trim_mean(scores, trim, axis=0).tolist())
    assert (sum(video.scores.values()) == pytest.approx(1)) == (trim == 0), "not made to sum to one"
    assert video.p_fake + video.scores["real"] == pytest.approx(1)
    assert (video.id, video.target) == ("v", "deepfake")
    assert (alone.id, alone.scores) == ("w", other.scores)


def test_a_video_with_two_targets_is_refused():
    frames = (scored("deepfake"), scored("ai_generated", id="b"))
    with pytest.raises(ValueError, match=r"differ in label, group, class or target: 'v'"):
        by_video(Predictions(frames))
