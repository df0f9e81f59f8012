"""Groups, leaks, near-duplicates and counts against scipy and hand values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from llava.core.types import Record
from llava.data.sources import DataConfig, split_of
from llava.data.splits import (
    LeakError,
    check_leaks,
    choose_groups,
    connected_groups,
    divide,
    near_duplicates,
    require_both_classes,
    summary,
)
from llava.data.stills import FolderSource


def record(name: str, label: int | None = 0, group: str = "", split: str = "") -> Record:
    class_name = {0: "real", 1: "fake"}.get(label, "unknown") if label is not None else "unknown"
    return Record(id=name, label=label, class_name=class_name, video=name, group=group or name, where=name, split=split)


def test_connected_groups_equal_scipys_components() -> None:
    rng = np.random.default_rng(3)
    items = [[f"{v:03d}" for v in rng.choice(150, size=rng.integers(1, 4), replace=False)] for _ in range(120)]
    ids = sorted({name for item in items for name in item})
    edges = [(ids.index(item[0]), ids.index(name)) for item in items for name in item]
    rows, columns = zip(*edges, strict=True)
    graph = coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(len(ids), len(ids)))
    _, component = connected_components(graph, directed=False)
    expected = [min(n for n in ids if component[ids.index(n)] == component[ids.index(i[0])]) for i in items]
    assert connected_groups(items) == expected
    assert 5 < len(set(expected)) < 120


def test_connected_groups_chain_and_refuse_an_item_without_ids() -> None:
    assert connected_groups([["3", "2"], ["9"], ["1", "2"], ["4", "3"]]) == ["1", "9", "1", "1"]
    with pytest.raises(ValueError, match="Item 1 has no group id"):
        connected_groups([["a"], []])


def test_a_leak_is_refused_with_count_groups_and_files() -> None:
    train = [record(f"train/{i}", group=f"g{i}") for i in range(9)]
    test = [record(f"test/{i}", group=f"g{i}") for i in range(2, 9)]
    check_leaks({"train": train[:2], "val": [], "test": test})
    with pytest.raises(LeakError) as caught:
        check_leaks({"train": train, "val": train[:1], "test": test})
    message = str(caught.value)
    assert "'train' and 'test' share 7 groups ('g2': train/2 and test/2;" in message
    assert "'train' and 'val' share 1 groups" in message
    assert "g6" in message
    assert "g7" not in message  # five are named
    assert "Move every record of a group into one split" in message


def test_near_duplicates_are_reported_across_splits_only(class_folder: Path) -> None:
    original = class_folder / "train" / "real" / "00.png"
    image = Image.open(original).resize((96, 96))
    image.save(class_folder / "test" / "real" / "copy.jpg", quality=60)
    image.save(class_folder / "train" / "real" / "same_split.png")
    source = FolderSource(DataConfig(path=str(class_folder)))
    splits = {name: split_of(source, name) for name in ("train", "test")}
    found = near_duplicates(source, splits, max_distance=4)
    pairs = {pair[:2] for pair in found}
    assert {("train/real/00.png", "test/real/copy.jpg"), ("train/real/same_split.png", "test/real/copy.jpg")} <= pairs
    assert all(a.startswith("train") and b.startswith("test") and d <= 4 for a, b, d in found)
    assert len(found) < 10


def test_near_duplicate_distances_are_imagehashs(class_folder: Path) -> None:
    import imagehash

    source = FolderSource(DataConfig(path=str(class_folder)))
    splits = {name: split_of(source, name) for name in ("val", "test")}
    by_id = {r.id: imagehash.phash(Image.open(r.where)) for r in source.records}
    found = near_duplicates(source, splits, max_distance=64)
    assert len(found) == len(splits["val"]) * len(splits["test"])
    assert all(d == by_id[a] - by_id[b] for a, b, d in found)
    assert [d for *_, d in found] == sorted(d for *_, d in found)


def test_both_classes_are_required() -> None:
    require_both_classes([record("a", 0), record("b", 1)], "x")
    with pytest.raises(ValueError, match=r"Training split has no fake images .1 records, classes: real"):
        require_both_classes([record("a", 0)], "Training split")
    with pytest.raises(ValueError, match="no real and no fake images"):
        require_both_classes([record("a", None)], "x")


def test_chosen_groups_are_whole_seeded_and_near_the_fraction() -> None:
    groups = [f"g{i // 3}" for i in range(300)]
    chosen = choose_groups(groups, 0.2, seed=1)
    assert 60 <= sum(g in chosen for g in groups) < 63
    assert chosen == choose_groups(groups, 0.2, seed=1) != choose_groups(groups, 0.2, seed=2)
    with pytest.raises(ValueError, match="fraction"):
        choose_groups(groups, 1.0, seed=1)


def test_summary_counts_by_hand() -> None:
    records = [record("a", 0, "g", "train"), record("b", 1, "g", "train"), record("c", None, "h", "test")]
    counted = summary(records)
    assert counted["labels"] == {"fake": 1, "real": 1, "unknown": 1}
    assert (counted["records"], counted["videos"], counted["groups"]) == (3, 3, 2)
    assert counted["splits"]["train"]["groups"] == 1
    assert counted["splits"]["test"]["classes"] == {"unknown": 1}


# ---- a division by groups and classes ---------------------------------------------------------------------------

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def people(seed=0):
    """Give 60 people: twenty have one real picture, twenty three of kind A, twenty two of kind B and one real."""
    kinds = [["real"], ["a"] * 3, ["b", "b", "real"]]
    found = []
    for number in range(60):
        for place, kind in enumerate(kinds[number % 3]):
            name, person = f"{number:02}_{place}", f"p{number:02}"
            label = int(kind != "real")
            found.append(Record(id=name, label=label, class_name=kind, video=name, group=person, where=name))
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def test_groups_stay_whole_and_classes_even():
    divided = divide(people(), SHARES, seed=1)
    splits = {group: {r.split for r in divided if r.group == group} for group in {r.group for r in divided}}
    assert all(len(found) == 1 for found in splits.values())
    for kind in ("real", "a", "b"):
        own = [r.split for r in divided if r.class_name == kind]
        for name, share in SHARES.items():
            assert abs(own.count(name) - share * len(own)) <= 3, (kind, name)
    assert [r.id for r in divided] == [r.id for r in people()], "the order stays"


def test_a_division_hangs_on_the_seed_and_not_on_the_order():
    def of(records, seed):
        return {r.id: r.split for r in divide(records, SHARES, seed)}

    assert of(people(0), 1) == of(people(5), 1) != of(people(0), 2)


def test_a_large_group_is_not_put_where_there_is_no_room():
    big = [Record(id=f"b{i}", label=0, class_name="real", video=f"b{i}", group="big", where="") for i in range(50)]
    divided = divide(big + people(), SHARES, seed=0)
    assert {r.split for r in divided if r.group == "big"} == {"train"}


def test_what_can_not_be_divided_is_said():
    with pytest.raises(ValueError, match=r"shares: 0\.7, 0\.7, 0\.15 do not add up to 1"):
        divide(people(), SHARES | {"val": 0.7}, seed=0)
    with pytest.raises(ValueError, match="2 records in 2 groups can not be divided into 3 splits"):
        divide(people()[:2], SHARES, seed=0)
