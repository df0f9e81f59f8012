"""What are detectors worth that were taught by forgeries made in memory? The numbers of the starter, seed by seed.

Each detector is taken as it is saved, with its threshold, calibration and abstention. Faces of the portraits are cut
out as `m2f2 detect` does it; public sets are scored as they are, and cut out as well. What was scored once is not
scored again: scores lie in the output folder. Intervals: 95 %, by bootstrap over groups (persons, videos); shares of
verdicts: Wilson, with groups as trials.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from llava.core.config import parse, setting, to_dict
from llava.core.runtime import atomic_path, pick_device, setup_logging, write_json
from llava.core.terminal import console, progress, titled_table
from llava.core.types import FAKE, REAL, REGIONS, Record, VerdictLabel
from llava.data.answer_texts import SIGNS
from llava.data.images import list_images
from llava.data.sources import DataConfig, Source, open_source, split_of
from llava.data.splits import refuse_groups
from llava.detectors.base import Detector, load
from llava.detectors.published import ready_detector
from llava.evaluation.blind import against_blind_guess
from llava.evaluation.metrics import class_aucs
from llava.evaluation.predictions import Predictions
from llava.evaluation.reliability import verdict_report
from llava.evaluation.robustness import Verdicts
from llava.evaluation.tables import interval_text, run_script
from llava.jobs.cost import TIMED, milliseconds, peak_memory
from llava.ops.degrade import DEGRADATIONS, VERSIONS, Change
from llava.ops.forge import ARTEFACTS, SELF_BLENDED, ForgeConfig
from llava.train.evaluate import training_of
from llava.train.recipe import forging_source
from llava.train.scoring import answers_over, changed, kept_scores, measured, score

Row: TypeAlias = dict[str, Any]  # value, low, high; images and groups as far as they make sense
Rows: TypeAlias = dict[str, Row]
LOCAL = tuple(kind for kind in ARTEFACTS if kind != SELF_BLENDED)
PLAIN_BLENDS = "self_blended, plainly"
BLENDS = ("trace", "artefact", (SELF_BLENDED,))
LOCAL_MEAN = "mean of the local edits"
DELIVERED: dict[str, Change | None] = {"as it is": None, **{name: VERSIONS[name] for name in ("JPEG 50", "half size")}}
TURNING = (*(Change("JPEG", quality) for quality in DEGRADATIONS["JPEG"].strengths), VERSIONS["half size"])
DEMO_FACES = Path(__file__).resolve().parents[1] / "utils" / "demo_faces"
WAYS = {"as they are": False, "cut out": True}  # of showing the faces of a public set; `m2f2 detect` cuts them out


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which detectors are measured, and on what; a set that is not given is skipped."""

    detectors: tuple[str, ...] = setting(help="folders of trained detectors, one a seed", positional=True)
    portraits: str | None = setting(None, "folder of real faces with manifest.csv, one person a group")
    ddvqa: str | None = setting(None, "folder of the DD-VQA faces: FaceForensics++ c40, and c23")
    dfdc: str | None = setting(None, "folder of the DFDC faces")
    faces_rvf: str | None = setting(None, "folder of the faces by StyleGAN and of FFHQ")
    three_class: str | None = setting(None, "folder of the faces real, deepfake and ai_generated")
    splits: tuple[str, ...] = setting(
        ("test", "test_b"), "splits of the portraits; calibration and stability are those of the first"
    )
    batch_size: int = setting(32, "images per batch")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where the sets are scored")
    resamples: int = setting(2000, "bootstrap resamples behind each interval")
    output_dir: str = setting("outputs/starter", "folder of starter.md, starter.json and of all scores")


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A set of real and fake faces: the setting that says where it is, and how its table is read."""

    setting: str
    test: str = "test"
    others: tuple[str, ...] = ("train", "val")  # splits whose reals say more of false alarms
    options: Mapping[str, Any] = field(default_factory=dict)


_DDVQA = {"columns": {"group": "ffpp_ids", "class_name": "manipulation"}, "group_ids": True}
PUBLIC_SETS = {
    "ddvqa c40": PublicSet(setting="ddvqa", others=("train", "heldval"), options=_DDVQA),
    "ddvqa c23": PublicSet(setting="ddvqa", test="test_c23", others=(), options=_DDVQA),
    "dfdc": PublicSet(setting="dfdc"),
    "faces_rvf": PublicSet(setting="faces_rvf"),
    "three_class": PublicSet(setting="three_class", options={"columns": {"class_name": "label"}}),
}


def main() -> None:
    """Measure; write the tables after each detector, and print them."""
    settings = parse(Settings, description=(__doc__ or "").splitlines()[0])
    setup_logging()
    folders = {name: ready_detector(name) for name in settings.detectors}
    if not folders:
        raise ValueError("No detector is named; give the folder of one, or of several that differ in the seed.")
    about: dict[str, dict[str, str]] = {}
    tables: dict[str, dict[str, Rows]] = {}
    for name, folder in folders.items():
        bench = Bench(folder, settings)
        about[name] = bench.about()
        for title, rows in (*measure(bench), ("Cost, one core", cost_rows(bench.detector, bench.folder))):
            tables.setdefault(title, {})[name] = rows
        write_tables(about, tables, Path(settings.output_dir))
    for title, found in tables.items():
        head, *cells = lines(found)
        table = titled_table(title, *head)
        for row in cells:
            table.add_row(*row)
        console().print(table)


def measure(bench: Bench) -> Iterator[tuple[str, Rows]]:
    """Yield title and rows of each table of one detector, but for its cost. Raises ValueError or FileNotFoundError."""
    settings = bench.settings
    untouched: dict[str, Shown] = {}
    if settings.portraits is None:
        _skip("portraits")
    for number, split in enumerate(settings.splits if settings.portraits else ()):
        forged = Forged(bench, split)
        untouched[f"portraits {split}"] = forged
        yield f"AUC on forgeries of unseen people, portraits {split}", forged.auc_rows()
        yield f"Named right, portraits {split}", forged.naming_rows()
        if number == 0:
            yield f"Calibration and stability, portraits {split}", {**forged.calibration_rows(), **forged.flip_rows()}
    aucs: Rows = {}
    for name, public in progress(list(PUBLIC_SETS.items()), "public sets"):
        if getattr(settings, public.setting) is None:
            _skip(public.setting)
            continue
        for way, is_cut in WAYS.items():
            shown = Shown(bench, f"{name}, {way}", *public_faces(settings, public, is_cut))
            untouched[f"{name}, {way}"] = shown
            test = Predictions(tuple(p for p in shown.scores() if p.split == public.test))
            aucs |= {f"{name}, {kind}, {way}": row for kind, row in public_aucs(test, settings.resamples).items()}
    if aucs:
        yield "AUC on public sets, test splits", aucs
    if untouched:
        alarms = {name: shown.verdict_rows() for name, shown in progress(list(untouched.items()), "untouched faces")}
        said = {f"{name}, {label}": row for name, rows in alarms.items() for label, row in rows.items()}
        yield "Verdicts on untouched faces", said


def _skip(name: str) -> None:
    console().print(f"--{name} is not given: skipped.")


class Bench:
    """A detector with what is needed to score it, and its scores of before."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.detector, self.folder, self.settings = load(folder), folder, settings
        self.device = pick_device(settings.device)
        forge = training_of(folder).forge
        if forge is None:
            raise ValueError(
                f"{str(folder)!r} was trained on no forgeries made in memory (run.json); give one that was."
            )
        self.forge = forge
        identity = json.dumps([self.detector.fingerprint(), to_dict(self.detector.config), to_dict(forge)])
        self.cache = Path(settings.output_dir) / "scores" / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def about(self) -> dict[str, str]:
        """Say which weights it has, and from where on it says FAKE."""
        decision = self.detector.decision
        return {
            "weights": self.detector.fingerprint(),
            "threshold": f"{decision.threshold:.4f}, chosen on {decision.chosen_on}",
            "calibration": "none" if self.detector.calibration is None else str(self.detector.calibration),
        }

    def scores(self, name: str, source: Source, records: Sequence[Record], change: Change | None = None) -> Predictions:
        """Score records, or read what they scored before."""
        path = self.cache / f"{name}{'' if change is None else f' {change.kind} {change.strength:g}'}.csv"
        degrade = None if change is None else partial(changed, change)
        make = partial(score, self.detector, source, records, self.device, self.settings.batch_size, degrade=degrade)
        return kept_scores(path, records, make)


