"""The scores of several runs side by side: detection, judgement, explanation, integrity, each with its interval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from llava.core.registry import nearest
from llava.evaluation.report import interval_text

# file of a run's folder -> rows (title, path inside the file)
ROWS = {
    "scores/report.json": (
        ("detector AUC, test frames", ("frame", "auc")),
        ("detector accuracy", ("frame", "accuracy")),
    ),
    "judgement.json": (
        ("judgement accuracy", ("accuracy",)),
        ("judgement precision", ("precision",)),
        ("judgement recall", ("recall",)),
        ("judgement F1", ("f1",)),
        ("words agree with the detector", ("agreement", "agreement")),
    ),
    "explanation.json": tuple(
        (f"explanation {title}", ("scores", "all", key))
        for key, title in (("bleu_4", "BLEU-4"), ("rouge_l", "ROUGE-L"), ("cider", "CIDEr"), ("meteor", "METEOR"))
    ),
    "integrity.json": (
        ("explanation ROUGE-L minus the blind template's", ("template", "difference", "kind", "rouge_l")),
        ("explanation ROUGE-L minus with images swapped", ("swap", "all", "gap", "rouge_l")),
        ("the same within one label", ("swap", "same_label", "gap", "rouge_l")),
        ("text names the edited region", ("regions", "accuracy")),
        ("the same minus a blind guess", ("regions", "gain", "guess")),
    ),
}


def comparison(runs: Sequence[Path]) -> Table:
    """Give one table of runs, folders that hold the files of ROWS; a dash stands for what a run does not have.

    Raises FileNotFoundError when a folder holds none of them.
    """
    reports = [_read_run(run) for run in runs]
    table = Table(title="95 % intervals by group bootstrap (proportions: Wilson)", title_justify="left")
    table.add_column("")
    for run, report in zip(runs, reports, strict=True):
        sizes = " / ".join(
            str(report[name]["n"].get("frames") or _items(report[name]["n"])) for name in ROWS if name in report
        )
        table.add_column(f"{run}\nn = {sizes}")
    for name, rows in ROWS.items():
        for title, path in rows:
            table.add_row(title, *(_cell(report.get(name), path) for report in reports))
    return table


def scores_of(run: Path) -> list[tuple[str, str]]:
    """Give (title, value with its interval) of everything that a run was scored on. Raises as `comparison` does."""
    report = _read_run(run)
    found = [
        (title, _cell(report[name], path)) for name, rows in ROWS.items() if name in report for title, path in rows
    ]
    return [(title, value) for title, value in found if value != "-"]


def _items(counts: Mapping[str, Any]) -> Any:
    """Give how many answers a report was made of."""
    return counts.get("items") or counts["scored"]


def _read_run(folder: Path) -> dict[str, Any]:
    found = {
        name: json.loads((folder / name).read_text(encoding="utf-8")) for name in ROWS if (folder / name).is_file()
    }
    if not found:
        raise FileNotFoundError(f"{str(folder)!r} holds no report. {nearest(str(folder), list(ROWS))}")
    return found


def _cell(report: Mapping[str, Any] | None, path: tuple[str, ...]) -> str:
    """Write one value with its interval, or a dash."""
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "-" if value is None else interval_text(value)
