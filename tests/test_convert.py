"""Published weights: read safely, planned tensor by tensor, converted, and usable by every command as they are."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from published_weights import (
    MM,
    TINY_CLIP,
    TINY_LLAMA,
    published_shapes,
    random_tensors,
    tiny_detector_config,
    write_folder,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from llava.core.tensor_files import Move, Rules, TensorFiles, plan, read_pickled, write_shards
from llava.core.weights import read_config, shapes_only
from llava.detectors.base import load
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.detectors.m2f2det_published import (
    PUBLISHED_PREFIXES,
    PublishedDetector,
    PublishedTower,
    detector_config,
    detector_plan,
)
from llava.detectors.published import ready_detector
from llava.explainer.convert import DETECTOR, RULES, TOWER, PublishedDelta, PublishedFolder, ready
from llava.explainer.generation import load_model
from llava.explainer.merge import merge_delta, merge_detector
from llava.train.tiny_base import train_tokenizer

ROOT = Path(__file__).parents[1]
GONE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "config.json").write_text(json.dumps(TINY_CLIP))
    return str(folder)


def publish(
    folder: Path, clip: str, detector: M2F2DetConfig | None, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """Write a tiny published folder with a tokeniser, whose config names its CLIP."""
    sizes = tiny_detector_config().vision
    write_folder(folder, TINY_LLAMA, detector, dtype, shard_bytes=3e6, vision=sizes, **options)
    settings = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": clip}
    (folder / "config.json").write_text(json.dumps(settings))
    words = ["Is the image real or fake? The image is fake.", "USER: ASSISTANT:"]
    train_tokenizer(iter(words * 20), TINY_LLAMA["vocab_size"]).save_pretrained(folder)
    return folder


def stage_1_file(path: Path) -> dict[str, Tensor]:
    """Write the file of the published stage 1 as its Saver does, with a pickled scheduler; gives its tensors."""
    config = M2F2DetConfig(
        backbone="efficientnet_b0", hidden_size=16, fusion="none", vision=tiny_detector_config().vision
    )
    with shapes_only():
        detector = M2F2Det(config)
    rules = Rules(prefixes=PUBLISHED_PREFIXES)
    shapes = {rules.foreign(name): tuple(tensor.shape) for name, tensor in detector.state_dict().items()}
    bridge = "bridge_adapter_proj.bridge_adapter_"
    shapes |= {
        "clip_text_alpha": (),
        "clip_text_encoder.prompt_tokens": (1, 7, 16),
        "text_proj.0.weight": (16, 16),
        "linear_1.weight": (64, 40),
        "clip_reduction.weight": (64, 24),
        f"{bridge}proj.1.weight": (1, 64),
        f"{bridge}proj.1.bias": (1,),
        f"{bridge}proj.2.weight": (1,),
        f"{bridge}proj.2.bias": (1,),
        f"{bridge}reduction.0.weight": (128, 50),
        f"{bridge}reduction.0.bias": (128,),
        f"{bridge}reduction.1.weight": (128,),
        f"{bridge}reduction.1.bias": (128,),
        "output.weight": (2, 16 + 128 + 16),
    }
    drawn = dict(random_tensors(shapes, torch.float32))
    drawn |= {name: 5 * tensor for name, tensor in drawn.items() if "bridge" in name or "output" in name}
    drawn["clip_text_alpha"], drawn["clip_vision_alpha"] = torch.tensor(4.0), torch.tensor(0.5)
    weight = torch.nn.Parameter(torch.ones(2))
    optimiser = torch.optim.Adam([weight], lr=1e-3)
    weight.sum().backward()
    optimiser.step()
    content = {
        "epoch": 180,
        "model_state_dict": {f"module.{name}": tensor for name, tensor in drawn.items()},
        "optimizer_state_dict": optimiser.state_dict(),
        "iter": 7,
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, "min"),
        "val_loss": 0.3,
    }
    torch.save(content, path)
    return drawn


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_pickled_scheduler_is_left_behind_and_the_tensors_are_read(tmp_path: Path) -> None:
    drawn = stage_1_file(tmp_path / "current_model_180.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "current_model_180.pth", weights_only=True)
    files = TensorFiles([tmp_path / "current_model_180.pth"])
    assert sorted(files) == sorted(f"module.{name}" for name in drawn)
    assert torch.equal(files["module.output.weight"], drawn["output.weight"])
    assert files.besides == ["epoch", "optimizer_state_dict", "iter", "scheduler", "val_loss"]


class Evil:
    def __init__(self, command: Any, argument: str) -> None:
        self.call = (command, (argument,))

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("command", [os.system, eval, exec])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path, command: Any) -> None:
    mark = tmp_path / "run"
    argument = f"touch {mark}" if command is os.system else f"open({str(mark)!r}, 'w')"
    torch.save({"model_state_dict": {"a": torch.ones(1)}, "scheduler": Evil(command, argument)}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=rf"evil.pth is refused: loading it would call \w+\.{command.__name__}"):
        read_pickled(tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="is refused"):
        ready_detector(tmp_path / "evil.pth")
    assert not mark.exists()
    command(argument)  # what the file would have done
    assert mark.exists()


def test_broken_and_empty_files_say_so(tmp_path: Path) -> None:
    stage_1_file(tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    (tmp_path / "noise.bin").write_bytes(b"\x80\x02noise")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("half", "copy the file again"),
        ("noise", "copy the file again"),
        ("list", "no table of tensors"),
    ):
        path = next(tmp_path.glob(f"{name}.*"))
        with pytest.raises(ValueError, match=message):
            TensorFiles([path])
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"'a' is also in a\.safetensors"):
        TensorFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_shards_are_written_with_an_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    save_file(tensors, tmp_path / "in.safetensors")
    moves = [Move(source=name, action="renamed", target=f"new.{name}") for name in tensors]
    write_shards(
        tmp_path / "out", moves, TensorFiles([tmp_path / "in.safetensors"]), {"e": torch.ones(3)}, shard_bytes=90
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 40 + 12
    found: dict[str, Tensor] = {}
    for name, file in index["weight_map"].items():
        found[name] = load_file(tmp_path / "out" / file)[name]
    assert torch.equal(found["new.t3"], tensors["t3"]) and torch.equal(found["e"], torch.ones(3))
    assert len(found) == 6 and len(set(index["weight_map"].values())) == 3
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(set(index["weight_map"].values()))


def test_a_plan_accounts_for_every_tensor() -> None:
    rules = Rules(prefixes={"a.": "b.", "same": "same"}, folded={"f": "into b"}, dropped={"*.ids": "made anew"})
    given = {"a.x": (1,), "same": (2,), "f": (1,), "a.ids": (3,), "who": (1,), "a.y": (4,)}
    found = plan(given, {"b.x": (1,), "same": (2,), "b.y": (5,), "b.z": (1,), "c": (1,)}, rules, computed=["c"])
    assert {m.source: m.action for m in found.moves} == {
        "a.x": "renamed",
        "same": "used",
        "f": "folded",
        "a.ids": "dropped",
        "a.y": "renamed",
    }
    assert found.unexpected == ("who",) and found.missing == ("a.z",)
    assert found.misshapen == ("a.y: [4] where [5] is needed",)
    wrong = "1 MISSING, 1 UNEXPECTED, 1 MISSHAPEN"
    assert found.counts() == f"6 tensors: 1 used, 2 renamed, 1 folded, 1 dropped, {wrong}"
    assert "dropped  a.ids  (made anew)" in list(found.lines())
    with pytest.raises(ValueError, match=r"1 missing \(a.z\); 1 unexpected \(who\); 1 of another shape"):
        found.check("that")
    again = plan({"a.x": (1,), "b.x": (1,)}, {"b.x": (1,)}, Rules(prefixes={"a.": "b.", "b.": "b."}))
    assert again.unexpected == ("b.x",), "two tensors can not have one target"


# ---- detectors ----------------------------------------------------------------------------------------------------


def test_stage_1_folds_its_constant_bridge_exactly(tmp_path: Path, clip: str, checkpoints: Path) -> None:
    t = stage_1_file(tmp_path / "s.pth")
    published = PublishedDetector(tmp_path / "s.pth", clip=TINY_CLIP)
    assert (published.config.backbone, published.config.fusion) == ("efficientnet_b0", "none")
    published.write(tmp_path / "ours")
    ours = load(tmp_path / "ours")
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cls = normed(ours.vision_encoder(images)[:, 0], t, "vision_proj.")
        cnn = ours.backbone_proj(ours.backbone.forward_stages(images)[0].mean(dim=(2, 3)))
        stem = "bridge_adapter_proj.bridge_adapter_"
        anything = torch.randn(3, 50, 1)  # a LayerNorm over one value forgets it
        tokens = F.layer_norm(anything, (1,), t[f"{stem}proj.2.weight"], t[f"{stem}proj.2.bias"]).flatten(1)
        bridge = normed(tokens, t, f"{stem}reduction.")
        expected = F.linear(torch.cat([0.5 * cls, 4.0 * bridge, cnn], dim=1), t["output.weight"], t["output.bias"])
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(images).logits, expected, atol=1e-5, rtol=1e-5)
    report = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    actions = {move["source"]: move for move in report["moves"]}
    assert actions.keys() == t.keys()
    assert (
        actions["clip_reduction.weight"]["action"] == "dropped"
        and "LayerNorm" in actions["clip_reduction.weight"]["reason"]
    )
    assert actions["output.bias"]["action"] == "folded"
    assert report["left"] == ["epoch", "iter", "optimizer_state_dict", "scheduler", "val_loss"]


def normed(values: Tensor, tensors: dict[str, Tensor], stem: str) -> Tensor:
    """Give Linear and LayerNorm as published."""
    linear = F.linear(values, tensors[f"{stem}0.weight"], tensors[f"{stem}0.bias"])
    return F.layer_norm(linear, linear.shape[1:], tensors[f"{stem}1.weight"], tensors[f"{stem}1.bias"])


@pytest.mark.e2e
def test_a_detector_file_is_converted_where_a_detector_is_asked_for(tmp_path: Path, checkpoints: Path) -> None:
    published = tmp_path / "M2F2_Det_densenet121.pth"
    with shapes_only():
        state = M2F2Det(M2F2DetConfig(hidden_size=8)).state_dict()
    shapes = {Rules(prefixes=PUBLISHED_PREFIXES).foreign(name): tuple(t.shape) for name, t in state.items()}
    is_tower = {name: name.startswith("clip_vision_encoder.") for name in shapes}
    flat = {name: shape for name, shape in shapes.items() if not is_tower[name]}
    torch.save(zeros(flat), published)
    alone = PublishedDetector(published)
    assert not alone.config.own_vision and len(alone.tensors) == 938
    bare = ready_detector(published)
    with pytest.raises(FileNotFoundError, match=r"or the published file itself, such as .*M2F2_Det"):
        read_config(tmp_path)
    stem = "clip_vision_encoder.model."
    tower = {name.replace(stem, "vision_tower."): shape for name, shape in shapes.items() if is_tower[name]}
    torch.save(zeros(tower), tmp_path / "vision_tower.pth")
    folder = ready_detector(published)
    assert folder.parent == checkpoints / "converted" and folder != bare, "a tower beside it is another detector"
    assert folder == ready_detector(published), "the second time it is there already"
    both = load(folder)
    assert both.config.own_vision and both.config.backbone == "densenet121" and len(both.state_dict()) == 1329
    assert ready_detector(folder) == folder


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Give tensors whose values nobody looks at; four hundred million random numbers would take seconds."""
    counts = {name: name.endswith("num_batches_tracked") for name in shapes}
    return {n: torch.zeros(shape, dtype=torch.int64 if counts[n] else torch.half) for n, shape in shapes.items()}


