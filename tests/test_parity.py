"""The published code and ours give the same numbers: every fixture of a folder in the golden format (`--golden`).

What was repaired is compared with the corrected expectation, or with a switch that undoes the repair, by name:
`as_published` (BatchNorm of the frozen detector on batch statistics, lm_head trained in stage 2), the layout
`published_train`, `published_scores`, `parse_verdict_published`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import DEFAULT, Fixture, find
from torch import Tensor

from llava.core.config import parse
from llava.core.types import Turn
from llava.core.weights import sha256_of
from llava.data.images import read_image
from llava.detectors.base import load
from llava.detectors.m2f2det_published import PublishedDetector, bridge_constant, read_clip_config
from llava.evaluation.published_csv import published_scores, read_predictions
from llava.evaluation.text import parse_verdict_published
from llava.explainer.convert import RULES, PublishedFolder
from llava.explainer.delta import inner
from llava.explainer.generation import load_model, load_processor
from llava.explainer.modeling import ForgeryLlavaConfig
from llava.explainer.processing import ExplainerProcessor, read_tokenizer
from llava.train.arguments import ExplainArguments, translate
from llava.train.explain import ExplainTrainer, prepare

pytestmark = pytest.mark.e2e
LOGITS = 1e-4  # the fixtures allow 2e-4; other processors add up in another order
INNER = {"atol": 1e-3, "rtol": 1e-3}
IMAGE, EVIDENCE = -200, -300


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kinds = {
        "detector": ["detector"],
        "stage_1": ["stage_1"],
        "llm": ["llm"],
        "train": ["train"],
        "pictures": ["preprocess"],
    }
    root: Path = metafunc.config.getoption("golden")
    for argument, wanted in kinds.items():
        if argument in metafunc.fixturenames:
            found = find(root, metafunc.config, *wanted) if root.is_dir() else []
            metafunc.parametrize(argument, found, ids=lambda fixture: fixture.name)


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.config.getoption("golden")
    if not folder.is_dir():
        pytest.skip(f"no parity fixtures in {folder}; name a folder with --golden")
    return folder


# ---- detectors ----------------------------------------------------------------------------------------------------


def convert_detector(fixture: Fixture, folder: Path, content: Any) -> Any:
    """Save what the published file holds, convert it, and load the result."""
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "published.pth")
    clip = read_clip_config(fixture.clip_folder(folder / "clip"))
    PublishedDetector(folder / "published.pth", clip=clip).write(folder / "ours")
    return load(folder / "ours", expected="m2f2det")


def grad_norms(detector: Any, rename: dict[str, str]) -> dict[str, float]:
    names = {name: our for our, name in rename.items()}
    return {names[n]: float(p.grad.norm()) for n, p in detector.named_parameters() if p.grad is not None and n in names}


def test_the_explainers_detector(detector: Fixture, tmp_path: Path) -> None:
    ours = convert_detector(detector, tmp_path, detector.weights)
    has_tower = detector.manifest["constructor"]["load_vision_encoder"]
    images = detector.input("images")
    with torch.no_grad():
        features = ours.vision_encoder(images) if has_tower else detector.input("clip_vision_features")
        output = ours(images, clip_features=None if has_tower else features)
        first = ours(images[:1], clip_features=features[:1])
        prompt = ours.text_encoder()
        cosines = output.evidence_map[:1].flatten(1) * 2 - 1
    detector.compare("logits", output.logits, LOGITS)
    detector.compare("probs", output.evidence, LOGITS)
    detector.compare("logits_batch1_cached_text", first.logits, LOGITS)
    detector.compare("clip_scores_scaled", cosines * ours.text_alpha, **INNER)
    detector.compare("clip_text_pooled", prompt, **INNER)
    detector.compare("text_proj", ours.text_proj(prompt), **INNER)
    detector.compare("vision_proj", ours.vision_proj(features[:1]), **INNER)
    with torch.no_grad():
        last, _ = ours.backbone.forward_stages(images[:1])
    detector.compare("deepfake_feature_map", last, **INNER)
    detector.compare("deepfake_proj", ours.backbone_proj(last.mean(dim=(2, 3))), **INNER)
    labels = torch.from_numpy(detector.expected["labels"])
    loss = ours(images, clip_features=None if has_tower else features, labels=labels).loss
    detector.compare("ce_loss", loss, 1e-5)
    loss.backward()
    compare_gradients(detector, ours)


def compare_gradients(fixture: Fixture, ours: Any) -> None:
    """Compare the gradient norms of what both train; the published text transformer is trained by accident."""
    rules = {move["target"]: move["source"] for move in report(ours, fixture)}
    norms = {rules[n]: float(p.grad.norm()) for n, p in ours.named_parameters() if p.grad is not None and n in rules}
    noise = set(fixture.manifest.get("grad_noise_params", {}).get("keys", ()))
    wanted = {k: v for k, v in fixture.manifest["grad_norms_eval_mode"].items() if k in norms and k not in noise}
    assert len(wanted) > 300
    pairs = np.array([(norms[k], v) for k, v in wanted.items()])
    sure = pairs[:, 1] > 1e-6
    fixture.close("gradient norms / published", pairs[sure, 0] / pairs[sure, 1], np.ones(sure.sum()), 1e-2)


def report(ours: Any, fixture: Fixture) -> list[dict[str, str]]:
    from llava.detectors.m2f2det_published import detector_plan

    shapes = {name: tuple(tensor.shape) for name, tensor in fixture.weights.items()}
    return [{"source": m.source, "target": m.target} for m in detector_plan(shapes, ours.config).moves if m.target]


def test_the_detector_of_stage_1_with_its_constant_bridge(stage_1: Fixture, tmp_path: Path) -> None:
    weights = {f"module.{name}": tensor for name, tensor in stage_1.weights.items()}
    ours = convert_detector(stage_1, tmp_path, {"epoch": 1, "model_state_dict": weights})
    assert ours.config.fusion == "none", "the bridge is folded"
    stage_1.compare("bridge_constant", bridge_constant(stage_1.weights), 1e-5)
    pictures = [stage_1.image(entry) for entry in stage_1.manifest["inputs"].values()]
    seen = torch.stack([stage_1_pixels(ours, picture) for picture in pictures])
    with torch.no_grad():
        stage_1.compare("logits", ours(seen).logits, LOGITS)
        for i in range(len(pictures)):
            stage_1.compare(f"vision_proj.{i}", ours.vision_proj(ours.vision_encoder(seen[i : i + 1])), **INNER)
            last, stages = ours.backbone.forward_stages(seen[i : i + 1])
            stage_1.compare(f"deepfake_proj.{i}", ours.backbone_proj(last.mean(dim=(2, 3))), **INNER)
            for layer, stage in zip((4, 5, 6), stages, strict=True):
                stage_1.compare(f"features_{layer}.{i}", stage, **INNER)
    both = torch.stack([stage_1_pixels(ours, p) for p in (pictures[0], pictures[0][:, ::-1].copy())])
    output = ours(both, labels=torch.tensor([0, 1]))
    stage_1.compare("logits_batch2_flip", output.logits, LOGITS)
    stage_1.compare("ce_loss_batch2_flip", output.loss, 1e-5)
    output.loss.backward()
    compare_gradients(stage_1, ours)
    stage_1.compare("grad.vision_proj.0.weight", ours.vision_proj.linear.weight.grad, 1e-6, rtol=1e-3)
    stage_1.compare("grad.deepfake_proj.0.weight", ours.backbone_proj.linear.weight.grad, 1e-6, rtol=1e-3)


def stage_1_pixels(detector: Any, picture: np.ndarray) -> Tensor:
    from llava.data.dataset import to_tensor

    return to_tensor(picture, detector.inputs["pixel_values"])


# ---- the explainer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Convert and load the explainer of a fixture, once."""
    cache: dict[str, Any] = {}

    def get(fixture: Fixture) -> tuple[Any, ExplainerProcessor, Path]:
        if fixture.name not in cache:
            cache.clear()
            folder = tmp_path_factory.mktemp(fixture.name)
            settings = fixture.manifest.get("llm_config") or fixture.manifest["config_after_train_setup"]
            PublishedFolder(fixture.publish(folder / "published", settings)).write(folder / "ours")
            model = load_model(folder / "ours")
            cache[fixture.name] = (model, load_processor(folder / "ours", model), folder / "ours")
        return cache[fixture.name]

    return get


