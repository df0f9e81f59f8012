"""What a detector sees and has never seen: said in a recipe, kept with its weights, shown beside each verdict."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_detector import ToyConfig

from llava.core.config import build
from llava.core.types import Explanation, Turn, Verdict, VerdictLabel
from llava.data.inputs import NamedImage
from llava.detectors import DETECTORS
from llava.detectors.base import Detector, create, load
from llava.detectors.ensemble import fresh
from llava.jobs.case_file import Section, case_about, entry_of, entry_section, model_facts, render_case
from llava.jobs.commands import table_text
from llava.pipeline import Pipeline
from llava.pipeline.crops import Face
from llava.pipeline.verdict import Finding, judge
from llava.serve.engine import plain_pieces
from llava.serve.page.views import announcement, card
from llava.train.recipe import PhaseConfig, Recipe
from llava.train.stage_1 import start

DETECTORS.add("toy", "toy_detector:ToyDetector")
BLENDS = "sees blends and local edits; has never seen wholly generated faces"
LIMIT = "REAL says nothing about what lies outside of it."
REAL = Verdict(
    label=VerdictLabel.REAL,
    p_fake=0.1,
    probabilities={},
    evidence={},
    detector="toy",
    image="a.png",
    scope=BLENDS,
)
FAKE = replace(REAL, label=VerdictLabel.FAKE, p_fake=0.9)
NONE = replace(REAL, label=VerdictLabel.INCONCLUSIVE, p_fake=None, reason="no face found")


def toy(folder: Path, scope: str) -> Path:
    torch.manual_seed(0)
    detector = create("toy", {"size": 16, "filters": 4})
    detector.own_scope = scope
    detector.save(folder)
    return folder


def ensemble(members: dict[str, Any], **settings: Any) -> Detector:
    detector = create("ensemble", {"members": members, **settings})
    detector.load_pretrained()
    return detector


def without_scope(folder: Path) -> dict[str, Any]:
    """Make a folder one of before; gives what it says."""
    config = json.loads((folder / "config.json").read_text())
    for described in (config, *config["config"].get("members", {}).values()):
        described.pop("scope")
    (folder / "config.json").write_text(json.dumps(config))
    return config


# ---- kept with the detector --------------------------------------------------------------------------------------


def test_it_is_saved_with_the_detector_and_empty_in_files_of_before(tmp_path: Path) -> None:
    assert load(toy(tmp_path, BLENDS)).scope == BLENDS
    assert "scope" not in without_scope(tmp_path)
    assert load(tmp_path).scope == ""


@pytest.mark.parametrize("scope", ["two\nlines", "x" * 201, "\x1b[31mred", None])
def test_what_can_not_stand_beside_a_verdict_is_refused(tmp_path: Path, scope: str | None) -> None:
    toy(tmp_path, BLENDS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scope": scope}))
    with pytest.raises(ValueError, match=r"^scope: .*one line of at most 200 characters"):
        load(tmp_path)
    with pytest.raises(ValueError, match="scope"):
        build(Recipe, {"scope": scope, "detector": "toy"})


def test_an_ensemble_says_what_its_members_see_unless_it_has_words_of_its_own(tmp_path: Path) -> None:
    members = {"a": str(toy(tmp_path / "a", BLENDS)), "b": str(toy(tmp_path / "b", ""))}
    both = ensemble(members)
    assert both.scope == f"a ({BLENDS}), b (nobody said)" and both.own_scope == ""
    assert ensemble({"b": members["b"]}).scope == ""
    assert ensemble(members, freeze_members=False).scope == "", "they are trained, and may see other things now"
    both.save(tmp_path / "both")
    assert load(tmp_path / "both").scope == both.scope
    assert load(tmp_path / "both" / "members" / "a").scope == BLENDS
    both.own_scope = "sees noise"
    both.save(tmp_path / "both")
    assert load(tmp_path / "both").scope == "sees noise"


def test_an_ensemble_of_before_loads_and_one_with_another_member_does_not(tmp_path: Path) -> None:
    members = {"a": str(toy(tmp_path / "a", BLENDS))}
    ensemble(members).save(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "before")
    without_scope(tmp_path / "before")
    with pytest.raises(ValueError, match=r"Member 'a' .* is not the one"):
        load(tmp_path / "before")
    without_scope(tmp_path / "before" / "members" / "a")
    assert load(tmp_path / "before").scope == ""


# ---- said in a recipe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said", "before", "after"),
    [
        ("train", BLENDS, "", BLENDS),
        ("train", BLENDS, "sees noise", BLENDS),
        ("train", "", "sees noise", ""),
        ("fit", "", "sees noise", "sees noise"),
        ("fit", BLENDS, "sees noise", BLENDS),
    ],
)
def test_training_needs_new_words_and_fitting_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, said: str, before: str, after: str
) -> None:
    recipe = build(Recipe, {"detector": "toy", "model": {"size": 16, "filters": 4}, "scope": said})
    phase = build(PhaseConfig, {"kind": kind, "init_from": str(toy(tmp_path, before)) if before else None})
    assert start(recipe, phase, None).scope == after
    assert ("say it with --scope" in caplog.text) == (bool(before) and not after)


def test_frozen_members_keep_theirs_while_their_fusion_is_trained(tmp_path: Path) -> None:
    members = {"a": str(toy(tmp_path / "a", BLENDS))}
    recipe = build(Recipe, {"detector": "ensemble", "model": {"members": members}})
    assert start(recipe, PhaseConfig(), None).scope == f"a ({BLENDS})"
    assert fresh("toy", ToyConfig()).keys() == {"detector", "config"}, "a fresh member has none"


# ---- shown with a verdict ----------------------------------------------------------------------------------------


def test_each_verdict_has_it_and_says_of_real_that_it_means_no_more() -> None:
    detector = create("toy", {"size": 16, "filters": 4})
    detector.own_scope = BLENDS
    scores = {"p_fake": 0.1, "probabilities": {}, "evidence": {}}
    found = judge(detector, Face(image="a.png", pixels=None), scores)
    assert (found.label, found.scope) == ("REAL", BLENDS) and found.to_dict()["scope"] == BLENDS
    assert found.scope_text == f"Scope of the detector: {BLENDS}. {LIMIT}"
    assert FAKE.scope_text == f"Scope of the detector: {BLENDS}."
    assert replace(FAKE, scope=f"{BLENDS}.").scope_text == FAKE.scope_text
    assert NONE.scope_text == replace(REAL, scope="").scope_text == ""
    said = Explanation(verdict=REAL, question="Why?", text="It is real.", text_verdict=0, agrees=True)
    assert str(said).splitlines() == [str(REAL), REAL.scope_text, "It is real."]


@pytest.mark.parametrize("order", [(REAL, FAKE, NONE), (FAKE, NONE, REAL)])
def test_a_table_says_it_once_with_the_limit_of_real(order: tuple[Verdict, ...]) -> None:
    shown = " ".join(table_text(order).split())
    assert shown.count(BLENDS) == shown.count(LIMIT) == 1 and shown.endswith(REAL.scope_text)
    shown = " ".join(table_text([FAKE, FAKE]).split())
    assert shown.endswith(FAKE.scope_text) and LIMIT not in shown
    assert "Scope" not in table_text([NONE, replace(REAL, scope="")])


def test_the_page_shows_and_speaks_it() -> None:
    shown = str(card(Finding(verdict=replace(REAL, scope="sees <b>")), "a.png"))
    assert f"<p>Scope of the detector: sees &lt;b&gt;. {LIMIT}</p>" in shown
    assert "Scope of" not in card(Finding(verdict=NONE), "a.png")
    assert announcement(REAL).endswith(f". {REAL.scope_text}")
    assert announcement(replace(REAL, scope="")).endswith("not calibrated.")


@pytest.mark.parametrize("verdict", [REAL, replace(REAL, scope="")])
def test_a_detector_without_words_says_it_behind_its_sentence(verdict: Verdict) -> None:
    *_, said = plain_pieces(Finding(verdict=verdict), [Turn(role="human", text="Real?")])
    told = f" {verdict.scope_text}" if verdict.scope else ""
    assert said.text == f"The detector's verdict is {verdict}; no language model wrote this.{told}"


def test_a_case_file_has_it_beside_the_verdict_and_among_the_facts_of_the_model(tmp_path: Path) -> None:
    pipeline = Pipeline(load(toy(tmp_path, "sees noise")), None, "it")
    entry = entry_of(Finding(verdict=REAL), NamedImage(name="a.png", pixels=None))
    section: Section = entry_section(entry, "e")
    assert f"<p><strong>{REAL.scope_text}</strong></p>" in section.body and entry["verdict"]["scope"] == BLENDS
    facts = model_facts(pipeline)
    assert facts["scope"] == "sees noise"
    assert '<th scope="row">What it sees</th><td><bdi>sees noise</bdi>' in render_case(case_about(facts, [entry]))
