"""What a person asks about (path, folder, glob, zip, URL, bytes, array) as a list of named images and videos."""

from __future__ import annotations

import glob
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np

from llava.core.config import setting
from llava.data.images import (
    IMAGE_SUFFIXES,
    MEMBER_MARK,
    FileKind,
    UnreadableImage,
    list_images,
    read_image,
    stored_image,
)

T = TypeVar("T")
SCHEMES = ("http", "https")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv")
VIDEO_FILES = FileKind(name="video", suffixes=VIDEO_SUFFIXES, are_frames=False)
SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES
CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """What an image or video from the web may cost."""

    max_bytes: int = setting(20_000_000, "largest download, in bytes")
    seconds: float = setting(20.0, "longest download, in seconds")


@dataclass(frozen=True, kw_only=True)
class NamedInput:
    """Something to look at, with the name it is reported under; where it cannot be read, the `problem` in words.

    sha256: of the `byte_count` bytes of the file or download; empty where there were none to be read.
    """

    name: str
    problem: str = ""
    sha256: str = ""
    byte_count: int = 0


@dataclass(frozen=True, kw_only=True)
class NamedImage(NamedInput):
    """An image that was read: pixels uint8 RGB (H, W, 3), None where there is a problem."""

    pixels: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class NamedVideo(NamedInput):
    """A video, not decoded yet: its file, or its bytes; None where there is a problem."""

    source: Path | bytes | None


def expand(words: Sequence[str]) -> list[str]:
    """List the images and videos behind files, folders, globs, zips and http(s) URLs, each once; none is opened.

    A word that matches nothing stays in the list, so that `open_input` can say what is wrong with it. Raises
    FileNotFoundError when no word matches anything.
    """
    found = {word: list(_matches(word)) for word in words}
    if not any(found.values()):
        asked = ", ".join(map(repr, words)) or "nothing"
        raise FileNotFoundError(
            f"No image to look at: {asked} matches nothing. Give image or video files, folders, zips, quoted globs or "
            f"URLs; in folders and zips files count that end in {' '.join(SUFFIXES)}."
        )
    return list(dict.fromkeys(name for word, names in found.items() for name in names or [word]))


def open_input(name: str, limits: FetchLimits | None = None) -> NamedImage | NamedVideo:
    """Read one image of `expand`'s list, or find one video; what cannot be read comes back with its problem."""
    known: dict[str, Any] = {}
    try:
        source = _source(name, limits or FetchLimits())
        if is_video(name):
            return NamedVideo(name=name, source=source, **_digest(source))
        content = source.read_bytes() if isinstance(source, Path) else source
        known = _digest(content)
        return NamedImage(name=name, pixels=read_image(content, name), **known)
    except (UnreadableImage, OSError, KeyError, BadZipFile) as error:
        problem = _words(name, error)
    if is_video(name):
        return NamedVideo(name=name, source=None, problem=problem)
    return NamedImage(name=name, pixels=None, problem=problem, **known)


def is_url(word: str) -> bool:
    """Say whether a word has the form of an address (`scheme://…`)."""
    return "://" in word


def is_video(name: str) -> bool:
    """Say whether a file, member of a zip or address is named like a video."""
    return Path(re.split("[?#]", name)[0] if is_url(name) else name).suffix.lower() in VIDEO_SUFFIXES


def _source(name: str, limits: FetchLimits) -> Path | bytes:
    """Give what is behind a name: a file or its bytes. Raises what `open_input` puts into words."""
    if is_url(name):
        return fetch(name, limits)
    if Path(name).is_dir():
        raise UnreadableImage(f"{name}: a folder without images.")
    if not Path(name).is_file() and MEMBER_MARK not in name:
        raise FileNotFoundError(f"{name}: no such file or folder, and no glob that matches.")
    return stored_image(name)


def _digest(source: Path | bytes) -> dict[str, Any]:
    """Give SHA-256 and length of a file, which is read in pieces, or of its bytes."""
    if isinstance(source, bytes):
        return {"sha256": hashlib.sha256(source).hexdigest(), "byte_count": len(source)}
    with source.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "byte_count": file.tell()}


