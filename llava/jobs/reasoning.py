"""`m2f2 reasoning`: what RADAR's reasoning attends to, round by round, image by image and class by class."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llava.core.config import setting
from llava.core.runtime import pick_device, write_json, write_run
from llava.core.terminal import aligned
from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.data.sources import DataConfig, open_source, split_of

if TYPE_CHECKING:
    from torch import Tensor

    from llava.detectors.radar import Radar


@dataclass(frozen=True, kw_only=True)
class ReasoningSettings:
    """Which RADAR is looked at, on which images."""

    model: str = setting(help="folder or name in checkpoints/ of a RADAR with both branches", positional=True)
    data: DataConfig = setting(help="images, as for stage 1")
    split: str = setting("test", "split to look at; all = every image")
    samples: int = setting(8, "images that are drawn one by one, evenly spread over the split")
    batch_size: int = setting(32, "images per batch")
    output_dir: str = setting("outputs/reasoning", "folder of samples.png, attention.png and reasoning.json")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where it runs")

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be drawn."""
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples} is not usable; give 1 or more.")


def show_reasoning(settings: ReasoningSettings) -> str:
    """Draw and write what the reasoning attends to, and give a table of it by class and round.

    Attention to the boundary branch; the rest, up to 1, goes to the frequency branch. Raises ValueError for a detector
    without reasoning over two branches.
    """
    from llava.evaluation.pictures import draw_attention, draw_rounds
    from llava.train.scoring import answers_over

    detector = _with_reasoning(settings.model)
    source = open_source(settings.data)
    records = split_of(source, settings.split)
    write_run(Path(settings.output_dir), asdict(settings), None)

    def answer(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        found = detector.answer(inputs["pixel_values"][:, 0])
        assert found.reasons is not None
        return found.reasons.attention[..., 0], found.reasons.logits.sigmoid(), found.logit.sigmoid()

    device = pick_device(settings.device)
    kept, answers = answers_over(detector, source, records, device, settings.batch_size, 0, answer)
    attention, p_fake, verdict = (values.cpu().numpy() for values in answers)
    labels = np.array([int(record.label or REAL) for record in kept])
    folder, count = Path(settings.output_dir), min(settings.samples, len(kept))
    chosen = [i * len(kept) // count for i in range(count)]
    titles = [f"{Path(kept[i].id).name}\n{LABEL_NAMES[labels[i]]}, p_fake {verdict[i]:.2f}" for i in chosen]
    draw_rounds(folder / "samples.png", titles, attention[chosen], p_fake[chosen])
    draw_attention(folder / "attention.png", labels, attention)
    classes = {name: _summary(attention[labels == n], p_fake[labels == n]) for n, name in enumerate(LABEL_NAMES)}
    alpha = detector.gate_logit.detach().sigmoid().item()
    rows = [
        {"id": record.id, "label": int(label), "attention_boundary": a.tolist(), "p_fake": p.tolist()}
        for record, label, a, p in zip(kept, labels, attention, p_fake, strict=True)
    ]
    write_json(folder / "reasoning.json", {"alpha": alpha, "classes": classes, "images": rows})
    lines = _lines(classes, {name: int((labels == n).sum()) for name, n in zip(LABEL_NAMES, (REAL, FAKE), strict=True)})
    return "\n".join([*lines, f"alpha, the share of the reasoning in the verdict: {alpha:.3f}", f"Pictures: {folder}"])


def _with_reasoning(model: str) -> Radar:
    from llava.detectors.base import load
    from llava.detectors.published import ready_detector
    from llava.detectors.radar import Radar

    detector = load(ready_detector(model))
    if not isinstance(detector, Radar) or "attention_boundary" not in detector.evidence_names:
        raise ValueError(
            f"{model!r} holds a detector {detector.name!r} without reasoning over two branches; give a RADAR with both."
        )
    return detector


def _summary(attention: np.ndarray, p_fake: np.ndarray) -> list[dict[str, Any]]:
    """Give mean and standard deviation of attention and p_fake (N, T) in each round; None where there is no image."""
    if not len(attention):
        return []
    return [
        {
            "attention_boundary": {"mean": float(a.mean()), "sd": float(a.std())},
            "p_fake": {"mean": float(p.mean()), "sd": float(p.std())},
        }
        for a, p in zip(attention.T, p_fake.T, strict=True)
    ]


def _lines(classes: dict[str, list[dict[str, Any]]], counts: dict[str, int]) -> list[str]:
    rows: list[tuple[str, ...]] = [("class", "n", "round", "attention to boundary", "p_fake")]
    for name, rounds in classes.items():
        for number, row in enumerate(rounds, 1):
            texts = [f"{row[what]['mean']:.3f} (sd {row[what]['sd']:.3f})" for what in ("attention_boundary", "p_fake")]
            rows.append((name, str(counts[name]), str(number), *texts))
    return aligned(rows)
