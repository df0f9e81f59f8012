"""The demonstration as a page: what was learned from, how, how good it is, and two pictures not seen before.

`python -m llava.jobs.demo_report`, started by `scripts/demo.sh`.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging
from llava.core.types import REGIONS, STARTER
from llava.data.answer_texts import label_free_question
from llava.data.images import IMAGE_SUFFIXES, read_image
from llava.data.inputs import FetchLimits, NamedImage, open_input
from llava.evaluation.pictures import draw_losses, draw_reliability
from llava.evaluation.predictions import read_csv
from llava.evaluation.tables import scores_of
from llava.jobs.case_file import (
    Section,
    entry_of,
    entry_section,
    figure,
    fill,
    outlined,
    png_bytes,
    render_page,
    shrink,
    write_page,
)
from llava.jobs.forged_files import TABLE
from llava.pipeline.pipeline import Pipeline
from llava.pipeline.settings import DEMO_MODEL, FaceSettings

log = logging.getLogger(__name__)

LEAD = (
    "This page was made by “make demo”. First the starter, the model that comes with the program, was asked about "
    "photographs that it has never seen. Then all three stages of training were run, small, from the starter's "
    "detector on forged versions of {photos} photographs: a demonstration that the whole path works. The model made so "
    "knows the few people it was shown: its verdicts mean nothing for any other picture."
)
LIMITS = (
    "The held-out pictures show one person. What is measured on them says how the model does on this portrait, and "
    "nothing about other people; intervals over people cannot be given.",
    "The forgeries were made by this program. Real forgeries look different.",
    "The training photographs are real and unedited; their forged versions were used to train on and are not shown. "
    "Only the Navy portrait of Rear Admiral Grace Hopper (1906-1992), a historical figure, is shown in an edited form. "
    "No endorsement by NASA, the US Navy or anybody shown is implied.",
)
INTEGRITY_NOTE = (
    "The blind template gives the most frequent training answer to such a question and never sees a picture. "
    "Swapped means that an answer is scored against the truth of another picture. With one held-out person there is no "
    "interval, so nothing is called clear here."
)
STARTER_NOTE = (
    "None of these people were learned from by the starter, and nothing was chosen by these pictures. They are four "
    "real photographs and one edited one: that says next to nothing of how often it is right; its card does."
)
DEMO_FACES = Path("utils") / "demo_faces"
STAGES = {
    "stage 1: detector": "stage_1/phases/0/history.json",
    "tiny LLaVA base": "base/history.json",
    "stage 2: adapter": "stage_2-delta/trainer_state.json",
    "stage 3: LoRA": "stage_3-delta/trainer_state.json",
}


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Which demonstration is shown."""

    folder: str = setting("outputs/demo", "folder of the demonstration; it gets report.html")
    model: str = setting(DEMO_MODEL, "its finished explainer: folder, or name in checkpoints/")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; gives the exit code."""
    setup_logging()
    settings = parse(ReportSettings, argv, "Show a demonstration as a page.", prog="demo_report")
    try:
        path = write_report(Path(settings.folder), settings.model)
    except (ValueError, FileNotFoundError) as error:
        log.error("%s", error)
        return 2
    log.info("wrote %s", path)
    return 0


def write_report(out: Path, model: str) -> Path:
    """Write report.html into the demonstration's folder from what its steps left there; gives its path.

    Raises FileNotFoundError where a step left nothing.
    """
    rows = _table(out / "data" / TABLE)
    photos = len({row["original"] for row in rows})
    sections = [
        _starter(out),
        _data(rows),
        _learning(out),
        _scores(out),
        _integrity(out),
        *_cases(out, model, rows),
        _time(json.loads((out / "seconds.json").read_text(encoding="utf-8"))),
    ]
    path = out / "report.html"
    write_page(path, render_page("A demonstration", sections, LEAD.format(photos=photos), LIMITS))
    return path


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _starter(out: Path) -> Section:
    """Say what the starter says of the embedded photographs, and of the Navy portrait with one region edited."""
    (edited,) = [row for row in _table(out / "edited" / TABLE) if row["label"] == "fake"]
    truths = {path: "real" for path in sorted(DEMO_FACES.iterdir()) if path.suffix in IMAGE_SUFFIXES}
    truths[out / "edited" / edited["file"]] = f"{edited['region']} edited ({edited['artefact'].replace('_', ' ')})"
    answers = Pipeline.from_pretrained(STARTER).explain_all(list(truths), label_free_question(None))
    cells = [
        (path.name, truth, answer.verdict.label, answer.verdict.score_text, answer.text or answer.verdict.reason)
        for (path, truth), answer in zip(truths.items(), answers, strict=True)
    ]
    head = ("picture", "the truth", "verdict", "", "in words, or why not")
    body = fill("table.html", head=head, rows=cells, note=STARTER_NOTE)
    return Section(title="What the starter says", body=body, anchor="starter")


def _data(rows: list[dict[str, str]]) -> Section:
    """Count what there is to learn from and to be tested on."""
    counts = Counter((row["split"], row["label"]) for row in rows)
    people = {
        split: sorted({row["group"] for row in rows if row["split"] == split}) for split in ("train", "val", "test")
    }
    use = {"train": "learned from", "val": "chooses weights and threshold", "test": "held out, never learned from"}
    cells = [
        (use[split], ", ".join(groups), counts[split, "real"], counts[split, "fake"])
        for split, groups in people.items()
    ]
    body = fill(
        "table.html",
        head=("", "photographs of", "untouched versions", "forged versions"),
        rows=cells,
        note="A version is the photograph a little turned, scaled and lit differently. A forged version has one region "
        "edited with one artefact, or the whole face blended with a changed copy of itself; where is known exactly.",
    )
    return Section(title="What it learned from", body=body, anchor="data")


def _learning(out: Path) -> Section:
    """Show the losses of every stage."""
    histories = {name: _losses(out / file) for name, file in STAGES.items()}
    draw_losses(out / "losses.png", histories)
    ends = ", ".join(f"{name} from {losses[0][1]:.2f} to {losses[-1][1]:.2f}" for name, losses in histories.items())
    body = figure(
        (out / "losses.png").read_bytes(),
        f"Training loss by step: {ends}.",
        "Training loss by step. In stage 2 only the adapter learns to put the detector's evidence into words that the "
        "language model understands; in stage 3 the language model learns its answers with LoRA.",
    )
    return Section(title="How it learned", body=body, anchor="learning")


def _losses(path: Path) -> list[tuple[int, float]]:
    history = json.loads(path.read_text(encoding="utf-8"))
    rows = history["log_history"] if isinstance(history, dict) else history
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def _scores(out: Path) -> Section:
    """Show the scores on the held-out person, with ROC and reliability."""
    rows = scores_of(out)
    predictions = read_csv(out / "scores" / "predictions.csv")
    draw_reliability(out / "scores" / "reliability.png", predictions, {"score": predictions.p_fake})
    shown = {
        "roc.png": (
            "ROC curve of the detector on the held-out person.",
            "Real versions called forged against forged ones found.",
        ),
        "reliability.png": (
            "Reliability diagram of the detector's score on the held-out person.",
            "How many of the pictures with such a score are forged. On the diagonal the score would be a probability; "
            "this detector is not calibrated, because that takes validation pictures of more people.",
        ),
    }
    pictures = (figure((out / "scores" / name).read_bytes(), *words) for name, words in shown.items())
    table = fill("table.html", head=("", "on the held-out person"), rows=rows, note="")
    return Section(title="How good it is", body=Markup("").join([table, *pictures]), anchor="scores")


def _integrity(out: Path) -> Section:
    """Say in words whether the answers depend on the picture, or could have been given without looking."""
    report = json.loads((out / "integrity.json").read_text(encoding="utf-8"))
    body = fill("sentences.html", sentences=report["verdict"], note=INTEGRITY_NOTE)
    return Section(title="Do the words depend on the picture?", body=body, anchor="integrity")


def _cases(out: Path, model: str, rows: list[dict[str, str]]) -> Iterator[Section]:
    """Show the held-out photograph, and the first of its forgeries in which one region was edited."""
    tested = [row for row in rows if row["split"] == "test"]
    untouched = next(row for row in tested if row["label"] == "real")
    forged = next(row for row in tested if row["region"] in REGIONS)
    pipeline = Pipeline.from_pretrained(model, faces=FaceSettings(face="off"))
    truth = (
        f"The truth: this is the portrait with the {forged['region']} edited ({forged['artefact'].replace('_', ' ')})."
    )
    yield _case(
        pipeline,
        out,
        untouched,
        "The demonstration's model: the held-out portrait, untouched",
        "The truth: nothing was edited.",
        "real",
    )
    yield _case(pipeline, out, forged, "The demonstration's model: the portrait edited", truth, "forged")


def _case(pipeline: Pipeline, out: Path, row: Mapping[str, str], title: str, truth: str, anchor: str) -> Section:
    image = open_input(str(out / "data" / row["file"]), FetchLimits())
    if not isinstance(image, NamedImage) or image.pixels is None:
        raise ValueError(f"{image.name}: {image.problem}")
    (finding,) = pipeline.explained_findings([image], label_free_question(None))
    section = entry_section(entry_of(finding, image), anchor)
    picture = Markup("")
    if row["mask"]:
        edited = outlined(image.pixels, np.asarray(read_image(out / "data" / row["mask"]))[..., 0] > 0)
        picture = figure(
            png_bytes(shrink(edited)), f"The edited {row['region']}, outlined.", "Outlined: what was edited."
        )
    return Section(title=title, body=fill("truth.html", truth=truth, picture=picture) + section.body, anchor=anchor)


def _time(seconds: Mapping[str, float]) -> Section:
    rows = [(name, f"{value:.0f}") for name, value in seconds.items()]
    total = ("all of it", f"{sum(seconds.values()):.0f}")
    return Section(
        title="How long it took",
        body=fill("table.html", head=("step", "seconds"), rows=[*rows, total], note=""),
        anchor="time",
    )


if __name__ == "__main__":
    raise SystemExit(main())
