"""Pictures of predictions: ROC curve, scores, how reliable they are, what degradations do, confusions, timelines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llava.core.runtime import atomic_path
from llava.core.types import VideoVerdict
from llava.evaluation.metrics import RankedScores, auc_interval
from llava.evaluation.predictions import Predictions, by_video
from llava.evaluation.reliability import reliability

REAL_COLOUR = "#1b7837"
FLIP_CURVES = {
    "flips_before": "REAL and FAKE change places, of clear verdicts",
    "flips_after": "the same, of those that the stability rule keeps",
    "differs": "any other verdict, UNCERTAIN included, of all images",
}
DPI = 150
SCORE_COLOUR, TELLING_COLOUR = "#1f77b4", "#d62728"


def draw_roc(
    path: str | Path,
    predictions: Predictions,
    n_boot: int = 2000,
    seed: int = 0,
    threshold: float | None = None,
) -> None:
    """Draw the ROC curves of frames and videos, with AUC and its 95 % group-bootstrap interval, into a picture.

    Where every frame is a video of its own there is one curve. threshold: its point on the curve of frames is marked.
    """
    figure = Figure(figsize=(5.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    levels = {"frames": predictions, "videos": by_video(predictions)}
    if len(levels["videos"]) == len(predictions):
        del levels["videos"]
    for level, items in levels.items():
        curve = RankedScores(items.labels, items.p_fake).curve()
        if not curve.is_defined:
            raise ValueError("A ROC curve needs real and fake items, got one class; give another split.")
        auc = auc_interval(items.labels, items.p_fake, items.groups, n_boot, seed)
        limits = "" if math.isnan(auc.low) else f" [{auc.low:.3f}, {auc.high:.3f}]"
        axes.plot(curve.fpr, curve.tpr, label=f"{len(items)} {level}: AUC {auc.value:.3f}{limits}")
    if threshold is not None:
        called, is_fake = predictions.p_fake >= threshold, predictions.labels == 1
        axes.plot(called[~is_fake].mean(), called[is_fake].mean(), "o", label=f"threshold {threshold:.3f}")
    axes.set(xlabel="reals called fake", ylabel="fakes called fake", title="ROC", aspect="equal")
    axes.legend(loc="lower right", fontsize="small")
    _save(figure, path)


def draw_histogram(path: str | Path, predictions: Predictions, threshold: float | None = None) -> None:
    """Draw how p_fake is distributed in each class, and the threshold, into a picture."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, 26)
    for name in sorted(set(predictions.class_names.tolist()), key=lambda n: (n != "real", n)):
        scores = predictions.p_fake[predictions.class_names == name]
        parts, _ = np.histogram(scores, edges)
        colour = REAL_COLOUR if name == "real" else None
        axes.stairs(parts / len(scores), edges, label=f"{name} ({len(scores)})", color=colour, linewidth=1.5)
    if threshold is not None:
        axes.axvline(threshold, color="0.4", linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set(xlabel="p_fake", ylabel="part of the class", title="Scores of each class", xlim=(0, 1))
    axes.legend(fontsize="small")
    _save(figure, path)


def draw_reliability(path: str | Path, predictions: Predictions, curves: Mapping[str, np.ndarray]) -> None:
    """Draw the share of fakes over p_fake in equal-mass bins, with 95 % intervals, into a picture.

    curves: p_fake (N,) of the predictions by their name, such as before and after calibration.
    """
    figure = Figure(figsize=(5.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, p_fake in curves.items():
        bins = reliability(predictions, p_fake)
        centres, shares = [b.p_fake for b in bins], [b.share.value for b in bins]
        reach = [[b.share.value - b.share.low for b in bins], [b.share.high - b.share.value for b in bins]]
        axes.errorbar(centres, shares, yerr=reach, marker="o", markersize=4, capsize=2, linewidth=1.2, label=name)
    title = f"{len(predictions)} images, {len(set(predictions.groups))} groups"
    axes.set(xlabel="mean p_fake of the bin", ylabel="share of fakes", title=title, aspect="equal")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="upper left", fontsize="small")
    _save(figure, path)


def timeline_png(verdict: VideoVerdict) -> bytes:
    """Draw p_fake of a video's frames over time, with the video's score and the threshold or band: a PNG file.

    Raises ValueError for a video without scores.
    """
    scores = {frame.seconds: frame.p_fake for frame in verdict.frames if frame.p_fake is not None}
    if verdict.telling_seconds is None or verdict.p_fake is None:
        raise ValueError(f"{verdict.image}: no frame has a score ({verdict.reason}); there is nothing to draw.")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    low, high = verdict.band or (verdict.threshold, verdict.threshold)
    if low < high:
        axes.axhspan(low, high, color="0.9", label="band: UNCERTAIN")
    else:
        axes.axhline(verdict.threshold, color="0.4", linestyle="--", label=f"threshold {verdict.threshold:.3f}")
    axes.plot([*scores], [*scores.values()], "o-", markersize=4, color=SCORE_COLOUR, label=f"{len(scores)} frames")
    axes.axhline(verdict.p_fake, color="black", linewidth=1, label=f"the video, {verdict.p_fake:.3f}")
    blind = [frame.seconds for frame in verdict.frames if frame.p_fake is None]
    if blind:
        axes.plot(blind, [0.0] * len(blind), "x", color="0.5", clip_on=False, label=f"{len(blind)} without the face")
    time, text = verdict.telling_seconds, f"most telling, {verdict.telling_seconds:.1f} s"
    axes.plot([time], [scores[time]], "o", markersize=11, fillstyle="none", color=TELLING_COLOUR, label=text)
    axes.set(title=f"{Path(verdict.image).name}: {verdict.label}", xlabel="seconds", ylim=(-0.03, 1.03))
    axes.set_ylabel("probability of being forged" if verdict.is_calibrated else "p_fake (not calibrated)")
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    FigureCanvasAgg(figure)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def draw_losses(path: str | Path, histories: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw (step, loss) of several trainings, one panel each, into a picture."""
    figure = Figure(figsize=(3.2 * len(histories), 2.8), layout="constrained")
    for axes, (name, losses) in zip(
        figure.subplots(1, len(histories), squeeze=False)[0], histories.items(), strict=True
    ):
        axes.plot(*zip(*losses, strict=True))
        axes.set(title=name, xlabel="step", ylabel="loss", ylim=(0, None))
    _save(figure, path)


def draw_rounds(path: str | Path, titles: Sequence[str], attention: np.ndarray, p_fake: np.ndarray) -> None:
    """Draw how attention to the boundary branch and p_fake, both (N, T), change over T rounds, one panel an image."""
    columns = min(4, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.5 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    rounds = np.arange(1, attention.shape[1] + 1)
    for axes, title, looked, scores in zip(panels, titles, attention, p_fake, strict=False):
        axes.plot(rounds, looked, "o-", markersize=4, label="attention to boundary (rest: frequency; sum 1)")
        axes.plot(rounds, scores, "s--", markersize=4, color=TELLING_COLOUR, label="p_fake after the round")
        axes.set(xlabel="round", xticks=rounds, ylim=(-0.03, 1.03))
        axes.label_outer()
        axes.set_title(title, fontsize="small")
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    _save(figure, path)


def draw_attention(path: str | Path, labels: np.ndarray, attention: np.ndarray) -> None:
    """Draw how attention (N, T) to the boundary branch is distributed in each class, one panel a round."""
    figure = Figure(figsize=(2.9 * attention.shape[1] + 0.5, 3.2), layout="constrained")
    panels = figure.subplots(1, attention.shape[1], sharey=True, squeeze=False)[0]
    edges = np.linspace(0, 1, 31)
    for number, (axes, looked) in enumerate(zip(panels, attention.T, strict=True), 1):
        for label, name, colour in ((0, "real", REAL_COLOUR), (1, "fake", TELLING_COLOUR)):
            values = looked[labels == label]
            if len(values):
                parts = np.histogram(values, edges)[0] / len(values)
                axes.stairs(parts, edges, label=f"{name} ({len(values)})", color=colour, linewidth=1.5)
        axes.set(title=f"round {number}", xlim=(0, 1))
    panels[0].set(ylabel="part of the class")
    panels[0].legend(fontsize="small")
    figure.supxlabel(
        "attention to the boundary branch; the rest goes to frequency, so that both sum to 1", fontsize="small"
    )
    _save(figure, path)


def draw_rocs(path: str | Path, scored: Mapping[str, Predictions]) -> None:
    """Draw the ROC curves of several models on the same items into a picture."""
    figure = Figure(figsize=(6, 5.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for number, (name, items) in enumerate(scored.items()):
        curve = RankedScores(items.labels, items.p_fake).curve()
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(curve.fpr, curve.tpr, style, linewidth=1.2, label=f"{name}: {curve.auc():.3f}")
    axes.set(xlabel="reals called fake", ylabel="fakes called fake", title="ROC", aspect="equal")
    axes.legend(loc="lower right", fontsize="x-small", title="AUC", title_fontsize="small")
    _save(figure, path)


def draw_aucs(path: str | Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the AUC of each model with its interval, and one dot a seed, into a picture.

    rows: of `m2f2 compare`, by model: `auc` of the mean score as value, low and high; `aucs` of the seeds.
    """
    figure = Figure(figsize=(6.5, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows.values()):
        auc = row["auc"]
        reach = [[auc["value"] - auc["low"]], [auc["high"] - auc["value"]]]
        axes.errorbar(auc["value"], place, xerr=reach, fmt="|", color=SCORE_COLOUR, capsize=3, markersize=9)
        axes.plot(row["aucs"], [place] * len(row["aucs"]), "o", color=TELLING_COLOUR, markersize=3.5)
    axes.axvline(0.5, color="0.7", linewidth=1)
    axes.set_yticks(range(len(rows)), [*rows])
    axes.invert_yaxis()
    axes.set(xlabel="AUC; bar: mean score of the seeds, 95 % interval; dots: seeds")
    _save(figure, path)


def draw_curves(path: str | Path, runs: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> None:
    """Draw (step, validation AUC) of several models, one colour a model and one line a seed, into a picture."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, curves) in enumerate(runs.items()):
        style, colour = ("-", "--", ":")[number // 10 % 3], f"C{number % 10}"
        for points in curves:
            axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1, label=name)
    lines, names = axes.get_legend_handles_labels()
    known = dict(zip(names, lines, strict=True))
    axes.set(xlabel="step", ylabel="validation AUC")
    figure.legend(known.values(), known.keys(), loc="outside right upper", fontsize="x-small")
    _save(figure, path)


def draw_robustness(path: str | Path, report: Mapping[str, Any]) -> None:
    """Draw AUC (above) and flip rates (below), with 95 % intervals, over strength per degradation into a picture.

    report: of `llava.evaluation.robustness.robustness_report`.
    """
    kinds = report["degradations"]
    figure = Figure(figsize=(3 * len(kinds), 5.6), layout="constrained")
    axes = figure.subplots(2, len(kinds), sharey="row", sharex="col", squeeze=False)
    whole = report["undegraded"]["auc"]
    for (above, below), (kind, numbers) in zip(axes.T, kinds.items(), strict=True):
        above.axhline(whole["value"], color="0.6", linewidth=1, label=f"undegraded, AUC {whole['value']:.3f}")
        above.set(title=kind)
        _draw_points(above, numbers["points"], "auc", "AUC")
        for shift, (name, label) in enumerate(FLIP_CURVES.items(), -1):
            _draw_points(below, numbers["points"], name, label, 0.15 * shift)
        below.set(xlabel=numbers["unit"])
        strengths = [point["strength"] for point in numbers["points"]]
        below.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axes[0, 0].set(ylabel="AUC")
    axes[0, 0].legend(fontsize="x-small")
    axes[1, 0].set(ylabel="share of verdicts")
    axes[1, 0].set_ylim(bottom=-0.01)
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    _save(figure, path)


def draw_confusion(path: str | Path, what: str, part: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Draw what was edited (rows) against what the text names (columns), shaded by the part of its row: a picture.

    part: of `llava.evaluation.grounding.naming_report`; what: `region` or `artefact`.
    """
    rows = part["confusion"]
    counts = np.array([[said.get(column, 0) for column in columns] for said in rows.values()])
    interval = _bounded(part["accuracy"])
    title = f"{part['n']} images: right {interval}, chance {part['chance']['value']:.3f}"
    figure = _shaded(_row_shares(counts), [*rows], columns, counts.astype(str), title)
    figure.axes[0].set(xlabel=f"{what} named in the text", ylabel=f"edited {what}")
    _save(figure, path)


def draw_class_confusion(path: str | Path, report: Mapping[str, Any], level: str = "frame") -> None:
    """Draw the true class (rows) against the class answered (columns), as shares of the row and counts: a picture.

    report: of `llava.evaluation.metrics.detection_report`. Raises ValueError without its part `multiclass`.
    """
    if "multiclass" not in report:
        raise ValueError("The report has no part 'multiclass'; give that of a detector of three or more classes.")
    part = report["multiclass"][level]
    classes, counts = part["confusion"]["classes"], np.array(part["confusion"]["counts"])
    shares = _row_shares(counts)
    texts = np.vectorize("{:.0%}\n({})".format)(shares, counts)
    title = f"{counts.sum()} items: right {_bounded(part['accuracy'])}"
    figure = _shaded(shares, classes, classes, texts, title)
    figure.axes[0].set(xlabel="class answered", ylabel="true class")
    _save(figure, path)


def draw_matrix(path: str | Path, report: Mapping[str, Any], level: str = "frame") -> None:
    """Draw the AUC of each model (rows) on each set (columns), with its interval and a word of leaks: a picture.

    report: of `m2f2 evaluate` with several models or sets. White is 0.5 and less, or no score.
    """
    models, sets, cells = report["models"], report["sets"], report["cells"]
    found = {(cell["model"], cell["set"]): cell for cell in cells}
    values, texts = np.full((len(models), len(sets)), np.nan), np.full((len(models), len(sets)), "-", dtype=object)
    for (i, model), (j, name) in product(enumerate(models), enumerate(sets)):
        cell = found[model, name]
        if "problem" in cell or cell[level]["value"] is None:
            continue
        values[i, j] = cell[level]["value"]
        leak = f"\nleak: {cell['shared_groups']} groups" if cell["shared_groups"] else ""
        texts[i, j] = _bounded(cell[level]).replace(" ", "\n", 1) + leak
    rows = [f"{name}\ntrained on {about['trained_on']}" for name, about in models.items()]
    figure = _shaded(values, rows, [*sets], texts, f"AUC of {level}s, [95 % interval]", 0.5, "AUC")
    longest = max(len(line) for row in rows for line in row.splitlines())
    figure.set_size_inches(2 + 0.08 * longest + 1.4 * len(sets), 1.8 + 0.9 * len(models))
    figure.axes[0].set(xlabel="tested on")
    _save(figure, path)


def _shaded(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    texts: np.ndarray,
    title: str,
    least: float = 0.0,
    meaning: str = "part of the row",
) -> Figure:
    """Draw a table of texts, each cell shaded by its value, white from `least` down; meaning: what a value is."""
    figure = Figure(figsize=(1.8 + 0.95 * len(columns), 1.8 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(values, cmap="Blues", vmin=least, vmax=1, aspect="auto")
    for (i, j), text in np.ndenumerate(texts):
        is_dark = values[i, j] > (least + 1) / 2
        axes.text(j, i, text, ha="center", va="center", color="white" if is_dark else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize="medium")
    figure.colorbar(shown, ax=axes, label=meaning)
    return figure


def _row_shares(counts: np.ndarray) -> np.ndarray:
    """Give counts as parts of their row; an empty row has none."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _bounded(interval: Mapping[str, Any]) -> str:
    """Write a value with its bounds, where it has them."""
    limits = "" if interval["low"] is None else f" [{interval['low']:.3f}, {interval['high']:.3f}]"
    return f"{interval['value']:.3f}{limits}"


def _draw_points(axes: Axes, points: Sequence[Mapping[str, Any]], name: str, label: str, shift: float = 0.0) -> None:
    """Draw one number of each point with its interval; a point that is undefined is left out."""
    shown = [(i + shift, point[name]) for i, point in enumerate(points) if point[name]["low"] is not None]
    places, values = [i for i, _ in shown], [v["value"] for _, v in shown]
    reach = [[v["value"] - v["low"] for _, v in shown], [v["high"] - v["value"] for _, v in shown]]
    axes.errorbar(places, values, yerr=reach, marker="o", markersize=4, capsize=2, linewidth=1.2, label=label)


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_path(path) as staged:
        figure.savefig(staged, dpi=DPI)
