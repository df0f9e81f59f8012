"""Where weights are found, and that nothing but the right ones is ever loaded."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from llava.core import weights
from llava.core.types import STARTER
from llava.core.weights import (
    load_strictly,
    read_config,
    read_weights,
    resolve,
    save_module,
    sha256_of,
    shapes_only,
    without_random_weights,
)


def network(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


@pytest.fixture
def in_workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two trained models, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("M2F2_CHECKPOINTS", raising=False)
    for name in ("stage_1", "stage_3", ".stage_1.half"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_saved_module_comes_back_with_every_tensor(tmp_path: Path) -> None:
    original = network()
    original(torch.randn(8, 2))  # moves the BatchNorm buffers
    save_module(tmp_path / "m", original, {"width": 3})
    assert read_config(tmp_path / "m") == {"width": 3}
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    copy = network()
    load_strictly(copy, read_weights(tmp_path / "m"), "the file")
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(copy.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_module_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path) -> None:
    save_module(tmp_path, network(), {"width": 3})
    before = sha256_of(tmp_path / "model.safetensors")
    tied = network()
    tied.twin = tied[0]
    with pytest.raises(RuntimeError, match="share memory"):
        save_module(tmp_path, tied, {"width": 4})
    assert sha256_of(tmp_path / "model.safetensors") == before and read_config(tmp_path) == {"width": 3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("0.bias"), "1 missing (first: 0.bias)"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unexpected (first: extra)"),
        (lambda s: s.update({"0.weight": torch.ones(3, 5)}), "1 of another shape (first: 0.weight)"),
        (lambda s: (s.pop("0.bias"), s.update(a=torch.ones(1), b=torch.ones(1))), "1 missing (first: 0.bias), 2 unex"),
    ],
)
def test_other_weights_are_refused_and_change_nothing(change, words: str) -> None:
    target = network()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = network().state_dict()
    change(state)
    with pytest.raises(ValueError) as raised:
        load_strictly(target, state, "the file")
    assert words in str(raised.value) and "the file does not fit Sequential" in str(raised.value)
    for name, tensor in target.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_an_empty_or_damaged_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; give the folder that training wrote"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        read_weights(tmp_path)
    save_module(tmp_path, network(), {})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (0, 5, len(whole) - 4):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model.safetensors' is damaged or incomplete .* copy the folder again"):
            read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' is not JSON"):
        read_config(tmp_path)


def test_a_name_is_a_path_first_and_a_checkpoint_second(in_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("stage_1") == Path("checkpoints/stage_1")
    assert resolve("checkpoints/stage_1") == Path("checkpoints/stage_1")
    (in_workplace / "stage_1").mkdir()
    assert resolve(Path("stage_1")) == Path("stage_1")
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(in_workplace))
    assert resolve("checkpoints") == Path("checkpoints")
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(in_workplace / "checkpoints"))
    assert resolve("stage_3") == in_workplace / "checkpoints" / "stage_3"


@pytest.mark.parametrize("name", ["stage_2", "checkpoints/stage_2", "./stage_2", "/stage_2", "a/b/stage_2", ""])
def test_a_misspelt_path_is_no_question_to_the_hub(name: str, in_workplace: Path, monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("llava.core.weights.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError) as raised:
        resolve(name)
    message = str(raised.value)
    assert f"No model at {name!r}" in message and "Allowed: stage_1, stage_3, starter." in message
    hint = "because 'checkpoints' is a folder here." if name.startswith("checkpoints") else "hub id like owner/model."
    assert message.endswith(hint)
    assert not name or "Did you mean 'stage_" in message


@pytest.fixture
def starter(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that holds a starter."""
    folder = tmp_path_factory.mktemp("package") / "starter"
    save_module(folder, network(), {"width": 3})
    monkeypatch.setattr(weights, "STARTER_DIR", folder)
    return folder


def test_the_starter_is_the_one_in_the_package_and_needs_nothing_else(
    starter: Path, in_workplace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weights, "snapshot_download", None)  # the hub can not be asked
    assert resolve(STARTER) == starter and not caplog.text
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(in_workplace / "nowhere"))
    assert resolve(STARTER) == starter and not caplog.text
    monkeypatch.chdir(starter.parent)
    assert resolve(STARTER) == starter and not caplog.text, "the same folder is no other one"


@pytest.mark.parametrize("place", ["starter", "checkpoints/starter"])
def test_a_namesake_is_meant_by_its_path_alone_and_never_silently(
    place: str, starter: Path, in_workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (in_workplace / place).mkdir()
    assert resolve(STARTER) == starter
    assert f"to mean the other one, give {in_workplace / place}" in caplog.text
    for meant in (f"./{place}", Path(place), str(in_workplace / place)):
        assert resolve(meant) == Path(meant) and resolve(meant) != starter


def test_an_installation_without_the_starter_says_so(
    in_workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "STARTER_DIR", tmp_path / "starter")
    (tmp_path / "starter").mkdir()
    (tmp_path / "starter" / "MODEL_CARD.md").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no model 'starter' .* has no config.json\); install the"):
        resolve(STARTER)


def test_a_file_is_not_a_model(in_workplace: Path) -> None:
    (in_workplace / "model.pth").write_text("")
    with pytest.raises(FileNotFoundError, match=r"'model.pth' is a file; give the folder that holds it"):
        resolve("model.pth")


def test_a_hub_id_without_network_gives_one_clear_message(in_workplace: Path) -> None:
    started = time.monotonic()
    with pytest.raises(FileNotFoundError) as raised:
        resolve("nobody-here/no-such-model")
    assert time.monotonic() - started < 2
    message = str(raised.value)
    assert "No model at 'nobody-here/no-such-model': not a folder, not in 'checkpoints'" in message
    assert "the model hub is switched off by HF_HUB_OFFLINE" in message and "\n" not in message


def test_a_name_no_hub_allows_is_one_message_too(in_workplace: Path) -> None:
    with pytest.raises(FileNotFoundError, match="and the model hub"):
        resolve("two words/and--more")


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_shapes_are_seen_without_memory() -> None:
    with shapes_only():
        seen = network().state_dict()
    own = network().state_dict()
    assert {n: (t.shape, t.dtype) for n, t in seen.items()} == {n: (t.shape, t.dtype) for n, t in own.items()}
    assert all(tensor.is_meta for tensor in seen.values())


def test_random_weights_are_left_out_and_constants_are_not() -> None:
    before = torch.get_rng_state()
    with without_random_weights():
        built = network()
    assert torch.equal(torch.get_rng_state(), before)
    assert built[1].weight.eq(1).all() and built[1].running_mean.eq(0).all()
    assert not torch.equal(network()[0].weight, network()[0].weight), "afterwards they are drawn again"
