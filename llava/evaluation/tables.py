"""Reports as tables for a terminal, of one run or of several side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from llava.core.registry import nearest
from llava.core.terminal import aligned, titled_table
from llava.evaluation.metrics import CLASS_METRICS, LEVELS
from llava.evaluation.published_csv import VideoScores

CAPTION_ROWS = (
    *((f"bleu_{i}", f"BLEU-{i}") for i in range(1, 5)),
    ("bleu_mean", "BLEU mean"),
    ("rouge_l", "ROUGE-L"),
    ("cider", "CIDEr"),
    ("meteor", "METEOR"),
    ("spice", "SPICE"),
)
DETECTION_ROWS = (
    ("auc", "AUC"),
    ("ap", "AP"),
    ("eer", "EER"),
    ("accuracy", "accuracy"),
    ("balanced_accuracy", "balanced accuracy"),
    ("recall_real", "recall of real"),
    ("recall_fake", "recall of fake"),
    ("precision", "precision"),
    ("f1", "F1"),
)
CALIBRATION_ROWS = (
    ("ece", "ECE, equal-mass bins"),
    ("ece_equal_width", "ECE, equal-width bins"),
    ("brier", "Brier"),
    ("log_loss", "log loss (nats)"),
    ("cllr", "Cllr (bits)"),
    ("min_cllr", "min Cllr (bits)"),
)
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


def run_script(main: Callable[[], None]) -> None:
    """Run a script; a mistake in what was asked ends it with one line instead of a traceback."""
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def interval_text(interval: Mapping[str, Any]) -> str:
    """Write `0.9444 [0.8943, 0.9715]`; a dash stands for what is undefined."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    shown = "-" if value is None else f"{value:.4f}"
    return shown if low is None else f"{shown} [{low:.4f}, {high:.4f}]"


def detection_tables(report: Mapping[str, Any]) -> list[Table]:
    """Give a table of frame and video numbers, and one of kinds of fakes."""
    n, trimmed = report["n"], f"videos (mean without {100 * report['trim']:g} % at each end)"
    levels = titled_table(
        f"{n['frames']} frames ({n['real']} real, {n['fake']} fake), {n['videos']} videos, {n['groups']} groups; "
        f"fake from p_fake {report['threshold']:.4f} on; 95 % intervals by group bootstrap",
        "",
        "frames",
        "videos (mean)",
        trimmed,
    )
    for key, title in DETECTION_ROWS:
        levels.add_row(title, *(interval_text(report[level][key]) for level in LEVELS))
    titles = ("class", "n frames", "n videos", "AUC of frames", "of videos", "of trimmed videos")
    classes = titled_table("Each kind of fake against all reals", *titles)
    for name, row in report["classes"].items():
        counts = (str(row[level]["n"]) for level in ("frame", "video"))
        classes.add_row(name, *counts, *(interval_text(row[level]["auc"]) for level in LEVELS))
    return [levels, classes]


def multiclass_lines(report: Mapping[str, Any], level: str = "frame") -> list[str]:
    """Give aligned lines of how classes are told apart, each class and in all; none for a detector of two classes.

    report: of `llava.evaluation.metrics.detection_report`. Recalls are averaged by items (accuracy) and by classes
    (balanced accuracy), F1 by classes (macro F1).
    """
    if "multiclass" not in report:
        return []
    part = report["multiclass"][level]
    titles = dict(DETECTION_ROWS)
    rows = [("class", "n", *(titles.get(name, name) for name in CLASS_METRICS))]
    for name, row in part["classes"].items():
        rows.append((name, str(row["n"]), *(interval_text(row[metric]) for metric in CLASS_METRICS)))
    for name, column in (("accuracy", "recall"), ("balanced_accuracy", "recall"), ("macro_f1", "f1")):
        cells = (interval_text(part[name]) if metric == column else "" for metric in CLASS_METRICS)
        rows.append((titles.get(name, "macro F1"), "", *cells))
    return aligned(rows)


def matrix_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Give the AUC of each model (rows) on each set (columns) as texts, heads first; of frames, then of videos.

    report: of `m2f2 evaluate` with several models or sets.
    """
    found = {(cell["model"], cell["set"]): cell for cell in report["cells"]}
    heads = [f"{name}, {about['images']} images, {about['groups']} groups" for name, about in report["sets"].items()]
    rows = [["model", "trained on", *heads]]
    for model, about in report["models"].items():
        rows.append([model, about["trained_on"], *(_matrix_cell(found[model, name]) for name in report["sets"])])
    return rows


def _matrix_cell(cell: Mapping[str, Any]) -> str:
    if "problem" in cell:
        return "-"
    leak = f"; LEAK: trained on {cell['shared_groups']} of the groups" if cell["shared_groups"] else ""
    if cell["videos"] == cell["frames"]:
        return interval_text(cell["frame"]) + leak
    return f"{interval_text(cell['frame'])}; videos {interval_text(cell['video'])}{leak}"


def matrix_table(report: Mapping[str, Any]) -> Table:
    """Put `matrix_rows` into a table for a terminal."""
    heads, *rows = matrix_rows(report)
    table = titled_table(f"AUC, split {report['split']!r}; 95 % intervals by group bootstrap", *map(escape, heads))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def matrix_markdown(report: Mapping[str, Any]) -> str:
    """Write `matrix_rows` as a table in Markdown."""
    return markdown(matrix_rows(report))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, heads first, as a table in Markdown."""
    heads, *cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *cells))


