"""Which worker is asked next, and when one is forgotten: with a clock that the test turns."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from llava.serve.protocol import WorkerStatus
from llava.serve.registration import WorkerAddress
from llava.serve.workers import MAX_WORKERS, Dispatch, Pool


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def pool_of(dispatch: Dispatch = "shortest_queue", **workers: WorkerStatus) -> tuple[Pool, Clock]:
    clock = Clock()
    pool = Pool(dispatch, 30.0, clock, random.Random(0))
    for name, status in workers.items():
        pool.add(address(name), status, expires=True, is_multimodal=name != "words")
    return pool, clock


def address(name: str) -> WorkerAddress:
    return WorkerAddress(name=name, url=f"http://127.0.0.1/{name}", host="127.0.0.1", netloc="127.0.0.1:1")


def status(*models: str, speed: float = 1, queue: int = 0) -> WorkerStatus:
    return WorkerStatus(model_names=list(models), speed=speed, queue_length=queue)


def chosen(pool: Pool, model: str = "m", without: tuple[str, ...] = ()) -> str:
    worker = pool.choose(model, without)
    return worker.address.name if worker else ""


def test_the_shortest_queue_for_its_speed_is_taken() -> None:
    pool, _ = pool_of(a=status("m", queue=4), b=status("m", speed=4, queue=8), c=status("n"))
    assert [chosen(pool) for _ in range(9)] == ["b"] * 8 + ["a"]  # 8/4 = 2 … 15/4 < 4, then 16/4 = 4: the first
    assert chosen(pool, "n") == "c"
    assert chosen(pool, "none") == ""
    assert chosen(pool, without=("a", "b")) == ""


def test_requests_that_end_shorten_the_queue() -> None:
    pool, _ = pool_of(a=status("m"), b=status("m"))
    assert [chosen(pool), chosen(pool), chosen(pool)] == ["a", "b", "a"]
    pool.done("a")
    pool.done("a")
    pool.done("a")
    pool.done("gone")
    assert chosen(pool) == "a" and chosen(pool, without=("a",)) == "b"


def test_the_lottery_follows_the_speeds() -> None:
    pool, _ = pool_of("lottery", a=status("m", speed=3), b=status("m", speed=1))
    drawn = Counter(chosen(pool) for _ in range(4000))
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_silent_worker_is_forgotten_and_a_heartbeat_keeps_one() -> None:
    pool, clock = pool_of(a=status("m"), b=status("n"))
    clock.seconds += 29
    assert pool.beat("a", 7)
    clock.seconds += 2
    assert pool.models() == ["m"] and pool.workers()[0].queue == 7
    assert not pool.beat("b", 0)  # it has to register again
    assert not pool.beat("never", 0)
    clock.seconds += 31
    assert pool.models() == [] and chosen(pool) == ""


def test_a_worker_without_heartbeats_stays() -> None:
    pool, clock = pool_of()
    pool.add(address("a"), status("m"), expires=False, is_multimodal=False)
    clock.seconds += 1e6
    assert chosen(pool) == "a"
    pool.drop("a")
    pool.drop("a")
    assert pool.models() == []


def test_models_are_listed_once_by_kind() -> None:
    pool, _ = pool_of(a=status("m", "k"), b=status("m"), words=status("w"))
    assert pool.models() == ["k", "m", "w"]
    assert pool.models(is_multimodal=True) == ["k", "m"] and pool.models(is_multimodal=False) == ["w"]


def test_there_is_room_for_so_many_workers() -> None:
    pool, _ = pool_of(**{f"w{i}": status("m") for i in range(MAX_WORKERS)})
    pool.add(address("w0"), status("n"), expires=True, is_multimodal=True)
    with pytest.raises(ValueError, match="the limit"):
        pool.add(address("one more"), status("m"), expires=True, is_multimodal=True)
