"""What processes there are, known by a word in their environment, and where they listen (Linux)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

LISTENS = "0A"
LOOPBACK = re.compile(r"0100007F|0000000000000000FFFF00000100007F|00000000000000000000000001000000")


def processes_with(word: str) -> dict[int, str]:
    """Give {id: command line} of the processes that were started with a word in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return {pid: words for pid, words in found.items() if words}  # what has ended and is not waited for has none


def listening_beyond_loopback(pids: Iterable[int]) -> list[str]:
    """List the command lines and addresses of listeners that other machines reach."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    open_ones = {
        row[9]: row[1] for row in rows if row[3] == LISTENS and not LOOPBACK.fullmatch(row[1].partition(":")[0])
    }
    return [f"{pid} listens on {open_ones[inode]}" for pid in pids for inode in _sockets(pid) if inode in open_ones]


def _sockets(pid: int) -> list[str]:
    """List the inodes of a process's sockets."""
    links = []
    for file in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            links.append(str(file.readlink()))
        except OSError:  # closed meanwhile
            continue
    return [link[8:-1] for link in links if link.startswith("socket:[")]