def published_table(scores: Mapping[str, VideoScores]) -> Table:
    """Put the published way of scoring videos beside the same without its slip."""
    table = titled_table(
        "Trimmed means of videos as published (each with the truth of the next, the last dropped) and corrected",
        "",
        *scores,
    )
    table.add_row("AUC", *(f"{s.auc:.4f}" for s in scores.values()))
    table.add_row("accuracy, threshold sought on these videos", *(f"{s.best_accuracy:.4f}" for s in scores.values()))
    table.add_row("videos", *(str(s.videos) for s in scores.values()))
    return table


def calibration_tables(report: Mapping[str, Any]) -> list[Table]:
    """Give a table of raw against calibrated scores, and one of verdicts."""
    n = report["n"]
    scores = titled_table(
        f"{n['images']} images, {n['groups']} groups; {report['method']}, {report['calibration']}, prior "
        f"{report['prior']:.3f}; 95 % intervals by group bootstrap",
        "",
        "raw",
        "calibrated",
    )
    for key, title in CALIBRATION_ROWS:
        scores.add_row(title, *(interval_text(report[side][key]) for side in ("before", "after")))
    chance = (f"{report[side]['ece_if_calibrated']:.4f}" for side in ("before", "after"))
    scores.add_row("ECE of calibrated scores by chance", *chance)
    low, high = report["band"]
    verdicts = titled_table(f"Verdicts: UNCERTAIN from {low:.3f} to {high:.3f}", "", "value", "expected")
    for name, row in report["coverage"].items():
        bounds = row["expected"]
        shown = "-" if bounds is None else f"{row['promised']:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
        verdicts.add_row(f"{name}: not called the other", interval_text(row), shown)
    verdicts.add_row("decided", interval_text(report["decided"]), "")
    verdicts.add_row("right of those decided", interval_text(report["right"]), "")
    return [scores, verdicts]


def judgement_tables(report: Mapping[str, Any]) -> list[Table]:
    """Give a table of scores, one per manipulation, and one of undecided answers where there are any."""
    n = report["n"]
    scores = titled_table(
        f"{n['answers']} answers, {n['scored']} scored ({n['real']} real, {n['fake']} fake); parser: "
        f"{report['parser']}; {n['undecided']} undecided ({report['undecided_are']}), "
        f"{len(n['missing'])} missing, {len(n['extra'])} extra",
        "fake = positive",
        "value",
        "interval",
    )
    rows = (("accuracy", "accuracy"), ("f1", "F1"), ("precision", "precision"), ("recall", "recall"))
    for key, title in (*rows, ("recall_real", "recall of real")):
        kind = "group bootstrap" if key == "f1" else "Wilson"
        scores.add_row(title, interval_text(report[key]), kind)
    classes = titled_table("Per manipulation", "class", "said real", "said fake", "undecided", "right")
    for name, row in report["classes"].items():
        classes.add_row(name, *(str(c) for c in row["said"].values()), interval_text(row["accuracy"]))
    tables = [scores, classes]
    if report["undecided"]:
        undecided = titled_table("Undecided answers", "image", "text")
        for answer in report["undecided"]:
            undecided.add_row(escape(answer["image"]), escape(answer["text"] or "(missing)"))
        tables.append(undecided)
    return tables


def agreement_table(report: Mapping[str, Any]) -> Table:
    """Say how often the words say what the detector found, in all and where its verdict is clear, or were told."""
    whom = "the side the detector's p_fake is on" if report["told"] is None else f"the p_fake told, {report['told']}"
    table = titled_table(f"Words against {whom}", "", "n", "left out", "agreement", "text undecided")
    rows = {"all answers": report, **({"verdict REAL or FAKE": report["clear"]} if report.get("clear") else {})}
    for name, row in rows.items():
        n, left_out, undecided = (str(row[key]) for key in ("n", "left_out", "text_undecided"))
        table.add_row(name, n, left_out, interval_text(row["agreement"]), undecided)
    return table


def caption_table(report: Mapping[str, Any]) -> Table:
    """Give a table of scores by question type, intervals below the values."""
    n, scores = report["n"], report["scores"]
    heads = (f"{name}\nn = {row['n']}" for name, row in scores.items())
    table = titled_table(
        f"{n['items']} questions, {n['groups']} groups; {len(n['missing'])} missing (scored as empty), "
        f"{len(n['extra'])} extra (left out); {n['verbatim']} equal a reference; tokens: {report['tokenisation']}",
        "",
        *heads,
    )
    for key, title in CAPTION_ROWS:
        if key in scores["all"]:
            table.add_row(title, *(_narrow(row[key]) for row in scores.values()))
    return table


def _narrow(interval: Mapping[str, Any]) -> str:
    """Write value and interval one below the other."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    bounds = "" if low is None else f"{low:.3f}-{high:.3f}"
    return f"{value:.4f}\n{bounds}"


def comparison(runs: Sequence[Path]) -> Table:
    """Give one table of runs, folders that hold the files of ROWS; a dash stands for what a run does not have.

    Raises FileNotFoundError when a folder holds none of them.
    """
    reports = [_read_run(run) for run in runs]
    table = titled_table("95 % intervals by group bootstrap (proportions: Wilson)", "")
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
