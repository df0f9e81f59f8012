"""Do explanations rest on the image? Leaked labels, blind templates, swapped images, flipped labels, named regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.evaluation.captions import CaptionItem, CaptionSet, read_jsonl
from llava.evaluation.flip import flip_report
from llava.evaluation.questions import TrainingPair, count_stated, leak_report
from llava.evaluation.regions import region_report
from llava.evaluation.swap import caption_swap
from llava.evaluation.template import template_report

JUDGED = (("rouge_l", "ROUGE-L"), ("cider", "CIDEr"), ("bleu_4", "BLEU-4"))
TEMPLATES = {
    "kind": "the blind template",
    "question": "the blind template by whole question",
    "own_verdict": "the template that only knows the model's own verdict",
}


def integrity_report(
    captions: CaptionSet,
    training: Sequence[TrainingPair],
    prompts: Mapping[str, str] | None = None,
    flipped: Mapping[str, str] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Give every part of the integrity suite, with 95 % intervals, and `verdict`, sentences in plain words.

    prompts: what the model was really asked, by key. flipped: answers to the flipped questions, by key. Parts that the
    files do not allow are None. Tokens are split at white space, case kept, as published.
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
        "regions": region_report(items, training, n_boot, seed),
    }
    return report | {"verdict": verdict(report)}


def read_prompts(predict_path: str | Path) -> dict[str, str]:
    """Read the prompts of a prediction file by key; rows without one are left out."""
    rows = (row for _, row in read_jsonl(predict_path))
    return {row["key"]: row["prompt"] for row in rows if "key" in row and isinstance(row.get("prompt"), str)}


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Say in plain words what the numbers mean: leak, template, image, flip, regions; unclear is said to be unclear."""
    sentences = [_leak_sentence(report["leak"])]
    sentences += [_template_sentence(name, row) for name, row in report["template"]["difference"].items()]
    sentences += _swap_sentences(report["swap"])
    if report["flip"] is not None:
        sentences.append(_flip_sentence(report["flip"]))
    if report["regions"] is not None:
        sentences.append(_region_sentence(report["regions"]))
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


def _region_sentence(regions: Mapping[str, Any]) -> str:
    begin = f"The text names the edited region in {regions['accuracy']['value']:.1%} of {regions['n']} images"
    gain = _sign(regions["gain"])
    blind = {1: "more often than", -1: "less often than", 0: "not clearly more often than"}[gain]
    swap = regions["swap"]
    if not swap["n"]:
        return f"{begin}, {blind} a blind guess."
    moved = "falls" if _sign(swap["gap"]["accuracy"]) > 0 else "does not clearly fall"
    swapped = swap["swapped"]["accuracy"]["value"]
    return f"{begin}, {blind} a blind guess; it {moved} when images are swapped ({swapped:.1%})."


def _sign(interval: Mapping[str, Any]) -> int:
    """Give 1 or -1 when the whole interval lies above or below 0, else 0."""
    if interval["low"] is None:
        return 0
    return int(interval["low"] > 0) - int(interval["high"] < 0)
