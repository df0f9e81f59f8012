"""Named inputs: files, folders, globs, zips and addresses; what cannot be read is told, not thrown."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from llava.data.images import UnreadableImage
from llava.data.inputs import FetchLimits, expand, fetch, open_input


def png(value: int = 90, side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    for name in ("b.png", "a.png", "deep/c.PNG", "odd[1].png"):
        (root / name).write_bytes(png())
    (root / "notes.txt").write_text("no image")
    with ZipFile(root / "faces.zip", "w") as archive:
        archive.writestr("x/2.png", png(2))
        archive.writestr("x/1.png", png(1))
        archive.writestr("readme.md", "no image")
    return root


class Site(BaseHTTPRequestHandler):
    """A site with a good picture and several kinds of trouble."""

    def do_GET(self) -> None:
        if self.path.startswith("/to"):
            target = {
                "/to-good": "/good",
                "/to-file": "file:///etc/hostname",
                "/to-ftp": "ftp://x/y",
                "/to-self": "/to-self",
            }[self.path]
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        body = {"/good": png(7), "/page": b"<html>hello</html>", "/large": b"x" * 5000, "/short": b"x" * 10}.get(
            self.path, b""
        )
        if self.path in ("/good", "/short"):
            self.send_header("Content-Length", str(len(body) * (3 if self.path == "/short" else 1)))
        self.end_headers()
        self.wfile.write(body)
        if self.path == "/slow":
            for _ in range(20):
                time.sleep(0.05)
                self.wfile.write(b"x")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_folders_globs_and_zips_become_sorted_names(folder: Path) -> None:
    assert expand([str(folder)]) == [str(folder / n) for n in ("a.png", "b.png", "deep/c.PNG", "odd[1].png")]
    assert expand([str(folder / "*.png")]) == [str(folder / n) for n in ("a.png", "b.png", "odd[1].png")]
    assert expand([str(folder / "**" / "c*")]) == [str(folder / "deep" / "c.PNG")]
    assert expand([str(folder / "faces.zip")]) == [f"{folder / 'faces.zip'}::x/{i}.png" for i in (1, 2)]
    assert expand([str(folder / "odd[1].png")]) == [str(folder / "odd[1].png")]


def test_an_input_is_named_once_and_kept_in_order(folder: Path) -> None:
    b = str(folder / "b.png")
    assert expand([b, str(folder / "*.png"), "http://x/y"])[:2] == [b, str(folder / "a.png")]
    assert expand([b, "http://x/y"])[1] == "http://x/y"


def test_nothing_to_look_at_is_an_error_and_one_miss_is_a_row(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'nothing\.jpg', 'none/\*' matches nothing"):
        expand(["nothing.jpg", "none/*"])
    with pytest.raises(FileNotFoundError, match="matches nothing"):
        expand([])
    names = expand(["nothing.jpg", str(folder / "a.png")])
    assert [open_input(name).problem for name in names] == ["no such file or folder, and no glob that matches.", ""]


def test_files_and_zip_members_are_read(folder: Path) -> None:
    member = open_input(f"{folder / 'faces.zip'}::x/2.png")
    assert member.pixels is not None and member.pixels[0, 0].tolist() == [2, 2, 2]
    assert open_input(str(folder / "b.png")).problem == ""
    assert "no.png" in open_input(f"{folder / 'faces.zip'}::no.png").problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(side=64)[:-60], "damaged or truncated"),
        (png(side=1), "1x1 pixels is too small"),
        (b"no image", "not an image"),
        (b"", "not an image"),
        (b"P6 20000 20000 255\n", "more pixels than can be decoded safely"),
    ],
)
def test_what_cannot_be_read_says_why(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    image = open_input(str(path))
    assert image.pixels is None and image.problem.startswith(words)


def test_a_folder_without_images_and_a_damaged_zip_are_told(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    whole = (folder / "faces.zip").read_bytes()
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"\0" * 40 + whole[-22:])
    names = expand([str(tmp_path / "empty"), str(broken), str(folder / "a.png")])
    problems = [open_input(name).problem for name in names]
    assert problems[0] == "a folder without images." and "not an image" in problems[1] and problems[2] == ""


def test_an_address_is_fetched_and_its_content_decides(site: str) -> None:
    for path in ("/good", "/to-good"):
        image = open_input(site + path)
        assert image.pixels is not None and image.pixels[0, 0, 0] == 7 and image.name == site + path
    assert open_input(f"{site}/page").problem.startswith("not an image")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/gone", "the server answers 404"),
        ("/large", "larger than 1,000 bytes"),
        ("/slow", "took longer than 0.3 s"),
        ("/short", "the connection broke off after 10 of 30 bytes"),
        ("/to-file", "is not allowed"),
        ("/to-ftp", "only addresses that begin with http:// or https://"),
        ("/to-self", "the server answers 302"),
    ],
)
def test_a_download_that_goes_wrong_says_why(site: str, path: str, words: str) -> None:
    limits = FetchLimits(max_bytes=1000, seconds=0.3)
    with pytest.raises(UnreadableImage, match=path.replace("/to-ftp", "ftp://x/y")):
        fetch(site + path, limits)
    assert words in open_input(site + path, limits).problem


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://x/y.png", "http://", "data://x"])
def test_only_http_is_fetched(url: str) -> None:
    assert "only addresses that begin with http:// or https://" in open_input(url).problem


def test_a_host_that_is_not_there_is_a_row() -> None:
    assert "cannot be reached" in open_input("http://127.0.0.1:9/x.png").problem