def pixels(processor: ExplainerProcessor, pictures: list[np.ndarray]) -> dict[str, Any]:
    """Prepare pictures; those of the vision tower pass float16 once, as in the published code."""
    rows = [{"input_ids": [0], **processor.pixels(picture)} for picture in pictures]
    batch = processor.collate(rows)
    batch["pixel_values"] = batch["pixel_values"].half().float()
    return {name: batch[name] for name in ("pixel_values", "detector_inputs")}


def expand(
    config: ForgeryLlavaConfig, ids: np.ndarray, labels: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """Give each published tag as many places as it has tokens; labels there are -100."""
    long_ids, long_labels = [], []
    for i, token in enumerate(ids.tolist()):
        count = config.image_tokens if token == IMAGE else 1
        new = {IMAGE: config.image_token_id, EVIDENCE: config.deepfake_token_index}.get(token, token)
        long_ids += [new] * count
        long_labels += [-100 if labels is None or token < 0 else int(labels[i])] * count
    return long_ids, long_labels


def test_the_explainer(llm: Fixture, opened: Any) -> None:
    model, processor, _ = opened(llm)
    pictures = [llm.image(entry) for entry in llm.manifest["images"]]
    ids = []
    for i, (prompt, picture) in enumerate(zip(llm.manifest["prompts"], pictures, strict=True)):
        ids.append([processor.tokenizer.bos_token_id, *processor.text_ids(prompt)])
        wanted, _ = expand(model.config, llm.expected[f"p{i}.input_ids"][0])
        assert ids[i] == wanted
        one_prompt(llm, i, model, ids[i], pixels(processor, [picture]))
    short = llm.manifest["textonly_prompt"]
    plain = torch.tensor([[processor.tokenizer.bos_token_id, *processor.text_ids(short)]])
    assert plain.tolist() == llm.expected["textonly.input_ids"].tolist()
    with torch.no_grad():
        llm.compare("textonly.logits", model(input_ids=plain).logits, LOGITS)
    padded_batch(llm, model, processor, pictures)


def one_prompt(llm: Fixture, i: int, model: Any, ids: list[int], seen: dict[str, Any]) -> None:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        features = model.vision_features(seen["pixel_values"])
        encoded = model.encode(**seen)
        embedded = model.embed(tokens, encoded.image_features, encoded.evidence)
        logits = model(input_ids=tokens, image_features=encoded.image_features, evidence=encoded.evidence).logits[0]
        llm.compare(f"p{i}.clip_vision_features", features, **INNER)
        llm.compare(f"p{i}.mm_projector_out_incl_cls", model.model.multi_modal_projector(features), **INNER)
        llm.compare(f"p{i}.detector_logits", encoded.detection.logits, LOGITS)
        llm.compare(f"p{i}.deepfake_token", model.deepfake_projector(encoded.evidence), LOGITS)
        llm.compare(f"p{i}.inputs_embeds", embedded, **INNER)
        llm.compare(f"p{i}.logits", logits, LOGITS)
        llm.compare(f"p{i}.logits_last8", logits[-8:], LOGITS)
        llm.compare(f"p{i}.max_per_position", logits.max(dim=-1).values, LOGITS)
        llm.compare(f"p{i}.logsumexp_per_position", logits.logsumexp(dim=-1), LOGITS)
        options = {k: v for k, v in llm.manifest["generate"].items() if k != "note"}
        written = model.generate(input_ids=tokens, **seen, **options, pad_token_id=0)[0, len(ids) :]
    likeliest = torch.from_numpy(llm.expected[f"p{i}.argmax_per_position"])[:, None]
    llm.close(f"p{i}.below the likeliest", logits.max(dim=-1).values, logits.gather(1, likeliest)[:, 0], LOGITS)
    wanted = llm.expected[f"p{i}.generated_sequences"][0, 1:].tolist()  # without the old transformers' first BOS
    assert written.tolist() == wanted[: len(written)] and len(wanted) == len(written)
    llm.close(
        f"p{i}.greedy ids that differ", [0], [sum(a != b for a, b in zip(written.tolist(), wanted, strict=True))], 0
    )


def padded_batch(llm: Fixture, model: Any, processor: ExplainerProcessor, pictures: list[np.ndarray]) -> None:
    """Compare loss and logits of a padded batch, padding left out."""
    seen = pixels(processor, pictures)
    rows = []
    for ids, labels in zip(llm.expected["batch.input_ids"], llm.expected["batch.labels_in"], strict=True):
        long_ids, long_labels = expand(model.config, ids[ids != 0], labels[ids != 0])
        rows.append({"input_ids": long_ids, "labels": long_labels})
    batch = processor.collate(rows, side=llm.manifest["llm_config"].get("tokenizer_padding_side", "right"))
    with torch.no_grad():
        output = model(**batch, **seen)
    llm.compare("batch.loss", output.loss, 1e-5)
    kept = batch["attention_mask"][..., None].expand(output.logits.shape).bool()
    llm.compare("batch.logits", output.logits, LOGITS, kept=kept.numpy())


# ---- one training step --------------------------------------------------------------------------------------------


def as_published(model: Any, stage: int) -> None:
    """Undo two repairs: BatchNorm of the frozen detector on batch statistics, and lm_head trained in stage 2."""
    inner(model).detector.backbone.train()
    if stage == 2:
        inner(model).lm_head.requires_grad_(True)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_step_of_training(train: Fixture, mode: str, opened: Any, tmp_path: Path) -> None:
    _, _, folder = opened(train)
    arguments = parse(ExplainArguments, list(translate(words(train, folder, tmp_path))))
    model, processor = prepare(arguments)
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if ".lora_" in name:
            parameter.data.copy_(train.weights[foreign(name)])
    model.train()
    if mode == "train":
        as_published(model, train.manifest["stage"])
    batch = conversations(train, processor)
    output = model(**batch)
    output.loss.backward()
    kept = batch["attention_mask"][..., None].expand(output.logits.shape).bool().numpy()
    train.compare(f"{mode}.loss", output.loss, 1e-5)
    train.compare(f"{mode}.logits", output.logits, LOGITS, kept=kept)
    trained = {foreign(name): parameter for name, parameter in own.items() if parameter.requires_grad}
    wanted = train.manifest["results"][mode]["grad_norms"]
    assert trained.keys() == {name for name in wanted if mode == "train" or name != "lm_head.weight"}
    for name, parameter in trained.items():
        if f"{mode}.grad.{name}" in train.expected:
            scale = recorded_scale(train, mode, name)
            train.compare(f"{mode}.grad.{name}", parameter.grad * scale, 1e-6, rtol=1e-3)
    ratios = [float(parameter.grad.norm()) / wanted[name] for name, parameter in trained.items()]
    train.close(f"{mode}.gradient norms / published", ratios, np.ones(len(ratios)), 1e-2)
    if mode == "train":
        one_step(train, arguments, model, processor, trained)


def recorded_scale(train: Fixture, mode: str, name: str) -> float:
    """Say how a gradient was recorded: as it is, or (whole arrays of mode train share its memory) already clipped."""
    recorded, results = train.expected[f"{mode}.grad.{name}"], train.manifest["results"][mode]
    if f"{mode}.grad.{name}@idx" in train.expected:
        return 1.0
    clipped = min(1.0, 1.0 / results["total_grad_norm"])
    is_clipped = np.linalg.norm(recorded) < (1 + clipped) / 2 * results["grad_norms"][name]
    return clipped if is_clipped else 1.0


def one_step(train: Fixture, arguments: Any, model: Any, processor: Any, trained: dict[str, Tensor]) -> None:
    """Clip and step as the published optimiser does, with our trainer's groups."""
    rate = arguments.mm_projector_lr
    trainer = ExplainTrainer(base={}, projector_lr=rate, model=model, args=arguments, data_collator=processor.collate)
    optimiser = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trained.items()}
    settings = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}
    groups = train.manifest["optimizer_groups"]
    assert settings == {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), arguments.max_grad_norm)
    train.close(
        "train.total gradient norm / published",
        float(norm) / train.manifest["results"]["train"]["total_grad_norm"],
        1.0,
        1e-2,
    )
    optimiser.step()
    # Whole arrays may have been recorded in the parameters' own memory, which was put back before it was saved.
    compared = 0
    for name in (name for name in trained if f"after_adamw_step.{name}" in train.expected):
        before = train.weights[name].reshape(-1).numpy()
        index = train.expected.get(f"after_adamw_step.{name}@idx", np.arange(before.size))
        if not np.array_equal(train.expected[f"after_adamw_step.{name}"].reshape(-1), before[index]):
            train.compare(f"after_adamw_step.{name}", trained[name], 1e-6)
            compared += 1
    assert compared


