"""A detector made of detectors: the fused log odds of its members, each of which can be loaded alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava.core.config import setting, to_dict
from llava.core.input_specs import Input, all_reasons
from llava.core.registry import nearest
from llava.core.weights import read_config
from llava.detectors.base import LEAST_ODDS, Detector, DetectorOutput, from_description, is_there, load
from llava.detectors.fitted import LogisticFusion
from llava.detectors.members import read_trained_on
from llava.detectors.published import ready_detector

MEMBER_NAME = re.compile("[a-z0-9_]+")
DESCRIPTION = ("detector", "config", "decision", "scope")  # what builds a member, see `Detector.describe`


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Settings of an ensemble."""

    members: dict[str, str | dict[str, Any]] = setting(
        help="name -> folder, name in checkpoints/ or hub id of a detector; or detector and config of a fresh one"
    )
    freeze_members: bool = setting(True, "leave the members as they are; false trains them together")

    def __post_init__(self) -> None:
        wrong = [name for name in self.members if not MEMBER_NAME.fullmatch(name)]
        if wrong or not self.members:
            raise ValueError(
                f"members: {wrong[0] if wrong else 'none'!r} is not usable; give at least one, with a name of small "
                "letters, digits and _, as --model.members.NAME FOLDER."
            )

    @classmethod
    def tiny(cls) -> Self:
        """Give two tiny members of different kinds, fresh and therefore to be trained."""
        from llava.detectors.m2f2det import M2F2DetConfig  # here, because an ensemble of others does without
        from llava.detectors.vit3 import ViT3Config

        members: dict[str, str | dict[str, Any]] = {
            "clip": fresh("m2f2det", M2F2DetConfig.tiny()),
            "vit": fresh("vit3", ViT3Config.tiny()),
        }
        return cls(members=members, freeze_members=False)


class Ensemble(Detector):
    """Fuse the log odds of p_fake of all members that can judge an image: their mean, unless weights are fitted.

    evidence = (p_real, p_fake, p_fake_<member>...), the latter NaN where a member lacks an input that it needs.
    """

    name = "ensemble"
    Config = EnsembleConfig
    config: EnsembleConfig

    def __init__(self, config: EnsembleConfig) -> None:
        """Build the members, without their weights; of one given by its folder only config.json is read."""
        descriptions, folders = described(config.members)
        super().__init__(replace(config, members=dict(descriptions)))
        members = {name: from_description(description) for name, description in descriptions.items()}
        self.members = cast("Mapping[str, Detector]", nn.ModuleDict(members))
        self._folders = folders
        self.trained_on = frozenset[str]().union(*map(read_trained_on, folders.values()))
        self._inputs, self._routes = joined(self.members)
        self.optional_evidence = tuple(f"p_fake_{name}" for name in members)
        self.evidence_names = ("p_real", "p_fake", *self.optional_evidence)
        self.fusion = self.make_fusion()
        self._hold_members()

    def make_fusion(self) -> nn.Module:
        """Build what maps log odds (B, M), NaN where a member has none, to one for each image, (B,)."""
        return LogisticFusion(len(self.members))

    @property
    def scope(self) -> str:
        """Give its own scope; without one those of its members by name, where these are as they were."""
        said = {name: member.scope for name, member in self.members.items()}
        if self.own_scope or not self.config.freeze_members or not any(said.values()):
            return self.own_scope
        return ", ".join(f"{name} ({scope or 'nobody said'})" for name, scope in said.items())

    @property
    def inputs(self) -> dict[str, Input]:
        """Give the inputs of all members, see `joined`."""
        return self._inputs

    @property
    def evidence_meanings(self) -> dict[str, str]:
        """Say of each piece of evidence what it is."""
        members = {f"p_fake_{name}": f"Score for fake by the member {name}" for name in self.members}
        return {"p_real": "Score for real", "p_fake": "Score for fake", **members}

    def forward(self, *, labels: Tensor | None = None, **inputs: Tensor) -> DetectorOutput:
        """Judge inputs by name; labels (B,) are places in `classes`."""
        return self._judge(inputs, labels, lambda member, own: member(**own))

    def over_views(self, inputs: Mapping[str, Tensor], clip_features: Tensor | None = None) -> DetectorOutput:
        """Run on inputs (B, V, ...): each member averages over the views that it declares."""
        assert clip_features is None, "an ensemble shares no vision"
        return self._judge(inputs, None, lambda member, own: member.over_views(own))

    def observe(self, part: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Give the members' log odds (B, M), NaN where one has none."""
        return self._log_odds(inputs, lambda member, own: member.over_views(own))

    def lacking(self, reasons: Mapping[str, str]) -> str:
        """Say why there is no verdict: only when no member is left."""
        found = {}
        for name, member in self.members.items():
            own = {own: reasons[shared] for own, shared in self._routes[name].items() if shared in reasons}
            if not (reason := member.lacking(own)):
                return ""
            found[name] = reason
        return all_reasons(found)

    def with_p_fake(self, evidence: Tensor, p_fake: Tensor, shares: Tensor | None = None) -> Tensor:
        """Put other values at p_fake and p_real; the members' p_fake move by as many log odds, so that they agree."""
        moved = torch.logit(p_fake.to(evidence), LEAST_ODDS) - torch.logit(evidence[:, 1], LEAST_ODDS)
        members = (torch.logit(evidence[:, 2:], LEAST_ODDS) + moved[:, None]).sigmoid()
        return torch.cat([super().with_p_fake(evidence, p_fake, shares)[:, :2], members], dim=1)

    def evidence_for_words(self, output: DetectorOutput, prior: float | None = None) -> Tensor:
        """Give the evidence that words rest on; of a member that has not judged, what the others say."""
        evidence = super().evidence_for_words(output, prior)
        return torch.where(evidence.isnan(), evidence[:, 1:2], evidence)

    def frozen_modules(self) -> list[nn.Module]:
        """List the members, or what they keep frozen themselves."""
        if self.config.freeze_members:
            return [cast("nn.Module", member) for member in self.members.values()]
        return [module for member in self.members.values() for module in member.frozen_modules()]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Give the members' own groups, and one for all other weights."""
        groups = [group for member in self.members.values() for group in member.parameter_groups(lr)]
        of_members = {id(p) for member in self.members.values() for p in member.parameters()}
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in of_members]
        return [group for group in (*groups, {"params": own, "lr": lr}) if group["params"]]

    def load_pretrained(self) -> None:
        """Load the members that were given by folder, as they are; others load what their settings name."""
        for name, member in self.members.items():
            if name in self._folders:
                cast("nn.ModuleDict", self.members)[name] = load(self._folders[name])
            else:
                member.load_pretrained()
        self._hold_members()

    def _hold_members(self) -> None:
        for module in self.frozen_modules():
            module.requires_grad_(False).eval()

    def _judge(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor | None,
        run: Callable[[Detector, dict[str, Tensor]], DetectorOutput],
    ) -> DetectorOutput:
        of_members = self._log_odds(inputs, run)
        fused = self.fusion(of_members)
        logits = torch.stack([-fused / 2, fused / 2], dim=1)  # their softmax is the sigmoid of the log odds
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.class_weights.to(logits))
        p_fake = self.p_fake(logits)[:, None]
        evidence = torch.cat([1 - p_fake, p_fake, of_members.float().sigmoid()], dim=1)
        return DetectorOutput(loss=loss, logits=logits, evidence=evidence)

    def _log_odds(
        self, inputs: Mapping[str, Tensor], run: Callable[[Detector, dict[str, Tensor]], DetectorOutput]
    ) -> Tensor:
        """Give each member's log odds of p_fake (B, M), NaN where it can not judge."""
        if inputs.keys() != self._inputs.keys():
            raise TypeError(f"{self.name!r} takes {', '.join(self._inputs)}; got {', '.join(inputs) or 'nothing'}.")
        columns = []
        for name, member in self.members.items():
            own = {own: inputs[shared] for own, shared in self._routes[name].items()}
            rows = judged_rows(member, own)
            logits = run(member, {key: tensor[rows] for key, tensor in own.items()}).logits if len(rows) else None
            column = torch.full((len(next(iter(own.values()))),), torch.nan, device=rows.device)
            if logits is not None:
                p_fake = member.p_fake(logits)
                column = column.to(p_fake).index_copy(0, rows, torch.logit(p_fake, LEAST_ODDS))
            columns.append(column)
        return torch.stack(columns, dim=1)


