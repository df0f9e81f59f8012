"""Ask an explainer about images: encoded once, answered side by side in a running batch, or as a stream.

What stands before a question (system text, image and evidence tokens) is run once per image; its keys and values are
kept and copied into every row that asks about it. Positions are explicit, so gaps in a row's cache are only masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from llava.core.types import GenerationSettings, Turn
from llava.core.weights import read_config
from llava.detectors.base import DetectorOutput
from llava.explainer.convert import is_published, ready
from llava.explainer.delta import detector_fingerprint
from llava.explainer.modeling import Encoded, ForgeryLlava, ForgeryLlavaConfig
from llava.explainer.processing import ExplainerProcessor, Pixels

DTYPES: dict[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "stored": "auto"}
# Never quantised: p_fake is the same whether the words are written in 4, 8 or 16 bit.
FULL_PRECISION = ["detector", "model.vision_tower", "model.multi_modal_projector", "deepfake_projector", "lm_head"]
Layers = list[tuple[Tensor, Tensor]]
UNFINISHED = "\ufffd"  # what a tokeniser gives for the first bytes of a character


def load_model(
    name: str | Path,
    device: torch.device | str = "cpu",
    dtype: Literal["fp32", "bf16", "fp16", "stored"] = "fp32",
    quantization: Literal["none", "8bit", "4bit"] = "none",
    settings: Mapping[str, Any] | None = None,
) -> ForgeryLlava:
    """Load a merged explainer in eval mode; the detector stays in float32, whatever `dtype` (stored = as saved).

    settings: what the config.json of the folder `name` says, where that was read already. Raises ValueError when the
    folder holds something else, when a tensor is missing or left over, or when its calibration.json is of another
    detector.
    """
    folder = Path(name) if settings else ready(name)
    settings = settings or read_config(folder)
    if settings.get("model_type") != ForgeryLlavaConfig.model_type:
        found = settings.get("model_type") or settings.get("detector") or "something else"
        raise ValueError(
            f"{str(name)!r} holds {found!r}, not a merged explainer; run stage 2 and 3 or give their output."
        )
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "config": ForgeryLlavaConfig.from_dict(dict(settings))}
    if quantization != "none":
        options |= {"quantization_config": _quantization(quantization, DTYPES[dtype]), "device_map": {"": str(device)}}
    model, report = ForgeryLlava.from_pretrained(folder, output_loading_info=True, **options)
    for kind_of_problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind_of_problem):
            some = sorted(map(str, report[kind_of_problem]))
            raise ValueError(f"{str(name)!r}: {len(some)} {kind_of_problem.replace('_', ' ')}, first: {some[0]}.")
    model.detector.load_calibration(folder, partial(detector_fingerprint, folder, model.detector))
    return model.eval() if quantization != "none" else model.to(device).eval()  # type: ignore[arg-type]


def load_processor(name: str | Path, model: ForgeryLlava) -> ExplainerProcessor:
    """Load the tokeniser and picture preparation that go with a model."""
    return ExplainerProcessor.from_pretrained(ready(name), model.config, model.detector.inputs, model.detector.lacking)


def load_explainer(
    folder: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    quantization: Literal["none", "8bit", "4bit"] = "none",
) -> Explainer:
    """Load a merged explainer, ours or a published one, whose config.json says `settings`.

    precision `auto` is bf16 on a GPU and fp32 elsewhere. Raises ValueError when the folder holds something else.
    """
    if is_published(settings):
        folder = ready(folder)
        settings = read_config(folder)
    if (kind := settings.get("model_type")) != ForgeryLlavaConfig.model_type:
        raise ValueError(
            f"{str(folder)!r} holds model type {kind!r}, neither a detector nor an explainer; give what stage 1 wrote, "
            "or what stage 3 merged."
        )
    dtype = ("bf16" if device.type == "cuda" else "fp32") if precision == "auto" else precision
    model = load_model(folder, device, dtype, quantization, settings)
    detector = model.detector
    return Explainer(model, ExplainerProcessor.from_pretrained(folder, model.config, detector.inputs, detector.lacking))


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=FULL_PRECISION)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=FULL_PRECISION
    )


class Explainer:
    """A loaded model with its processor."""

    def __init__(self, model: ForgeryLlava, processor: ExplainerProcessor) -> None:
        self.model = model
        self.processor = processor

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray | Pixels], prior: float | None = None) -> Encoded:
        """Run tower and detector once for each uint8 image (H, W, 3), or what the processor made of it."""
        return self.model.encode(*self._pixels(images), prior)

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray | Pixels]) -> DetectorOutput:
        """Run tower and detector, as `encode` does, for images that nobody is going to be asked about."""
        pixels, inputs = self._pixels(images)
        return self.model.detect(self.model.vision_features(pixels), inputs)

    def answer(
        self,
        encoded: Encoded,
        conversations: Sequence[Sequence[Turn]],
        settings: GenerationSettings | None = None,
        evidence: Tensor | None = None,
    ) -> list[str]:
        """Answer one conversation (ending with a question) for each encoded image, as one batch.

        evidence (N, E) in [0, 1] replaces the detector's own, for causality tests.
        """
        chosen = encoded if evidence is None else replace(encoded, evidence=evidence.to(encoded.evidence))
        decoder, rows = self._begin(chosen, conversations, settings)
        while decoder.rows:
            decoder.leave([row for row in decoder.rows if row.is_done])
            decoder.step()
        return [self.processor.decode(row.ids) for row in rows]

    def stream(
        self, encoded: Encoded, turns: Sequence[Turn], settings: GenerationSettings | None = None
    ) -> Iterator[str]:
        """Yield the answer to one conversation piece by piece; a reader that stops early stops the writing."""
        decoder, (row,) = self._begin(encoded, [turns], settings)
        while True:
            if piece := decoder.news(row):
                yield piece
            if row.is_done:
                return
            decoder.step()

    def _begin(
        self, encoded: Encoded, conversations: Sequence[Sequence[Turn]], settings: GenerationSettings | None
    ) -> tuple[Decoder, list[Row]]:
        """Read one conversation for each image and write the first token of each answer."""
        if len(conversations) != len(encoded.evidence):
            raise ValueError(
                f"{len(conversations)} conversations for {len(encoded.evidence)} images; give one for each."
            )
        decoder, settings = Decoder(self.model, self.processor), settings or GenerationSettings()
        split = [decoder.split(turns, settings) for turns in conversations]
        images = [encoded.take([n]) for n in range(len(split))]
        prefixes = decoder.prefixes_of([ids for ids, _ in split], images)
        rows = [Row(settings=settings, suffix=suffix, prefix=p) for (_, suffix), p in zip(split, prefixes, strict=True)]
        decoder.join(rows)
        return decoder, rows

    def _pixels(self, images: Sequence[np.ndarray | Pixels]) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the tower's pixels (N, 3, S, S) and the detector's inputs (N, V, 3, S, S) on the model's device."""
        if not images:
            raise ValueError("images: expected at least one uint8 (H, W, 3) array, got none.")
        prepared = [self.processor.pixels(image) if isinstance(image, np.ndarray) else image for image in images]
        device = self.model.device
        pixels = torch.stack([p["pixel_values"] for p in prepared]).to(device)
        names = prepared[0]["detector_inputs"]
        return pixels, {n: torch.stack([p["detector_inputs"][n] for p in prepared]).to(device) for n in names}


