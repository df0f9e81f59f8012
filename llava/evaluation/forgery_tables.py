"""The strength of forgeries as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from llava.core.types import LABEL_NAMES
from llava.evaluation.forgery_strength import RINGS
from llava.evaluation.report import interval_text, titled_table


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
