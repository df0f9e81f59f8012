"""Do explanations rest on the image? Leak, template, swap, flip, named regions, pointing, counterfactual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from llava.core.terminal import titled_table
from llava.core.types import LABEL_NAMES
from llava.evaluation.blind import TrainingPair, count_stated, flip_report, leak_report, template_report
from llava.evaluation.captions import CaptionItem, CaptionSet, read_jsonl
from llava.evaluation.grounding import (
    ARTEFACT,
    EDITS,
    NONE,
    REGION,
    RIVALS,
    SEVERAL,
    CounterfactualCase,
    Naming,
    PointingCase,
    counterfactual_report,
    naming_report,
    pointing_report,
)
from llava.evaluation.swap import caption_swap
from llava.evaluation.tables import CAPTION_ROWS, interval_text

JUDGED = (("rouge_l", "ROUGE-L"), ("cider", "CIDEr"), ("bleu_4", "BLEU-4"))
TEMPLATES = {
    "kind": "the blind template",
    "question": "the blind template by whole question",
    "own_verdict": "the template that only knows the model's own verdict",
}
NAMING_RIVALS = {"chance": "chance", "guess": "a blind guess", "template": "the blind template"}
POINTING_RIVALS = dict(zip(RIVALS, ("chance", "the centre of all maps", "maps of other images"), strict=True))
POINTING_ROWS = {
    "hit": "maximum of the map in the mask",
    "chance": "a cell at random (mean mask area)",
    "centre": "centre: maximum of the mean map",
    "other": "maps of other images",
    "best": "best cell of that grid",
}
SYSTEMS = {
    "predictions": "predictions",
    "kind": "blind template\n(kind of question)",
    "question": "blind template\n(whole question)",
    "own_verdict": "template told the\npredicted verdict",
}


def integrity_report(
    captions: CaptionSet,
    training: Sequence[TrainingPair],
    prompts: Mapping[str, str] | None = None,
    flipped: Mapping[str, str] | None = None,
    pointing: PointingCase | None = None,
    counterfactual: CounterfactualCase | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Give every part of the integrity suite, with 95 % intervals, and `verdict`, sentences in plain words.

    prompts: what the model was really asked, by key. flipped: answers to the flipped questions, by key. pointing: maps
    beside masks. counterfactual: scores of edited images. Parts that the files do not allow are None. Tokens are split
    at white space, case kept, as published.
    """
    items = captions.items
    report: dict[str, Any] = {
        "n": {
            "items": len(items),
            "groups": len({item.group for item in items}),
            "training": len(training),
            "missing": list(captions.missing),
            "extra": list(captions.extra),
        },
        "bootstrap": {"n_boot": n_boot, "seed": seed, "level": 0.95, "unit": "group"},
        "leak": leak_report(items, training, n_boot, seed) | {"prompts": _prompts(items, prompts)},
        "template": template_report(items, training, n_boot, seed),
        "swap": {
            "all": caption_swap(items, n_boot, seed),
            "same_label": caption_swap(items, n_boot, seed, same_label=True),
        },
        "flip": None if flipped is None else flip_report(items, training, flipped, n_boot, seed),
        "regions": naming_report(REGION, items, training, n_boot, seed),
        "artefacts": naming_report(ARTEFACT, items, training, n_boot, seed),
        "pointing": None if pointing is None else pointing_report(pointing, n_boot, seed),
        "counterfactual": None if counterfactual is None else counterfactual_report(counterfactual, n_boot, seed),
    }
    return report | {"verdict": verdict(report)}


