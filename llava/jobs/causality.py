"""`m2f2 causality`: do an explainer's words follow its evidence? It is set by hand to each class, the texts are read.

The images stay as they are, and so does everything else that the words could rest on: what changes with the class that
is told is caused by the evidence alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llava.core.config import setting
from llava.core.runtime import Incomplete, batched, write_json, write_run
from llava.core.terminal import aligned, progress
from llava.core.types import FAKE, REAL, Turn
from llava.data.answer_texts import VERDICT_QUESTION, stated_class
from llava.data.sources import DataConfig, open_source, split_of
from llava.evaluation.statistics import wilson
from llava.evaluation.text import parse_verdict

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline

FOLLOWED = 0.9  # share of texts that must say the class that was told


@dataclass(frozen=True, kw_only=True)
class CausalityConfig:
    """Which explainer is asked about which images, and how sure the evidence is made."""

    model: str = setting(help="folder, name in checkpoints/ or hub id of an explainer", positional=True)
    data: DataConfig = setting(help="images, as for stage 1; their own classes do not matter")
    split: str = setting("test", "split to ask about; all = every image")
    images: int = setting(100, "images that are asked about at most, evenly spread over the split")
    p: float = setting(0.98, "probability that is told of each class in turn")
    question: str = setting(VERDICT_QUESTION, "what is asked")
    output_dir: str = setting("outputs/causality", "folder of causality.json, which holds every text")
    batch_size: int = setting(16, "answers written side by side")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where it runs")


def causality(config: CausalityConfig) -> Iterator[str]:
    """Yield a table: how many texts say each class when they are told it; also written as causality.json.

    Raises Incomplete (exit code 1) when a class is followed by less than 90 % of the texts, ValueError or
    FileNotFoundError.
    """
    from llava.pipeline.pipeline import Pipeline  # here, so that --help loads no torch

    source = open_source(config.data)
    records = split_of(source, config.split)
    count = min(config.images, len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    pipeline = Pipeline.from_pretrained(config.model, config.device)
    pipeline.needed_explainer()
    write_run(Path(config.output_dir), asdict(config), None)
    texts: dict[str, list[str]] = {name: [] for name in pipeline.detector.told_classes}
    for batch in progress(list(batched(chosen, config.batch_size)), "asking"):
        pictures = [source.load(record).image for record in batch]
        for name, said in told_texts(pipeline, pictures, config.question, config.p).items():
            texts[name] += said
    report = {name: _followed(name, said, list(texts)) for name, said in texts.items()}
    ids = [record.id for record in chosen]
    write_json(
        Path(config.output_dir) / "causality.json", {"p": config.p, "classes": report, "images": ids, "texts": texts}
    )
    yield from (f"{line}\n" for line in _lines(report))
    ignored = [name for name, found in report.items() if found["share"] < FOLLOWED]
    if ignored:
        raise Incomplete(f"{config.model}: the words do not follow the evidence when told {', '.join(ignored)}")
    yield f"{config.model}: the words follow the evidence ({len(chosen)} images, split {config.split!r})\n"


def told_texts(pipeline: Pipeline, images: Sequence[np.ndarray], question: str, p: float) -> dict[str, list[str]]:
    """Ask about each image once for each class, whose probability the words are told to be `p`; gives the texts."""
    explainer, detector = pipeline.needed_explainer(), pipeline.detector
    encoded, turns = explainer.encode(images), [[Turn(role="human", text=question)]] * len(images)
    return {
        name: explainer.answer(encoded, turns, evidence=detector.with_class(encoded.evidence, name, p))
        for name in detector.told_classes
    }


def says(text: str, class_name: str, classes: Sequence[str]) -> bool:
    """Say whether a text takes the side of a class and, where that is one kind of fake, names it and no other."""
    if parse_verdict(text) != (REAL if class_name == "real" else FAKE):
        return False
    return class_name in ("real", "fake") or stated_class(text, classes) == class_name


def _followed(name: str, texts: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    count = sum(says(text, name, classes) for text in texts)
    share = wilson(count, len(texts))
    return {"said": count, "n": len(texts), "share": share.value, "low": share.low, "high": share.high}


def _lines(report: dict[str, dict[str, Any]]) -> Iterator[str]:
    rows = [["told", "said", "of", "share (95 %)"]]
    for name, found in report.items():
        share = f"{found['share']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        rows.append([name, str(found["said"]), str(found["n"]), share])
    yield from aligned(rows)
