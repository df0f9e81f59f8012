"""The model that comes with the package: it is asked where none is named."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import llava
from llava.core import weights
from llava.core.config import parse
from llava.core.types import STARTER
from llava.jobs.bulk import ScoreSettings
from llava.jobs.commands import ChatSettings, DetectSettings, ExplainSettings
from llava.jobs.ddvqa_answers import JudgeSettings, ReasonSettings
from llava.jobs.maps import CounterfactualSettings, MapSettings
from llava.serve.options import ServeSettings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (DetectSettings, ["photo.jpg"]),
        (ExplainSettings, ["photo.jpg"]),
        (ChatSettings, ["photo.jpg"]),
        (ScoreSettings, ["folder", "--out", "scores"]),
        (MapSettings, ["manifest.csv"]),
        (CounterfactualSettings, ["manifest.csv", "--predict_path", "a", "--gt_path", "b"]),
        (JudgeSettings, []),
        (ReasonSettings, []),
        (ServeSettings, []),
    ],
)
def test_who_names_no_model_asks_the_starter(settings: Any, words: list[str]) -> None:
    def asked(*flags: str) -> Any:
        found = parse(settings, [*words, *flags])
        return getattr(found, "model", None) or found.model_path

    flag = "--model" if "model" in inspect.signature(settings).parameters else "--model_path"
    name: Any = [STARTER] if settings is ServeSettings else STARTER
    assert asked() == name
    assert asked(flag, "mine") == (["mine"] if settings is ServeSettings else "mine")
    if settings is ServeSettings:
        assert parse(settings, words).models == {STARTER: STARTER}


def test_python_asks_the_starter_too(tiny_explainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "STARTER_DIR", tiny_explainer)
    model = llava.load(device="cpu")
    assert model.name == STARTER and model.explainer is not None
    assert llava.load(tiny_explainer.parent / "detector").explainer is None
