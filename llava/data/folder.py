"""Class folders: root/<split>/<class>/… or root/<class>/…, the label is the class folder's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llava.core.types import REAL, Record
from llava.data.image_source import ImageSource
from llava.data.images import list_images
from llava.data.sources import DataConfig, label_of_class
from llava.data.splits import require_both_classes


class FolderSource(ImageSource):
    """Images in class folders.

    When the root holds a folder with the name of a split (train, val, test as configured), every folder of the root
    is a split; else every folder of the root is a class and the records carry no split. A class folder named in
    `real_names` is real, any other is fake with its name as class name. Images that share a folder *below* the class
    folder are frames of one video; an image alone is its own video. Group = video: folders say nothing of identity.
    Raises FileNotFoundError or ValueError naming the folder.
    """

    def __init__(self, config: DataConfig) -> None:
        root = Path(config.path)
        if not root.is_dir():
            raise FileNotFoundError(f"Folder {config.path!r} does not exist; give one that holds class folders.")
        records = [r for split, folder in _split_folders(root, config) for r in _records(root, folder, split, config)]
        if not records:
            raise ValueError(
                f"Folder {config.path!r} holds no images; expected <split>/<class>/*.jpg or <class>/*.jpg."
            )
        training = [r for r in records if r.split == config.train]
        if training:
            require_both_classes(training, f"Training split {config.train!r} of {config.path!r}")
        super().__init__(config, records)


def _split_folders(root: Path, config: DataConfig) -> list[tuple[str, Path]]:
    names = {config.train, config.val, config.test}
    if not any((root / name).is_dir() for name in names):
        return [("", root)]
    return [(folder.name, folder) for folder in _folders(root)]


def _folders(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def _records(root: Path, folder: Path, split: str, config: DataConfig) -> Iterator[Record]:
    images = list_images(folder)
    loose = [p for p in images if p.parent == folder]
    if loose:
        raise ValueError(
            f"{len(loose)} images lie directly in {str(folder)!r} (first: {loose[0].name}), outside any class folder; "
            "move them into a folder such as real or fake."
        )
    frames = Counter(p.parent for p in images)
    for path in images:
        class_name = path.relative_to(folder).parts[0]
        label = label_of_class(class_name, config.real_names)
        is_frame = frames[path.parent] > 1 and path.parent.parent != folder
        video = (path.parent if is_frame else path).relative_to(root).as_posix()
        yield Record(
            id=path.relative_to(root).as_posix(),
            label=label,
            class_name="real" if label == REAL else class_name,
            video=video,
            group=video,
            where=str(path),
            split=split,
        )
