"""Predictions: strict checks, csv, frames to videos."""

import math
import re

import numpy as np
import pytest

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
