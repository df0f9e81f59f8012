"""Labelled images become conversations that train a detector and an explainer on the same splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.data.conversations import ConversationSource, VerdictConfig, build_verdicts
from llava.data.sources import DataConfig, open_source, split_of


def test_a_class_folder_goes_round(class_folder: Path, tmp_path: Path) -> None:
    images = DataConfig(path=str(class_folder))
    counts = build_verdicts(VerdictConfig(data=images, output=str(tmp_path / "conversations")))
    assert counts == {"train/verdict_only.json": 16, "val/verdict_only.json": 8, "test/verdict_only.json": 8}
    before = open_source(images)
    after = ConversationSource(DataConfig(source="conversations", path=str(tmp_path / "conversations")))
    for split in ("train", "val", "test"):
        old, new = split_of(before, split), split_of(after, split)
        assert [(r.label, r.class_name, r.video, r.group) for r in new] == [
            (r.label, r.class_name, r.video, r.group) for r in old
        ]
    record = split_of(after, "test")[0]
    question, answer = after.turns(record)
    assert question.text == "<image>\n<deepfake>\nDetermine the authenticity of this image."
    assert answer.text == ("The image is real.", "The image is fake.")[record.label or 0]
    assert after.load(record).image.shape == before.load(split_of(before, "test")[0]).image.shape


def test_a_folder_without_conversations_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no"):
        ConversationSource(DataConfig(source="conversations", path=str(tmp_path)))