def fresh(name: str, config: Any) -> dict[str, Any]:
    """Describe a member with fresh weights."""
    return {"detector": name, "config": to_dict(config)}


def described(members: Mapping[str, str | dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """Give what builds each member, and the folders of those that were given so.

    Raises ValueError or FileNotFoundError naming the member.
    """
    descriptions, folders = {}, {}
    for name, given in members.items():
        description = given
        if isinstance(given, str):
            folders[name] = ready_detector(given)
            description = read_config(folders[name])
            if "detector" not in description:
                raise ValueError(f"members.{name}: {given!r} holds no detector; give the folder that stage 1 wrote.")
            description = {key: description[key] for key in DESCRIPTION if key in description}
        assert isinstance(description, dict)
        unknown = sorted(description.keys() - set(DESCRIPTION))
        if unknown or not {"detector", "config"} <= description.keys():
            problem = f"unknown setting {unknown[0]!r}" if unknown else "detector or config is missing"
            raise ValueError(f"members.{name}: {problem}. {nearest(unknown[0] if unknown else '', DESCRIPTION)}")
        descriptions[name] = description
    return descriptions, folders


def joined(members: Mapping[str, Detector]) -> tuple[dict[str, Input], dict[str, dict[str, str]]]:
    """Give the inputs of all members together, and for each member its own names with those they have here.

    An input on which all members that have it agree keeps its name and is prepared once; others become
    `<member>_<name>`. Raises ValueError where two would have one name.
    """
    specs: dict[str, Input] = {}
    routes: dict[str, dict[str, str]] = {}
    of_members = {name: member.inputs for name, member in members.items()}
    for member, own in of_members.items():
        routes[member] = {}
        for name, spec in own.items():
            agree = all(other.get(name, spec) == spec for other in of_members.values())
            shared = name if agree else f"{member}_{name}"
            if specs.setdefault(shared, spec) != spec:
                raise ValueError(f"members.{member}: two inputs would be called {shared!r}; give it another name.")
            routes[member][name] = shared
    return specs, routes


def judged_rows(member: Detector, inputs: Mapping[str, Tensor]) -> Tensor:
    """Give the numbers of the rows that a member can judge, (rows,); some of its inputs may be missing in others."""
    there = torch.stack([is_there(tensor) for tensor in inputs.values()], dim=1)  # (B, inputs)
    missing = [
        {name: name for name, is_given in zip(inputs, row, strict=True) if not is_given} for row in there.tolist()
    ]
    rows = [i for i, names in enumerate(missing) if not names or not member.lacking(names)]
    return torch.tensor(rows, dtype=torch.long, device=there.device)
