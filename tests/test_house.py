"""One thought passes through few files: an image to its verdict, a question to its words, a recipe to a detector."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import files_of, functions_of, journeys_of

MOST = {"image to verdict": 24, "question to words": 24, "recipe to detector": 26}


@pytest.mark.e2e
def test_one_thought_passes_through_few_files(tmp_path: Path) -> None:
    passed = {title: files_of(functions_of(journey)) for title, journey in journeys_of(tmp_path).items()}
    too_long = {title: files for title, files in passed.items() if len(files) > MOST[title]}
    assert passed.keys() == MOST.keys() and not too_long
    # What the counter has to see if it sees anything: the first file of each journey and its last.
    assert {"cli.py", "detectors/m2f2det.py", "pipeline/verdict.py"} <= set(passed["image to verdict"])
    assert {"serve/guard.py", "serve/batching.py", "explainer/generation.py"} <= set(passed["question to words"])
    assert {"core/config.py", "train/engine.py", "core/weights.py"} <= set(passed["recipe to detector"])
