"""Do explanations rest on the image? Leak, template, swap, flip, named regions, pointing, counterfactual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.evaluation.blind import TrainingPair, count_stated, flip_report, leak_report, template_report
from llava.evaluation.captions import CaptionItem, CaptionSet, read_jsonl
from llava.evaluation.grounding import (
    ARTEFACT,
    EDITS,
    REGION,
    RIVALS,
    CounterfactualCase,
    PointingCase,
    counterfactual_report,
    naming_report,
    pointing_report,
)
from llava.evaluation.swap import caption_swap

JUDGED = (("rouge_l", "ROUGE-L"), ("cider", "CIDEr"), ("bleu_4", "BLEU-4"))
TEMPLATES = {
    "kind": "the blind template",
    "question": "the blind template by whole question",
    "own_verdict": "the template that only knows the model's own verdict",
}
NAMING_RIVALS = {"chance": "chance", "guess": "a blind guess", "template": "the blind template"}
POINTING_RIVALS = dict(zip(RIVALS, ("chance", "the centre of all maps", "maps of other images"), strict=True))


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
    test, told = leak["test"], leak["predictability"]
    begin = f"{test['true']} of {test['n']} questions state the image's label"
    if 2 * test["true"] > test["n"]:
        return f"{begin}: the scores measure how it is described, not whether it is detected."
    if _sign(told["gain"]) > 0:
        return f"{begin}, but their text gives it away: it alone is right on {told['question']['value']:.1%}."
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