def public_faces(settings: Settings, public: PublicSet, is_cut: bool) -> tuple[Source, list[Record]]:
    """Open a public set: the test split, and the reals of its other splits."""
    path = Path(getattr(settings, public.setting)) / "manifest.csv"
    source = open_source(DataConfig(source="csv", path=str(path), face_crop=is_cut, **public.options))
    others = [record for split in public.others for record in split_of(source, split) if record.label == REAL]
    return source, [*split_of(source, public.test), *others]


class Shown:
    """Faces that are shown in one way, and what a detector says of them."""

    def __init__(self, bench: Bench, name: str, source: Source, records: Sequence[Record]) -> None:
        self.bench, self.name, self.source, self.records = bench, name, source, records

    def scores(self, change: Change | None = None) -> Predictions:
        """Score all of them."""
        return self.bench.scores(self.name, self.source, self.records, change)

    def verdict_rows(self) -> Rows:
        """Give the shares FAKE, UNCERTAIN and REAL of untouched faces, and of FAKE that outlasts the stability rule."""
        predictions, labels = self.scores(), self.bench.detector.labels
        said = np.array(labels(predictions.p_fake))
        verdicts = Verdicts(predictions=predictions, labels=said, changed={})
        untouched = predictions.labels == REAL
        accused = untouched & (said == VerdictLabel.FAKE)
        stays = accused.copy()
        chosen = [record for record, is_accused in zip(self.records, accused, strict=True) if is_accused]
        for change in VERSIONS.values() if chosen else ():
            again = self.bench.scores(f"{self.name}, FAKE", self.source, chosen, change)
            stays[accused] &= np.array(labels(again.p_fake)) != VerdictLabel.REAL
        shares = (VerdictLabel.FAKE, VerdictLabel.UNCERTAIN, VerdictLabel.REAL)
        rows = {label.value: verdicts.share(said == label, untouched) for label in shares}
        return rows | {f"{VerdictLabel.FAKE} after the stability rule": verdicts.share(stays, untouched)}


