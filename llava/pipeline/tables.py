"""Verdicts and explanations as a table for people and as a csv file."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava.core.runtime import atomic_path
from llava.core.types import LABEL_NAMES, Explanation, Verdict, VerdictLabel, VideoVerdict

PIPE_WIDTH = 200
COLOURS = {VerdictLabel.REAL: "green", VerdictLabel.FAKE: "red"}
AGREEMENT = {True: "agrees", False: "DISAGREES", None: "-"}
VERDICT_FIELDS = ("image", "face", "face_count", "label", "p_fake", "threshold", "calibration", "detector")
MORE_FIELDS = ("raw_p_fake", "band", "coverage", "likelihood_ratio", "prior", "p_fake_range", "face_box", "reason")
TEXT_FIELDS = ("question", "about", "text", "text_verdict", "agrees")
VIDEO_FIELDS = ("frames", "frames_with_face", "damaged", "trim", "spread", "telling_seconds")


def table_text(answers: Sequence[Verdict | Explanation]) -> str:
    """Give a table, in colour and as wide as the window on a terminal, plain and wide in a file or pipe."""
    has_text = any(isinstance(answer, Explanation) for answer in answers)
    is_calibrated = any(verdict_of(answer).is_calibrated for answer in answers)
    table = Table(caption=_caption(answers), caption_justify="left") if is_calibrated else Table()
    score = "probability" if is_calibrated else "p_fake\n(not calibrated)"
    for head in ("verdict", score, "image", *(("text", "text") if has_text else ()), "remark"):
        table.add_column(head, overflow="fold")
    if has_text:
        table.columns[3].header = "text and\nverdict"
    for answer in answers:
        table.add_row(*_cells(answer))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def write_csv(path: str | Path, answers: Sequence[Verdict | Explanation]) -> None:
    """Write one row per face or video; columns of texts and videos are there when there is one."""
    has_text = any(isinstance(answer, Explanation) for answer in answers)
    has_video = any(isinstance(verdict_of(answer), VideoVerdict) for answer in answers)
    fields = [*VERDICT_FIELDS, *MORE_FIELDS, *(VIDEO_FIELDS if has_video else ()), *(TEXT_FIELDS if has_text else ())]
    with atomic_path(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(_flat(answer) for answer in answers)


def verdict_of(answer: Verdict | Explanation) -> Verdict:
    """Give the verdict of an answer."""
    return answer.verdict if isinstance(answer, Explanation) else answer


def _cells(answer: Verdict | Explanation) -> list[str]:
    verdict = verdict_of(answer)
    colour = COLOURS.get(verdict.label, "yellow")
    which = f" (face {verdict.face} of {verdict.face_count})" if verdict.face_count > 1 else ""
    p_fake = verdict.score_text if verdict.is_calibrated else "-" if verdict.p_fake is None else f"{verdict.p_fake:.3f}"
    text = [AGREEMENT[answer.agrees], escape(answer.told)] if isinstance(answer, Explanation) else []
    remark = " ".join([verdict.remark, answer.remark if isinstance(answer, Explanation) else ""]).strip()
    return [f"[{colour}]{verdict.label}[/]", p_fake, escape(verdict.image + which), *text, escape(remark)]


def _caption(answers: Sequence[Verdict | Explanation]) -> str:
    """Say what the probabilities were calibrated on, and where the band lies."""
    shown = {}
    for verdict in map(verdict_of, answers):
        if verdict.band is not None and verdict.coverage is not None:
            low, high = verdict.band
            shown[verdict.calibration] = (
                f"UNCERTAIN from {100 * low:.1f} % to {100 * high:.1f} %, coverage {100 * verdict.coverage:g} %"
            )
    return escape("\n".join(f"{calibration}; {band}" for calibration, band in shown.items()))


def _flat(answer: Verdict | Explanation) -> dict[str, Any]:
    verdict = verdict_of(answer)
    row = verdict.to_dict() | {"p_fake_range": verdict.p_fake_range}
    if isinstance(verdict, VideoVerdict):
        row |= {name: getattr(verdict, name) for name in ("frames_with_face", "telling_seconds")}
        row["frames"] = len(verdict.frames)
    for name in ("face_box", "band", "p_fake_range"):
        row[name] = " ".join(map(str, row[name] or ()))
    if isinstance(answer, Explanation):
        said = "" if answer.text_verdict is None else LABEL_NAMES[answer.text_verdict]
        row |= {name: getattr(answer, name) for name in TEXT_FIELDS} | {"text_verdict": said}
    return row
