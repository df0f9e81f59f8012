"""Names of images from folders, zips and lists: each once, nothing passed over in silence."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava.jobs.bulk import list_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.png", "a.JPG", "b/1.jpeg", "notes.md", ".hidden.png", ".git/4.png", "clip.mp4"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "images"


def test_a_folder_is_listed_to_the_bottom_with_all_that_is_named_like_an_image(folder: Path) -> None:
    (folder / "c.png").mkdir()
    (folder / "c.png" / "3.png").write_bytes(b"x")
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    found = list_names(str(folder))
    names = ["a.JPG", "b/1.jpeg", "b/2.png", "c.png", "c.png/3.png", "gone.jpg"]
    assert found.names == [str(folder / name) for name in names]
    assert (found.duplicates, found.left_out) == (0, 4)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_a_list_begins_at_its_folder_and_names_each_once(tmp_path: Path, suffix: str) -> None:
    names = ["one.jpg", "deep//two.jpg", "/elsewhere/three.jpg", "./one.jpg", "deep/two.jpg", "https://a.org/x.jpg"]
    path = tmp_path / f"list{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(names) + "\n\n")
    elif suffix == ".csv":
        path.write_text("id,path\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    else:
        pq.write_table(pa.table({"id": range(len(names)), "path": names}), path)
    found = list_names(str(path))
    assert found.names == [
        *(str(tmp_path / "one.jpg"), str(tmp_path / "deep/two.jpg")),
        *("/elsewhere/three.jpg", "https://a.org/x.jpg"),
    ]
    assert found.duplicates == 2
    assert list_names(str(path), root="else").names[0] == "else/one.jpg"


def test_a_zip_is_listed(folder: Path, tmp_path: Path) -> None:
    with ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("x/1.jpg", "x/2.png", "x/3.mp4", "x/notes.txt", "x/"):
            archive.writestr(name, b"x")
    found = list_names(str(tmp_path / "a.zip"))
    assert found.names == [f"{tmp_path}/a.zip::x/1.jpg", f"{tmp_path}/a.zip::x/2.png"]
    assert found.left_out == 2


def test_a_source_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder"):
        list_names(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="names no image"):
        list_names(str(tmp_path))
    path = tmp_path / "a.csv"
    path.write_text("image,label\na.jpg,1\n")
    with pytest.raises(ValueError, match="no column 'path'; name another with --column"):
        list_names(str(path))
    assert list_names(str(path), column="image").names == [str(tmp_path / "a.jpg")]
    path.write_text("path,label\na.jpg,1\n,0\n")
    with pytest.raises(ValueError, match="row 3: the column 'path' is empty"):
        list_names(str(path))
    pq.write_table(pa.table({"path": ["a.jpg", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="something else than names"):
        list_names(str(tmp_path / "a.parquet"))