def read_prompts(predict_path: str | Path) -> dict[str, str]:
    """Read the prompts of a prediction file by key; rows without one are left out."""
    rows = (row for _, row in read_jsonl(predict_path))
    return {row["key"]: row["prompt"] for row in rows if "key" in row and isinstance(row.get("prompt"), str)}


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Say in plain words what the numbers mean, part by part; what is unclear is said to be unclear."""
    sentences = [_leak_sentence(report["leak"])]
    sentences += [_template_sentence(name, row) for name, row in report["template"]["difference"].items()]
    sentences += _swap_sentences(report["swap"])
    optional = {
        "flip": _flip_sentence,
        "regions": lambda part: _naming_sentence("edited region", part),
        "artefacts": lambda part: _naming_sentence("artefact", part),
        "pointing": _pointing_sentence,
        "counterfactual": _counterfactual_sentence,
    }
    sentences += [say(report[name]) for name, say in optional.items() if report[name] is not None]
    n = report["n"]
    if lacks := report["template"]["unseen"]["kind"]:
        sentences.append(
            f"Caution: training lacks the kind of {lacks} of {n['items']} questions, so the templates are weak; "
            "give the training file of the same style."
        )
    if missing := len(n["missing"]):
        sentences.append(f"{missing} of {n['items']} questions have no answer and count as empty ones.")
    return sentences


def _prompts(items: Sequence[CaptionItem], prompts: Mapping[str, str] | None) -> dict[str, int] | None:
    own = [(prompts[item.key], item.label) for item in items if item.key in prompts] if prompts else []
    return count_stated([prompt for prompt, _ in own], [label for _, label in own]) if own else None


def _leak_sentence(leak: Mapping[str, Any]) -> str:
    test, predictability = leak["test"], leak["predictability"]
    begin = f"{test['true']} of {test['n']} questions state the image's label"
    if 2 * test["true"] > test["n"]:
        return f"{begin}: the scores measure how it is described, not whether it is detected."
    if _sign(predictability["gain"]) > 0:
        return f"{begin}, but their text gives it away: it alone is right on {predictability['question']['value']:.1%}."
    return f"{begin}, and their text tells no more of it than its share in training."


def _template_sentence(name: str, difference: Mapping[str, Any]) -> str:
    signs = {title: _sign(difference[key]) for key, title in JUDGED}
    template = TEMPLATES[name]
    if all(sign > 0 for sign in signs.values()):
        return f"The model beats {template}."
    words = {1: "better", -1: "worse", 0: "no clear difference"}
    said = ", ".join(f"{title} {words[sign]}" for title, sign in signs.items())
    return f"The model does not {'clearly ' if max(signs.values()) > 0 else ''}beat {template}: {said}."


def _swap_sentences(swap: Mapping[str, Any]) -> list[str]:
    all_images, same_label = swap["all"], swap["same_label"]
    if not all_images["n"]:
        return ["No two images share a question, so nothing can be said of image dependence."]
    depends = _depends(all_images)
    if not depends:
        sentence = "No dependence on the image was found: its answers fit other images with the same question as well"
        return [f"{sentence} as their own. (That is absence of evidence: these scores are weak.)"]
    sentence = f"Its score depends on the image ({', '.join(depends)})"
    if same_label is None or not same_label["n"]:
        return [f"{sentence}."]
    if own := _depends(same_label):
        return [f"{sentence}, also among images of the same label ({', '.join(own)}): more than a verdict."]
    return [f"{sentence}, but not among images of the same label: beyond its verdict no dependence was found."]


def _depends(swap: Mapping[str, Any]) -> list[str]:
    return [title for key, title in JUDGED if _sign(swap["gap"][key]) > 0]


def _flip_sentence(flip: Mapping[str, Any]) -> str:
    follows, both = (f"{flip[key]['value']:.1%}" for key in ("follows", "both"))
    return (
        f"Told the wrong label, {follows} of {flip['n']} answers follow the statement instead of the image; {both} say "
        "what is stated whichever label that is."
    )


def _naming_sentence(what: str, part: Mapping[str, Any]) -> str:
    accuracy, swap = part["accuracy"]["value"], part["swap"]
    begin = f"The text names the {what} in {accuracy:.1%} of {part['n']} images, {_beside(part['gain'], NAMING_RIVALS)}"
    if not swap["n"]:
        return f"{begin}."
    moved = "falls" if _sign(swap["gap"]["accuracy"]) > 0 else "does not clearly fall"
    swapped = swap["swapped"]["accuracy"]["value"]
    return f"{begin}; it {moved} when images are swapped ({swapped:.1%}; chance is {part['chance']['value']:.1%})."


def _pointing_sentence(part: Mapping[str, Any]) -> str:
    if not part["n"]:
        return "No image of the maps was edited locally, so nothing can be said of where the map points."
    begin = f"The map's maximum lies in the mask in {part['hit']['value']:.1%} of {part['n']} locally edited images"
    return f"{begin}, {_beside(part['gain'], POINTING_RIVALS)}."


def _counterfactual_sentence(part: Mapping[str, Any]) -> str:
    if not part["n"]:
        return "No answer names one region, so no counterfactual was tested."
    drop, done = part["drop"], EDITS[part["edit"]]
    words = {1: "more than", -1: "less than", 0: "not clearly more than"}[_sign(drop["difference"])]
    named, random = (f"{drop[name]['value']:.3f}" for name in ("named", "random"))
    return (
        f"With the region that the text names {done}, p_fake falls by {named}, {words} with random regions of that "
        f"area {done} ({random}), in {part['n']} images."
    )


def _beside(gains: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Say which rivals are beaten, which beat, and which are neither."""
    said = {1: "more often than", -1: "less often than", 0: "not clearly more often than"}
    found = {words: [names[key] for key, gain in gains.items() if _sign(gain) == sign] for sign, words in said.items()}
    return ", ".join(f"{words} {' and '.join(rivals)}" for words, rivals in found.items() if rivals)


