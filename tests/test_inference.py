"""The DD-VQA answer files: fields, order, resuming, told evidence, refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import forked
import pytest
from PIL import Image
from tiny_explainer import REASON_QUESTION
from tiny_world import draw

from llava.core.runtime import ResumableJsonl
from llava.evaluation.judgement import judgement_report, read_judgements
from llava.evaluation.text import parse_verdict
from llava.explainer.generation import Explainer
from llava.explainer.prompts import VERDICT_QUESTION
from llava.jobs import ddvqa_answers
from llava.jobs.ddvqa_answers import JudgeSettings, ReasonSettings, list_items

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("5_000", "0_000_001", "5_010", "1_002_003", "3_011_012")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write five test pictures with DD-VQA names, one training picture, and questions in no order."""
    root = tmp_path_factory.mktemp("ddvqa")
    for folder, names in (("test", NAMES), ("train", ("5_777",))):
        (root / "c40" / folder).mkdir(parents=True)
        for number, name in enumerate(names):
            Image.fromarray(draw(int(not name.startswith("5")), 500 + number)).save(
                root / "c40" / folder / f"{name}.png"
            )
    numbered = [(name, i) for i in (10, 0, 2) for name in NAMES]
    rows = [{f"{n}_{i}": {"question": (REASON_QUESTION, "Why?")[i == 2], "answer": ["x"]}} for n, i in numbered]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ZipFile(root / "packed.zip", "w") as archive:
        for path in sorted((root / "c40").rglob("*.png")):
            archive.write(path, f"c40/{path.relative_to(root / 'c40')}")
    return root


def judge(model: Path, faces: Path, output: Path, **more: Any) -> JudgeSettings:
    given = {"images": str(faces / "c40"), "device": "cpu", "batch_size": 2} | more
    return JudgeSettings(model_path=str(model), output=str(output), **given)


def reason(model: Path, faces: Path, output: Path, **more: Any) -> ReasonSettings:
    given = {"images": str(faces / "c40"), "device": "cpu", "batch_size": 2} | more
    return ReasonSettings(model_path=str(model), questions=str(faces / "questions.jsonl"), output=str(output), **given)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_judgements_have_the_published_fields(tiny_explainer: Path, faces: Path, tmp_path: Path) -> None:
    path = ddvqa_answers.answer_all(judge(tiny_explainer, faces, tmp_path / "out" / "det.jsonl"))
    found = rows(path)
    assert [Path(row["image"]).stem for row in found] == sorted(NAMES)
    assert all(list(row) == ["image", "prompt", "text", "metadata"] for row in found)
    assert all(row["prompt"].endswith(f"USER: <image>\n<deepfake>\n{VERDICT_QUESTION} ASSISTANT:") for row in found)
    for row in found:
        said = row["metadata"]
        assert said["label"] == ("FAKE" if said["p_fake"] >= 0.5 else "REAL")
        assert (said["detector"], said["model"]) == ("m2f2det", str(tiny_explainer))
    report = judgement_report(read_judgements(path), n_boot=10)
    assert report["n"]["answers"] == 5 and report["accuracy"]["value"] >= 0.8
    assert json.loads((tmp_path / "out" / "det_run" / "run.json").read_text())["config"]["batch_size"] == 2
    assert sorted(p.name for p in path.parent.iterdir()) == ["det.jsonl", "det_run"]


