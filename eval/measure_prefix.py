"""How much cheaper are eight questions about one image than eight images? Real sizes, random weights, one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from threading import Event
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlavaConfig, set_seed

from llava.core.config import parse, setting
from llava.core.runtime import software, write_json
from llava.core.terminal import console, titled_table
from llava.core.types import GenerationSettings, Turn
from llava.data.images import read_image
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.evaluation.tables import run_script
from llava.explainer.generation import DTYPES, Explainer
from llava.explainer.modeling import ForgeryLlava, join_config
from llava.explainer.processing import ExplainerProcessor
from llava.pipeline.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings, Precision
from llava.serve.batching import BatchConfig, BatchingEngine
from llava.serve.engine import Question
from llava.serve.load import picture
from llava.train.tiny_base import SPECIAL_TOKENS, train_tokenizer

PARTS = ("nose", "mouth", "skin", "eyes", "hair", "chin", "ears", "light")
ONE, MANY = "questions about one image", "the same questions, each about another image"
STEPS = {"look": "tower and detector", "prefixes_of": "prefix", "join": "questions", "step": "words"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and counts; the defaults are LLaVA-1.5-7B's widths with four of its layers, CLIP ViT-L/14-336, M2F2-Det."""

    width: int = setting(4096, "hidden size of the language model")
    layers: int = setting(4, "layers of the language model")
    heads: int = setting(32, "attention heads of the language model")
    tiny_detector: bool = setting(False, "tower and detector of test size")
    precision: Precision = setting("fp32", "of tower and language model; the detector is fp32")
    stability: bool = setting(False, "judge delivered versions of each image too, as m2f2 serve does by default")
    questions: int = setting(8, "questions, and images")
    max_tokens: int = setting(16, "tokens of an answer")
    side: int = setting(448, "pixels a side of an image")
    repeats: int = setting(5, "times both are measured, in turn and back")
    json: str | None = setting(None, "write the numbers to this file as well")


def main() -> None:
    """Make the model, measure, print the table."""
    settings = parse(Settings, description=(__doc__ or "").splitlines()[0])
    pipeline = make_pipeline(settings)
    pictures = [read_image(picture(number, settings.side), str(number)) for number in range(settings.questions)]
    ways = {ONE: pictures[:1] * settings.questions, MANY: pictures}
    ask_all(pipeline, pictures[:1], settings)  # not counted: the first run makes buffers
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(settings.repeats):
        for name in list(ways)[:: -1 if repeat % 2 else 1]:
            runs[name].append(ask_all(pipeline, ways[name], settings))
    print_table(runs, settings)
    if settings.json:
        write_json(settings.json, {"settings": settings.__dict__, **software(), "runs": runs})


def make_pipeline(settings: Settings) -> Pipeline:
    """Make an explainer of these sizes with random weights."""
    set_seed(0)
    shape = M2F2DetConfig.tiny().__dict__ if settings.tiny_detector else {}
    detector = M2F2Det(M2F2DetConfig(**shape | {"own_vision": False}))
    words = [question(i) for i in range(settings.questions)]
    tokenizer = train_tokenizer(iter(words), 400)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.width * 43 // 16,  # 11,008 of 4,096, as LLaMA has it
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=4096,
    )
    base = LlavaConfig(
        vision_config=detector.shared_tower().config,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
    )
    model = ForgeryLlava(join_config(base, detector, "pad", 1, "v1")).eval().to(DTYPES[settings.precision])
    model.detector.float()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # never the likeliest, so all answers have their whole length
    explainer = Explainer(model, ExplainerProcessor(tokenizer, model.config, model.detector.inputs))
    faces = FaceSettings(face="off")
    return Pipeline(model.detector, explainer, "random weights", faces, stability=settings.stability)


def question(number: int) -> str:
    """Give a question of its own for each number."""
    return f"Does the {PARTS[number % len(PARTS)]} look real or fake, and how sure are you of it?"


def ask_all(pipeline: Pipeline, images: Sequence[np.ndarray], settings: Settings) -> dict[str, float]:
    """Ask one question about each image, all at once, of an engine that has seen none; gives seconds by step."""
    engine = BatchingEngine(pipeline, BatchConfig(rows=settings.questions))
    spent = dict.fromkeys(STEPS, 0.0)
    for owner, name in (
        (engine.pipeline, "look"),
        *((engine.decoder, name) for name in ("prefixes_of", "join", "step")),
    ):
        setattr(owner, name, timed(getattr(type(owner), name).__get__(owner), spent, name))
    words = GenerationSettings(max_new_tokens=settings.max_tokens)

    def ask(number: int) -> int:
        turns = [Turn(role="human", text=question(number))]
        asked = Question(image=images[number], turns=turns, settings=words)
        return max(piece.tokens for piece in engine.ask(asked, Event()))

    started = time.perf_counter()
    with ThreadPoolExecutor(len(images)) as pool:
        tokens = sum(pool.map(ask, range(len(images))))
    seconds = time.perf_counter() - started
    engine.close()
    return {"seconds": seconds, "tokens": tokens, **spent}


def timed(method: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """Wrap a method so that its seconds are added up."""

    def run(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            spent[name] += time.perf_counter() - started

    return run


def print_table(runs: Mapping[str, Sequence[Mapping[str, float]]], settings: Settings) -> None:
    """Print medians, ranges and shares, and how many times faster one image is."""
    model = f"{settings.layers} layers of {settings.width}, {settings.precision}, {torch.get_num_threads()} threads"
    table = titled_table(
        f"{settings.questions} questions, {settings.max_tokens} tokens each, {settings.repeats} runs; {model}",
        *("", "seconds", "range", "tokens", *STEPS.values()),
    )
    for name, found in runs.items():
        seconds = sorted(run["seconds"] for run in found)
        shares = [median(run[step] / run["seconds"] for run in found) for step in STEPS]
        extent, tokens = f"{seconds[0]:.2f} to {seconds[-1]:.2f}", f"{found[0]['tokens']:.0f}"
        table.add_row(name, f"{median(seconds):.2f}", extent, tokens, *(f"{100 * share:.0f} %" for share in shares))
    out = console()
    out.print(table)
    ratios = sorted(many["seconds"] / one["seconds"] for one, many in zip(runs[ONE], runs[MANY], strict=True))
    out.print(f"one image: {median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    run_script(main)