def _sign(interval: Mapping[str, Any]) -> int:
    """Give 1 or -1 when the whole interval lies above or below 0, else 0."""
    if interval["low"] is None:
        return 0
    return int(interval["low"] > 0) - int(interval["high"] < 0)


def grounding_tables(report: Mapping[str, Any]) -> list[Table]:
    """Give the tables of regions, artefacts, pointing game and counterfactual; parts that are None give none."""
    tables: list[Table] = []
    for name, naming in (("regions", REGION), ("artefacts", ARTEFACT)):
        if report[name] is not None:
            tables += _naming_tables(naming, report[name])
    if report["pointing"] is not None:
        tables += _pointing_tables(report["pointing"])
    if report["counterfactual"] is not None:
        tables.append(_counterfactual_table(report["counterfactual"]))
    return tables


def _naming_tables(naming: Naming, part: Mapping[str, Any]) -> list[Table]:
    named = part["named"]
    table = titled_table(
        f"Does the text name the edited {naming.field}? {part['n']} locally edited images; {named['one']} answers name "
        f"one {naming.field}, {named[NONE]} none, {named[SEVERAL]} several (both wrong)",
        "",
        "value",
        "predictions minus it",
    )
    table.add_row("predictions", interval_text(part["accuracy"]), "")
    gain = {name: interval_text(interval) for name, interval in part["gain"].items()}
    chance = part["chance"]
    table.add_row(f"chance (one of {chance['of']})", f"{chance['value']:.4f}", gain["chance"])
    for name, title in (("guess", "blind guess"), ("template", "blind template")):
        rival = part[name]
        table.add_row(f"{title} ({', '.join(rival['names'])})", interval_text(rival["accuracy"]), gain[name])
    if (swap := part["swap"])["n"]:
        values = (swap["swapped"]["accuracy"], swap["gap"]["accuracy"])
        table.add_row("predictions, images swapped", *map(interval_text, values))
    columns = confusion_columns(naming, part)
    heads = [name.replace("_", "\n") for name in columns]
    confusion = titled_table(f"Edited {naming.field} (rows) and {naming.field} named (columns)", "", *heads)
    elsewhere = {f"(other {label} images)": said for label, said in part["elsewhere"].items()}
    for name, said in (part["confusion"] | elsewhere).items():
        confusion.add_row(name, *(str(said.get(column, 0)) for column in columns))
    return [table, confusion]


def confusion_columns(naming: Naming, part: Mapping[str, Any]) -> list[str]:
    """List what is true or named anywhere in a naming report, in the order of the naming, then none and several."""
    rows = (part["confusion"] | part["elsewhere"]).values()
    used = {*part["confusion"], *(name for said in rows for name in said)}
    return [*(name for name in naming.names if name in used), NONE, SEVERAL]


def _pointing_tables(part: Mapping[str, Any]) -> list[Table]:
    left_out = ", ".join(f"{count} {reason}" for reason, count in part["left_out"].items() if count) or "none"
    table = titled_table(
        f"Pointing game: {part['n']} locally edited images, {part['groups']} groups; left out: {left_out}",
        "",
        "part of it in the mask",
        "map minus it",
    )
    for key, title in POINTING_ROWS.items() if part["n"] else ():
        gain = interval_text(part["gain"][key]) if key in part["gain"] else ""
        table.add_row(title, interval_text(part[key]), gain)
    columns = ("hit", "chance", "centre", "other")
    regions = titled_table("Pointing game by edited region", "region", "images", *columns)
    for name, row in part["by_region"].items():
        regions.add_row(name, str(row["n"]), *(interval_text(row[column]) for column in columns))
    return [table, regions]


def _counterfactual_table(part: Mapping[str, Any]) -> Table:
    left_out = ", ".join(f"{count} {reason}" for reason, count in part["left_out"].items()) or "none"
    regions = f", {part['random_regions']} random regions each" if part["n"] else ""
    table = titled_table(f"Counterfactual: {part['n']} answers{regions}; left out: {left_out}", "", "value")
    if not part["n"]:
        return table
    done = EDITS[part["edit"]]
    for key, title in (
        ("named", f"p_fake falls by, named region {done}"),
        ("random", f"p_fake falls by, random region {done}"),
        ("difference", "difference"),
    ):
        table.add_row(title, interval_text(part["drop"][key]))
    table.add_row("random regions that lower p_fake less (chance 0.5)", interval_text(part["rank"]))
    for name, row in part["by_truth"].items():
        table.add_row(f"difference, {name} region named ({row['n']})", interval_text(row["difference"]))
    return table


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
    predictability = leak["predictability"]
    table.add_row("label right from the question's text alone", interval_text(predictability["question"]))
    table.add_row("label right by its share in training alone", interval_text(predictability["prior"]))
    table.add_row("difference", interval_text(predictability["gain"]))
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
