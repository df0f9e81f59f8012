"""What a detector is made of, and how it lies in a folder: its own with members and groups trained on, or a host's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from llava.core.runtime import write_json
from llava.core.tensor_files import TensorFiles, tensor_files_in
from llava.core.weights import load_strictly, read_config, read_weights
from llava.detectors.fitted import FittedPart

if TYPE_CHECKING:
    from llava.detectors.base import Detector

MEMBERS = "members"  # attribute, sub-folder, and how the names of their tensors begin
TRAINED_ON = "trained_on.json"
HOST = "detector."  # how the names of its tensors begin in an explainer


class Composite(nn.Module):
    """What a detector may be made of, beside layers: other detectors, and parts that are fitted instead of trained.

    members: detectors by name, which are saved in folders of their own. trained_on: SHA-256 of the names of all groups
    that it, or a member, was trained on. own_scope: what was said of what it sees and has never seen.
    """

    name: ClassVar[str]
    members: Mapping[str, Detector]

    def __init__(self) -> None:
        super().__init__()
        self.members = {}
        self.trained_on: frozenset[str] = frozenset()
        self.own_scope = ""

    def fitted_parts(self) -> dict[str, FittedPart]:
        """Give the parts that a phase of kind `fit` makes, by name in the order of fitting; not those of members."""
        parts = {name: module for name, module in self.named_modules() if isinstance(module, FittedPart)}
        return {name: part for name, part in parts.items() if not name.startswith(f"{MEMBERS}.")}

    def require_fitted(self) -> None:
        """Refuse a detector with parts that are still to be fitted. Raises ValueError that names them and the step."""
        missing = [name for name, part in self.fitted_parts().items() if not part.is_fitted]
        if missing:
            raise ValueError(
                f"Detector {self.name!r} gives no verdicts yet, nor can it be trained: {', '.join(missing)} must be "
                "fitted first; add a phase `kind: fit` to its recipe (docs/training.md)."
            )

    def load_weights(self, folder: str | Path) -> None:
        """Load the weights of a saved folder, members included, strictly. Raises ValueError or FileNotFoundError."""
        load_strictly(self, read_tensors(folder, self.members), str(folder))
        self.trained_on = read_trained_on(folder)

    def load_hosted_weights(self, folder: str | Path) -> None:
        """Load the weights that it has inside an explainer, strictly. Raises ValueError or FileNotFoundError."""
        stored = TensorFiles(tensor_files_in(folder))  # maps of the files: nothing else is read
        own = {name.removeprefix(HOST): stored[name] for name in stored if name.startswith(HOST)}
        load_strictly(self, own, str(folder))
        self.trained_on = read_trained_on(folder)

    def take_over(self, other: Composite, what: str) -> None:
        """Take the weights of a detector with equal tensors, and what is known of them. Raises ValueError.

        A fitted part with a neutral default, which only one of the two has, is left as it is, or left out.
        """
        ours, theirs = self.fitted_parts(), other.fitted_parts()
        apart = ours.keys() ^ theirs.keys()
        begins = tuple(f"{name}." for name in apart if (ours | theirs)[name].has_default)
        kept = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(begins)}
        taken = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith(begins)}
        load_strictly(self, kept | taken, what)
        self.trained_on, self.own_scope = other.trained_on, other.own_scope
        for name, member in self.members.items():
            own = other.members[name]
            member.decision, member.calibration, member.trained_on = own.decision, own.calibration, own.trained_on
            member.own_scope = own.own_scope


def own_description(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give what a config.json says of a detector: all of a detector's own, the part about it of an explainer's."""
    inside = config.get("detector")
    return inside if isinstance(inside, Mapping) else config


def save_members(folder: str | Path, members: Mapping[str, Detector]) -> dict[str, str]:
    """Write each member into a sub-folder that can be loaded alone; gives their fingerprints by name."""
    for name, member in members.items():
        member.save(member_folder(folder, name))
    return {name: member.fingerprint() for name, member in members.items()}


def read_tensors(folder: str | Path, members: Mapping[str, Detector]) -> dict[str, Tensor]:
    """Read the weights of a folder, and below `members.<name>.` those of its members.

    Raises FileNotFoundError or ValueError.
    """
    state = read_weights(folder)
    for name, member in members.items():
        place = member_folder(folder, name)
        if not place.is_dir():
            raise FileNotFoundError(
                f"{str(folder)!r} lacks its member {name!r} ({place}); copy the whole folder again."
            )
        tensors = read_tensors(place, member.members)
        state |= {f"{MEMBERS}.{name}.{key}": tensor for key, tensor in tensors.items()}
    return state


def read_members(folder: str | Path, members: Mapping[str, Detector], recorded: Mapping[str, str]) -> None:
    """Read what lies beside the weights of members, and refuse one that the detector was not saved with.

    recorded: fingerprints by name, as the detector's config.json has them. Raises ValueError.
    """
    for name, member in members.items():
        described = {"scope": ""} | read_config(member_folder(folder, name))  # files of before have none
        found, own = member.fingerprint(), member.describe()
        if recorded.get(name) != found or any(described.get(key) != value for key, value in own.items()):
            raise ValueError(
                f"Member {name!r} of {str(folder)!r} is not the one that it was saved with (sha256 {found[:12]}, "
                f"recorded {recorded.get(name, 'none')[:12]}, or other settings); copy the whole folder again, or make "
                f"a detector of the new members (--model.members.{name} FOLDER) and fit it again."
            )
        read_members(member_folder(folder, name), member.members, described.get(MEMBERS, {}))
        member.load_calibration(member_folder(folder, name))
        member.trained_on = read_trained_on(member_folder(folder, name))


def member_folder(folder: str | Path, name: str) -> Path:
    """Give the sub-folder of a member."""
    return Path(folder) / MEMBERS / name


def write_trained_on(folder: str | Path, hashes: Iterable[str]) -> None:
    """Write the SHA-256 of the names of all groups that a detector was trained on; without any there is no file."""
    path = Path(folder) / TRAINED_ON
    path.unlink(missing_ok=True)  # of weights that were there before
    if listed := sorted(hashes):
        write_json(path, {"sha256_of_groups": listed})


def read_trained_on(folder: str | Path) -> frozenset[str]:
    """Read what `write_trained_on` wrote; empty where nobody knows. Raises ValueError on damage."""
    path = Path(folder) / TRAINED_ON
    if not path.is_file():
        return frozenset()
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return frozenset(content["sha256_of_groups"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error!r}); copy the folder again.") from error