def processors(settings: GenerationSettings) -> LogitsProcessorList:
    """Give what changes the scores of one answer, none when greedy. Raises ValueError for a temperature below 0."""
    if settings.temperature < 0:
        raise ValueError(f"temperature: {settings.temperature} is not usable; allowed: 0 (greedy) or more.")
    if settings.temperature == 0:
        return LogitsProcessorList()
    warpers = [TemperatureLogitsWarper(float(settings.temperature)), TopPLogitsWarper(settings.top_p)]
    return LogitsProcessorList([*warpers, GumbelNoise(settings.seed)])


class GumbelNoise(LogitsProcessor):
    """Add Gumbel noise to scores, so that their greatest is a sample of their softmax (the Gumbel-max trick).

    The noise of a step is a function of (seed, step), the same for every row of a batch and on every device:
    transformers' own sampling takes no generator and would read and move the global one.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Give scores (B, vocabulary) with noise."""
        waits = torch.empty(scores.shape[-1]).exponential_(generator=self.generator)
        return scores - waits.log().to(scores)


@dataclass(frozen=True)
class Prefix:
    """The ids up to the last image or evidence token, and the keys and values (1, heads, P, D) of each layer."""

    ids: tuple[int, ...]
    layers: Layers


@dataclass(eq=False)
class Row:
    """One answer on its way: `ids` so far, without the end; `is_done` once it ended or reached its limit.

    handed_out: how many characters of it were.
    """

    settings: GenerationSettings
    suffix: list[int]
    prefix: Prefix | None
    ids: list[int] = field(default_factory=list)
    is_done: bool = False
    handed_out: int = 0
    processors: LogitsProcessorList = field(init=False)

    def __post_init__(self) -> None:
        self.processors = processors(self.settings)

    @property
    def position(self) -> int:
        """Give the position of the newest token."""
        return len(self.prefix.ids if self.prefix else ()) + len(self.suffix) + len(self.ids) - 1