VARIANTS = (
    "llm_densenet121_h1024_no_clipvision",
    "llmclass_densenet121_h1024_with_clipvision",
    "stage1_efficientnet_b4_h1792",
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_full_size_tensor_of_the_published_detectors_has_its_place(shared_data: Path, variant: str) -> None:
    path = shared_data.parent / "m2f2" / "full_size_keys.json"
    shapes = {name: tuple(shape) for name, shape in json.loads(path.read_text())[variant].items()}
    config = detector_config(shapes)
    found = detector_plan(shapes, config)
    found.check(variant)
    assert len(found.moves) == len(shapes)
    assert (config.fusion == "none") == variant.startswith("stage1")


def test_every_tensor_of_a_saved_explainer_has_its_place(shared_data: Path) -> None:
    path = shared_data.parent / "m2f2" / "tiny_saved_keys.json"
    names = json.loads(path.read_text())
    assert len(names) > 800
    assert [name for name in names if RULES.move(name) is None] == []
    assert all(RULES.foreign(move.target) == name for name in names if (move := RULES.move(name)) and move.target)


def test_other_generations_and_damaged_detectors_are_refused(tmp_path: Path) -> None:
    t = stage_1_file(tmp_path / "s.pth")
    torch.save({**t, "link_adapter_proj.weight": torch.ones(1, 2)}, tmp_path / "first.pth")
    with pytest.raises(ValueError, match="first commit"):
        PublishedDetector(tmp_path / "first.pth", clip=TINY_CLIP)
    short = {name: tensor for name, tensor in t.items() if name != "deepfake_encoder.0.0.weight"}
    torch.save({**short, "surprise": torch.ones(1)}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"1 missing \(deepfake_encoder\.0\.0\.weight\); 1 unexpected \(surprise\)"):
        PublishedDetector(tmp_path / "short.pth", clip=TINY_CLIP).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="attention heads can not be seen"):
        PublishedDetector(tmp_path / "s.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the tensors of an M2F2-Det detector"):
        PublishedDetector(tmp_path / "other.pth")