def test_reasons_are_sorted_and_each_image_is_encoded_once(
    tiny_explainer: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Explainer.encode
    monkeypatch.setattr(Explainer, "encode", lambda self, im, *more: encoded.append(len(im)) or encode(self, im, *more))
    found = rows(ddvqa_answers.answer_all(reason(tiny_explainer, faces, tmp_path / "exp.jsonl")))
    assert [row["key"] for row in found] == [f"{name}_{i}" for name in sorted(NAMES) for i in (0, 2, 10)]
    assert all(list(row) == ["key", "image", "prompt", "text", "metadata"] for row in found)
    assert found[0]["image"] == f"{sorted(NAMES)[0]}.png"
    assert encoded == [2, 2, 1]


def test_a_zip_gives_what_the_folder_gives(tiny_explainer: Path, faces: Path, tmp_path: Path) -> None:
    one = ddvqa_answers.answer_all(reason(tiny_explainer, faces, tmp_path / "one.jsonl", limit=4))
    two = ddvqa_answers.answer_all(
        reason(tiny_explainer, faces, tmp_path / "two.jsonl", limit=4, images=str(faces / "packed.zip"))
    )
    assert len(rows(one)) == 4 and one.read_bytes() == two.read_bytes()


def test_paths_are_the_published_ones(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = list_items(JudgeSettings(images=str(faces / "c40")))[0]
    row = ddvqa_answers.row_of(item, "p", "t", {}, "utils/DDVQA_images/c40", is_reason=False)
    assert row == {
        "image": "./utils/DDVQA_images/c40/test/0_000_001.png",
        "prompt": "p",
        "text": "t",
        "metadata": {},
    }


@pytest.mark.parametrize(("cut", "left"), [(0, 5), (30, 5), (1500, 8)])
def test_an_interrupted_run_is_continued_and_gives_the_same_file(
    cut: int, left: int, tiny_explainer: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ddvqa_answers.answer_all(reason(tiny_explainer, faces, tmp_path / "whole.jsonl")).read_bytes()
    answer, asked = Explainer.answer, []

    def stop_at_the_fifth(self: Explainer, *args: Any, **more: Any) -> list[str]:
        asked.append(len(args[1]))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return answer(self, *args, **more)

    settings = reason(tiny_explainer, faces, tmp_path / "cut.jsonl")
    monkeypatch.setattr(Explainer, "answer", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        ddvqa_answers.answer_all(settings)
    partial = tmp_path / ".cut.jsonl.partial"
    assert not (tmp_path / "cut.jsonl").exists() and len(partial.read_text().splitlines()) == 1 + 8
    partial.write_bytes(partial.read_bytes()[: partial.stat().st_size - cut])
    resumed = ddvqa_answers.answer_all(settings).read_bytes()
    assert resumed == whole and not partial.exists()
    assert len(asked) == 5 + left


def test_a_partial_file_of_other_settings_is_not_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = ResumableJsonl(tmp_path / "a.jsonl", {"seed": 1})
    assert first.resume([1, 1]) == 0
    first.append([{"n": 1}])
    assert ResumableJsonl(tmp_path / "a.jsonl", {"seed": 1}).resume([1, 1]) == 1
    with caplog.at_level(logging.WARNING):
        other = ResumableJsonl(tmp_path / "a.jsonl", {"seed": 2})
        assert other.resume([1, 1]) == 0
    assert "starting afresh" in caplog.text
    other.append([{"n": 3}])
    assert other.finish().read_text() == '{"n": 3}\n' and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_told_evidence_turns_the_text_and_not_the_verdict(tiny_explainer: Path, faces: Path, tmp_path: Path) -> None:
    said, found = {}, {}
    for told in (0.02, 0.98):
        settings = judge(tiny_explainer, faces, tmp_path / f"{told}.jsonl", evidence_p_fake=told)
        found[told] = rows(ddvqa_answers.answer_all(settings))
        said[told] = [parse_verdict(row["text"]) for row in found[told]]
        assert all(row["metadata"]["evidence_p_fake"] == told for row in found[told])
    assert said[0.02] == [0] * 5 and said[0.98] == [1] * 5
    scores = [[row["metadata"]["p_fake"] for row in found[told]] for told in (0.02, 0.98)]
    assert scores[0] == scores[1]


def test_a_layout_is_chosen_by_name(tiny_explainer: Path, faces: Path, tmp_path: Path) -> None:
    settings = judge(tiny_explainer, faces, tmp_path / "a.jsonl", layout="published_det", limit=1, max_new_tokens=3)
    (row,) = rows(ddvqa_answers.answer_all(settings))
    assert row["prompt"].endswith(f"###Human: <image>\n <deepfake>\n {VERDICT_QUESTION} ###Assistant:")
    with pytest.raises(ValueError, match="Unknown prompt layout 'v9'"):
        ddvqa_answers.answer_all(judge(tiny_explainer, faces, tmp_path / "b.jsonl", layout="v9"))


def test_what_is_missing_is_named(tiny_explainer: Path, faces: Path, tmp_path: Path) -> None:
    detector = tiny_explainer.parent / "detector"
    with pytest.raises(ValueError, match="gives verdicts and no words"):
        ddvqa_answers.answer_all(judge(detector, faces, tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        ddvqa_answers.answer_all(judge(tiny_explainer, faces, tmp_path / "a.jsonl", evidence_p_fake=1.5))
    with pytest.raises(FileNotFoundError, match=r"does not exist, nor 'nowhere\.zip'"):
        ddvqa_answers.answer_all(judge(tiny_explainer, faces, tmp_path / "a.jsonl", images=str(tmp_path / "nowhere")))
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"5_999_0": {"question": "Why?", "answer": []}}\n')
    with pytest.raises(FileNotFoundError, match=r"lacks the images of 1 questions .*first: 5_999_0"):
        list_items(JudgeSettings(images=str(faces / "c40"), questions=str(questions)))
    questions.write_text('{"5_000_0": "Why?"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected \{key: \{question, answer\}\}"):
        list_items(JudgeSettings(images=str(faces / "c40"), questions=str(questions)))


def test_questions_about_training_images_find_them(faces: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"5_777_0": {"question": "Why?", "answer": []}}\n')
    (item,) = list_items(JudgeSettings(images=str(faces / "c40"), questions=str(questions)))
    assert item.name == "train/5_777.png" and Path(item.where).is_file()


def test_mistakes_end_with_code_2(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert ddvqa_answers.main(["dat"]) == 2 and "Unknown task 'dat'" in caplog.text
    with pytest.raises(SystemExit) as stopped:
        ddvqa_answers.main(["det", "--modle-path", "x"])
    assert stopped.value.code == 2 and "Did you mean --model_path?" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.parametrize("task", ["det", "exp"])
def test_the_scripts_run(task: str, tiny_explainer: Path, faces: Path, tmp_path: Path) -> None:
    command = ["bash", f"stage_3_inference_{task}.sh", "--model-path", str(tiny_explainer), "--limit", "2"]
    command += ["--images", str(faces / "c40"), "--output", str(tmp_path / "a.jsonl")]
    command += ["--questions", str(faces / "questions.jsonl")] if task == "exp" else []
    done = forked.run_shell(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "a.jsonl")) == 2
