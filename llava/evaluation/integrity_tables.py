"""The integrity report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llava.core.types import LABEL_NAMES
from llava.evaluation.grounding_tables import grounding_tables
from llava.evaluation.report import CAPTION_ROWS, interval_text, titled_table

SYSTEMS = {
    "predictions": "predictions",
    "kind": "blind template\n(kind of question)",
    "question": "blind template\n(whole question)",
    "own_verdict": "template told the\npredicted verdict",
}


def integrity_tables(report: Mapping[str, Any]) -> list[Table]:
    """Give a table per part of the report; parts that are None give none."""
    tables = [_leak_table(report["leak"]), *_template_tables(report), *_swap_tables(report["swap"])]
    if report["flip"] is not None:
        tables.append(_flip_table(report["flip"]))
    return tables + grounding_tables(report)


def _leak_table(leak: Mapping[str, Any]) -> Table:
    table = titled_table(
        f"Does the question give the label away? {leak['distinct_questions']} distinct questions, "
        f"{leak['unseen_questions']} asked with a text that training lacks",
        "",
        "value",
    )
    for key, title in (
        ("test", "test questions"),
        ("prompts", "prompts of the predictions"),
        ("training", "training questions"),
    ):
        if (counts := leak[key]) is not None:
            wrong = f" ({counts['false']} state the other one)" if counts["false"] else ""
            table.add_row(f"{title} that state the label", f"{counts['true']} of {counts['n']}{wrong}")
    told = leak["predictability"]
    table.add_row("label right from the question's text alone", interval_text(told["question"]))
    table.add_row("label right by its share in training alone", interval_text(told["prior"]))
    table.add_row("difference", interval_text(told["gain"]))
    return table


def _template_tables(report: Mapping[str, Any]) -> list[Table]:
    template, n = report["template"], report["n"]
    kinds = f"; {lacks} questions of a kind that training lacks" if (lacks := template["unseen"]["kind"]) else ""
    scores = titled_table(
        f"{n['items']} questions, {n['groups']} groups, {n['training']} training answers; {len(n['missing'])} missing "
        f"(scored as empty), {len(n['extra'])} extra (left out)\ntemplate: {template['rule']}{kinds}",
        "",
        *(SYSTEMS[name] for name in template["scores"]),
    )
    gaps = titled_table(
        "Predictions minus template, same resamples", "", *(SYSTEMS[name] for name in template["difference"])
    )
    for table, part in ((scores, "scores"), (gaps, "difference")):
        for key, title in CAPTION_ROWS:
            if key in template["scores"]["predictions"]:
                table.add_row(title, *(interval_text(row[key]) for row in template[part].values()))
    scores.add_row("distinct answers", *(str(count) for count in template["distinct_answers"].values()))
    return [scores, gaps]


def _swap_tables(swap: Mapping[str, Any]) -> list[Table]:
    titles = {"all": "all other images with the same question", "same_label": "those of the same label only"}
    tables = []
    for key, title in titles.items():
        part = swap[key]
        if part is None or not part["n"]:
            continue
        table = titled_table(
            f"Swap gap against {title}: {part['n']} answers, {part['alone']} without another image",
            "",
            "own image",
            "other images",
            "gap",
        )
        for metric, name in CAPTION_ROWS:
            if metric in part["gap"]:
                table.add_row(name, *(interval_text(part[column][metric]) for column in ("own", "swapped", "gap")))
        tables.append(table)
    return tables


def _flip_table(flip: Mapping[str, Any]) -> Table:
    table = titled_table(f"Label flip: {flip['n']} questions asked again with the other label stated", "", "value")
    table.add_row("answer follows the flipped statement", interval_text(flip["follows"]))
    for name in LABEL_NAMES:
        table.add_row(f"  {name} images", interval_text(flip["by_label"][name]))
    table.add_row("answer agreed with the true statement before", interval_text(flip["before"]))
    table.add_row("answer says what is stated both times", interval_text(flip["both"]))
    table.add_row("same text both times", interval_text(flip["unchanged"]))
    table.add_row("references whose label is read rightly", interval_text(flip["reader"]))
    table.add_row("questions left out", str(flip["left_out"]))
    return table