class Forged(Shown):
    """A split of the portraits, cut out, with one forgery of each kind as the recipe forges what is held out."""

    def __init__(self, bench: Bench, split: str) -> None:
        self.split, self.resamples = split, bench.settings.resamples
        portraits = DataConfig(source="csv", path=f"{bench.settings.portraits}/manifest.csv", cache=True)
        source = forging_source(portraits, bench.forge, split)
        super().__init__(bench, f"portraits {split}", source, source.records)
        groups = {record.group for record in source.records}
        refuse_groups(groups, bench.detector.trained_on, f"split {split!r} of the portraits", "trained on")
        plainly = replace(bench.forge, held_out=ForgeConfig(hulls=True))
        self._plain = forging_source(portraits, plainly, split)

    def plain_scores(self, change: Change | None = None) -> Predictions:
        """Score the untouched faces beside blends by the defaults of `ForgeConfig`, with hulls."""
        records = [r for r in self._plain.records if r.label == REAL or r.class_name == SELF_BLENDED]
        return self.bench.scores(f"portraits {self.split} plainly", self._plain, records, change)

    def auc_rows(self) -> Rows:
        """Give the AUC of every kind of forgery against the untouched faces, delivered in three ways."""
        found: dict[str, Rows] = {}
        for title, change in progress(list(DELIVERED.items()), f"portraits {self.split}"):
            rows = class_aucs(self.scores(change), {LOCAL_MEAN: LOCAL}, self.resamples)
            rows[PLAIN_BLENDS] = class_aucs(self.plain_scores(change), {}, self.resamples)[SELF_BLENDED]
            found |= {kind: found.get(kind, {}) | {title: row} for kind, row in rows.items()}
        kinds = (SELF_BLENDED, PLAIN_BLENDS, LOCAL_MEAN, *LOCAL)
        return {f"{kind}, {title}": row for kind in kinds for title, row in found[kind].items()}

    def naming_rows(self) -> Rows:
        """Give how often region and trace are named right, of local edits in all and of each."""
        rows: Rows = {}
        for title, truth, kinds in (("region", "region", LOCAL), ("trace", "artefact", LOCAL), BLENDS):
            chosen = [row for row in self.namings() if row["artefact"] in kinds]
            truths, answers, groups = ([row[name] for row in chosen] for name in (truth, f"named_{truth}", "group"))
            found = against_blind_guess(truths, answers, groups, self.resamples)
            # Among blends alone there is nothing to guess.
            rows |= {f"{title}, {name}": row for name, row in found.items() if kinds == LOCAL or name in kinds}
        return rows

    def namings(self) -> list[dict[str, str]]:
        """Give region and artefact of each forgery, and which of them the detector's evidence has most of."""
        path = self.bench.cache / f"portraits {self.split} named.json"
        if not path.is_file():
            write_json(path, self._namings())
        return json.loads(path.read_text(encoding="utf-8"))

    def _namings(self) -> list[dict[str, str]]:
        detector, fakes = self.bench.detector, [r for r in self.source.records if r.label == FAKE]

        def evidence(inputs: dict[str, Tensor]) -> tuple[Tensor]:
            found = detector.over_views(inputs).evidence
            assert found is not None
            return (found,)

        run = (self.bench.device, self.bench.settings.batch_size, 0, evidence)
        kept, (found,) = answers_over(detector, self.source, fakes, *run)
        columns = dict(zip(detector.evidence_names, found.numpy().T, strict=True))
        named = {
            f"named_{field}": np.array(names)[np.argmax([columns[name] for name in names], axis=0)].tolist()
            for field, names in (("region", REGIONS), ("artefact", tuple(SIGNS)))
        }
        rows = []
        for number, record in enumerate(progress(kept, "what was forged")):
            tags = self.source.load(record).record.tags
            told = {"id": record.id, "group": record.group, "region": tags["region"], "artefact": tags["artefact"]}
            rows.append(told | {name: values[number] for name, values in named.items()})
        return rows

    def calibration_rows(self) -> Rows:
        """Give ECE before and after calibration, at the share of fakes here; coverage and abstention as shipped."""
        calibration, scored = self.bench.detector.calibration, self.scores()
        report = measured(calibration, scored, self.resamples)
        if calibration is None or report is None:
            console().print(f"{self.bench.detector.name!r} is not calibrated: no ECE, no coverage.")
            return {}
        rows = {f"ECE {side} calibration": report[side]["ece"] for side in ("before", "after")}
        rows["ECE of perfectly calibrated scores, by chance"] = _number(report["after"]["ece_if_calibrated"])
        shipped = verdict_report(scored, calibration, calibration.prior, self.resamples)
        rows |= {f"coverage of {name}": row for name, row in shipped["coverage"].items()}
        rows |= {"REAL or FAKE": shipped["decided"], "right of these": shipped["right"]}
        return {name: {"images": len(scored), **row} for name, row in rows.items()}

    def flip_rows(self) -> Rows:
        """Give how often JPEG 95 to 30 and half size turn a verdict round, and the parts that are UNCERTAIN."""
        labels, plain = self.bench.detector.labels, self.scores()
        changes = list(dict.fromkeys((*TURNING, *VERSIONS.values())))
        turned = {change: np.array(labels(self.scores(change).p_fake)) for change in progress(changes, "degrading")}
        verdicts = Verdicts(predictions=plain, labels=np.array(labels(plain.p_fake)), changed=turned)
        rates = {"any of JPEG 95 to 30 and half size": verdicts.flip_rates(list(TURNING))}
        rates |= {f"{each.kind} {each.strength:g}": verdicts.flip_rates([each]) for each in TURNING}
        rows = {
            f"flips {when} the rule, {name}": rate[f"flips_{when}"]
            for name, rate in rates.items()
            for when in ("before", "after")
        }
        for name, among in (("all", plain.labels >= REAL), ("untouched", plain.labels == REAL)):
            rows[f"UNCERTAIN before the rule, {name}"] = verdicts.share(~verdicts.clear, among)
            rows[f"UNCERTAIN after the rule, {name}"] = verdicts.share(~verdicts.stable, among)
        return rows