def foreign(name: str) -> str:
    """Give the published name of one of our parameters, LoRA's included."""
    return RULES.foreign(name.removeprefix("base_model.model.").replace(".base_layer", ""))


def words(train: Fixture, folder: Path, out: Path) -> list[str]:
    """Complete the recorded command line with folders."""
    given = {"--model_name_or_path": str(folder), "--output_dir": str(out), "--data_path": "x", "--image_folder": "x"}
    flags: list[str] = []
    argv = train.manifest["argv"]
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        flags += [word, given.get(word, "x")] if word.startswith("--") and following.startswith("--") else [word]
    at = flags.index("--version") + 1
    return [*flags[:at], "published_train", *flags[at + 1 :]]


def conversations(train: Fixture, processor: ExplainerProcessor) -> dict[str, Any]:
    """Lay out, tokenise and collate the records ourselves; ids and masks must be the published ones.

    The published masking gives up on a second round with a toy vocabulary; its labels are taken for the numbers.
    """
    items = []
    pictures = [train.image(entry) for entry in train.manifest["images"]]
    for record, ids, labels in zip(
        train.manifest["records"], train.expected["input_ids"], train.expected["labels"], strict=True
    ):
        ours = processor.encode(turns_of(record["conversations"]), "published_train")
        length = int((ids != 0).sum())
        wanted = expand(processor.config, ids[:length], labels[:length])
        assert ours[0] == wanted[0]
        if any(label != -100 for label in wanted[1]):
            assert ours[1] == wanted[1]
        items.append({"input_ids": ours[0], "labels": wanted[1]})
    return processor.collate(items) | pixels(processor, pictures)


