"""A tiny explainer that has learned, in seconds and in one loop, to say what its detector finds."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_world import REASONS, draw, make_base, train_detector

from llava.core.types import Turn
from llava.explainer.generation import load_model, load_processor
from llava.explainer.merge import merge_detector
from llava.explainer.prompts import VERDICT_QUESTION

REASON_QUESTION = "Does the nose look real or fake?"


def conversations(label: int) -> list[list[Turn]]:
    """Give the conversations about one picture: verdict, reason, and both in a row."""
    said = f"The image is {('real', 'fake')[label]}."
    verdict = [Turn(role="human", text=VERDICT_QUESTION), Turn(role="assistant", text=said)]
    reason = [Turn(role="human", text=REASON_QUESTION), Turn(role="assistant", text=f"{said} {REASONS[label]}")]
    return [verdict, reason, [*verdict, *reason]]


def train_explainer(folder: Path, steps: int = 140) -> Path:
    """Train detector, language model and adapter; gives the folder of the merged explainer (`detector` lies beside)."""
    train_detector(folder / "detector")
    make_base(folder / "base", folder / "detector")
    merge_detector(str(folder / "base"), str(folder / "detector"), folder / "start")
    model = load_model(folder / "start").train()
    processor = load_processor(folder / "start", model)
    pictures = [draw(label, 100 + i) for i in range(4) for label in (0, 1)]
    rows = []
    for label in (0, 1):
        for turns in conversations(label):
            ids, labels = processor.encode(turns)
            rows.append((label, {"input_ids": ids, "labels": labels}))
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    trained += [*model.deepfake_projector.parameters()]
    optimiser = torch.optim.Adam(trained, lr=5e-3)
    torch.manual_seed(0)
    for _ in range(steps):
        chosen = [rows[i] for i in torch.randperm(len(rows))]
        seen = [processor.pixels(pictures[i]) for i in torch.randint(len(pictures), (len(chosen),))]
        batch = processor.collate([row | pixels for (_, row), pixels in zip(chosen, seen, strict=True)])
        p_fake = torch.tensor([abs(label - 0.05 * float(torch.rand(()))) for label, _ in chosen])
        optimiser.zero_grad()
        # Any picture with any evidence: the words must follow the evidence, as they do in a stage-2 base.
        model(**batch, evidence=torch.stack([1 - p_fake, p_fake], dim=1)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    model.eval().save_pretrained(folder / "explainer")
    processor.tokenizer.save_pretrained(folder / "explainer")
    return folder / "explainer"
