"""The running batch writes what each conversation alone would be answered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_world import draw

from llava.core.types import GenerationSettings, Turn
from llava.explainer.generation import Decoder, Explainer, Row, load_model, load_processor, processors
from llava.explainer.prompts import VERDICT_QUESTION

QUESTIONS = (
    VERDICT_QUESTION,
    "Does the nose look real or fake?",
    "Why?",
    "Is the skin real? Tell me, please, at length.",
)


@pytest.fixture(scope="module")
def explainer(tiny_explainer: Path) -> Explainer:
    model = load_model(tiny_explainer)
    return Explainer(model, load_processor(tiny_explainer, model))


def asked(question: str) -> list[Turn]:
    return [Turn(role="human", text=question)]


def rows_for(
    decoder: Decoder, explainer: Explainer, images: list[int], settings: list[GenerationSettings]
) -> list[Row]:
    """Make a row for each question about an image of this number, one prefix per image."""
    distinct = sorted(set(images))
    encoded = explainer.encode([draw(n % 2, n) for n in distinct])
    shared: dict[int, object] = {}
    rows = []
    for question, image, setting in zip(QUESTIONS, images, settings, strict=True):
        ids, suffix = decoder.split(asked(question), setting)
        if not shared:
            found = decoder.prefixes_of([ids] * len(distinct), [encoded.take([n]) for n in range(len(distinct))])
            shared = dict(zip(distinct, found, strict=True))
        rows.append(Row(settings=setting, suffix=suffix, prefix=shared[image]))
    return rows


def finish(decoder: Decoder) -> None:
    while decoder.rows:
        decoder.leave([row for row in decoder.rows if row.is_done])
        if decoder.rows:
            decoder.step()


def alone(explainer: Explainer, image: int, question: str, settings: GenerationSettings) -> str:
    """Answer with transformers' own generate, one question and its whole prompt at a time."""
    encoded = explainer.encode([draw(image % 2, image)])
    ids = torch.tensor([explainer.processor.encode(asked(question))[0]])
    seen = {"image_features": encoded.image_features, "evidence": encoded.evidence}
    ends = {"eos_token_id": explainer.processor.tokenizer.eos_token_id, "pad_token_id": explainer.processor.pad_id}
    limit = {"max_new_tokens": settings.max_new_tokens, "do_sample": False, "logits_processor": processors(settings)}
    written = explainer.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **seen, **ends, **limit)
    return explainer.processor.decode(written[0, ids.shape[1] :])


@pytest.mark.parametrize("images", [[0, 0, 0, 0], [0, 1, 2, 3], [1, 0, 1, 2]])
def test_a_batch_says_what_each_says_alone(explainer: Explainer, images: list[int]) -> None:
    settings = [GenerationSettings(max_new_tokens=n) for n in (24, 7, 30, 1)]
    decoder = Decoder(explainer.model, explainer.processor)
    rows = rows_for(decoder, explainer, images, settings)
    decoder.join(rows)
    finish(decoder)
    for row, question, image, setting in zip(rows, QUESTIONS, images, settings, strict=True):
        assert explainer.processor.decode(row.ids) == alone(explainer, image, question, setting)


def test_rows_join_and_leave_a_running_batch(explainer: Explainer) -> None:
    settings = [GenerationSettings(max_new_tokens=20)] * 4
    decoder = Decoder(explainer.model, explainer.processor)
    rows = rows_for(decoder, explainer, [0, 1, 1, 3], settings)
    decoder.join(rows[:1])
    for _ in range(3):
        decoder.step()
    decoder.join(rows[1:3])
    decoder.step()
    cut = rows[0].ids.copy()
    decoder.leave([rows[0]])
    decoder.join(rows[3:])
    finish(decoder)
    for row, question, image in zip(rows[1:], QUESTIONS[1:], [1, 1, 3], strict=True):
        assert explainer.processor.decode(row.ids) == alone(explainer, image, question, settings[0])
    whole = alone(explainer, 0, QUESTIONS[0], settings[0])
    assert whole.startswith(explainer.processor.decode(cut))


def test_sampling_depends_on_the_seed_alone(explainer: Explainer) -> None:
    settings = [GenerationSettings(max_new_tokens=12, temperature=1.5, seed=n) for n in range(4)]
    decoder = Decoder(explainer.model, explainer.processor)
    rows = rows_for(decoder, explainer, [0, 1, 2, 3], settings)
    decoder.join(rows)
    finish(decoder)
    for row, question, image, setting in zip(rows, QUESTIONS, [0, 1, 2, 3], settings, strict=True):
        fresh = GenerationSettings(max_new_tokens=12, temperature=1.5, seed=setting.seed)
        assert explainer.processor.decode(row.ids) == alone(explainer, image, question, fresh)


def test_one_batch_and_a_stream_say_what_each_says_alone(explainer: Explainer) -> None:
    settings = GenerationSettings(max_new_tokens=15)
    encoded = explainer.encode([draw(n % 2, n) for n in range(4)])
    wanted = [alone(explainer, n, question, settings) for n, question in enumerate(QUESTIONS)]
    assert explainer.answer(encoded, [asked(question) for question in QUESTIONS], settings) == wanted
    for n, question in enumerate(QUESTIONS):
        assert "".join(explainer.stream(encoded.take([n]), asked(question), settings)) == wanted[n]


def test_the_prefix_is_most_of_the_prompt(explainer: Explainer) -> None:
    decoder = Decoder(explainer.model, explainer.processor)
    ids, suffix = decoder.split(asked("Why?"), GenerationSettings())
    assert list(ids) + suffix == explainer.processor.encode(asked("Why?"))[0]
    assert ids[-1] == explainer.model.config.deepfake_token_index
    assert len(ids) > explainer.model.config.image_tokens > 0
    assert torch.tensor(suffix).lt(explainer.model.config.text_config.vocab_size).all()