def fetch(url: str, limits: FetchLimits) -> bytes:
    """Download an address over http or https within the limits. Raises UnreadableImage that names address and reason.

    Any host may be asked: this is for a person at a command line, not for a server that strangers send addresses to.
    """
    _check_scheme(url)
    deadline = time.monotonic() + limits.seconds
    try:
        asked = request.Request(url, headers={"User-Agent": "m2f2-det", "Accept": "image/*, video/*"})
        with _opener().open(asked, timeout=limits.seconds) as answer:
            return _read_within(answer, url, limits, deadline)
    except HTTPError as error:
        raise UnreadableImage(f"{url}: the server answers {error.code} {error.reason}.") from error
    except URLError as error:
        raise UnreadableImage(f"{url}: cannot be reached ({error.reason}).") from error
    except TimeoutError:
        raise UnreadableImage(f"{url}: took longer than {limits.seconds:g} s.") from None
    except (HTTPException, OSError, ValueError) as error:
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(f"{url}: cannot be downloaded ({type(error).__name__}: {error}).") from error


def _matches(word: str) -> Iterator[str]:
    path = Path(word)
    if is_url(word):
        yield word
    elif path.is_dir():
        yield from map(str, list_images(path, SUFFIXES))
    elif path.is_file():
        yield from _zip_members(path) if is_zipfile(path) else [word]
    elif glob.has_magic(word):
        for match in sorted(glob.glob(word, recursive=True)):  # noqa: PTH207 (Path.glob knows no absolute ones)
            yield from _matches(match)


def _zip_members(path: Path) -> list[str]:
    """List the images and videos of an archive; none when it is damaged, so that opening it tells why."""
    try:
        with ZipFile(path) as archive:
            names = [m.filename for m in archive.infolist() if not m.is_dir()]
    except BadZipFile:
        return []
    return [f"{path}{MEMBER_MARK}{n}" for n in sorted(names) if Path(n).suffix.lower() in SUFFIXES]


def _check_scheme(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise UnreadableImage(f"{url}: only addresses that begin with http:// or https:// and a host are fetched.")


class _FewRedirects(request.HTTPRedirectHandler):
    """Follow a few redirects, to http and https only."""

    max_redirections = 3

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        """Check where a redirect leads before it is followed."""
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> request.OpenerDirector:
    """Build an opener that knows http and https and nothing else (urllib's own also opens files and ftp)."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.HTTPDefaultErrorHandler(),
        _FewRedirects(),
        request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _read_within(answer, url: str, limits: FetchLimits, deadline: float) -> bytes:  # type: ignore[no-untyped-def]
    too_large = UnreadableImage(f"{url}: larger than {limits.max_bytes:,} bytes, the limit for a download.")
    announced = answer.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > limits.max_bytes:
        raise too_large
    content = bytearray()
    while chunk := answer.read1(CHUNK_BYTES):
        content += chunk
        if len(content) > limits.max_bytes:
            raise too_large
        if time.monotonic() > deadline:
            raise TimeoutError
    if announced.isdigit() and len(content) < int(announced):
        raise UnreadableImage(f"{url}: the connection broke off after {len(content):,} of {int(announced):,} bytes.")
    return bytes(content)


def _words(name: str, error: Exception) -> str:
    """Give an error's message without the name that stands beside it anyway."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(f"{name}: ")


Image: TypeAlias = str | Path | bytes | np.ndarray | NamedImage


def as_list(images: Image | Sequence[Image]) -> Sequence[Image]:
    """Give images, or the one that was given, as a sequence."""
    return [images] if isinstance(images, (str, Path, bytes, np.ndarray, NamedImage)) else images


def named(image: Image, number: int) -> NamedImage:
    """Read an image if it is not read yet; arrays and bytes are named by their number."""
    if isinstance(image, NamedImage):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image {number}: expected uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}.")
        return NamedImage(name=f"image {number}", pixels=image)
    if isinstance(image, bytes):
        return NamedImage(name=f"image {number}", pixels=read_image(image, f"image {number}"))
    source = fetch(str(image), FetchLimits()) if is_url(str(image)) else Path(image)
    return NamedImage(name=str(image), pixels=read_image(source, str(image)))


def in_order(
    inputs: Sequence[NamedImage | NamedVideo],
    ask_images: Callable[[Sequence[NamedImage]], Iterable[T]],
    ask_video: Callable[[NamedVideo], T],
) -> Iterator[T]:
    """Yield what is found in images and videos in the order of the inputs; neighbouring images are asked together."""
    images: list[NamedImage] = []
    for each in inputs:
        if isinstance(each, NamedImage):
            images.append(each)
            continue
        yield from ask_images(images)
        images = []
        yield ask_video(each)
    yield from ask_images(images)