def public_aucs(test: Predictions, n_boot: int) -> Rows:
    """Give the AUC of every fake against the reals, and of each class where there are several."""
    whole = Predictions(tuple(replace(p, class_name="every fake") if p.label == FAKE else p for p in test))
    by_class = class_aucs(test, {}, n_boot)
    return class_aucs(whole, {}, n_boot) | (by_class if len(by_class) > 1 else {})


def cost_rows(detector: Detector, folder: Path) -> Rows:
    """Give weights, size of the file, time of a face and memory of the process that is asked about a photo."""
    command = [sys.executable, "-m", "llava.cli", "detect", str(list_images(DEMO_FACES)[0]), "--model", str(folder)]
    return {
        "weights, millions": _number(sum(p.numel() for p in detector.parameters()) / 1e6),
        "model.safetensors, MB": _number((folder / "model.safetensors").stat().st_size / 1e6),
        f"ms of a face crop, median of {TIMED}": _number(milliseconds(detector)),
        "peak memory of `m2f2 detect`, MB": _number(peak_memory(command)),
    }


def _number(value: float) -> Row:
    return {"value": value, "low": None, "high": None}


def lines(found: Mapping[str, Rows]) -> Iterator[tuple[str, ...]]:
    """Yield heads and rows of a table of several detectors; last, where there are several, the mean of their values."""
    yield "", "images (real + fake)", "groups", *found, *(["mean"] if len(found) > 1 else [])
    for name in dict.fromkeys(name for rows in found.values() for name in rows):
        row = next(rows[name] for rows in found.values() if name in rows)
        cells = [interval_text(rows[name]) if name in rows else "-" for rows in found.values()]
        values = [rows[name]["value"] for rows in found.values() if name in rows and rows[name]["value"] is not None]
        means = [f"{mean(values):.4f}" if values else "-"] if len(found) > 1 else []
        images = f"{row['real']} + {row['fake']}" if "fake" in row else str(row.get("images", ""))
        yield name, images, str(row.get("n", "")), *cells, *means


def write_tables(
    about: Mapping[str, Mapping[str, str]], tables: Mapping[str, Mapping[str, Rows]], folder: Path
) -> None:
    """Write what is known of the detectors, and all tables, as starter.json and starter.md."""
    write_json(folder / "starter.json", {"detectors": about, "tables": tables})
    text = [f"- {name}: {'; '.join(f'{key} {value}' for key, value in each.items())}\n" for name, each in about.items()]
    for title, found in tables.items():
        head, *rows = ("| " + " | ".join(row) + " |" for row in lines(found))
        text += [f"## {title}", "", head, "|---" * (head.count("|") - 1) + "|", *rows, ""]
    with atomic_path(folder / "starter.md") as staged:
        staged.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