def turns_of(said: list[dict[str, str]]) -> list[Turn]:
    return [Turn(role="human" if one["from"] == "human" else "assistant", text=one["value"]) for one in said]


# ---- pictures, words, metrics -------------------------------------------------------------------------------------


def test_pictures(pictures: Fixture, golden: Path) -> None:
    compared = 0
    for item in pictures.manifest["items"]:
        picture = stored_picture(item, golden) if "file" in item else pictures.image(item)
        if picture is None:
            continue
        assert hashlib.sha256(picture.tobytes()).hexdigest() == item["decoded_rgb_sha256"]
        for ratio in ("pad", "square"):
            seen = processor_with(ratio, golden).pixels(picture)["pixel_values"]
            pictures.compare(f"{item['name']}.{ratio}.pixel_values", seen, 1e-6)
            spec = ForgeryLlavaConfig(detector={}, vision_config={"image_size": 336, "patch_size": 14}).vision_input
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
            whole = ((seen * std + mean) * 255).round().byte().permute(1, 2, 0).contiguous()
            assert hashlib.sha256(whole.numpy().tobytes()).hexdigest() == item[ratio]["sha256_uint8_after_resize_crop"]
        compared += 1
    assert compared, "no picture of this fixture is here"


def stored_picture(item: dict[str, Any], golden: Path) -> np.ndarray | None:
    """Read a picture that the fixture names; it lies in the DD-VQA images, if these are beside the checkout."""
    for folder in (*golden.resolve().parents, DEFAULT.parents[1]):
        for found in (folder / "data" / "ddvqa" / "images").rglob(item["file"]):
            if sha256_of(found) == item["sha256"]:
                return read_image(found)
    return None


