"""`m2f2 data kaggle140k`: the Kaggle set "140k Real and Fake Faces" (FFHQ, StyleGAN) as class folders with splits.

Its layout is real_vs_fake/real-vs-fake/{train,valid,test}/{real,fake}/NAME.jpg: 50,000, 10,000 and 10,000 a class.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from llava.core.config import setting
from llava.core.runtime import atomic_path, write_json
from llava.core.terminal import progress
from llava.core.weights import sha256_of
from llava.data.images import UnreadableImage, read_image

DATASET = "xhlulu/140k-real-and-fake-faces"
SPLITS = {"train": "train", "valid": "val", "test": "test"}  # theirs -> ours
PLACE = re.compile(r"(?:^|/)(train|valid|test)/(real|fake)/([^/]+\.(?:jpg|jpeg|png))$", re.IGNORECASE)
LEFT_OUT_SHOWN = 20
CREDENTIALS = "~/.kaggle/kaggle.json"


@dataclass(frozen=True, kw_only=True)
class KaggleSettings:
    """Where the set comes from and where it goes."""

    archive: str | None = setting(
        None, "the zip as Kaggle gives it, or the folder that it was unpacked to; default: download it", positional=True
    )
    output: str = setting("data/kaggle140k", "folder to write: train, val and test, each with real and fake")
    check: bool = setting(True, "read every image, and leave out those that cannot be read")


@dataclass(frozen=True)
class Item:
    """One picture of the set: its place in ours, and how its bytes are read."""

    place: str
    read: Callable[[], bytes]


def build_kaggle(settings: KaggleSettings) -> dict[str, Any]:
    """Copy the set into class folders with splits, with metadata.json; gives what was counted.

    A file that is there already is left as it is, so that an interrupted call is gone on with. Raises ValueError or
    FileNotFoundError for an archive of another layout, and for a download that does not work.
    """
    output = Path(settings.output)
    archive = _download(output) if settings.archive is None else Path(settings.archive)
    if not archive.exists():
        raise FileNotFoundError(f"{str(archive)!r} does not exist; give the zip from Kaggle or its folder.")
    counts: dict[str, Counter[str]] = {name: Counter() for name in SPLITS.values()}
    kept, left_out = 0, []
    for item in progress(list(_items(archive)), "copying"):
        target = output / item.place
        if target.is_file():
            kept += 1
        elif (why := _copy(item, target, settings.check)) is not None:
            left_out.append(f"{item.place}: {why}")
            continue
        split, class_name, _ = item.place.split("/")
        counts[split][class_name] += 1
    about = {
        "dataset": DATASET,
        "source": "FFHQ (real), StyleGAN (fake)",
        "archive_sha256": sha256_of(archive) if archive.is_file() else None,
        "total_images": sum(map(Counter.total, counts.values())),
        "statistics": {name: {kind: found[kind] for kind in ("real", "fake")} for name, found in counts.items()},
        "left_out": left_out,
    }
    write_json(output / "metadata.json", about)
    shown = {**about, "left_out": left_out[:LEFT_OUT_SHOWN], "left_out_count": len(left_out)}
    return shown | {"there_already": kept, "output": str(output)}


def _items(archive: Path) -> Iterator[Item]:
    """Yield the pictures of a zip or folder. Raises ValueError when it holds none in the layout of the set."""
    if archive.is_dir():
        files = {path.relative_to(archive).as_posix(): path.read_bytes for path in sorted(archive.rglob("*"))}
    else:
        try:
            zipped = ZipFile(archive)
        except BadZipFile:
            raise ValueError(f"{str(archive)!r} is no zip, or an incomplete one; download it again.") from None
        names = sorted(name for name in zipped.namelist() if not name.endswith("/"))
        files = {name: _reader(zipped, name) for name in names}
    found = {match: name for name in files if (match := PLACE.search(name))}
    if not found:
        raise ValueError(
            f"{str(archive)!r} holds no real-vs-fake/{{train,valid,test}}/{{real,fake}} with pictures; give the "
            f"archive of {DATASET}."
        )
    for match, name in found.items():
        split, class_name, file = match.groups()
        yield Item(f"{SPLITS[split.lower()]}/{class_name.lower()}/{file}", files[name])


def _reader(zipped: ZipFile, name: str) -> Callable[[], bytes]:
    return lambda: zipped.read(name)


def _copy(item: Item, target: Path, check: bool) -> str | None:
    """Copy a picture into place; gives why not, if it cannot be read."""
    try:
        content = item.read()
        if check:
            read_image(content)
    except (UnreadableImage, BadZipFile) as error:
        return str(error)
    with atomic_path(target) as staged:
        staged.write_bytes(content)
    return None


def _download(output: Path) -> Path:
    """Download the archive beside the output with Kaggle's own client, once; gives its path.

    Raises ValueError without the client or credentials, or when it gives no file.
    """
    archive = output.parent / f"{DATASET.partition('/')[2]}.zip"
    if archive.is_file():
        return archive
    has_key = {"KAGGLE_USERNAME", "KAGGLE_KEY"} <= os.environ.keys() or "KAGGLE_API_TOKEN" in os.environ
    if shutil.which("kaggle") is None or not (has_key or Path(CREDENTIALS).expanduser().is_file()):
        raise ValueError(
            "To download, install the client (pip install 'm2f2-det[kaggle]') and put your key into "
            f"{CREDENTIALS} or KAGGLE_USERNAME and KAGGLE_KEY; or give the zip that a browser downloaded from "
            f"kaggle.com/datasets/{DATASET}."
        )
    with atomic_path(archive) as staged:
        staged.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["kaggle", "datasets", "download", "-d", DATASET, "-p", str(staged.parent)], check=False)
        if done.returncode or not staged.is_file():
            raise ValueError(f"Kaggle's client gave no {staged.name} (exit code {done.returncode}); see what it said.")
    return archive