# ---- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_the_merged_folder_works_where_a_model_is_asked_for(tmp_path: Path, clip: str, checkpoints: Path) -> None:
    from llava.pipeline import Pipeline
    from llava.pipeline.settings import FaceSettings

    source = publish(tmp_path / "llava-v1.5-m2f2", clip, tiny_detector_config(), torch.bfloat16)
    assert len(list(source.glob("*.safetensors"))) > 1
    pipeline = Pipeline.from_pretrained(source, faces=FaceSettings(face="off"))
    picture = np.random.default_rng(0).integers(0, 256, (70, 60, 3), dtype=np.uint8)
    assert 0 < pipeline.detect(picture)[0].p_fake < 1
    assert pipeline.explain(picture).text is not None
    (converted,) = (checkpoints / "converted").iterdir()
    assert converted.name.startswith("llava-v1.5-m2f2-")
    stamp = (converted / "config.json").stat().st_mtime_ns
    model = load_model(source, dtype="stored")
    assert (converted / "config.json").stat().st_mtime_ns == stamp, "the second time it is there already"
    assert model.config.image_aspect_ratio == "pad" and model.config.layout == "published_train"
    assert {p.dtype for p in model.detector.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    original = TensorFiles(sorted(source.glob("*.safetensors")))
    assert torch.equal(model.detector.classifier.weight, original[f"{DETECTOR}output.weight"].float())
    assert ready(converted) == converted, "ours needs no conversion"


@pytest.mark.e2e
def test_dry_run_names_what_is_missing_and_what_is_too_much(tmp_path: Path, clip: str) -> None:
    source = publish(tmp_path / "bad", clip, tiny_detector_config(), missing=GONE, extra="model.surprise.weight")
    out = run_script("--model_path", str(source), "--dry-run", "--save_path", str(tmp_path / "out"))
    assert out.returncode != 0
    assert f"MISSING  {GONE}" in out.stdout and "UNEXPECTED model.surprise.weight" in out.stdout
    assert GONE in out.stderr and "model.surprise.weight" in out.stderr
    assert not (tmp_path / "out").exists()


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    words = [str(ROOT / "scripts" / "convert_m2f2.py"), *flags]
    return forked.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.e2e
def test_llava_with_and_without_its_tower_becomes_a_base(
    tmp_path: Path, clip: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(tmp_path / "llava", clip, None)
    PublishedFolder(source).write(tmp_path / "whole")
    tensors = TensorFiles(sorted(source.glob("*.safetensors")))
    tower = {name.removeprefix("model.vision_tower."): tensors[name] for name in tensors if name.startswith(TOWER)}
    torch.save(tower, tmp_path / "vision_tower.pth")
    PublishedTower(tmp_path / "vision_tower.pth", clip=TINY_CLIP).write(tmp_path / "clip_vision")
    alone = CLIPVisionModel.from_pretrained(tmp_path / "clip_vision").state_dict()
    assert len(alone) == len(tower)
    assert all(torch.equal(alone[name.removeprefix("vision_tower.vision_model.")], tower[name]) for name in tower)
    bare = {name: tensors[name].clone() for name in tensors if not name.startswith(TOWER)}
    for file in source.glob("*.safetensors"):
        file.unlink()
    torch.save(bare, source / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        PublishedFolder(source)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"mm_vision_tower": "owner/clip"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"without a CLIP vision tower\. No model at 'owner/clip'.*--vision_tower"
    ):
        PublishedFolder(source)
    (source / "config.json").write_text(json.dumps(settings))
    PublishedFolder(source, vision_tower=str(tmp_path / "vision_tower.pth")).write(tmp_path / "joined")
    whole, joined = (
        TensorFiles([folder / "model.safetensors"]) for folder in (tmp_path / "whole", tmp_path / "joined")
    )
    assert sorted(whole) == sorted(joined)
    assert all(torch.equal(whole[name], joined[name]) for name in whole)
    publish_detector(tmp_path / "detector.pth")
    (tmp_path / "joined" / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "joined" / "config.json").read_text()) | {"deepfake_model_name": "densenet121"}
        )
    )
    PublishedDetector(tmp_path / "detector.pth", clip=TINY_CLIP).write(tmp_path / "detector")
    certificate = merge_detector(str(tmp_path / "joined"), str(tmp_path / "detector"), tmp_path / "start")
    assert certificate["max_delta_p_fake"] < 1e-4


