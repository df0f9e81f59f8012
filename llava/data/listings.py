"""What public sets of videos say of each video: label, kind, split, and who is in it, so that groups are kept together.

Layouts and labels: FaceForensics++ (Rössler et al. 2019), Celeb-DF v2 (Li et al. 2020), DFDC and its preview (Dolhansky
et al. 2019, 2020).
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.data.ffpp import KINDS, ORIGINAL, group_names, keys_of, read_pairs
from llava.data.sources import DataConfig
from llava.data.splits import choose_groups, connected_groups
from llava.data.video_tree import VideoTree

log = logging.getLogger(__name__)
REAL_CLASS = LABEL_NAMES[REAL]
TRAIN, VAL, TEST = "train", "val", "test"
# A set without a validation split lends this part of its training videos, by groups, the same ones every time. Groups
# that hold more than the second part stay in training.
VAL_PART, LARGEST_VAL_GROUP, VAL_SEED = 0.1, 0.25, 0
CELEB_FOLDERS = {"Celeb-real": REAL, "YouTube-real": REAL, "Celeb-synthesis": FAKE}
CELEB_TESTS = "List_of_testing_videos.txt"
_CELEB_IDS = {
    "Celeb-real": re.compile(r"(id\d+)_\d+"),
    "YouTube-real": re.compile(r"(\d+)"),
    "Celeb-synthesis": re.compile(r"(id\d+)_(id\d+)_\d+"),
}


@dataclass(frozen=True, kw_only=True)
class ListedVideo:
    """A video that a set names. place: its folder and name below the root, without `videos/` and suffix."""

    name: str
    place: str
    label: int
    class_name: str
    split: str
    group: str


def read_ffpp(tree: VideoTree, config: DataConfig) -> list[ListedVideo]:
    """List FaceForensics++ by the official splits: originals and the kinds of fakes that are there, of one compression.

    A group is what pairs of ids connect. Raises FileNotFoundError or ValueError naming split file or folder.
    """
    folder = Path(config.splits) if config.splits else tree.root
    splits = {
        name: read_pairs(folder / f"{name}.json") for name in dict.fromkeys((config.train, config.val, config.test))
    }
    groups = group_names(splits)
    places = {kind: _ffpp_folder(kind, config.compression) for kind in KINDS}
    found = [kind for kind, place in places.items() if (tree.root / place).is_dir()]
    log.info(
        "found %s; absent: %s", ", ".join(found) or "nothing", ", ".join(k for k in KINDS if k not in found) or "none"
    )
    if ORIGINAL not in found:
        raise FileNotFoundError(
            f"{str(tree.root / places[ORIGINAL])!r} does not exist: no real faces; give --data.path, the folder of "
            "original_sequences and manipulated_sequences, and --data.compression."
        )
    return [
        ListedVideo(
            name=f"{kind}/{key}",
            place=f"{places[kind]}/{key}",
            label=REAL if kind == ORIGINAL else FAKE,
            class_name=REAL_CLASS if kind == ORIGINAL else kind,
            split=split,
            group=groups[key.split("_")[0]],
        )
        for split, pairs in splits.items()
        for kind in found
        for key in keys_of(kind, pairs)
    ]


def _ffpp_folder(kind: str, compression: str) -> str:
    return f"{'original_sequences/youtube' if kind == ORIGINAL else f'manipulated_sequences/{kind}'}/{compression}"


def read_celebdf_v2(tree: VideoTree, config: DataConfig) -> list[ListedVideo]:
    """List Celeb-DF v2: the official test list, and as training what lies in the folders besides.

    A group is what identities connect (id0_0000 has one, id0_id1_0000 two); each YouTube video is one. Raises
    FileNotFoundError or ValueError naming file and line.
    """
    tests = _celeb_tests(tree.root / CELEB_TESTS)
    listed = {f"{folder}/{name}" for folder in CELEB_FOLDERS for name in tree.names(folder)}
    names = sorted(listed | tests)
    groups = connected_groups([_celeb_ids(name) for name in names])
    videos = []
    for name, group in zip(names, groups, strict=True):
        folder = name.partition("/")[0]
        label = CELEB_FOLDERS[folder]
        class_name = REAL_CLASS if label == REAL else folder
        split = TEST if name in tests else TRAIN
        videos.append(ListedVideo(name=name, place=name, label=label, class_name=class_name, split=split, group=group))
    return _with_validation(videos)


def _celeb_tests(path: Path) -> set[str]:
    """Read lines such as `1 YouTube-real/00170.mp4`; there, 1 is real."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; it comes with Celeb-DF v2 and says what is test.")
    names = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        label, _, name = line.strip().partition(" ")
        place = PurePosixPath(name.strip())
        folder = place.parts[0] if place.parts else ""
        if label not in ("0", "1") or CELEB_FOLDERS.get(folder) != 1 - int(label):
            raise ValueError(
                f"{path}, line {number}: {line.strip()!r} is no `1 REAL_VIDEO` or `0 FAKE_VIDEO` with a video in "
                f"{', '.join(CELEB_FOLDERS)}."
            )
        names.add(f"{folder}/{place.stem}")
    return names


