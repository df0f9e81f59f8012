"""How strong self-made forgeries are, and how obvious: SSIM to the untouched image, a blind spectrum baseline.

SSIM: Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity. The baseline is the
classifier of Durall et al. 2020, Unmasking DeepFakes with simple Features; we window with a Hann taper and have 24
rings, the paper has neither. A high AUC says that the forgeries can be told by their spectrum alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.markup import escape
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from llava.core.terminal import progress, titled_table
from llava.core.types import FAKE, LABEL_NAMES, REAL, REGIONS, Record
from llava.data.sources import EVERY_SPLIT, DataConfig, split_of
from llava.data.splits import check_leaks
from llava.data.stills import CsvSource
from llava.evaluation.metrics import auc_interval
from llava.evaluation.tables import interval_text

TRAIN = "train"
TAGS = ("region", "artefact", "mask", "untouched")
RINGS, SIDE = 24, 256


@dataclass(frozen=True, kw_only=True)
class Strength:
    """One forgery: SSIM to its untouched image, at most 1 (the same), and the share of the image its mask covers."""

    record: Record
    ssim: float
    covered: float


def open_forged(manifest_path: str | Path) -> CsvSource:
    """Open the manifest.csv that `m2f2 data forge` wrote, images and masks beside it.

    Raises FileNotFoundError for a missing table or image, ValueError for a table of another origin.
    """
    # No split has the name EVERY_SPLIT: a training split of one class is then told in the report, not refused here.
    source = CsvSource(DataConfig(source="csv", path=str(manifest_path), masks=True, train=EVERY_SPLIT))
    lacking = [name for name in TAGS if name not in source.records[0].tags]
    if lacking:
        raise ValueError(
            f"{str(manifest_path)!r} has no column {', '.join(lacking)}; give a manifest.csv of `m2f2 data forge`."
        )
    untouched = {record.id for record in source.records if record.label == REAL}
    for record in source.records:
        is_forgery = all(record.tags[name] for name in TAGS) and record.tags["untouched"] in untouched
        if record.label != REAL and not (record.label == FAKE and is_forgery):
            raise ValueError(
                f"{str(manifest_path)!r}: {record.id!r} needs a label, and a fake one also {', '.join(TAGS)}, the last "
                "of them a real image of the table; give a manifest.csv of `m2f2 data forge`."
            )
    return source


def strength_report(source: CsvSource, split: str = "test", n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Give the SSIM and mask area of the forgeries of a split (`all`: of every one), and the spectrum baseline.

    Raises ValueError for a split without records, and LeakError when it shares a group with the training split.
    """
    records = split_of(source, split)
    spectrum = spectrum_report(source, split, n_boot, seed)
    strengths = measure(source, [record for record in records if record.label == FAKE])
    return {
        "split": split,
        "rows_left_out": source.rows_left_out,
        "bootstrap": {"n_boot": n_boot, "seed": seed, "level": 0.95, "unit": "group"},
        **_strength_rows(strengths),
        "spectrum": spectrum,
    }


def measure(source: CsvSource, forgeries: Sequence[Record]) -> list[Strength]:
    """Compare forgeries with their untouched images. Raises ValueError where the two differ in size."""
    originals = {record.id: record for record in source.records}
    strengths = []
    for record in _shown(forgeries, "comparing"):
        sample, untouched = source.load(record), source.load(originals[record.tags["untouched"]])
        if sample.image.shape != untouched.image.shape:
            raise ValueError(
                f"{record.id}: {sample.image.shape[:2]} pixels, its untouched image {untouched.image.shape[:2]}; "
                "forge the data again."
            )
        assert sample.mask is not None  # the manifest names one, and the source reads it
        covered = float((sample.mask > 0).mean())
        strengths.append(Strength(record=record, ssim=ssim(sample.image, untouched.image), covered=covered))
    return strengths


def ssim(image: np.ndarray, other: np.ndarray) -> float:
    """Give the mean SSIM of two uint8 RGB images (H, W, 3), as grey images of 256 levels: in [-1, 1], 1 = the same.

    Wang et al. 2004, eq. 13, constants and weights as there: Gaussian, sigma 1.5, 11 x 11 pixels; the border of 5
    pixels, where the weights do not fit, is left out. Raises ValueError when scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity  # comes with the extra [eval]
    except ModuleNotFoundError as error:
        raise ValueError(f"SSIM needs {error.name}: pip install 'm2f2-det[eval]'.") from error
    first, second = (np.asarray(Image.fromarray(pixels).convert("L")) for pixels in (image, other))
    return float(
        structural_similarity(
            first, second, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def spectrum_report(source: CsvSource, split: str, n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Give the AUC of a logistic regression on `ring_spectrum`, trained on split `train`; group-bootstrap interval.

    Scored: the images of `split` that were not trained on. The interval holds for this one training. auc is None and
    `reason` says why where either part lacks a class. Raises LeakError when both share a group.
    """
    parts = {
        "trained": [record for record in source.records if record.split == TRAIN],
        "scored": [record for record in split_of(source, split) if record.split != TRAIN],
    }
    counts = {part: Counter(record.label for record in records) for part, records in parts.items()}
    n = {part: {name: count[label] for label, name in enumerate(LABEL_NAMES)} for part, count in counts.items()}
    where = {
        "trained": f"split {TRAIN!r} to train on",
        "scored": f"split {split!r} to score, those of {TRAIN!r} aside",
    }
    missing = {part: [name for name, count in n[part].items() if not count] for part in parts}
    lacks = [f"no {' or '.join(names)} images in {where[part]}" for part, names in missing.items() if names]
    if lacks:
        return {"n": n, "auc": None, "reason": "; ".join(lacks)}
    check_leaks(parts)
    trained, scored = (
        np.stack([ring_spectrum(source.load(record).image) for record in _shown(records, "spectra")])
        for records in parts.values()
    )
    labels, scored_labels = (np.array([record.label for record in records]) for records in parts.values())
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000))
    p_fake = model.fit(trained, labels).predict_proba(scored)[:, FAKE]
    groups = np.array([record.group for record in parts["scored"]])
    return {"n": n, "auc": auc_interval(scored_labels, p_fake, groups, n_boot, seed).to_dict(), "reason": None}


