"""A LLaVA that owns its detector and reads its evidence, with its configuration.

M2F2-Det (Guo et al., CVPR 2025): the detector's probabilities pass a Linear-GELU-Linear adapter and stand as
tokens at `<deepfake>`. Different here: the detector always runs in eval mode and in float32, the vision tower
runs once for both readers, and only what was asked for is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from llava.core.types import InputSpec
from llava.detectors.base import Detector, DetectorOutput, from_description
from llava.detectors.m2f2det_parts import CLIP_MEAN, CLIP_STD


class ForgeryLlavaConfig(LlavaConfig):
    """LLaVA configuration with a detector.

    detector: what `Detector.describe()` gives. evidence_size (E) and evidence_tokens (T): the adapter maps the
    detector's (B, E) evidence to T tokens at `<deepfake>`. image_aspect_ratio: `pad` puts the image on a square
    canvas for the vision tower, `square` centre-crops it. layout: the prompt layout of training.
    """

    model_type = "m2f2_llava"

    detector: dict[str, Any] | None = None
    deepfake_token_index: int = 32001
    evidence_size: int = 2
    evidence_tokens: int = 1
    image_aspect_ratio: str = "square"
    layout: str = "v1"

    @property
    def image_tokens(self) -> int:
        """Count the patch tokens that stand for one image."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def vision_input(self) -> InputSpec:
        """Say what the vision tower's pixels look like."""
        return InputSpec(size=self.vision_config.image_size, mean=CLIP_MEAN, std=CLIP_STD)


