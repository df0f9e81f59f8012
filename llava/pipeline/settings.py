"""Settings that every way of asking shares, and loading a model with them; light, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llava.core.config import setting

if TYPE_CHECKING:
    from pathlib import Path

    from llava.pipeline.pipeline import Pipeline

Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]
Quantization: TypeAlias = Literal["none", "8bit", "4bit"]
DEMO_MODEL = "demo"  # what `scripts/demo.sh` calls its model in checkpoints/


@dataclass(frozen=True, kw_only=True)
class FaceSettings:
    """How faces are found and cut out."""

    face: Literal["auto", "largest", "off"] = setting(
        "auto", "auto = every face, largest = only the largest, off = the whole image, whatever it shows"
    )
    margin: float = setting(0.3, "width added around a face, as a part of its box")
    # A crop with margin 0.3 has that square on (1 / 1.6)^2 = 39 % of it: what this rule cuts out passes it unchanged.
    whole_from: float = setting(0.3, "an image is taken as it is when a square on its largest face covers this part")
    least_face: int = setting(
        32, "pixels of width that a face needs to be judged; a smaller one is said to be too small"
    )

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be cut out."""
        if self.margin < 0:
            raise ValueError(f"margin: {self.margin} is not usable; allowed: 0 or more, 0.3 leaves hair and chin in.")


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """How a video is looked at."""

    frames: int = setting(16, "frames that are looked at, evenly spread over the clip")
    least_frames: int = setting(3, "frames with the face that a verdict needs; all, where a clip has fewer frames")
    trim: float = setting(0.1, "share of the frame scores cut off at each end before the mean is taken")
    overlap: float = setting(0.3, "boxes of two frames with this overlap (IoU) are the same face")
    # In the longer side of the box the eyes lie 0.34 (portraits) to 0.39 (ddvqa) apart, in that of a Haar box 0.38: 1.0
    # means what it did.
    shift: float = setting(1.0, "and so are those whose centres lie at most this many faces (longer sides) apart")

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be done."""
        for name in ("frames", "least_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"video.{name}: {getattr(self, name)} is not usable; allowed: 1 or more.")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"video.trim: {self.trim} is not usable; allowed: 0 or more and below 0.5, such as 0.1.")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How the model is loaded and run."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: Precision = setting("auto", "of the explainer; auto = bf16 on a GPU, else fp32")
    quantization: Quantization = setting("none", "of the language model alone, so p_fake stays as it is")
    batch_size: int = setting(8, "faces that are looked at together")


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(FaceSettings, ModelSettings):
    """Everything that a pipeline is loaded with, except the model's name."""

    prior: float | None = setting(
        None, "share of forgeries expected among such images, 0.1 = one in ten; none = as in the calibration data"
    )
    stability: bool = setting(
        True, "judge delivered versions of each face too (JPEG, resized, cropped); one that turns it makes it UNCERTAIN"
    )


@dataclass(frozen=True, kw_only=True)
class WordSettings:
    """How the words are chosen."""

    max_new_tokens: int | None = setting(None, "longest answer, in tokens; none = the explainer's own limit")
    temperature: float = setting(0.0, "0 = always the likeliest word; above 0 samples")
    seed: int = setting(0, "seed of the sampling; matters only when temperature is above 0")


def is_detector(config: Mapping[str, Any]) -> bool:
    """Say whether the config.json of a model is that of a detector alone; an explainer's says more of its own."""
    return isinstance(config.get("detector"), str)


def model_folder(name: str) -> Path:
    """Give the folder of a detector or explainer that our loaders read; a published one is converted first.

    Raises FileNotFoundError or ValueError.
    """
    from llava.core.weights import read_config
    from llava.detectors.published import ready_detector

    folder = ready_detector(name)
    if read_config(folder).get("detector"):
        return folder
    from llava.explainer.convert import ready  # here, because a model of ours needs no conversion

    return ready(folder)


def load(
    settings: PipelineSettings, name: str, quantization: Quantization | None = None, words: bool = True
) -> Pipeline:
    """Load a model; `quantization` where it was spelled in another way. Raises ValueError or FileNotFoundError.

    words: see `Pipeline.from_pretrained`.
    """
    from transformers.utils.logging import disable_progress_bar

    from llava.pipeline.pipeline import Pipeline

    disable_progress_bar()
    return Pipeline.from_pretrained(
        name,
        device=settings.device,
        precision=settings.precision,
        quantization=quantization or settings.quantization,
        faces=FaceSettings(**{field.name: getattr(settings, field.name) for field in fields(FaceSettings)}),
        batch_size=settings.batch_size,
        prior=settings.prior,
        stability=settings.stability,
        words=words,
    )
