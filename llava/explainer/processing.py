"""From images and conversations to the tensors of ForgeryLlava, and back from ids to text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava.core.input_specs import Input, all_reasons
from llava.core.types import Content, Turn
from llava.data.dataset import input_tensors, to_tensor
from llava.detectors.m2f2det_parts import CLIP_MEAN
from llava.explainer.modeling import ForgeryLlavaConfig
from llava.explainer.prompts import EVIDENCE_TAG, IMAGE_TAG, TAGS, lay_out

IGNORE = -100
Pixels: TypeAlias = dict[str, Any]  # what `ExplainerProcessor.pixels` gives


class ExplainerProcessor:
    """Tokeniser and picture preparation of one explainer.

    Text pieces between tags are tokenised one by one, as the published code does, so the tags need no place in
    the vocabulary and the word "deepfake" in a question is just a word.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ForgeryLlavaConfig,
        detector_inputs: Mapping[str, Input],
        lacking: Callable[[Mapping[str, str]], str] = all_reasons,
    ) -> None:
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer needs a BOS and an EOS token; LLaVA's and the tiny base's have both.")
        self.tokenizer = tokenizer
        self.config = config
        self.detector_inputs, self.lacking = detector_inputs, lacking
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.is_legacy = bool(getattr(tokenizer, "legacy", tokenizer.init_kwargs.get("legacy", False)))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: ForgeryLlavaConfig,
        detector_inputs: Mapping[str, Input],
        lacking: Callable[[Mapping[str, str]], str] = all_reasons,
    ) -> ExplainerProcessor:
        """Read the tokeniser beside the model; `lacking` is the detector's."""
        return cls(read_tokenizer(folder), config, detector_inputs, lacking)

    def pixels(self, image: np.ndarray | Content) -> Pixels:
        """Give pixel_values (3, S, S) and the detector's tensors (V, ...), one per view, from uint8 (H, W, 3).

        `reasons`: why inputs of the detector are missing, by name; the tower reads the image of a Content.
        """
        content = Content(image=image) if isinstance(image, np.ndarray) else image
        image = content.image
        canvas = _pad_to_square(image) if self.config.image_aspect_ratio == "pad" else image
        tower, inputs = self.config.vision_input, self.detector_inputs
        pixel_values = to_tensor(canvas, tower)
        if canvas is image and list(inputs.values()) == [tower]:  # read by both: prepared once
            return {
                "pixel_values": pixel_values,
                "detector_inputs": dict.fromkeys(inputs, pixel_values[None]),
                "reasons": {},
            }
        tensors, reasons = input_tensors(content, inputs, with_views=True)
        return {"pixel_values": pixel_values, "detector_inputs": tensors, "reasons": reasons}

    def encode(
        self, turns: Sequence[Turn], layout: str | None = None, evidence_words: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Give (ids, labels) of a conversation; labels are -100 outside the answers.

        evidence_words stand at `<deepfake>` for a language model that has no adapter yet.
        """
        ids, labels = [self.tokenizer.bos_token_id], [IGNORE]
        for segment in lay_out(turns, layout or self.config.layout):
            text = segment.text if evidence_words is None else segment.text.replace(EVIDENCE_TAG, evidence_words)
            piece = self.text_ids(text, follows_end=len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id)
            if segment.is_answer:
                piece.append(self.tokenizer.eos_token_id)
            ids += piece
            labels += piece if segment.is_answer else [IGNORE] * len(piece)
        return ids, labels

    def collate(self, items: Sequence[dict[str, Any]], side: str = "right") -> dict[str, Any]:
        """Pad ids (and labels) to one length and stack the pictures; `side` is left for generation.

        Raises ValueError for a picture that lacks what the detector cannot do without.
        """
        why = next((why for item in items if (why := self.lacking(item.get("reasons", {})))), "")
        if why:
            raise ValueError(
                f"An explainer is taught with pictures, and its detector judges none: {why}. Merge a detector that "
                "reads single images."
            )
        batch: dict[str, Any] = {
            "input_ids": _padded([i["input_ids"] for i in items], self.pad_id, side),
            "attention_mask": _padded([[1] * len(i["input_ids"]) for i in items], 0, side),
        }
        if "labels" in items[0]:
            batch["labels"] = _padded([i["labels"] for i in items], IGNORE, side)
        if "spread" in items[0]:
            batch["spread"] = torch.tensor([i["spread"] for i in items])
        if "pixel_values" in items[0]:
            batch["pixel_values"] = torch.stack([i["pixel_values"] for i in items])
            names = items[0]["detector_inputs"]
            batch["detector_inputs"] = {n: torch.stack([i["detector_inputs"][n] for i in items]) for n in names}
        return batch

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Give the text of generated ids without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def text_ids(self, text: str, follows_end: bool = False) -> list[int]:
        """Tokenise text with its tags, without BOS; follows_end: it stands behind the end of an answer.

        LLaMA's tokeniser puts a space before a text, but (unless `legacy`) not behind a special token.
        """
        ids: list[int] = []
        end = str(self.tokenizer.eos_token) if follows_end and not self.is_legacy else ""
        for piece in TAGS.split(text):
            if piece == IMAGE_TAG:
                ids += [self.config.image_token_id] * self.config.image_tokens
            elif piece == EVIDENCE_TAG:
                ids += [self.config.deepfake_token_index] * self.config.evidence_tokens
            elif piece:
                found = self.tokenizer(end + piece, add_special_tokens=False)["input_ids"]
                ids += found[found.index(self.tokenizer.eos_token_id) + 1 :] if end else found
                end = ""
        return ids


def read_tokenizer(folder: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Read the tokeniser of a model folder, with LLaMA's `legacy` as the published code understands it.

    True where a tokenizer.model stands beside no word on it (transformers 5 then takes False). It is kept in
    `init_kwargs`, which are saved: transformers 5 reads `legacy` of LLaMA's class, but does not save it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if not hasattr(tokenizer, "legacy"):
        return tokenizer
    path = Path(folder) / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    legacy = said.get("legacy")
    if legacy is None:
        legacy = (Path(folder) / "tokenizer.model").is_file()
    if legacy != tokenizer.legacy:
        tokenizer = AutoTokenizer.from_pretrained(folder, legacy=legacy, **options)
    tokenizer.init_kwargs["legacy"] = legacy
    return tokenizer


def _padded(rows: list[list[int]], fill: int, side: str) -> Tensor:
    width = max(len(r) for r in rows)
    gaps = [[fill] * (width - len(r)) for r in rows]
    return torch.tensor([r + g if side == "right" else g + r for r, g in zip(rows, gaps, strict=True)])


def _pad_to_square(image: np.ndarray) -> np.ndarray:
    """Centre the picture on a square canvas of the CLIP mean colour, as LLaVA-1.5 does."""
    height, width = image.shape[:2]
    side = max(height, width)
    if height == width:
        return image
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = [int(c * 255) for c in CLIP_MEAN]
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas
