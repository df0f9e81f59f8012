"""Where the videos of a public set lie: as files, or as folders of face crops beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.data.frame_reader import frame_files
from llava.data.inputs import VIDEO_SUFFIXES

FRAMES, VIDEOS = "frames", "videos"
BESIDE = {FRAMES, VIDEOS, "landmarks", "masks"}  # sub-folders that are no folders of frames


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
