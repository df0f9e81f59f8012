"""What every detector is: named inputs in, logits and named evidence out, saved and loaded strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from llava.core.config import build, to_dict
from llava.core.input_specs import Input, all_reasons
from llava.core.registry import nearest
from llava.core.score_map import CALIBRATION_NAME, Calibration, read_calibration, write_calibration
from llava.core.types import REAL, Decision, Record, VerdictLabel, checked_scope, class_in_words
from llava.core.weights import read_config, save_module, sha256_of_tensors, without_random_weights
from llava.detectors.members import MEMBERS, Composite, own_description, read_members, save_members, write_trained_on

LEAST_ODDS = 1e-6  # a score or threshold nearer to 0 or 1 counts as this


@dataclass
class DetectorOutput(ModelOutput):
    """loss: scalar; logits (B, classes); evidence (B, E) in [0, 1]; evidence_map (B, h, w); losses: named parts."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    evidence: Tensor | None = None
    evidence_map: Tensor | None = None
    losses: dict[str, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class SharedTower:
    """A CLIP vision tower that a host with the same weights may run for a detector.

    prefix: how the names of its tensors begin in the detector's state dict, what follows are those of transformers'
    CLIPVisionModel; config: that model's; select_layer: the hidden state that is read; input: the detector's input that
    the tower sees.
    """

    prefix: str
    config: PreTrainedConfig
    select_layer: int
    input: str = "pixel_values"


class Detector(Composite):
    """Base of all detectors.

    A subclass sets `name`, `Config`, `classes` (one of them is `real`) and `evidence_names`, declares `inputs`, and
    writes `forward(<its inputs>, labels=None) -> DetectorOutput` without **kwargs. Of the evidence, `p_real` and
    `p_fake` are always there, and what is called `p_<class>` is the probability of that class; what other evidence is,
    `own_meanings` says in a few words. What it may be made of: see `Composite`.
    """

    Config: ClassVar[type]
    accepts_loss_kwargs: ClassVar[bool] = False  # Trainer asks: it is to divide the loss of accumulated batches itself
    class_weights: Tensor
    classes: tuple[str, ...] = ("real", "fake")
    evidence_names: tuple[str, ...] = ("p_real", "p_fake")
    optional_evidence: tuple[str, ...] = ()  # NaN, and left out of a verdict, where what it rests on is missing
    own_meanings: ClassVar[Mapping[str, str]] = {}
    taught: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # tag of records -> its values; `forward` gets their numbers

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.decision = Decision()
        self.calibration: Calibration | None = None
        self._frozen_by_name: set[str] = set()
        self.register_buffer("class_weights", torch.ones(len(self.classes)), persistent=False)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Name each tensor of `forward` and say what it looks like."""
        raise NotImplementedError

    def shared_tower(self) -> SharedTower | None:
        """Declare the vision tower that a host may run for this detector, there or not; None = it shares none."""
        return None

    def tower_tensors(self) -> dict[str, Tensor]:
        """Give the tensors of the shared tower by their names in a CLIPVisionModel; none where it is not there."""
        tower = self.shared_tower()
        if tower is None:
            return {}
        named = self.state_dict().items()
        return {name.removeprefix(tower.prefix): t for name, t in named if name.startswith(tower.prefix)}

    @property
    def evidence_meanings(self) -> dict[str, str]:
        """Say of each piece of evidence what it is, for people who see its value."""
        kinds = {f"p_{name}": f"Score for {class_in_words(name)}" for name in self.classes}
        known = {"p_real": "Score for real", "p_fake": "Score for fake", **kinds, **self.own_meanings}
        return {name: known[name] for name in self.evidence_names}

    @property
    def scope(self) -> str:
        """Say what it sees and what it has never seen, as each verdict repeats it; empty where nobody said."""
        return self.own_scope

    @property
    def shares_vision(self) -> bool:
        """Say whether the shared tower is not there: `forward` needs a host's features of it as `clip_features`."""
        return False

    @property
    def mask_grid(self) -> int | None:
        """Say how fine `masks` (B, grid, grid) of forged pixels are that training's `forward` wants; None = none."""
        return None

    def lacking(self, reasons: Mapping[str, str]) -> str:
        """Say why there is no verdict where inputs are missing, by name with the reason of each; empty = there is.

        By default all of them are needed. A missing input's tensor is NaN, so that nothing is made of it by accident.
        """
        return all_reasons(reasons)

    def without_vision(self) -> Detector:
        """Give the same weights without their own vision tower, to live in a host that has the same one."""
        raise ValueError(f"Detector {self.name!r} has no vision tower that a host could share.")

    def frozen_modules(self) -> list[nn.Module]:
        """List submodules that are not trained; they stay in eval mode while the rest trains."""
        return []

    def train(self, mode: bool = True) -> Detector:
        """Switch mode, but keep frozen parts in eval mode so that no BatchNorm statistic drifts."""
        super().train(mode)
        for module in (*self.frozen_modules(), *map(self.get_submodule, self._frozen_by_name)):
            module.eval()
        return self

    def freeze(self, patterns: Sequence[str]) -> None:
        """Stop training submodules whose dotted names match a shell pattern; they keep to eval mode from now on.

        Raises ValueError for a pattern that matches nothing.
        """
        for pattern in patterns:
            names = [name for name, _ in self.named_modules() if name and fnmatchcase(name, pattern)]
            if not names:
                children = [name for name, _ in self.named_children()]
                raise ValueError(f"freeze: no module is called {pattern!r}. {nearest(pattern, children)}")
            self._frozen_by_name.update(names)
            for name in names:
                self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def load_pretrained(self) -> None:
        """Load the published initial weights that the config names; there are none by default."""

    def observe(self, part: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Give what a fitted part is fitted on, (B, F), of inputs (B, V, ...)."""
        raise NotImplementedError

    def target(self, record: Record) -> int:
        """Give the number of the class that is right for a record.

        It is the one that has the record's class name; `real` for every record with label 0; else `fake`, where the
        detector has that class. Raises ValueError for a record without label, and for a class it does not know.
        """
        if record.label is None:
            raise ValueError(f"{record.id!r} has no label; add it.")
        name = "real" if record.label == REAL else record.class_name.strip().lower()
        known = [each for each in (name, "fake") if each in self.classes and (each == "real") == (record.label == REAL)]
        if not known:
            raise ValueError(
                f"{self.name!r} has no class for {record.class_name!r} (first: {record.id!r}); its classes are "
                f"{', '.join(self.classes)}. Say which one it is (--data.class_names.NAME CLASS), or take a detector "
                "that has a class 'fake'."
            )
        return self.classes.index(known[0])

    def class_scores(self, logits: Tensor) -> Tensor:
        """Map logits (B, classes) to the probability of each class, (B, classes) in [0, 1] with sum 1."""
        return logits.float().softmax(dim=-1)

    def p_fake(self, logits: Tensor) -> Tensor:
        """Map logits (B, classes) to the probability of not being real, (B,) in [0, 1]."""
        return 1.0 - self.class_scores(logits)[:, self.classes.index("real")]

    def labels(self, p_fake: np.ndarray, prior: float | None = None) -> list[VerdictLabel]:
        """Give the verdict on each raw p_fake (N,): by the calibration, without one by the threshold.

        prior: share of fakes expected, for a calibrated detector; None = the calibration's own.
        """
        if self.calibration is not None:
            return self.calibration.labels(p_fake, prior)
        return [VerdictLabel.FAKE if p >= self.decision.threshold else VerdictLabel.REAL for p in p_fake]

    def evidence_for_words(self, output: DetectorOutput, prior: float | None = None) -> Tensor:
        """Give the evidence (B, E) that words rest on: p_real and p_fake as the verdict takes them.

        Calibrated, they are the posterior at `prior` (None = the calibration's own). Otherwise their log odds are
        those above the odds of the threshold, so that words, which tip over at 0.5, and verdict tip over at the same
        score. All other evidence stays as it is.
        """
        assert output.logits is not None and output.evidence is not None
        if self.calibration is None and self.decision.threshold == 0.5:
            return output.evidence
        p_fake = self.p_fake(output.logits).double()
        if self.calibration is not None:
            p_words = torch.from_numpy(self.calibration.posterior(p_fake.cpu().numpy(), prior))
        else:
            threshold = torch.full_like(p_fake, self.decision.threshold)
            p_words = (torch.logit(p_fake, LEAST_ODDS) - torch.logit(threshold, LEAST_ODDS)).sigmoid()
        return self.with_p_fake(output.evidence, p_words)

    def with_p_fake(self, evidence: Tensor, p_fake: Tensor, shares: Tensor | None = None) -> Tensor:
        """Put other values (B,) in [0, 1] at p_fake, and what is left of 1 at p_real, of the evidence (B, E).

        The classes that are not real keep their shares of p_fake (equal ones, where it was 0), so that none is above
        it and all of them sum to it. shares (B, kinds), in the order of `kinds`: what replaces their shares; a row of
        zeros replaces nothing.
        """
        columns = dict(zip(self.evidence_names, evidence.unbind(dim=1), strict=True))
        p_fake, before = p_fake.to(evidence), columns["p_fake"]
        even = torch.full_like(before, 1 / (len(self.classes) - 1))
        for number, name in enumerate(self._kinds):
            share = torch.where(before > 0, columns[name] / before, even)
            if shares is not None:
                share = torch.where(shares.any(dim=1), shares[:, number].to(share), share)
            columns[name] = p_fake * share
        columns |= {"p_real": 1 - p_fake, "p_fake": p_fake}
        return torch.stack([columns[name] for name in self.evidence_names], dim=1)

    def with_class(self, evidence: Tensor, class_name: str, p: float) -> Tensor:
        """Set the evidence (B, E) by hand to one class: `p` is its probability, all others share the rest evenly.

        Raises ValueError for a class that the evidence does not tell, and for a p that is not above all others.
        """
        if class_name not in self.told_classes or not 1 / len(self.classes) < p <= 1:
            raise ValueError(
                f"{class_name!r} with p = {p}: the evidence of {self.name!r} tells {', '.join(self.told_classes)}, "
                f"each with a p above {1 / len(self.classes):.2f} and at most 1."
            )
        if class_name not in self.kinds:
            return self.with_p_fake(evidence, torch.full((len(evidence),), 1 - p if class_name == "real" else p))
        rest = (1 - p) / len(self.kinds)  # of p_real, and of each other kind
        kinds = torch.tensor([p if name == class_name else rest for name in self.kinds])
        shares = (kinds / (1 - rest)).expand(len(evidence), -1)
        return self.with_p_fake(evidence, torch.full((len(evidence),), 1 - rest), shares)

    def soften(self, evidence: Tensor, exponent: Tensor) -> Tensor:
        """Make the evidence (B, E) beside p_real and p_fake less sure, the more so the smaller the exponents (B,).

        exponent: in (0, 1], 1 = as it is. The shares of the classes that are not real are taken to that power.
        """
        columns = dict(zip(self.evidence_names, evidence.unbind(dim=1), strict=True))
        if self._kinds:
            kinds = torch.stack([columns[name] for name in self._kinds], dim=1)
            softer = kinds.clamp(min=torch.finfo(kinds.dtype).tiny) ** exponent.to(kinds)[:, None]
            softer = softer / softer.sum(dim=1, keepdim=True) * kinds.sum(dim=1, keepdim=True)
            columns |= dict(zip(self._kinds, softer.unbind(dim=1), strict=True))
        return torch.stack([columns[name] for name in self.evidence_names], dim=1)

    @property
    def told_classes(self) -> list[str]:
        """Name the classes that the evidence tells: real, fake where the detector has that class, and its kinds."""
        return ["real", *(["fake"] if "fake" in self.classes else []), *self.kinds]

    @property
    def kinds(self) -> list[str]:
        """Name the classes that are one kind of fake among several, and have their probability in the evidence."""
        kinds = {f"p_{name}": name for name in self.classes if name not in ("real", "fake")}
        return [kinds[name] for name in self.evidence_names if name in kinds]

    @property
    def _kinds(self) -> list[str]:
        return [f"p_{name}" for name in self.kinds]

    def over_views(self, inputs: Mapping[str, Tensor], clip_features: Tensor | None = None) -> DetectorOutput:
        """Run on inputs (B, V, ...) and average probabilities and evidence over the V views of each image.

        clip_features (B * V, 1 + P, D) for a detector that shares a host's vision. Logits (B, classes) are the log of
        the mean probabilities when V > 1; evidence_map is that of the first view.
        """
        views = next(iter(inputs.values())).shape[1]
        shared = {} if clip_features is None else {"clip_features": clip_features}
        output: DetectorOutput = self(**{name: tensor.flatten(0, 1) for name, tensor in inputs.items()}, **shared)
        if views == 1:
            return output
        assert output.logits is not None and output.evidence is not None
        probabilities = output.logits.float().softmax(dim=-1).unflatten(0, (-1, views)).mean(dim=1)
        return DetectorOutput(
            logits=probabilities.log(),
            evidence=output.evidence.unflatten(0, (-1, views)).mean(dim=1),
            evidence_map=None if output.evidence_map is None else output.evidence_map[::views],
        )

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Give optimiser groups that cover every trainable weight exactly once."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def save(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, if it is calibrated, calibration.json into `folder`.

        Members go into its sub-folders; what is known of the groups that it was trained on into trained_on.json.
        """
        members = {MEMBERS: sha256} if (sha256 := save_members(folder, self.members)) else {}
        write_trained_on(folder, self.trained_on)
        if self.calibration is None:
            (Path(folder) / CALIBRATION_NAME).unlink(missing_ok=True)  # of weights that were there before
        else:
            write_calibration(folder, self.calibration)
        # The config comes last: a folder that has one is complete.
        save_module(folder, self, self.describe() | members, apart=f"{MEMBERS}.")

    def fingerprint(self) -> str:
        """Give one SHA-256 of every tensor. Raises ValueError when those of a host's tower are missing."""
        if self.shares_vision:
            raise ValueError(
                f"{self.name!r} computes its scores with a host's vision tower and has no fingerprint of its own; "
                "llava.explainer.delta.detector_fingerprint gives it for the host's folder."
            )
        return sha256_of_tensors(self.state_dict())

    def load_calibration(self, folder: str | Path, fingerprint: Callable[[], str] | None = None) -> None:
        """Take the calibration.json of `folder`, if any. Raises ValueError when it is of other weights.

        fingerprint: gives that of the detector inside a host; None = its own.
        """
        calibration = read_calibration(folder)
        if calibration is not None and calibration.weights_sha256 != (own := (fingerprint or self.fingerprint)()):
            raise ValueError(
                f"{str(Path(folder) / CALIBRATION_NAME)!r} was fitted for other weights (sha256 "
                f"{calibration.weights_sha256[:12]}, these are {own[:12]}); score the validation split again and run "
                "eval/calibrate.py (for an explainer, merge the detector with its calibration again), or remove the "
                "file to go without calibration."
            )
        self.calibration = calibration

    def describe(self) -> dict[str, Any]:
        """Give what `from_description` needs to build this detector again, without its weights."""
        known = {"decision": asdict(self.decision), "scope": self.own_scope}
        return {"detector": self.name, "config": to_dict(self.config), **known}


def is_there(tensor: Tensor) -> Tensor:
    """Say of each row of an input (B, ...) whether it is there, (B,): one that is missing is NaN."""
    return ~tensor.flatten(1).isnan().any(dim=1)


def create(name: str, config: dict[str, Any]) -> Detector:
    """Build a detector with fresh weights from its name and plain settings. Raises ValueError on unknown ones."""
    from llava.detectors import DETECTORS

    detector_class = DETECTORS.get(name)
    return detector_class(build(detector_class.Config, config, where="model"))


def from_description(description: Mapping[str, Any]) -> Detector:
    """Build the detector of a `describe()` dictionary, with fresh weights."""
    detector = create(description["detector"], description["config"])
    detector.decision = Decision(**description.get("decision", {}))
    detector.own_scope = checked_scope(description.get("scope", ""))
    return detector


def load(folder: str | Path, expected: str | None = None, description: Mapping[str, Any] | None = None) -> Detector:
    """Load a saved detector with its calibration, in eval mode; from an explainer's folder the one inside.

    description: what its config.json says, where that was read already. Raises ValueError when the folder holds
    another kind of model, a calibration of other weights, or a detector with parts that are still to be fitted.
    """
    detector = load_uncalibrated(folder, expected, description)
    detector.require_fitted()
    detector.load_calibration(folder)
    return detector


def load_uncalibrated(
    folder: str | Path, expected: str | None = None, description: Mapping[str, Any] | None = None
) -> Detector:
    """Load a saved detector in eval mode, fitted or not, without its calibration. Raises ValueError as `load` does."""
    whole = read_config(folder) if description is None else description
    description = own_description(whole)
    kind = description.get("detector")
    if kind is None or (expected is not None and kind != expected):
        found = f"detector {kind!r}" if kind else f"model type {description.get('model_type')!r}"
        wanted = "a detector" if expected is None else f"detector {expected!r}"
        raise ValueError(f"{str(folder)!r} holds {found}, not {wanted}; give another folder.")
    with without_random_weights():
        detector = from_description(description)
    if description is not whole:
        if detector.shares_vision:
            raise ValueError(f"{str(folder)!r}: its detector reads the explainer's vision tower; give that of stage 1.")
        detector.load_hosted_weights(folder)
        return detector.eval()
    detector.load_weights(folder)
    read_members(folder, detector.members, description.get(MEMBERS, {}))
    return detector.eval()