def ring_spectrum(image: np.ndarray) -> np.ndarray:
    """Average the log power spectrum of an image, uint8 RGB (H, W, 3), over rings of equal width.

    Returns (24,), lowest frequency first, in nats; the last ring ends at the corners, 0.5 cycles a pixel both ways.
    The image is made grey, stretched to 256 x 256 (bicubic), freed of its mean and windowed (Hann).
    """
    grey = Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values, taper = np.asarray(grey, dtype=float), np.hanning(SIDE)
    power = np.abs(np.fft.fft2((values - values.mean()) * np.outer(taper, taper))) ** 2
    squares = np.fft.fftfreq(SIDE) ** 2
    radius = np.sqrt((squares[:, None] + squares) / 0.5)  # 1 at the corners
    ring = np.minimum(RINGS * radius, RINGS - 1).astype(int).ravel()
    # 1 keeps the log of a flat image finite; rounding to 256 levels alone gives about 65536 * 9 / 64 / 12 = 768.
    return np.bincount(ring, np.log1p(power).ravel()) / np.bincount(ring)


def _strength_rows(strengths: Sequence[Strength]) -> dict[str, Any]:
    """Sum up by artefact, over the edits of one region, and over all."""
    artefacts = sorted({item.record.tags["artefact"] for item in strengths})
    return {
        "artefacts": {
            name: _strength_row([item for item in strengths if item.record.tags["artefact"] == name])
            for name in artefacts
        },
        "local_edits": _strength_row([item for item in strengths if item.record.tags["region"] in REGIONS]),
        "all": _strength_row(strengths),
    }


def _strength_row(strengths: Sequence[Strength]) -> Mapping[str, float | int | None]:
    if not strengths:
        return {"n": 0, "ssim_median": None, "ssim_quantile_10": None, "covered_median": None}
    low, median = np.quantile([item.ssim for item in strengths], [0.1, 0.5])
    return {
        "n": len(strengths),
        "ssim_median": float(median),
        "ssim_quantile_10": float(low),
        "covered_median": float(np.median([item.covered for item in strengths])),
    }


def _shown(records: Sequence[Record], title: str) -> Iterable[Record]:
    """Go through records, with a progress bar on a terminal."""
    return progress(records, title)


def strength_tables(report: Mapping[str, Any]) -> list[Table]:
    """Give a table of SSIM and mask area by artefact, and one of the spectrum baseline."""
    return [_ssim_table(report), _spectrum_table(report["spectrum"])]


def _ssim_table(report: Mapping[str, Any]) -> Table:
    left_out = f"; {report['rows_left_out']} rows name no image" if report["rows_left_out"] else ""
    table = titled_table(
        escape(
            f"{report['all']['n']} forgeries of split {report['split']!r}, each beside its untouched image{left_out}"
        ),
        "artefact",
        "n",
        "SSIM, median",
        "SSIM, 10 % quantile",
        "share under the mask, median",
    )
    for name, row in report["artefacts"].items():
        _add_row(table, escape(name), row)
    table.add_section()
    _add_row(table, "local edits", report["local_edits"])
    _add_row(table, "all", report["all"])
    return table


def _add_row(table: Table, name: str, row: Mapping[str, Any]) -> None:
    numbers = (row[key] for key in ("ssim_median", "ssim_quantile_10", "covered_median"))
    table.add_row(name, str(row["n"]), *("-" if number is None else f"{number:.4f}" for number in numbers))


def _spectrum_table(part: Mapping[str, Any]) -> Table:
    table = titled_table(
        f"Logistic regression on {RINGS} rings of the power spectrum; 95 % interval by group bootstrap", "", "value"
    )
    for name in ("trained", "scored"):
        table.add_row(f"images {name}", ", ".join(f"{part['n'][name][label]} {label}" for label in LABEL_NAMES))
    auc = f"not computed: {part['reason']}" if part["auc"] is None else interval_text(part["auc"])
    table.add_row("AUC", escape(auc))
    return table