class Decoder:
    """A running batch of rows. One thread at a time may use it."""

    def __init__(self, model: ForgeryLlava, processor: ExplainerProcessor) -> None:
        self.model, self.processor = model, processor
        self.rows: list[Row] = []
        self._layers: Layers = []
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)  # (rows, cached tokens)

    def split(self, turns: Sequence[Turn], settings: GenerationSettings) -> tuple[tuple[int, ...], list[int]]:
        """Give the ids of a conversation up to its last tag, and those behind it. Raises ValueError."""
        ids, _ = self.processor.encode(turns, settings.layout)
        config = self.processor.config
        tags = [i for i, token in enumerate(ids) if token in (config.image_token_id, config.deepfake_token_index)]
        cut = tags[-1] + 1 if tags else 0
        return tuple(ids[:cut]), ids[cut:]

    @torch.inference_mode()
    def _prefixes(self, ids: tuple[int, ...], images: Sequence[Encoded]) -> list[Prefix]:
        """Run the same prefix ids for each image, encoded on its own, as one batch."""
        tokens = torch.tensor([ids] * len(images), device=self.model.device)
        features = torch.cat([image.image_features for image in images])
        evidence = torch.cat([image.evidence for image in images])
        cache = DynamicCache()
        given = {"image_features": features, "evidence": evidence}
        self.model(input_ids=tokens, **given, cache=cache, use_cache=True, logits_to_keep=1)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return [Prefix(ids, [(k[i : i + 1], v[i : i + 1]) for k, v in layers]) for i in range(len(tokens))]

    def prefixes_of(self, wanted: Sequence[tuple[int, ...]], images: Sequence[Encoded]) -> list[Prefix]:
        """Run the prefix ids wanted for each image; images with the same ids make one batch."""
        found: dict[int, Prefix] = {}
        for ids in dict.fromkeys(wanted):
            same = [n for n, other in enumerate(wanted) if other == ids]
            found |= zip(same, self._prefixes(ids, [images[n] for n in same]), strict=True)
        return [found[n] for n in range(len(wanted))]

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the rows' questions as one batch, write the first token of each answer, and let them into the batch."""
        if not rows:
            return
        device, pad = self.model.device, self.processor.pad_id
        kept = [len(row.prefix.ids) if row.prefix else 0 for row in rows]
        width, longest = max(kept), max(len(row.suffix) for row in rows)
        tokens = torch.tensor([row.suffix + [pad] * (longest - len(row.suffix)) for row in rows], device=device)
        lengths = torch.tensor([len(row.suffix) for row in rows], device=device)
        steps = torch.arange(longest, device=device)
        mask = torch.cat([_ones(kept, width, device), (steps < lengths[:, None]).long()], dim=1)
        positions = torch.tensor(kept, device=device)[:, None] + torch.minimum(steps, lengths[:, None] - 1)
        cache = DynamicCache(_stack([row.prefix for row in rows], width)) if width else DynamicCache()
        logits = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        ).logits
        last = logits[torch.arange(len(rows), device=device), lengths - 1]
        self._append([(layer.keys, layer.values) for layer in cache.layers], mask)
        self.rows += rows
        self._write(rows, last)

    @torch.inference_mode()
    def step(self) -> None:
        """Write one more token of every answer."""
        if not self.rows:
            return
        tokens = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.model.device)
        positions = torch.tensor([[row.position] for row in self.rows], device=self.model.device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        cache = DynamicCache(self._layers)
        logits = self.model(
            input_ids=tokens, attention_mask=self._mask, position_ids=positions, cache=cache, use_cache=True
        ).logits
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        self._write(self.rows, logits[:, -1])

    def news(self, row: Row) -> str:
        """Give what was written of an answer since the last call, in whole characters."""
        text = self.processor.decode(row.ids)
        if text.endswith(UNFINISHED) and not row.is_done:
            return ""
        new, row.handed_out = text[row.handed_out :], max(row.handed_out, len(text))
        return new

    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out of the batch, and the cache that only they used."""
        if not rows:
            return
        stays = [i for i, row in enumerate(self.rows) if row not in rows]
        self.rows = [self.rows[i] for i in stays]
        mask = self._mask[stays]
        used = mask.any(dim=0)
        self._mask = mask[:, used]
        self._layers = [(k[stays][:, :, used], v[stays][:, :, used]) for k, v in self._layers] if stays else []

    def _write(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose the next token of each row from its logits (rows, vocabulary)."""
        end = self.processor.tokenizer.eos_token_id
        for row, scores in zip(rows, logits.float(), strict=True):
            chosen = row.processors(torch.tensor([row.ids]), scores[None])[0] if row.processors else scores
            token = int(chosen.argmax())
            if token != end:
                row.ids.append(token)
            row.is_done = token == end or len(row.ids) >= row.settings.max_new_tokens

    def _append(self, layers: Layers, mask: Tensor) -> None:
        """Put new rows under the old ones; the shorter of both caches gets a gap at its end."""
        width = max(self._mask.shape[1], mask.shape[1])
        if self.rows:
            old = [(_widen(k, width), _widen(v, width)) for k, v in self._layers]
            new = [(_widen(k, width), _widen(v, width)) for k, v in layers]
            layers = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(old, new, strict=True)]
            mask = torch.cat([_gap(self._mask, width), _gap(mask, width)])
        self._layers, self._mask = layers, mask


def _stack(prefixes: Sequence[Prefix | None], width: int) -> Layers:
    """Give the prefixes of all rows as one cache; a row without one gets zeros, which its mask hides."""
    some = next(prefix for prefix in prefixes if prefix is not None)
    stacked = []
    for n, (keys, values) in enumerate(some.layers):
        rows = [prefix.layers[n] if prefix else (keys * 0, values * 0) for prefix in prefixes]
        stacked.append(tuple(torch.cat([_widen(row[part], width) for row in rows]) for part in (0, 1)))
    return stacked  # type: ignore[return-value]


def _ones(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    return (torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]).long()


def _widen(states: Tensor, width: int) -> Tensor:
    """Fill keys or values (rows, heads, L, D) with zeros up to a width; L wider than that is cut."""
    states = states[:, :, :width]
    return torch.nn.functional.pad(states, (0, 0, 0, width - states.shape[2]))


def _gap(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (0, width - mask.shape[1]))