def join_config(
    base: LlavaConfig, guest: Detector, aspect_ratio: str, evidence_tokens: int, layout: str
) -> ForgeryLlavaConfig:
    """Give the configuration of an explainer: that of its LLaVA base, and what its detector needs."""
    values = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    own = {
        "detector": guest.describe(),
        "evidence_size": len(guest.evidence_names),
        "evidence_tokens": evidence_tokens,
        "deepfake_token_index": max(base.image_token_index, base.text_config.vocab_size) + 1,
        "image_aspect_ratio": aspect_ratio,
        "layout": layout,
    }
    return ForgeryLlavaConfig(**values | own)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What the images of a batch become before a word is read.

    image_features (N, patches, hidden); evidence (N, E), as told to the words; detection: the detector's whole output.
    """

    image_features: Tensor
    evidence: Tensor
    detection: DetectorOutput

    def take(self, rows: list[int]) -> Encoded:
        """Give the rows of some images, repeated as asked."""
        picked = {k: v[rows] for k, v in self.detection.items() if isinstance(v, Tensor) and v.ndim > 0}
        return Encoded(
            image_features=self.image_features[rows],
            evidence=self.evidence[rows],
            detection=DetectorOutput(**picked),  # type: ignore[arg-type]
        )


class EvidenceAdapter(nn.Sequential):
    """Map evidence (B, E) to tokens (B, T * hidden): Linear, GELU, Linear (the published deepfake_projector)."""

    def __init__(self, evidence_size: int, hidden_size: int, tokens: int) -> None:
        super().__init__(nn.Linear(evidence_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, tokens * hidden_size))

    def forward(self, evidence: Tensor) -> Tensor:
        """Give (B, T * hidden) in the adapter's own precision; evidence comes in the detector's."""
        return super().forward(evidence.to(next(self.parameters()).dtype))


class ForgeryLlava(LlavaForConditionalGeneration):
    """LLaVA-1.5 with a detector inside; `<image>` and `<deepfake>` ids may lie beyond the vocabulary."""

    config_class = ForgeryLlavaConfig
    _keep_in_fp32_modules_strict = frozenset({"detector"})

    def __init__(self, config: ForgeryLlavaConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        if config.detector is None:
            raise ValueError("ForgeryLlavaConfig.detector is empty; merge a stage-1 detector into the base first.")
        self.detector: Detector = from_description(config.detector)
        hidden = config.text_config.hidden_size
        self.deepfake_projector = EvidenceAdapter(config.evidence_size, hidden, config.evidence_tokens)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as transformers does; a detector's unsaved buffers come back after a meta-device build."""
        super()._init_weights(module)
        if isinstance(module, Detector):
            saved = module.state_dict().keys()
            for name, buffer in from_description(module.describe()).named_buffers():
                if name not in saved:
                    init.copy_(module.get_buffer(name), buffer)

    def train(self, mode: bool = True) -> ForgeryLlava:
        """Switch mode; the detector and the vision tower stay in eval mode (no BatchNorm drift, no dropout)."""
        super().train(mode)
        self.detector.eval()
        self.model.vision_tower.eval()
        return self

    @torch.no_grad()
    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """Give the tower's selected hidden state (N, 1 + P, D), CLS first; pixel_values (N, 3, S, S)."""
        tower = self.model.vision_tower
        output = tower(pixel_values.to(tower.dtype), output_hidden_states=True)
        return output.hidden_states[self.config.vision_feature_layer]

    @torch.no_grad()
    def detect(self, features: Tensor, detector_inputs: dict[str, Tensor]) -> DetectorOutput:
        """Run the detector in its own precision on inputs (N, V, 3, S, S), averaged over V views.

        One that shares the tower gets `features` (N, 1 + P, D); further views, or another crop of the image, need the
        tower once more.
        """
        dtype = next(self.detector.parameters()).dtype
        inputs = {name: tensor.to(dtype) for name, tensor in detector_inputs.items()}
        shared, tower = None, self.detector.shared_tower()
        if tower is not None and self.detector.shares_vision:
            views, spec = inputs[tower.input], self.detector.inputs[tower.input]
            is_crop = isinstance(spec, InputSpec) and spec.seen == 1 and spec.fit == "crop"
            sees_the_same = is_crop and views.shape[1] == 1
            shared = (features if sees_the_same else self.vision_features(views.flatten(0, 1))).to(dtype)
        with torch.autocast(features.device.type, enabled=False):
            return self.detector.over_views(inputs, shared)

    def encode(self, pixel_values: Tensor, detector_inputs: dict[str, Tensor], prior: float | None = None) -> Encoded:
        """Run vision tower, projector and detector for N images: (N, 3, S, S) and (N, V, 3, S, S) per input.

        prior: share of fakes expected, for what a calibrated detector tells; None = the calibration's own.
        """
        features = self.vision_features(pixel_values)
        detection = self.detect(features, detector_inputs)
        projector = self.model.multi_modal_projector
        projected = projector(features[:, 1:].to(projector.linear_1.weight.dtype))  # the LLM never sees CLS
        for_words = self.detector.evidence_for_words(detection, prior)
        return Encoded(image_features=projected, evidence=for_words, detection=detection)

    def embed(self, input_ids: Tensor, image_features: Tensor | None, evidence: Tensor | None) -> Tensor:
        """Embed ids (B, L) and put image and evidence tokens at their placeholders, in reading order."""
        is_image = input_ids == self.config.image_token_id
        is_evidence = input_ids == self.config.deepfake_token_index
        for tag, marks, given in (("<image>", is_image, image_features), ("<deepfake>", is_evidence, evidence)):
            if given is None and input_ids.shape[1] > 1 and bool(marks.any()):
                raise ValueError(
                    f"The prompt holds {tag}, but no image was given; pass pixel_values or encoded images."
                )
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_image | is_evidence, 0))
        if evidence is not None:
            tokens = self.deepfake_projector(evidence)
            embeddings = _put(embeddings, is_evidence, tokens, "<deepfake>")
        if image_features is not None:
            embeddings = _put(embeddings, is_image, image_features, "<image>")
        return embeddings

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        detector_inputs: dict[str, Tensor] | None = None,
        image_features: Tensor | None = None,
        evidence: Tensor | None = None,
        spread: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Give logits (B, L, vocabulary) and, with labels, the loss averaged over the answer's tokens.

        Images come as pixel_values + detector_inputs or, already encoded, as image_features + evidence; evidence
        given beside pixel_values replaces the detector's own. spread, in training: see `_evidence_for_words`.
        """
        if pixel_values is not None and inputs_embeds is None:
            encoded = self.encode(pixel_values, detector_inputs or {})
            image_features, evidence = encoded.image_features, self._evidence_for_words(encoded, evidence, spread)
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, image_features, evidence)  # type: ignore[arg-type]
        items = kwargs.pop("num_items_in_batch", None)
        if labels is not None:
            kwargs["use_cache"] = False
        outputs = self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        vocab_size = self.config.text_config.vocab_size
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size, num_items_in_batch=items)
        return LlavaCausalLMOutputWithPast(loss=loss, logits=logits, cache=outputs.cache)

    def _evidence_for_words(self, encoded: Encoded, evidence: Tensor | None, spread: Tensor | None) -> Tensor:
        """Give the evidence (N, E) for the words: the detector's, or what replaces it.

        spread (N, 2 + kinds): the p_fake that replaces the one in it, the exponent that makes the rest of it less sure,
        and the kinds' shares of p_fake (0 = as they are). What else is told of a real face is its neighbour's: where
        nothing was edited, what an edit would be says nothing, and the words must learn that of any.
        """
        evidence = encoded.evidence if evidence is None else evidence
        if spread is None:
            return evidence
        softer = self.detector.soften(evidence, spread[:, 1])
        softer = torch.where(spread[:, :1] < 0.5, softer.roll(1, dims=0), softer)
        return self.detector.with_p_fake(softer, spread[:, 0], spread[:, 2:] if spread.shape[1] > 2 else None)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Hand images and evidence to the first step only; later steps read them from the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            for name in ("pixel_values", "detector_inputs", "image_features", "evidence"):
                inputs.pop(name, None)
        return inputs


def _put(embeddings: Tensor, where: Tensor, tokens: Tensor, tag: str) -> Tensor:
    """Scatter tokens, in order, to the marked positions. Raises ValueError when their numbers differ."""
    wanted, given = int(where.sum()), tokens.numel() // embeddings.shape[-1]
    if wanted != given:
        raise ValueError(f"{tag}: the prompt has room for {wanted} tokens, the images give {given}; one tag per image.")
    return embeddings.masked_scatter(where.unsqueeze(-1), tokens.to(embeddings.dtype))


AutoConfig.register(ForgeryLlavaConfig.model_type, ForgeryLlavaConfig)
AutoModelForImageTextToText.register(ForgeryLlavaConfig, ForgeryLlava)
