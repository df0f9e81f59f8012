"""RADAR's published files, best.pth: what becomes of every tensor, and what tensors do not show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from llava.core.tensor_files import Rules, Shape, read_pickled
from llava.detectors.published import PublishedFile, Unseen, detector_tensors, plan_for
from llava.detectors.radar import Radar, RadarConfig

SETTINGS = "config.yaml"  # that the published scripts write beside the weights
WIDTH_OF_HEAD = 64  # of timm's ViTs
_OURS = {
    "_gating_logit": "gate_logit",
    "badm.edge_encoder.": "boundary.map_encoder.",
    "badm.patch_processor.": "boundary.token_mlp.",
    "badm.": "boundary.",
    "aadm.freq_encoder.": "frequency.map_encoder.",
    "aadm.cls_processor.": "frequency.token_mlp.",
    "aadm.": "frequency.",
    "encoder.": "encoder.",
}
_OFF = "this model was trained without that branch: the weights are those of the first day"
_OTHER = "never trained: for another number of branches"
_ALONE = "one branch alone gets all attention, whatever it is asked"


class PublishedRadar(PublishedFile):
    """A published file of RADAR with the switches that it was trained with.

    config.yaml beside it, the settings in it, or `unseen` say how many rounds of reasoning there were and which
    branches were on: no tensor shows it. Raises ValueError where nobody says.
    """

    detector = Radar
    marks = ("_gating_logit", "reasoning.gru.weight_ih", "badm.classifier.weight", "aadm.classifier.weight")
    config: RadarConfig

    def __init__(self, file: Path, unseen: Unseen) -> None:
        tensors = detector_tensors(file)
        config = config_of(tensors.shapes, settings_of(file, unseen), unseen.heads, str(file))
        super().__init__(file, tensors, config, plan_for(Radar, config, tensors.shapes, rules_of(config)))

    @classmethod
    def open(cls, file: Path, unseen: Unseen) -> Self:
        """Open a file with what is said by hand."""
        return cls(file, unseen)

    @classmethod
    def files_of(cls, file: Path) -> list[Path]:
        """List the weights, and the settings beside them where they are."""
        beside = file.with_name(SETTINGS)
        return [file, *([beside] if beside.is_file() else [])]


def settings_of(file: Path, unseen: Unseen) -> dict[str, Any]:
    """Give the published settings: those in the file, over them those beside it, over them those said by hand."""
    content = read_pickled(file) if file.suffix != ".safetensors" else {}
    inside = content.get("config")
    known: dict[str, Any] = dict(inside) if isinstance(inside, Mapping) else {}
    beside = file.with_name(SETTINGS)
    if beside.is_file():
        known |= yaml.safe_load(beside.read_text(encoding="utf-8")) or {}
    if "reasoning_iterations" in known and not {"use_badm", "use_aadm"} & known.keys():
        known |= {"use_badm": True, "use_aadm": True}  # the script of the full model writes no switches
    if unseen.iterations is not None:
        known["reasoning_iterations"] = unseen.iterations
    if unseen.branches is not None:
        known |= {"use_badm": unseen.branches != "frequency", "use_aadm": unseen.branches != "boundary"}
    return known


def config_of(shapes: Mapping[str, Shape], known: Mapping[str, Any], heads: int | None, what: str) -> RadarConfig:
    """Read the settings off shapes and published settings. Raises ValueError naming those that nobody says."""
    lacking = [name for name in ("reasoning_iterations", "use_badm", "use_aadm") if name not in known]
    if lacking:
        raise ValueError(
            f"{what}: its tensors do not show {', '.join(lacking)}; put the {SETTINGS} of the run beside it, or say "
            "--iterations NUMBER and --branches both|boundary|frequency (scripts/convert_m2f2.py)."
        )
    width, _, patch, _ = shapes["encoder.patch_embed.proj.weight"]
    if heads is None and width % WIDTH_OF_HEAD:
        raise ValueError(
            f"{what}: attention heads can not be seen in the weights, and {width} channels are no multiple of "
            f"{WIDTH_OF_HEAD}; say how many there are (--heads NUMBER)."
        )
    return RadarConfig(
        image_size=round((shapes["encoder.pos_embed"][1] - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.blocks.")}),
        num_attention_heads=width // WIDTH_OF_HEAD if heads is None else heads,
        evidence_dim=shapes["badm.classifier.weight"][1],
        boundary=bool(known["use_badm"]),
        frequency=bool(known["use_aadm"]),
        iterations=int(known["reasoning_iterations"]),
        reasoning_heads=int(known.get("reasoning_heads", RadarConfig.reasoning_heads)),
        spectrum_size=int(known.get("fft_size", RadarConfig.spectrum_size)),
        normalisation="imagenet",
        operators="published",
    )


def rules_of(config: RadarConfig) -> Rules:
    """Give the rules: parts get our names; what these switches leave unused is dropped."""
    both = config.boundary and config.frequency
    used, unused = ("dual", "single") if both else ("single", "dual")
    dropped = {f"{part}_{unused}.": _OTHER for part in ("reasoning.init_proj", "external_classifier")}
    for name, is_on in (("badm.", config.boundary), ("aadm.", config.frequency)):
        dropped |= {} if is_on else {name: _OFF}
    if not both:
        dropped |= {f"reasoning.attention.{name}_proj.": _ALONE for name in "qk"}
    ours = _OURS | {
        f"reasoning.init_proj_{used}.": "reasoning.start.",
        f"external_classifier_{used}.": "external.",
        "reasoning.": "reasoning.",
    }
    return Rules(prefixes=ours, dropped=dropped)