def _celeb_ids(name: str) -> Sequence[str]:
    folder, _, video = name.partition("/")
    found = _CELEB_IDS[folder].fullmatch(video)
    if found is None:
        raise ValueError(
            f"{name!r} does not say who is in it; expected Celeb-real/id0_0000, Celeb-synthesis/id0_id1_0000 or "
            "YouTube-real/00000."
        )
    return [f"{folder}/{video}"] if folder == "YouTube-real" else found.groups()


def read_dfdc(tree: VideoTree, config: DataConfig) -> list[ListedVideo]:
    """List DFDC: parts with a metadata.json are training, `validation` and `test` have a labels.csv.

    A group is an original with the fakes made from it; who is in it is not said. Raises FileNotFoundError or
    ValueError naming file and entry.
    """
    root = tree.root
    parts = [
        p
        for pattern in ("dfdc_train_part_*", "train/dfdc_train_part_*")
        for p in sorted(root.glob(pattern))
        if p.is_dir()
    ]
    if (root / "metadata.json").is_file():
        parts.append(root)
    videos = [
        video for part in parts for video in _dfdc_part(part / "metadata.json", part.relative_to(root).as_posix())
    ]
    for split, folder in ((VAL, "validation"), (TEST, "test")):
        if (root / folder).is_dir():
            videos += _dfdc_labels(root / folder / "labels.csv", folder, split)
    if not videos:
        raise FileNotFoundError(
            f"{str(root)!r} holds no dfdc_train_part_*, no metadata.json, no validation and no test folder; give "
            "--data.path, the folder that holds them."
        )
    return videos if any(video.split == VAL for video in videos) else _with_validation(videos)


def _dfdc_part(path: Path, folder: str) -> Iterator[ListedVideo]:
    for name, entry in _entries(path).items():
        label = {"REAL": REAL, "FAKE": FAKE}.get(str(entry.get("label")))
        original = name if label == REAL else entry.get("original")
        if label is None or not isinstance(original, str):
            raise ValueError(f"{path}, {name!r}: label must be REAL, or FAKE with an original; got {entry}.")
        yield _dfdc_video(name, folder, label, TRAIN, Path(original).stem)


def _dfdc_labels(path: Path, folder: str, split: str) -> Iterator[ListedVideo]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; expected a csv of filename,label with 0 real, 1 fake.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if not row.get("filename") or row.get("label") not in ("0", "1"):
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected filename,label with 0 real, 1 fake, got {row}."
                )
            yield _dfdc_video(row["filename"], folder, int(row["label"]), split, Path(row["filename"]).stem)


def _dfdc_video(file: str, folder: str, label: int, split: str, group: str) -> ListedVideo:
    place = (PurePosixPath(folder) / file).with_suffix("").as_posix()
    return ListedVideo(name=place, place=place, label=label, class_name=LABEL_NAMES[label], split=split, group=group)


def read_dfdcp(tree: VideoTree, config: DataConfig) -> list[ListedVideo]:
    """List the DFDC preview by its dataset.json, whose `set` is the split.

    A group is what target and swapped ids connect. Raises FileNotFoundError or ValueError naming file and entry.
    """
    path = tree.root / "dataset.json"
    entries = _entries(path)
    for name, entry in entries.items():
        if entry.get("label") not in LABEL_NAMES or entry.get("set") not in (TRAIN, VAL, TEST) or not _people(entry):
            raise ValueError(
                f"{path}, {name!r}: expected label real or fake, set {TRAIN}, {VAL} or {TEST}, and a target_id; "
                f"got {entry}."
            )
    groups = connected_groups([_people(entry) for entry in entries.values()]) if entries else []
    videos = []
    for (name, entry), group in zip(entries.items(), groups, strict=True):
        place, label = PurePosixPath(name).with_suffix("").as_posix(), LABEL_NAMES.index(entry["label"])
        class_name = REAL_CLASS if label == REAL else PurePosixPath(name).parts[0]
        videos.append(
            ListedVideo(name=place, place=place, label=label, class_name=class_name, split=entry["set"], group=group)
        )
    return videos if any(video.split == VAL for video in videos) else _with_validation(videos)


def _people(entry: Mapping[str, Any]) -> list[str]:
    return [str(entry[key]) for key in ("target_id", "swapped_id") if entry.get(key) is not None]


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """Read a json of video name -> what is said of it. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; it comes with the set and says what each video is.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path}: expected a mapping of video names to what is said of them.")
    return entries


def _with_validation(videos: Sequence[ListedVideo]) -> list[ListedVideo]:
    """Turn whole groups of the training videos into a validation split; logs it where no groups are small enough."""
    groups = [video.group for video in videos if video.split == TRAIN]
    sizes = Counter(groups)
    small = [group for group in groups if sizes[group] <= LARGEST_VAL_GROUP * len(groups)]
    wanted = VAL_PART * len(groups)
    if len(small) <= wanted:
        if groups:
            log.warning("no validation split: %d training videos, in groups too large to cut some off", len(groups))
        return list(videos)
    chosen = choose_groups(small, wanted / len(small), VAL_SEED)
    return [replace(v, split=VAL) if v.split == TRAIN and v.group in chosen else v for v in videos]


LISTINGS: dict[str, Callable[[VideoTree, DataConfig], list[ListedVideo]]] = {
    "ffpp": read_ffpp,
    "celebdf_v2": read_celebdf_v2,
    "dfdc": read_dfdc,
    "dfdcp": read_dfdcp,
}