@pytest.mark.e2e
def test_the_layout_of_llava_hf_is_a_base_as_it_is(tmp_path: Path, clip: str, checkpoints: Path) -> None:
    """Names as in llava-hf/llava-1.5-7b-hf, and a vocabulary padded beyond the tokeniser's."""
    PublishedFolder(publish(tmp_path / "published", clip, None)).write(tmp_path / "hf")
    old = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal": "multi_modal",
    }
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    rules = Rules(prefixes=old)
    renamed = {move.target: tensors[name] for name in tensors if (move := rules.move(name))}
    assert len(renamed) == len(tensors)
    save_file(renamed, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert ready(tmp_path / "hf") == tmp_path / "hf"
    publish_detector(tmp_path / "detector.pth")
    PublishedDetector(tmp_path / "detector.pth", clip=TINY_CLIP).write(tmp_path / "detector")
    merge_detector(str(tmp_path / "hf"), str(tmp_path / "detector"), tmp_path / "start")
    merged = load_model(tmp_path / "start").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


def test_a_folder_without_a_tokeniser_is_refused_before_anything_is_written(tmp_path: Path, clip: str) -> None:
    source = publish(tmp_path / "llava", clip, None)
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokeniser \(tokenizer\.model or tokenizer\.json\)"):
        PublishedFolder(source).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def publish_detector(path: Path) -> None:
    """Write a flat detector file without a vision tower."""
    config = tiny_detector_config()
    shapes = published_shapes(TINY_LLAMA, config, config.vision)
    own = {name.removeprefix(DETECTOR): shape for name, shape in shapes.items() if name.startswith(DETECTOR)}
    torch.save(dict(random_tensors(own, torch.float32)), path)


# ---- deltas -------------------------------------------------------------------------------------------------------


def delta_files(folder: Path, base: Path, rank: int = 4, leak: float = 0.0) -> None:
    """Write a published stage-3 output for `base`: LoRA round the language model and, untrained, round a tower."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    sizes = {
        "q": (32, 32),
        "k": (32, 32),
        "v": (32, 32),
        "o": (32, 32),
        "gate": (48, 32),
        "up": (48, 32),
        "down": (32, 48),
    }
    lora = {}
    for layer in range(TINY_LLAMA["num_hidden_layers"]):
        for name, (rows, columns) in sizes.items():
            part = "mlp" if name in ("gate", "up", "down") else "self_attn"
            stem = f"base_model.model.model.layers.{layer}.{part}.{name}_proj"
            lora[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(rank, columns, generator=generator)
            lora[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)
    stem = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    lora |= {f"{stem}.lora_A.weight": torch.ones(rank, 24), f"{stem}.lora_B.weight": torch.full((24, rank), leak)}
    save_file(lora, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05}))
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in others().items()}, folder / "non_lora_trainables.bin"
    )


def others() -> dict[str, Tensor]:
    shapes = {
        f"deepfake_projector.{i}.{part}": shape
        for i, width in (("0", 2), ("2", 32))
        for part, shape in (("weight", (32, width)), ("bias", (32,)))
    }
    shapes |= {
        f"model.mm_projector.{i}.{part}": shape
        for i, width in (("0", 24), ("2", 32))
        for part, shape in (("weight", (32, width)), ("bias", (32,)))
    }
    return {name: tensor + 0.5 for name, tensor in random_tensors(shapes, torch.float32, seed=9)}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, clip: str) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    PublishedFolder(publish(folder / "published", clip, tiny_detector_config())).write(folder / "ours")
    return folder / "ours"


@pytest.mark.e2e
def test_stage_3_outputs_merge_as_published(tmp_path: Path, merged: Path, checkpoints: Path) -> None:
    delta_files(tmp_path / "delta", merged)
    certificate = merge_delta(str(merged), str(tmp_path / "delta"), tmp_path / "final")
    assert certificate["kind"] == "lora" and certificate["max_delta_logit"] < 1e-4
    assert certificate["tensors_changed"] == 7 * 2 + 8
    before, after = (TensorFiles(sorted(f.glob("*.safetensors"))) for f in (merged, tmp_path / "final"))
    lora = load_file(tmp_path / "delta" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.down_proj"
    change = 2 * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
    name = next(n for n in after if n.endswith("layers.1.mlp.down_proj.weight"))
    torch.testing.assert_close(after[name] - before[name], change, atol=1e-5, rtol=1e-4)
    assert torch.equal(after["deepfake_projector.0.bias"], others()["deepfake_projector.0.bias"])


@pytest.mark.e2e
def test_stage_2_outputs_merge_and_half_deltas_are_refused(tmp_path: Path, merged: Path, checkpoints: Path) -> None:
    (tmp_path / "two").mkdir()
    adapter = {name: tensor for name, tensor in others().items() if name.startswith("deepfake")}
    torch.save(adapter, tmp_path / "two" / "mm_projector.bin")
    certificate = merge_delta(str(merged), str(tmp_path / "two"), tmp_path / "final")
    assert (certificate["kind"], certificate["tensors_changed"]) == ("adapter", 4)
    (tmp_path / "checkpoint-9").mkdir()
    torch.save(
        {f"base_model.model.{n}": t for n, t in others().items()}, tmp_path / "checkpoint-9" / "mm_projector.bin"
    )
    with pytest.raises(ValueError, match="does not save LoRA there"):
        merge_delta(str(merged), str(tmp_path / "checkpoint-9"), tmp_path / "half")
    delta_files(tmp_path / "leaky", merged, leak=0.1)
    with pytest.raises(ValueError, match="round a CLIP tower are not zero"):
        PublishedDelta(tmp_path / "leaky", merged)
    out = run_script("--model_path", str(tmp_path / "two"), "--model_base", str(merged), "--dry-run")
    assert out.returncode == 0, out.stderr
    assert "4 tensors: 4 used" in out.stdout


def test_a_folder_that_needs_no_conversion_says_so(merged: Path) -> None:
    with pytest.raises(ValueError, match="needs no conversion"):
        PublishedFolder(merged)
    assert MM["mm_projector_type"] == "mlp2x_gelu"
