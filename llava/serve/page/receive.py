"""A file that was uploaded, read once and deleted at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava.serve.page import words
from llava.serve.refusals import Refused
from llava.serve.uploads import UploadLimits


def received(file: Mapping[str, Any] | None, folder: Path, limits: UploadLimits) -> tuple[bytes, str]:
    """Give content and name of a file in the folder of uploads; it is gone afterwards. Raises Refused for any other."""
    path = Path(str((file or {}).get("path", ""))).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise Refused(400, words.GONE)
    try:
        with path.open("rb") as stream:
            content = stream.read(limits.max_bytes + 1)
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # another upload of the same bytes may be there
            path.parent.rmdir()
    return content, str((file or {}).get("orig_name") or path.name)
