"""The measurement of HDF5 reading runs on a set of its own making and names every number."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import forked
import pytest
from PIL import Image
from tiny_world import draw

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.e2e
def test_both_patterns_are_measured_in_all_layouts(tmp_path):
    (tmp_path / "faces").mkdir()
    for n in range(3):
        Image.fromarray(draw(0, n)).save(tmp_path / "faces" / f"{n}.png")
    small = shlex.split("--pairs 1 --frames 60 --side 96 --repeats 1 --draws 2 --scored 10 --workers 1")
    places = ["--faces", str(tmp_path / "faces"), "--folder", str(tmp_path / "set"), "--json", str(tmp_path / "a.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = forked.run(["eval/measure_hdf5.py", *places, *small], cwd=ROOT, env=environment, check=True)
    found = json.loads((tmp_path / "a.json").read_text())
    for ways in found["images_per_second"].values():
        assert len(ways) == 4
        assert all(rate > 0 for states in ways.values() for rate in (states["cold"], states["warm"]))
    alone = found["images_per_second"]["I/O alone, one process"]
    assert alone["ours, whole clips"]["warm"] > alone["published pattern, whole clips"]["warm"]
    assert {len(samples) for samples in found["worker_mb"].values()} == {4}
    assert "memory of all 1 workers" in done.stdout
