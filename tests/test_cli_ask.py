"""m2f2 detect, explain and chat: what is printed, what is written, and the exit codes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_world import SCOPE, draw

from llava import cli
from llava.detectors.base import Detector
from llava.pipeline.crops import CUT_OFF, NO_FACE, TOO_SMALL, TURNS

PHOTO = Path(__file__).parents[1] / "utils" / "demo_faces" / "grace_hopper.jpg"
GRACE_HOPPERS_EYES = ((223.6, 190.4), (307.0, 187.4))  # read off an enlarged print
QUESTION = "Determine the authenticity of this image."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        Image.fromarray(draw(number % 2, 700 + number)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def ask(tiny_explainer: Path):
    """Give a function that runs one command on the tiny explainer."""
    return lambda *words: cli.main([*map(str, words), "--model", str(tiny_explainer), "--device", "cpu"])


def spoil(folder: Path) -> Path:
    """Add a truncated, a tiny and a huge picture."""
    bad = folder / "bad"
    bad.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "jpeg")
    (bad / "cut.jpg").write_bytes(buffer.getvalue()[:4000])
    Image.fromarray(noise[:1, :1]).save(bad / "dot.png")
    Image.new("1", (20_000, 20_000)).save(bad / "huge.png")
    return bad


def json_rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_seed_says_which_words_are_sampled(ask, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert ask("explain", folder / "0.png", "--face", "off", "--json", "--temperature", "3", *words) == 0
        return json_rows(capsys.readouterr().out)[0]["text"]

    first = said("--seed", "1")
    assert said("--seed", "1") == first
    assert any(said("--seed", seed) != first for seed in "234")


def test_detect_prints_a_table(ask, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("detect", folder, "--face", "off", "--batch-size", "3") == 0
    out = capsys.readouterr().out
    assert "(not calibrated)" in out
    said = f"Scope of the detector: {SCOPE}. REAL says nothing about what lies outside of it."
    assert " ".join(out.split()).count(said) == out.count("Scope of the detector") == 1, "once, however many faces"
    lines = [line for line in out.splitlines() if ".png" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["REAL", "FAKE", "REAL", "FAKE"]
    assert all(0 <= float(line.split("│")[2]) <= 1 for line in lines)


def test_detect_prints_json_lines(ask, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("detect", folder / "*.png", "--face", "off", "--json") == 0
    rows = json_rows(capsys.readouterr().out)
    assert [row["image"] for row in rows] == [str(folder / f"{i}.png") for i in range(4)]
    assert [row["label"] for row in rows] == ["REAL", "FAKE"] * 2
    assert all(row["calibration"] == "not calibrated" and row["scope"] == SCOPE for row in rows)


def test_a_detector_alone_answers_detect_and_not_explain(
    folder: Path, tiny_explainer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "1.png"), "--face", "off", "--model", str(tiny_explainer.parent / "detector")]
    assert cli.main(["detect", *words, "--json"]) == 0
    assert json_rows(capsys.readouterr().out)[0]["label"] == "FAKE"
    assert cli.main(["explain", *words]) == 2
    assert "gives verdicts and no words; use `m2f2 detect`" in capsys.readouterr().err
    assert cli.main(["chat", *words]) == 2


def test_bad_inputs_are_rows_and_the_exit_code_tells(ask, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = spoil(folder)
    words = (folder / "0.png", bad, folder / "none.jpg", folder / "1.png", "--face", "off", "--json", "--batch-size", 2)
    assert ask("detect", *words) == 1
    captured = capsys.readouterr()
    rows = json_rows(captured.out)
    assert [Path(row["image"]).name for row in rows] == ["0.png", "cut.jpg", "dot.png", "huge.png", "none.jpg", "1.png"]
    assert [row["label"] for row in rows] == ["REAL", *["INCONCLUSIVE"] * 4, "FAKE"]
    reasons = [row["reason"] for row in rows[1:5]]
    for words, reason in zip(("truncated", "too small", "pixels", "no such file"), reasons, strict=True):
        assert words in reason
    assert all(row["p_fake"] is None for row in rows[1:5])
    assert captured.err.endswith("m2f2: 4 of 6 inputs could not be read; their rows say why.\n")


def test_an_image_without_a_face_is_an_answer_and_no_failure(
    ask, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("detect", folder / "0.png", "--json") == 0
    (row,) = json_rows(capsys.readouterr().out)
    assert (row["label"], row["reason"]) == ("INCONCLUSIVE", NO_FACE)


def test_landmarks_and_roll_are_printed_and_written(ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "answers.csv"
    assert ask("detect", PHOTO, "--json", "--csv", table, "--stability", "off") == 0
    (row,) = json_rows(capsys.readouterr().out)
    assert np.allclose(row["face_landmarks"][:2], GRACE_HOPPERS_EYES, atol=8) and len(row["face_landmarks"]) == 5
    assert row["face_roll"] == pytest.approx(-2.1, abs=3)
    with table.open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert [float(value) for value in written["face_landmarks"].split()] == list(np.ravel(row["face_landmarks"]))
    assert float(written["face_roll"]) == row["face_roll"]


def test_a_face_that_cannot_be_judged_says_why(ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(PHOTO) as photo:
        photo.rotate(90, expand=True).save(tmp_path / "1.png")
        photo.resize((77, 90)).save(tmp_path / "2.png")
        photo.crop((0, 0, 320, 600)).save(tmp_path / "3.png")
    assert ask("detect", tmp_path, "--json") == 0
    rows = json_rows(capsys.readouterr().out)
    assert {(row["label"], row["p_fake"]) for row in rows} == {("INCONCLUSIVE", None)}
    assert [row["reason"] for row in rows[::2]] == [TURNS[3], CUT_OFF]
    assert rows[1]["reason"] == TOO_SMALL.format(*rows[1]["face_box"][2:], 32)
    assert ask("detect", tmp_path / "1.png") == 0
    assert "turn the image by 90 degrees to the right" in " ".join(capsys.readouterr().out.split())


def test_nothing_to_look_at_ends_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["detect", "nothing.jpg", "--model", "no-such-model"]) == 2
    assert "'nothing.jpg' matches nothing" in capsys.readouterr().err
    assert cli.main(["detect", __file__, "--csv", str(Path(__file__).parent)]) == 2
    assert "is a folder; give the name of a file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["detect"])
    assert stopped.value.code == 2 and "'paths'" in capsys.readouterr().err


def test_explain_says_whether_the_text_agrees(ask, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder / "out" / "answers.csv"
    assert ask("explain", folder, "--face", "off", "--csv", table) == 0
    out = capsys.readouterr().out
    assert "agrees" in out and "The image is fake." in out
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["REAL", "FAKE"] * 2
    assert all(row["question"] == QUESTION for row in rows)
    assert all((row["text_verdict"].upper() == row["label"]) == (row["agrees"] == "True") for row in rows)


def test_a_text_that_disagrees_is_marked(
    ask,
    folder: Path,
    tiny_explainer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Detector, "evidence_for_words", lambda self, output, prior: output.evidence
    )  # words that do not listen
    strict = tmp_path / "strict"
    strict.mkdir()
    for path in tiny_explainer.iterdir():
        (strict / path.name).symlink_to(path)
    config = json.loads((tiny_explainer / "config.json").read_text())
    config["detector"]["decision"] = {"threshold": 0.0, "chosen_on": "a test"}
    (strict / "config.json").unlink()
    (strict / "config.json").write_text(json.dumps(config))
    words = ["explain", str(folder / "0.png"), "--face", "off", "--stability", "off", "--model", str(strict)]
    assert cli.main(words) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if ".png" in line)
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[1] == "FAKE" and cells[4:6] == ["DISAGREES", "The image is real."]
    assert cells[6] == "[The text says real; the detector's verdict stands.]"


def test_chat_answers_what_is_piped_in(
    ask, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\nWhy?\n/quit\nnot asked\n"))
    assert ask("chat", folder / "1.png", "--face", "off") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAKE: p_fake ") and lines[1] == f"Scope of the detector: {SCOPE}."
    assert lines[2:4] == [f"> {QUESTION}", "The image is fake."]
    assert "> Why?" in lines and lines[-1] == "> /quit"


def test_chat_ends_with_the_input(
    ask, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert ask("chat", folder / "1.png", "--face", "off") == 0
    verdict, scope, prompt = capsys.readouterr().out.splitlines()
    assert verdict.startswith("FAKE") and SCOPE in scope and prompt == "> "


def test_chat_without_a_face_or_a_picture_says_so(ask, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("chat", folder / "1.png") == 1
    captured = capsys.readouterr()
    assert captured.out == f"INCONCLUSIVE: {NO_FACE}\n" and "nothing to talk about" in captured.err
    assert ask("chat", spoil(folder) / "cut.jpg") == 2
    assert "damaged or truncated" in capsys.readouterr().err


@pytest.mark.e2e
def test_the_installed_command_answers(folder: Path, tiny_explainer: Path) -> None:
    command = [str(Path(sys.executable).with_name("m2f2")), "explain", str(folder / "1.png"), "--face", "off", "--json"]
    done = subprocess.run([*command, "--model", str(tiny_explainer)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"]["label"] == "FAKE" and done.stderr == ""
