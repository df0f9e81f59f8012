"""Published stage-2 and stage-3 outputs become deltas of ours, for the base that their user names.

Stage 2 is `mm_projector.bin` with the adapter. Stage 3 is `adapter_model.safetensors` (LoRA) beside
`non_lora_trainables.bin` (projector and adapter). The published LoRA was also wrapped round both CLIP towers, where it
was not trained: those tensors are dropped, after a look that they change nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from llava.core.conversion import REPORT_NAME, Plan, Rules, plan
from llava.core.runtime import atomic_path, write_json
from llava.core.tensor_files import TensorFiles
from llava.core.weights import resolve
from llava.detectors.published import converted_folder
from llava.explainer.configuration import ForgeryLlavaConfig
from llava.explainer.convert import RULES
from llava.explainer.delta import LORA_WEIGHTS, OTHER_WEIGHTS, RECORD, add_lora, fingerprint, save_tensors, write_record
from llava.explainer.modeling import ForgeryLlava

log = logging.getLogger(__name__)
WRAPPED: Final = "base_model.model."
ADAPTER_FILE, PROJECTOR_FILE, OTHERS_FILE = "adapter_config.json", "mm_projector.bin", "non_lora_trainables.bin"
LORA_FILES: Final = (LORA_WEIGHTS, "adapter_model.bin")
_LEAKED: Final = dict.fromkeys(
    (f"{WRAPPED}model.vision_tower.", f"{WRAPPED}deepfake_encoder."),
    "LoRA round a frozen CLIP tower, never trained: its B is zero",
)
_LORA_RULES: Final = Rules(
    prefixes={f"{WRAPPED}model.layers.": f"{WRAPPED}model.language_model.layers."}, dropped=_LEAKED
)
_TRAINED: Final = ("deepfake_projector.", "model.multi_modal_projector.")


def ready_delta(name: str | Path, base: Path) -> Path:
    """Give a delta folder that `merge_delta` reads; a published one is converted for `base` first.

    The converted copy is kept in `checkpoints/converted/`. Raises FileNotFoundError or ValueError.
    """
    folder = resolve(name)
    if (folder / RECORD).is_file():
        return folder
    files = [folder / name for name in (PROJECTOR_FILE, OTHERS_FILE, *LORA_FILES) if (folder / name).is_file()]
    if not files:
        return folder
    target = converted_folder(folder, [*files, *sorted(base.glob("*.safetensors"))])
    if not target.is_dir():
        PublishedDelta(folder, base).write(target)
        log.info("%s is a published delta; written for %s to %s", folder, base, target)
    return target


class PublishedDelta:
    """A published stage-2 or stage-3 folder, and the base (an explainer of ours) that it is for.

    Raises ValueError when a tensor is missing, left over or of another shape, and for a LoRA that was not saved.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.config = ForgeryLlavaConfig.from_pretrained(base)
        self.lora = self._lora_files()
        others = TensorFiles([folder / (OTHERS_FILE if self.lora else PROJECTOR_FILE)])
        if not self.lora and any(name.startswith(WRAPPED) for name in others):
            raise ValueError(
                f"{str(folder)!r} is a checkpoint of a LoRA run that holds the projectors alone: the published trainer "
                "does not save LoRA there. Give the folder of the finished run, with adapter_model.safetensors."
            )
        self.others = {name.removeprefix(WRAPPED): tensor for name, tensor in others.items()}
        self.adapter = read_adapter(folder) if self.lora else {}
        self.plans = self._plans()

    def write(self, out: Path) -> None:
        """Write the delta as our own training would, with a report. Raises ValueError when tensors do not fit."""
        for what, found in self.plans.items():
            found.check(f"{self.folder} ({what})")
        with atomic_path(out) as staged:
            staged.mkdir()
            lora = self._moved("lora", self.lora)
            if lora:
                self._wrapped().peft_config["default"].save_pretrained(str(staged))
                save_tensors(staged / LORA_WEIGHTS, lora)
            others = self._moved("others", self.others)
            save_tensors(staged / OTHER_WEIGHTS, others)
            base = {"name": str(self.base), "sha256": fingerprint(self.base)}
            write_record(staged, base, len(others), len(lora))
            write_json(staged / REPORT_NAME, {what: found.to_dict() for what, found in self.plans.items()})

    def _lora_files(self) -> Mapping[str, Tensor]:
        files = [self.folder / name for name in LORA_FILES]
        present = [file for file in files if file.is_file()]
        return TensorFiles(present[:1]) if present else {}

    def _plans(self) -> dict[str, Plan]:
        with torch.device("meta"):
            own = {name: tuple(tensor.shape) for name, tensor in ForgeryLlava(self.config).named_parameters()}
        given = {name: tuple(tensor.shape) for name, tensor in self.others.items()}
        parts = _TRAINED if self.lora else _TRAINED[:1]
        plans = {"others": plan(given, {n: shape for n, shape in own.items() if n.startswith(parts)}, RULES)}
        if self.lora:
            wanted = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(self._wrapped()).items()}
            plans["lora"] = plan({n: tuple(t.shape) for n, t in self.lora.items()}, wanted, _LORA_RULES)
            self._refuse_trained_leaks(plans["lora"])
        return plans

    def _refuse_trained_leaks(self, found: Plan) -> None:
        leaks = [move.source for move in found.moves if move.action == "dropped" and ".lora_B" in move.source]
        trained = [name for name in leaks if bool(self.lora[name].any())]
        if trained:
            raise ValueError(
                f"{str(self.folder)!r}: {len(trained)} LoRA tensors round a CLIP tower are not zero (first: "
                f"{trained[0]}); folding them would change the tower that the detector was trained with."
            )

    def _wrapped(self) -> Any:
        """Give an empty explainer with LoRA of these sizes."""
        with torch.device("meta"):
            return add_lora(
                ForgeryLlava(self.config),
                self.adapter["r"],
                self.adapter["lora_alpha"],
                self.adapter.get("lora_dropout", 0.0),
            )

    def _moved(self, what: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if what not in self.plans:
            return {}
        return {move.target: tensors[move.source] for move in self.plans[what].moves if move.target}


def read_adapter(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises FileNotFoundError when it is not beside the LoRA tensors."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds LoRA tensors but no {ADAPTER_FILE}; copy it, too.")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings
