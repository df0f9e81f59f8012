"""Judgement scores: published numbers, truth files, undecided answers, agreement, and the eval scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from llava.evaluation.judgement import agreement, judgement_report, read_agreement, read_judgements
from llava.evaluation.tables import agreement_table

ROOT = Path(__file__).parents[1]


def write_answers(path, answers):
    rows = [{"image": image, "prompt": "", "text": f"<s> {text}</s>", "metadata": {}} for image, text in answers]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


ANSWERS = [
    ("some/folder/5_001.jpg", "The image is real."),
    ("some/folder/5_002.jpg", "The image is unrealistic and fake."),
    ("some/folder/5_003.jpg", "Who knows."),
    ("5/0_001_004.jpg", "The image is not real."),
    ("x/3_005_006.jpg", "The image is real."),
]


@pytest.fixture
def answers(tmp_path):
    return write_answers(tmp_path / "answers.jsonl", ANSWERS)


def values(report, *names):
    return tuple(report[name]["value"] for name in names)


def test_undecided_answers_are_shown_and_wrong(answers):
    report = judgement_report(read_judgements(answers), n_boot=50)
    labels, said = [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]  # the undecided real counts as called fake
    assert values(report, "accuracy", "precision", "recall", "f1") == pytest.approx(
        (0.4, precision_score(labels, said), recall_score(labels, said), f1_score(labels, said))
    )
    assert report["n"]["undecided"] == 1
    assert report["undecided"] == [{"image": "some/folder/5_003.jpg", "text": "<s> Who knows.</s>"}]
    assert report["classes"]["real"]["said"] == {"real": 1, "fake": 1, "undecided": 1}
    assert report["classes"]["Deepfakes"]["accuracy"]["value"] == 1


def test_truth_by_file_name_not_by_folder(answers):
    labels = {Path(j.image).name: (j.label, j.class_name) for j in read_judgements(answers).items}
    assert labels["0_001_004.jpg"] == (1, "Deepfakes")
    assert labels["5_001.jpg"] == (0, "real")
    groups = {Path(j.image).name: j.group for j in read_judgements(answers).items}
    assert groups["5_001.jpg"] == groups["0_001_004.jpg"] != groups["3_005_006.jpg"]


def test_published_way_drops_what_it_cannot_read(answers):
    report = judgement_report(read_judgements(answers, published=True), n_boot=20)
    assert report["n"]["scored"] == 4
    assert report["n"]["undecided"] == 1
    assert "all count as fake" in report["notes"][0]
    with pytest.raises(ValueError, match="leave out --gt_path"):
        read_judgements(answers, gt_path="x.csv", published=True)


def test_published_numbers(shared_data):
    path = shared_data / "ddvqa/published_predictions/DDVQA_det_c40.jsonl"
    published = judgement_report(read_judgements(path, published=True), n_boot=200)
    names = ("accuracy", "f1", "precision", "recall")
    assert values(published, *names) == pytest.approx((0.9444, 0.9420, 0.9848, 0.9028), abs=5e-5)
    assert (published["accuracy"]["low"], published["accuracy"]["high"]) == pytest.approx((0.894, 0.972), abs=5e-4)
    corrected = judgement_report(read_judgements(path), n_boot=200)
    assert corrected["accuracy"]["value"] == pytest.approx(133 / 144)
    assert corrected["n"]["undecided"] == 1
    said = {name: row["said"]["real"] for name, row in published["classes"].items()}
    assert said == {"real": 71, "Deepfakes": 0, "FaceSwap": 0, "Face2Face": 4, "NeuralTextures": 3}


def test_truth_file_as_csv_and_jsonl(tmp_path):
    path = write_answers(tmp_path / "a.jsonl", [("in/a.png", "fake"), ("in/b.png", "real"), ("in/z.png", "real")])
    table = tmp_path / "truth.csv"
    table.write_text("file,label,manipulation\nelsewhere/a.png,fake,FaceSwap\nin/b.png,real,\nin/c.png,1,FaceSwap\n")
    judged = read_judgements(path, table)
    assert judged.missing == ("in/c.png",)
    assert judged.extra == ("in/z.png",)
    report = judgement_report(judged, n_boot=20)
    assert report["accuracy"]["value"] == pytest.approx(2 / 3)
    assert report["classes"]["FaceSwap"]["said"] == {"real": 0, "fake": 1, "undecided": 1}
    lines = tmp_path / "truth.jsonl"
    lines.write_text('{"image": "in/a.png", "label": 1}\n{"image": "in/b.png", "label": 0}\n')
    assert judgement_report(read_judgements(path, lines), n_boot=20)["accuracy"]["value"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("portrait.png", "real")], "does not follow the DD-VQA names"),
        ([("5_1.jpg", "real"), ("5_1.jpg", "fake")], "line 2: image '5_1.jpg' is answered twice"),
        ([], "holds no answers"),
    ],
)
def test_mistakes_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_judgements(write_answers(tmp_path / "a.jsonl", rows))


def test_ambiguous_and_bad_truth(tmp_path):
    path = write_answers(tmp_path / "a.jsonl", [("a.png", "fake")])
    table = tmp_path / "truth.csv"
    table.write_text("image,label\nx/a.png,1\ny/a.png,0\n")
    with pytest.raises(ValueError, match=r"2 rows for 'a\.png'"):
        read_judgements(path, table)
    table.write_text("image,label\na.png,maybe\n")
    with pytest.raises(ValueError, match="line 2: expected image"):
        read_judgements(path, table)
    table.write_text("image,label\nb.png,1\n")
    with pytest.raises(ValueError, match="knows none"):
        read_judgements(path, table)


def test_agreement_counts_undecided_against_and_inconclusive_out():
    report = agreement([0, 1, None, 1, 1], [0, 1, 1, 0, None], ["a", "b", "c", "d", "e"])
    assert report["agreement"]["value"] == 0.5
    assert (report["n"], report["text_undecided"], report["left_out"]) == (4, 1, 1)
    assert report["agreement"]["low"] < 0.5 < report["agreement"]["high"]


def test_agreement_counts_people_and_not_their_images():
    perfect = agreement([1] * 40, [1] * 40, [f"person {n % 10}" for n in range(40)])["agreement"]
    assert (perfect["value"], perfect["n"]) == (1, 10)
    assert perfect["low"] == pytest.approx(1 / (1 + 1.959964**2 / 10), abs=1e-4), "never without a width"


def test_groups_of_the_truth_are_those_of_the_agreement(tmp_path):
    answers, truth = tmp_path / "answers.jsonl", tmp_path / "truth.csv"
    notes = {"label": "FAKE", "p_fake": 0.9}
    rows = [{"image": f"{n}.png", "text": "The image is fake.", "metadata": notes} for n in range(6)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth.write_text("image,label,group\n" + "".join(f"{n}.png,fake,person {n % 2}\n" for n in range(6)))
    judged = read_judgements(answers, truth)
    assert {item.group for item in judged.items} == {"person 0", "person 1"}
    assert judgement_report(judged, 20)["n"]["groups"] == 2
    assert read_agreement(answers, judged)["agreement"]["n"] == 2
    assert read_agreement(answers)["agreement"]["n"] == 6


def test_agreement_with_nothing_has_no_value():
    report = agreement([0, 1], [None, None], ["a", "b"])
    assert (report["n"], report["left_out"], report["agreement"]["value"]) == (0, 2, None)


def run(*arguments):
    """Run a script without Java on the PATH, which would start for seconds."""
    return forked.run([*map(str, arguments)], cwd=ROOT, env=os.environ | {"PATH": ""})


def test_script_judgement(answers, tmp_path):
    done = run("eval/eval_judgement.py", "--predict_path", answers, "--json", tmp_path / "r.json", "--n_boot", 20)
    assert done.returncode == 0, done.stderr
    assert "0.4000" in done.stdout
    assert "Who knows." in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["accuracy"]["value"] == 0.4


def test_script_explanation(tmp_path):
    (tmp_path / "gt.jsonl").write_text('{"5_1_0": {"question": "The nose is", "answer": ["straight nose"]}}\n')
    (tmp_path / "p.jsonl").write_text('{"key": "5_1_0", "text": "straight nose"}\n{"key": "5_2_0", "text": "x"}\n')
    done = run(
        "eval/eval_explanation.py", "--predict_path", tmp_path / "p.jsonl", "--gt_path", tmp_path / "gt.jsonl",
        "--n_boot", 5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SPICE skipped" in done.stdout
    assert "METEOR skipped: no `java`" in done.stdout
    assert "1 extra: 5_2_0" in done.stdout


def test_script_detection(tmp_path):
    head = "id,label,p_fake,video,group,class_name,split\n"
    rows = [
        (f"{p}{i}", i % 2, 0.2 + 0.6 * (i % 2), f"{p}{i}", f"{p}{i}", ("real", "fake")[i % 2])
        for p in "tv"
        for i in range(6)
    ]
    for prefix in "tv":
        own = [",".join(map(str, r)) + ",test\n" for r in rows if r[0].startswith(prefix)]
        (tmp_path / f"{prefix}.csv").write_text(head + "".join(own))
    done = run(
        "eval/eval_detection.py", "--predict_path", tmp_path / "t.csv", "--val_path", tmp_path / "v.csv",
        "--n_boot", 20, "--json", tmp_path / "r.json", "--pictures", tmp_path / "pictures",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["threshold"] == pytest.approx(0.5)
    assert report["video"]["auc"]["value"] == 1
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"roc.png", "scores.png"}


@pytest.mark.parametrize("script", ["eval_judgement", "eval_explanation", "eval_detection"])
def test_scripts_fail_with_a_message(script):
    missing = run(f"eval/{script}.py", "--predict_path", "nowhere.jsonl")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "nowhere.jsonl" in missing.stderr


@pytest.mark.parametrize("script", ["eval_judgement", "eval_explanation", "eval_detection"])
def test_scripts_start_without_torch(script):
    code = f"import runpy, sys; runpy.run_path('eval/{script}.py'); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_words_are_compared_with_what_the_rows_say(tmp_path):
    rows = [
        {"image": "5_001.jpg", "text": "The image is real.", "metadata": {"label": "REAL", "p_fake": 0.1}},
        {"image": "0_002_003.jpg", "text": "The image is real.", "metadata": {"label": "FAKE", "p_fake": 0.8}},
        {"image": "0_004_005.jpg", "text": "Who knows?", "metadata": {"label": "FAKE", "p_fake": 0.9}},
        {"image": "0_006_007.jpg", "text": "The image is fake.", "metadata": {"label": "INCONCLUSIVE", "p_fake": None}},
        {"image": "0_008_009.jpg", "text": "The image is fake.", "metadata": {"label": "UNCERTAIN", "p_fake": 0.6}},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = read_agreement(path)
    assert (report["told"], report["n"], report["text_undecided"], report["left_out"]) == (None, 4, 1, 1)
    assert report["agreement"]["value"] == pytest.approx(2 / 4)
    assert (report["clear"]["n"], report["clear"]["left_out"]) == (3, 2)
    assert report["clear"]["agreement"]["value"] == pytest.approx(1 / 3)
    shown = [list(column.cells) for column in agreement_table(report).columns]
    assert shown[:2] == [["all answers", "verdict REAL or FAKE"], ["4", "3"]]
    told = [row | {"metadata": row["metadata"] | {"evidence_p_fake": 0.02}} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    report = read_agreement(path)
    assert (report["told"], report["n"], report.get("clear")) == (0.02, 5, None)
    assert report["agreement"]["value"] == pytest.approx(2 / 5)
    path.write_text(json.dumps({"image": "5_001.jpg", "text": "real", "metadata": {}}) + "\n")
    assert read_agreement(path) is None
