"""Public sets of videos: where they lie, and label, kind, split and people of each, from the lists that each set ships.

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
from typing import Any, Literal, get_args

from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.data.frames import frame_files
from llava.data.inputs import VIDEO_SUFFIXES
from llava.data.sources import DataConfig
from llava.data.splits import choose_groups, connected_groups

log = logging.getLogger(__name__)

FRAMES, VIDEOS = "frames", "videos"
BESIDE = {FRAMES, VIDEOS, "landmarks", "masks"}  # sub-folders that are no folders of frames
ORIGINAL = "original"
Kind = Literal["original", "Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter"]
KINDS: tuple[str, ...] = get_args(Kind)
Pair = tuple[str, str]
REAL_CLASS = LABEL_NAMES[REAL]
CELEB_FOLDERS = {"Celeb-real": REAL, "YouTube-real": REAL, "Celeb-synthesis": FAKE}
CELEB_TESTS = "List_of_testing_videos.txt"
_CELEB_IDS = {
    "Celeb-real": re.compile(r"(id\d+)_\d+"),
    "YouTube-real": re.compile(r"(\d+)"),
    "Celeb-synthesis": re.compile(r"(id\d+)_(id\d+)_\d+"),
}


class VideoTree:
    """The videos below a root. A video is named by its place, folder and name without suffix: `Celeb-real/id0_0000`.

    Frames of it lie in `Celeb-real/frames/id0_0000/` (as DeepfakeBench writes them; or in `frames/` of the topmost
    folder) or in `Celeb-real/id0_0000/`, the file is `Celeb-real/id0_0000.mp4` or `Celeb-real/videos/id0_0000.mp4`.
    Raises FileNotFoundError when the root is no folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"Folder {str(root)!r} does not exist; give --data.path, the root of the set.")
        self._folders: dict[Path, dict[str, bool]] = {}

    def names(self, folder: str) -> list[str]:
        """List the videos of a folder in any form, sorted; none when it does not exist."""
        found = set()
        for holder in (self.root / folder, self.root / folder / FRAMES, self.root / folder / VIDEOS):
            for name, is_folder in self._entries(holder).items():
                if is_folder and name not in BESIDE:
                    found.add(name)
                elif not is_folder and name.lower().endswith(VIDEO_SUFFIXES):
                    found.add(Path(name).stem)
        return sorted(found)

    def locate(self, places: Sequence[str]) -> dict[str, Path]:
        """Give the folder of frames, or else the file, of each video that is there.

        As soon as one of them is a folder of frames, files do not count: crops and whole frames are never mixed.
        """
        frames = {place: path for place in places if (path := self._frames(place)) is not None}
        return frames or {place: path for place in places if (path := self._file(place)) is not None}

    def _frames(self, place: str) -> Path | None:
        parent, name = (self.root / place).parent, Path(place).name
        for holder in (parent / FRAMES, parent, self.root / Path(place).parts[0] / FRAMES):
            if self._entries(holder).get(name) and frame_files(holder / name):
                return holder / name
        return None

    def _file(self, place: str) -> Path | None:
        parent, name = (self.root / place).parent, Path(place).name
        for holder in (parent, parent / VIDEOS):
            for suffix in VIDEO_SUFFIXES:
                if self._entries(holder).get(name + suffix) is False:
                    return holder / (name + suffix)
        return None

    def _entries(self, folder: Path) -> dict[str, bool]:
        """Give name -> whether it is a folder; a folder is read once, because a set has up to 100,000 videos."""
        if folder not in self._folders:
            entries = folder.iterdir() if folder.is_dir() else ()
            self._folders[folder] = {p.name: p.is_dir() for p in entries if not p.name.startswith(".")}
        return self._folders[folder]


def file_name(kind: str, compression: str, is_test_only: bool = False) -> str:
    """Give the name of the HDF5 file that holds one kind of video."""
    return f"FF++_{kind}_{compression}{'_test_only' if is_test_only else ''}.h5"


def keys_of(kind: str, pairs: Sequence[Pair]) -> list[str]:
    """Give the videos of one kind that pairs of ids stand for, each once.

    Originals are `071` and `054`; fakes `071_054` and `054_071`, the first id the target, the second the source.
    """
    if kind == ORIGINAL:
        return list(dict.fromkeys(name for pair in pairs for name in pair))
    return list(dict.fromkeys(key for a, b in pairs for key in (f"{a}_{b}", f"{b}_{a}")))


def read_pairs(path: Path) -> list[Pair]:
    """Read an official split file, a list of [id, id]. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"Split file {str(path)!r} does not exist; give `splits`, the folder of the official train.json, val.json "
            "and test.json."
        )
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    wrong = [pair for pair in pairs if not _is_pair(pair)] if isinstance(pairs, list) else [pairs]
    if wrong:
        raise ValueError(
            f"{path}: {str(wrong[0])[:60]!r} is no pair of video ids; expected a list of [id, id], ids without _."
        )
    return [(a, b) for a, b in pairs]


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, str) and v and "_" not in v for v in pair)


def group_names(splits: Mapping[str, Sequence[Pair]]) -> dict[str, str]:
    """Give the group of each id: ids that share a pair, directly or through others, in any split, are one group."""
    pairs = [pair for part in splits.values() for pair in part]
    groups = connected_groups(pairs)
    return {name: group for pair, group in zip(pairs, groups, strict=True) for name in pair}


TRAIN, VAL, TEST = "train", "val", "test"
# A set without a validation split lends this part of its training videos, by groups, the same ones every time. Groups
# that hold more than the second part stay in training.
VAL_PART, LARGEST_VAL_GROUP, VAL_SEED = 0.1, 0.25, 0


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