def processor_with(ratio: str, golden: Path, tokens: Path | None = None) -> ExplainerProcessor:
    """Give a processor with the published tags' numbers and one place for each image."""
    config = ForgeryLlavaConfig(
        vision_config={"image_size": 336, "patch_size": 336}, detector={}, image_token_index=IMAGE
    )
    config.deepfake_token_index, config.image_aspect_ratio = EVIDENCE, ratio
    return ExplainerProcessor(read_tokenizer(tokens or next(golden.rglob("tokenizer.model")).parent), config, {})


def tokenizer_folder(golden: Path, folder: Path, legacy: bool | None, saves: int) -> Path:
    """Copy the fixtures' tokeniser, let its file say `legacy` (None: nothing), and read and save it some times."""
    shutil.copytree(next(golden.rglob("tokenizer.model")).parent, folder / "0")
    file = folder / "0" / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings = {k: v for k, v in settings.items() if k != "legacy"} | ({} if legacy is None else {"legacy": legacy})
    file.write_text(json.dumps(settings), encoding="utf-8")
    for number in range(saves):
        read_tokenizer(folder / str(number)).save_pretrained(folder / str(number + 1))
    return folder / str(saves)


@pytest.mark.parametrize("saves", [0, 1, 2])
@pytest.mark.parametrize("said", [True, None, False])
def test_tokens_and_training_masks(golden: Path, said: bool | None, saves: int, tmp_path: Path) -> None:
    """`legacy` is what the tokeniser's file says (the original takes none for true), also after our merges' saves."""
    legacy = said is not False
    cases = json.loads((golden / "tokenization.json").read_text(encoding="utf-8")).get(f"legacy_{legacy}")
    if cases is None:
        pytest.skip(f"tokenization.json has no cases with legacy={legacy}")
    processor = processor_with("square", golden, tokenizer_folder(golden, tmp_path, said, saves))
    for case in cases["hybrid"]:
        found = [processor.tokenizer.bos_token_id, *processor.text_ids(case["text"])]
        if "ids" in case:
            assert found == case["ids"], case["text"]
        else:  # repaired: the word alone is no tag
            assert IMAGE not in found and EVIDENCE not in found and len(found) > 1
    for case in cases["v1_training"]:
        ids, labels = processor.encode(turns_of(case["conversations"]), "published_train")
        assert ids == case["input_ids"], case["conversations"]
        if len(case["conversations"]) == 2 or legacy:
            assert labels == case["labels"]


def test_video_scores(golden: Path) -> None:
    """The published scoring, with its slip as a named switch, and the corrected one."""
    wanted = json.loads((golden / "metrics.json").read_text(encoding="utf-8"))
    found = published_scores(read_predictions(golden / wanted["csv"]))
    for way, name in (("published", "original_parse_auc_score"), ("corrected", "corrected")):
        assert found[way].auc == pytest.approx(wanted[name]["auc"], abs=1e-12)
        assert found[way].best_accuracy == pytest.approx(wanted[name]["best_accuracy"], abs=1e-12)
    assert found["published"].videos == wanted["original_parse_auc_score"]["videos_used"]
    assert found["corrected"].videos == wanted["n_videos"]


def test_verdicts(golden: Path) -> None:
    cases = json.loads((golden / "metrics.json").read_text(encoding="utf-8"))["verdict_cases"]
    assert cases
    for case in cases:
        assert parse_verdict_published(case["text"]) == case["original_pred"], case["text"]
