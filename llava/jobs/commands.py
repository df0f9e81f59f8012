"""What `m2f2 detect`, `m2f2 explain` and `m2f2 chat` do, and the table and csv file that they write."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from llava.core.config import setting, to_dict
from llava.core.runtime import Incomplete, atomic_path, batched, write_json
from llava.core.terminal import progress, text_of, window
from llava.core.types import LABEL_NAMES, STARTER, Explanation, Verdict, VerdictLabel, VideoVerdict
from llava.data.inputs import FetchLimits, NamedImage, NamedInput, NamedVideo, expand, in_order, open_input
from llava.pipeline.settings import PipelineSettings, VideoSettings, WordSettings, load
from llava.pipeline.verdict import Finding

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline

COLOURS = {VerdictLabel.REAL: "green", VerdictLabel.FAKE: "red"}
AGREEMENT = {True: "agrees", False: "DISAGREES", None: "-"}
VERDICT_FIELDS = ("image", "face", "face_count", "label", "p_fake", "threshold", "calibration", "detector")
MORE_FIELDS = (
    *("raw_p_fake", "band", "coverage", "real_coverage", "likelihood_ratio", "prior", "p_fake_range"),
    *("face_box", "face_landmarks", "face_roll", "reason"),
)
TEXT_FIELDS = ("question", "about", "text", "text_verdict", "agrees")
VIDEO_FIELDS = ("frames", "frames_with_face", "damaged", "trim", "spread", "telling_seconds")
QUIT = "/quit"
FILES = ("csv", "html", "json_file")
Ask = Callable[[Sequence[NamedImage]], Iterable[Finding]]
AskVideo = Callable[[NamedVideo], Finding]


def table_text(answers: Sequence[Verdict | Explanation]) -> str:
    """Give a table, in colour and as wide as the window on a terminal, plain and wide in a file or pipe."""
    has_text = any(isinstance(answer, Explanation) for answer in answers)
    is_calibrated = any(verdict_of(answer).is_calibrated for answer in answers)
    table = Table(caption=_caption(answers), caption_justify="left")
    score = "probability" if is_calibrated else "p_fake\n(not calibrated)"
    for head in ("verdict", score, "image", *(("text", "text") if has_text else ()), "remark"):
        table.add_column(head, overflow="fold")
    if has_text:
        table.columns[3].header = "text and\nverdict"
    for answer in answers:
        table.add_row(*_cells(answer))
    return text_of(table, on=window())


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
    text = [AGREEMENT[answer.agrees], escape(answer.placed_text)] if isinstance(answer, Explanation) else []
    remark = " ".join([verdict.remark, answer.remark if isinstance(answer, Explanation) else ""]).strip()
    return [f"[{colour}]{verdict.label}[/]", p_fake, escape(verdict.image + which), *text, escape(remark)]


def _caption(answers: Sequence[Verdict | Explanation]) -> str:
    """Say what the probabilities were calibrated on, where the band lies, and once what the detector can see."""
    verdicts = [verdict_of(answer) for answer in answers]
    shown = {}
    for verdict in verdicts:
        if verdict.band is not None and verdict.coverage is not None and verdict.real_coverage is not None:
            low, high = verdict.band
            shown[verdict.calibration] = (
                f"UNCERTAIN from {100 * low:.1f} % to {100 * high:.1f} %, coverage of real faces "
                f"{100 * verdict.real_coverage:g} %, of forged ones {100 * verdict.coverage:g} %"
            )
    bands = [f"{calibration}; {band}" for calibration, band in shown.items()]
    real_last = sorted(verdicts, key=lambda verdict: verdict.label == VerdictLabel.REAL)
    scopes = {verdict.scope: verdict.scope_text for verdict in real_last if verdict.scope_text}
    return escape("\n".join([*bands, *scopes.values()]))


def _flat(answer: Verdict | Explanation) -> dict[str, Any]:
    verdict = verdict_of(answer)
    row = verdict.to_dict() | {"p_fake_range": verdict.p_fake_range}
    if isinstance(verdict, VideoVerdict):
        row |= {name: getattr(verdict, name) for name in ("frames_with_face", "telling_seconds")}
        row["frames"] = len(verdict.frames)
    row["face_landmarks"] = [value for point in row["face_landmarks"] or () for value in point]
    for name in ("face_box", "face_landmarks", "band", "p_fake_range"):
        row[name] = " ".join(map(str, row[name] or ()))
    if isinstance(answer, Explanation):
        said = "" if answer.text_verdict is None else LABEL_NAMES[answer.text_verdict]
        row |= {name: getattr(answer, name) for name in TEXT_FIELDS} | {"text_verdict": said}
    return row


@dataclass(frozen=True, kw_only=True)
class AskSettings(PipelineSettings):
    """Which model is asked."""

    model: str = setting(STARTER, "starter (the one in the package), folder, name in checkpoints/, or hub id")
    fetch: FetchLimits = setting(FetchLimits())


@dataclass(frozen=True, kw_only=True)
class DetectSettings(AskSettings):
    """What is looked at, and how the answers are given."""

    paths: list[str] = setting(help="images, videos, folders, zips, quoted globs, http(s) addresses", positional=True)
    json: bool = setting(False, "print one JSON object per face (or video) and line instead of a table")
    csv: str | None = setting(None, "write the answers to this file as well")
    html: str | None = setting(None, "write a case file to read and print: pictures, verdicts, what they rest on")
    json_file: str | None = setting(None, "write the case file as JSON, with the same facts and pictures")
    timeline: str | None = setting(None, "draw the scores of each video over time into this folder")
    video: VideoSettings = setting(VideoSettings())


@dataclass(frozen=True, kw_only=True)
class ExplainSettings(DetectSettings, WordSettings):
    """What is asked."""

    question: str | None = setting(None, "what to ask; default: Determine the authenticity of this image.")


@dataclass(frozen=True, kw_only=True)
class ChatSettings(AskSettings, WordSettings):
    """What is talked about."""

    image: str = setting(help="image file or http(s) address", positional=True)


def detect(settings: DetectSettings) -> Iterator[str]:
    """Yield the verdicts as a table or as JSON lines. Raises Incomplete at the end when an input could not be read."""
    names = _checked_inputs(settings)
    pipeline = load(settings, settings.model, words=False)

    def ask_video(video: NamedVideo) -> Finding:
        return pipeline.video_finding(video, settings.video)

    yield from _answers(names, settings, pipeline, pipeline.findings, ask_video)


def explain(settings: ExplainSettings) -> Iterator[str]:
    """Yield the verdicts with their reasons, like `detect`."""
    names = _checked_inputs(settings)
    pipeline = load(settings, settings.model)
    from llava.pipeline.pipeline import generation_settings  # here, so that --help loads no torch

    words = generation_settings(settings.max_new_tokens, settings.temperature, seed=settings.seed)

    def ask(images: Sequence[NamedImage]) -> Iterator[Finding]:
        return pipeline.explained_findings(images, settings.question, words)

    def ask_video(video: NamedVideo) -> Finding:
        return pipeline.explained_video_finding(video, settings.question, settings.video, words)

    yield from _answers(names, settings, pipeline, ask, ask_video)


def chat(settings: ChatSettings) -> Iterator[str]:
    """Yield the verdict, then answers as they are written, until /quit or the end of the input."""
    (name,) = expand([settings.image])[:1]
    image = open_input(name, settings.fetch)
    if isinstance(image, NamedVideo):
        raise ValueError(f"{name}: a conversation is about one image; ask about a video with `m2f2 explain`.")
    if image.problem:
        raise ValueError(f"{name}: {image.problem}")
    pipeline = load(settings, settings.model)
    from llava.pipeline.pipeline import generation_settings

    words = generation_settings(settings.max_new_tokens, settings.temperature, seed=settings.seed)
    session = pipeline.chat(image, words)
    yield "".join(f"{line}\n" for line in (str(session.verdict), session.verdict.scope_text) if line)
    if not session.can_answer:
        raise Incomplete(f"{name}: there is nothing to talk about.")
    for question in _questions():
        yield from session.ask(question)
        assert session.last is not None
        yield "\n" + (f"{session.last.remark}\n" if session.last.remark else "")


def _checked_inputs(settings: DetectSettings) -> list[str]:
    """List the inputs; what is wrong with the command line is said here, before a model is loaded."""
    for name in FILES:
        file = getattr(settings, name)
        if file and Path(file).is_dir():
            raise ValueError(f"--{name.replace('_', '-')} {file!r} is a folder; give the name of a file.")
    if settings.timeline and Path(settings.timeline).is_file():
        raise ValueError(f"--timeline {settings.timeline!r} is a file; give the name of a folder.")
    return expand(settings.paths)


def _answers(
    names: Sequence[str], settings: DetectSettings, pipeline: Pipeline, ask: Ask, ask_video: AskVideo
) -> Iterator[str]:
    is_case = bool(settings.html or settings.json_file)
    answers, entries = [], []
    unread = 0
    for batch in _with_progress(names, settings.batch_size):
        inputs = {name: open_input(name, settings.fetch) for name in batch}
        unread += sum(isinstance(each, NamedImage) and each.pixels is None for each in inputs.values())
        for finding in in_order(list(inputs.values()), ask, ask_video):
            verdict = finding.verdict
            unread += isinstance(verdict, VideoVerdict) and not verdict.frames
            answers.append(finding.answer)
            if is_case:
                entries.append(_entry(finding, inputs[verdict.image]))
            if settings.json:
                yield json.dumps(finding.answer.to_dict(), ensure_ascii=False) + "\n"
    if not settings.json:
        yield table_text(answers)
    if settings.csv:
        write_csv(settings.csv, answers)
    if settings.timeline:
        from llava.pipeline.video import write_timelines  # here, because it brings what reads videos

        write_timelines(settings.timeline, answers)
    if is_case:
        _write_case(pipeline, entries, settings)
    if unread:
        raise Incomplete(f"{unread} of {len(names)} inputs could not be read; their rows say why.")


def _entry(finding: Finding, source: NamedInput) -> dict[str, Any]:
    from llava.jobs.case_file import entry_of  # here, because only a case file needs matplotlib and Jinja

    return entry_of(finding, source)


def _write_case(pipeline: Pipeline, entries: Sequence[dict[str, Any]], settings: DetectSettings) -> None:
    from llava.jobs.case_file import case_of, write_case_html

    left_out = {"paths", "json", "fetch", "timeline", "video", *FILES}
    asked = {name: value for name, value in to_dict(settings).items() if name not in left_out}
    if any(entry["video"] for entry in entries):
        asked |= {f"video.{name}": value for name, value in to_dict(settings.video).items()}
    case = case_of(pipeline, entries, asked)
    if settings.html:
        write_case_html(settings.html, case)
    if settings.json_file:
        write_json(settings.json_file, case)


def _with_progress(names: Sequence[str], size: int) -> Iterable[list[str]]:
    """Cut the names into batches, with a bar on standard error when there are many and somebody is watching."""
    batches = list(batched(names, size))
    return batches if len(batches) < 2 else progress(batches, "looking")


def _questions() -> Iterator[str]:
    """Give the questions that are typed, or piped in: those are shown as if they had been typed."""
    is_typed = sys.stdin.isatty()
    while True:
        sys.stdout.write("> ")
        sys.stdout.flush()
        line = sys.stdin.readline()
        question = line.strip()
        if not is_typed or not line:
            sys.stdout.write(f"{question}\n")
        if not line or question == QUIT:
            return
        if question:
            yield question
