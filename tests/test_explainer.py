"""The explainer: prompts, masks, evidence, shared tower, batches, merges and their refusals."""

from __future__ import annotations

import copy
import json
import shutil
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_world import draw, make_base, train_detector
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llava.core.types import GenerationSettings, Turn
from llava.data.conversations import open_conversations
from llava.data.dataset import to_tensor
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.explainer.delta import add_lora, attach, fingerprint, inner, load_delta, save_delta
from llava.explainer.generation import Explainer, GumbelNoise, load_model, load_processor, processors
from llava.explainer.merge import max_difference, merge_delta, merge_detector, sample_logits
from llava.explainer.processing import ExplainerProcessor, read_tokenizer
from llava.explainer.prompts import LAYOUTS, lay_out, plain_text
from llava.train.explain import SOFTEST, ExplainDataset

QUESTION = [Turn(role="human", text="<image>\n<deepfake>\nDo the eyes look real or fake?")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a detector, a LLaVA base and the explainer merged from both."""
    folder = tmp_path_factory.mktemp("world")
    train_detector(folder / "detector", steps=12)
    make_base(folder / "base", folder / "detector")
    merge_detector(str(folder / "base"), str(folder / "detector"), folder / "start")
    return folder


@pytest.fixture
def explainer(world: Path) -> Explainer:
    model = load_model(world / "start")
    return Explainer(model, load_processor(world / "start", model))


def conversation(*texts: str) -> list[Turn]:
    return [Turn(role="human" if i % 2 == 0 else "assistant", text=t) for i, t in enumerate(texts)]


def test_layouts_are_the_published_ones() -> None:
    v1 = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    v1 += "detailed, and polite answers to the user's questions. USER: "
    v0 = "Assistant: A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    v0 += "helpful, detailed, and polite answers to the human's questions.###Human: "
    expected = {
        "v1": f"{v1}<image>\n<deepfake>\nWhy? ASSISTANT:",
        "published_train": f"{v1}<image>\n<deepfake>\n\n\nWhy? ASSISTANT:",
        "published_det": f"{v0}<image>\n <deepfake>\n Why? ###Assistant:",
        "published_exp": f"{v0}<image>\n<deepfake>\nWhy? ###Assistant:",
        "published_page": f"{v1}<image>\nWhy?\n\n<deepfake> ASSISTANT:",
    }
    assert expected.keys() == LAYOUTS.keys()
    for name, text in expected.items():
        assert plain_text(lay_out(conversation("<image>\n<deepfake>\nWhy?"), name)) == text


def test_layout_mistakes_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="Did you mean 'v1'"):
        lay_out(QUESTION, "v11")
    with pytest.raises(ValueError, match=r"Turn 0 .* by the human"):
        lay_out([Turn(role="assistant", text="Hello")])


def test_only_answers_are_learned(explainer: Explainer) -> None:
    turns = conversation("<image>\n<deepfake>\nReal?", "It is fake.", "Why is this deepfake fake?", "The nose.")
    ids, labels = explainer.processor.encode(turns)
    learned = [label for label in labels if label != -100]
    assert explainer.processor.tokenizer.decode(learned) == " It is fake.</s> The nose.</s>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert ids.count(explainer.model.config.image_token_id) == explainer.model.config.image_tokens
    assert ids.count(explainer.model.config.deepfake_token_index) == 1


@pytest.mark.parametrize("legacy", [True, False])
def test_a_second_question_is_tokenised_as_llama_s_legacy_says(world: Path, tmp_path: Path, legacy: bool) -> None:
    """Of our own making: a vocabulary of letters. Legacy puts a space before every text, else not behind an end."""
    llama = LlamaTokenizer(vocab=letters(), merges=[], legacy=legacy)
    llama.init_kwargs["legacy"] = legacy
    llama.save_pretrained(tmp_path)
    config = load_model(world / "start").config
    processor = ExplainerProcessor.from_pretrained(tmp_path, config, {})
    ids, labels = processor.encode(conversation("<image>\n<deepfake>\nWhy?", "So.", "And?", "No."), "published_train")
    end = processor.tokenizer.eos_token_id
    assert ids.count(end) == labels.count(end) == 2
    behind = processor.tokenizer.convert_ids_to_tokens(ids[ids.index(end) + 1 :])
    assert "".join(behind) == f"{'▁' if legacy else ''}USER:▁And?▁ASSISTANT:▁No.</s>"
    learned = processor.tokenizer.convert_ids_to_tokens([label for label in labels if label != -100])
    assert "".join(learned) == "▁So.</s>▁No.</s>"
    assert read_tokenizer(tmp_path).init_kwargs["legacy"] == legacy


def test_an_end_mark_that_is_normalised_is_counted_once(world: Path, tmp_path: Path) -> None:
    """Old LLaMA files mark `</s>` as normalised: behind the space that is put before a text it is found with it."""
    backend = Tokenizer(BPE(vocab=letters(), merges=[]))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(spaces)
    backend.add_special_tokens([AddedToken(text, normalized=True) for text in ("<s>", "</s>")])
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", legacy=True)
    processor = ExplainerProcessor(tokens, load_model(world / "start").config, {})
    ids, labels = processor.encode(conversation("Why?", "So.", "And?", "No."), "published_train")
    assert ids.count(tokens.eos_token_id) == labels.count(tokens.eos_token_id) == 2
    behind = tokens.convert_ids_to_tokens(ids[ids.index(tokens.eos_token_id) + 1 : -1])
    assert "".join(behind) == "▁USER:▁And?▁ASSISTANT:▁No."


def letters() -> dict[str, int]:
    """Give a vocabulary of LLaMA's special tokens, its space, and one letter a token."""
    return {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *string.printable[:94]])}


def test_a_conversation_that_is_cut_is_counted(
    explainer: Explainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = [("<image>\n<deepfake>\nReal?", "It is fake."), ("Why?", "The nose."), ("And the eyes?", "They look fine.")]
    turns = [{"from": who, "value": text} for pair in said for who, text in zip(("human", "gpt"), pair, strict=True)]
    rows = [{"id": f"{n}", "image": "a.png", "conversations": turns[: 2 * n]} for n in (1, 2, 3)]
    Image.fromarray(draw(1, 0)).save(tmp_path / "a.png")
    (tmp_path / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    source = open_conversations(str(tmp_path / "c.json"), "")
    whole = ExplainDataset(source, explainer.processor, 2048)
    lengths = [len(whole[i]["input_ids"]) for i in range(3)]
    decoded = [explainer.processor.decode([t for t in whole[i]["labels"] if t != -100]) for i in range(3)]
    assert decoded == ["It is fake.", "It is fake. The nose.", "It is fake. The nose. They look fine."]
    assert not caplog.records
    assert len(ExplainDataset(source, explainer.processor, lengths[1])[2]["labels"]) == lengths[1]
    assert f"1 of 3 conversations have more than {lengths[1]} tokens" in caplog.text


def test_evidence_is_spread_to_the_label_s_side_and_less_sure(explainer: Explainer, tmp_path: Path) -> None:
    rows = [
        {
            "id": f"{n}",
            "image": "a.png",
            "label": ("real", "fake")[n % 2],
            "conversations": [
                {"from": "human", "value": "<image>\n<deepfake>\nReal?"},
                {"from": "gpt", "value": "No."},
            ],
        }
        for n in range(40)
    ]
    Image.fromarray(draw(1, 0)).save(tmp_path / "a.png")
    (tmp_path / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset = ExplainDataset(open_conversations(str(tmp_path / "c.json"), ""), explainer.processor, 999, spread_seed=1)
    batch = explainer.processor.collate([dataset[n] for n in range(40)])
    p_fake, exponent = batch["spread"].unbind(dim=1)
    assert (p_fake[::2] < 0.5).all() and (p_fake[1::2] > 0.5).all() and p_fake[::2].std() > 0.1
    assert exponent.min() >= SOFTEST and exponent.max() <= 1 and exponent.std() > 0.15
    assert dataset[3]["spread"] == dataset[3]["spread"] != dataset[5]["spread"]
    told = torch.stack([1 - p_fake, p_fake], dim=1)  # this detector has no other evidence
    with torch.no_grad():
        assert torch.equal(
            explainer.model(**batch).logits, explainer.model(**batch | {"spread": None}, evidence=told).logits
        )


def test_a_detector_that_sees_a_tight_crop_shares_the_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"resize_size": 48, "local_features": True, "region_evidence": True}
    detector = M2F2Det(replace(M2F2DetConfig.tiny(), **settings)).eval()
    detector.save(tmp_path / "detector")
    make_base(tmp_path / "base", tmp_path / "detector")
    merge_detector(str(tmp_path / "base"), str(tmp_path / "detector"), tmp_path / "start")
    model = load_model(tmp_path / "start")
    explainer = Explainer(model, load_processor(tmp_path / "start", model))
    assert model.detector.shares_vision
    pictures = [draw(n % 2, n, size=64) for n in range(3)]
    spec = detector.inputs["pixel_values"]
    with torch.no_grad():
        alone = detector(torch.stack([to_tensor(picture, spec) for picture in pictures]))
    encoded = explainer.encode(pictures)
    torch.testing.assert_close(encoded.detection.logits, alone.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded.evidence, alone.evidence, atol=1e-5, rtol=1e-4)


def test_loss_is_the_mean_over_answer_tokens(explainer: Explainer) -> None:
    items = []
    for i, answer in enumerate(("Fake.", "The image is real and the nose is fine.")):
        ids, labels = explainer.processor.encode([*QUESTION, Turn(role="assistant", text=answer)])
        items.append({"input_ids": ids, "labels": labels, **explainer.processor.pixels(draw(i, i))})
    batch = explainer.processor.collate(items)
    with torch.no_grad():
        output = explainer.model(**batch)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(output.loss, expected, atol=1e-6)
    count = (batch["labels"] != -100).sum()
    summed = explainer.model(**batch, num_items_in_batch=2 * count).loss
    assert torch.allclose(summed * 2, expected, atol=1e-6)


def test_the_detector_inside_is_the_detector_of_stage_1(world: Path, explainer: Explainer) -> None:
    from llava.detectors.base import load

    alone = load(world / "detector")
    pictures = [draw(i % 2, i) for i in range(6)]
    encoded = explainer.encode(pictures)
    pixels = torch.stack([explainer.processor.pixels(p)["detector_inputs"]["pixel_values"] for p in pictures])
    with torch.no_grad():
        assert torch.allclose(encoded.evidence, alone(pixels[:, 0]).evidence, atol=1e-6)
    assert explainer.model.detector.shares_vision
    assert not [k for k in explainer.model.state_dict() if k.startswith("detector.vision_encoder")]


def test_views_are_averaged_inside_as_outside(world: Path, tmp_path: Path) -> None:
    from llava.detectors.base import load
    from llava.pipeline import Pipeline
    from llava.pipeline.settings import FaceSettings

    edit_config(shutil.copytree(world / "detector", tmp_path / "detector"), **two_views(world / "detector"))
    merge_detector(str(world / "base"), str(tmp_path / "detector"), tmp_path / "start")
    alone = load(tmp_path / "detector")
    picture = draw(1, 3)
    flipped = picture[:, ::-1]
    spec = alone.inputs["pixel_values"]
    with torch.no_grad():
        each = alone(torch.stack([to_tensor(picture, spec), to_tensor(flipped.copy(), spec)])).evidence[:, 1]
    whole = FaceSettings(face="off")
    inside = Pipeline.from_pretrained(tmp_path / "start", faces=whole).detect(picture)[0].p_fake
    outside = Pipeline.from_pretrained(tmp_path / "detector", faces=whole).detect(picture)[0].p_fake
    assert float(each[0] - each[1]) != 0
    assert inside == pytest.approx(float(each.mean()), abs=1e-6)
    assert outside == pytest.approx(inside, abs=1e-6)


def two_views(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    return {"config": config | {"views": ["plain", "flip"]}}


def test_encoding_first_or_on_the_way_is_the_same(explainer: Explainer) -> None:
    ids, _ = explainer.processor.encode(QUESTION)
    batch = explainer.processor.collate([{"input_ids": ids, **explainer.processor.pixels(draw(1, 3))}])
    encoded = explainer.encode([draw(1, 3)])
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        early = explainer.model(**text, image_features=encoded.image_features, evidence=encoded.evidence).logits
        late = explainer.model(**batch).logits
        other = explainer.model(**batch, evidence=1 - encoded.evidence).logits
    assert torch.allclose(early, late, atol=1e-5)
    assert not torch.allclose(other, late, atol=1e-4)


def test_a_tag_without_its_image_is_refused(explainer: Explainer) -> None:
    ids, _ = explainer.processor.encode(QUESTION)
    encoded = explainer.encode([draw(0, 0), draw(1, 1)])
    with pytest.raises(ValueError, match="room for 1 tokens, the images give 2"):
        explainer.model(input_ids=torch.tensor([ids]), evidence=encoded.evidence, image_features=encoded.image_features)


def test_batched_answers_equal_single_ones(explainer: Explainer) -> None:
    pictures = [draw(i % 2, i) for i in range(8)]
    question = "Tell me whether the eyes of this person really look like eyes to you"
    asked = [conversation(" ".join(question.split()[: 3 + i])) for i in range(8)]
    encoded = explainer.encode(pictures)
    settings = GenerationSettings(max_new_tokens=12)
    together = explainer.answer(encoded, asked, settings)
    alone = [explainer.answer(encoded.take([i]), [asked[i]], settings)[0] for i in range(8)]
    assert together == alone
    assert len(set(together)) > 1
    assert "".join(explainer.stream(encoded.take([2]), asked[2], settings)).strip() == alone[2]


def test_the_seed_alone_decides_what_is_sampled(explainer: Explainer) -> None:
    encoded = explainer.encode([draw(i % 2, i) for i in range(3)])

    def sampled(seed: int) -> list[str]:
        settings = GenerationSettings(max_new_tokens=12, temperature=1.5, seed=seed)
        return explainer.answer(encoded, [QUESTION] * 3, settings)

    before = torch.random.get_rng_state()
    first = sampled(0)
    assert sampled(0) == first
    assert any(sampled(seed) != first for seed in (1, 2, 3))
    assert torch.equal(torch.random.get_rng_state(), before)
    one = GenerationSettings(max_new_tokens=12, temperature=1.5)
    assert explainer.answer(encoded.take([1]), [QUESTION], one) == first[1:2]
    assert "".join(explainer.stream(encoded.take([1]), QUESTION, one)).strip() == first[1]
    greedy = explainer.answer(encoded, [QUESTION] * 3, GenerationSettings(max_new_tokens=12))
    assert greedy == explainer.answer(encoded, [QUESTION] * 3, GenerationSettings(max_new_tokens=12, seed=1))
    cold = GenerationSettings(max_new_tokens=12, temperature=1e-4)
    assert explainer.answer(encoded, [QUESTION] * 3, cold) == greedy


def test_noise_samples_the_softmax() -> None:
    scores = torch.tensor([[0.5, -1.0, 2.0, float("-inf")]])
    noise = GumbelNoise(0)
    drawn = torch.cat([noise(torch.zeros(1, 1), scores).argmax(-1) for _ in range(20_000)])
    found = torch.bincount(drawn, minlength=4) / len(drawn)
    # Four standard errors of a share of 20,000 draws.
    assert torch.allclose(found, scores[0].softmax(0), atol=4 * 0.5 / 20_000**0.5)
    assert found[3] == 0


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 is not usable; allowed: 0"):
        processors(GenerationSettings(temperature=-1))


def test_a_reader_that_leaves_ends_the_writing(explainer: Explainer) -> None:
    encoded = explainer.encode([draw(0, 1)])
    written = 0
    forward = explainer.model.forward

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal written
        written += 1
        return forward(*args, **kwargs)

    explainer.model.forward = counted
    pieces = explainer.stream(encoded, QUESTION, GenerationSettings(max_new_tokens=5000))
    next(pieces)
    pieces.close()
    assert written < 1000


def test_frozen_parts_stay_in_eval_mode(explainer: Explainer) -> None:
    """A step of an optimiser that was given everything moves the words, and not what is never trained."""
    model = explainer.model.train()
    frozen = {"detector": model.detector, "tower": model.model.vision_tower}
    before = {part: copy.deepcopy(module.state_dict()) for part, module in frozen.items()}
    words = {n: p.clone() for n, p in model.model.language_model.named_parameters()}
    adapter = {n: p.clone() for n, p in model.deepfake_projector.named_parameters()}
    model.encode(torch.randn(4, 3, 32, 32), {"pixel_values": torch.randn(4, 1, 3, 32, 32)})
    assert model.model.language_model.training
    assert not any(m.training for part in frozen.values() for m in part.modules())
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    ids, labels = explainer.processor.encode([*QUESTION, Turn(role="assistant", text="They look fake.")])
    item = {"input_ids": ids, "labels": labels, **explainer.processor.pixels(draw(1, 0))}
    model(**explainer.processor.collate([item] * 2)).loss.backward()
    optimiser.step()
    for part, module in frozen.items():
        assert all(torch.equal(v, before[part][k]) for k, v in module.state_dict().items()), part
    assert not any(torch.equal(p, words[n]) for n, p in model.model.language_model.named_parameters())
    assert not any(torch.equal(p, adapter[n]) for n, p in model.deepfake_projector.named_parameters())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_writes_words_and_keeps_the_detector_in_float32(
    world: Path, explainer: Explainer, dtype: str
) -> None:
    half = load_model(world / "start", dtype=dtype)
    assert {p.dtype for p in half.detector.parameters()} == {torch.float32}
    assert half.lm_head.weight.dtype != torch.float32
    words = Explainer(half, load_processor(world / "start", half))
    pictures = [draw(i % 2, i) for i in range(4)]
    found, exact = words.encode(pictures), explainer.encode(pictures)
    # The vision tower is in half precision, so the score moves, but hardly.
    assert torch.allclose(found.evidence, exact.evidence, atol=0.01)
    assert len(words.answer(found, [QUESTION] * 4, GenerationSettings(max_new_tokens=3))) == 4


def test_a_half_precision_base_keeps_its_precision_through_the_merges(world: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    shutil.copytree(world / "base", tmp_path / "base")
    LlavaForConditionalGeneration.from_pretrained(world / "base").half().save_pretrained(tmp_path / "base")
    certificate = merge_detector(str(tmp_path / "base"), str(world / "detector"), tmp_path / "start")
    assert certificate["max_delta_p_fake"] <= certificate["tolerance"] == 0.01
    (tmp_path / "w").mkdir()
    shutil.copytree(tmp_path / "start", tmp_path / "w" / "start")
    trained_delta(tmp_path / "w", tmp_path / "delta")
    merge_delta(str(tmp_path / "start"), str(tmp_path / "delta"), tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype="stored")
    assert merged.lm_head.weight.dtype == torch.float16
    assert merged.detector.classifier.weight.dtype == torch.float32


def test_nan_is_no_small_difference() -> None:
    assert not max_difference([torch.zeros(2), torch.tensor([float("nan")])], [torch.zeros(2), torch.zeros(1)]) <= 1e-4


def test_unsaved_buffers_of_a_detector_survive_loading(world: Path) -> None:
    detector = load_model(world / "start").detector
    assert torch.equal(detector.class_weights, torch.ones(2))
    positions = detector.text_encoder.model.embeddings.position_ids
    assert torch.equal(positions, torch.arange(positions.shape[-1]).expand_as(positions))


def test_a_prompt_without_its_image_is_refused(explainer: Explainer) -> None:
    ids, _ = explainer.processor.encode(QUESTION)
    with pytest.raises(ValueError, match="The prompt holds <image>, but no image was given"):
        explainer.model(input_ids=torch.tensor([ids]))


def test_lora_touches_the_language_model_only(explainer: Explainer) -> None:
    names = [n for n, p in add_lora(explainer.model, 4, 8, 0.0).named_parameters() if p.requires_grad]
    assert names
    assert all(".language_model.layers." in n for n in names)
    assert len(names) == 2 * 7 * explainer.model.config.text_config.num_hidden_layers


def trained_delta(world: Path, folder: Path, rank: int = 4) -> None:
    """Write a delta whose every tensor differs from the base."""
    model = load_model(world / "start").requires_grad_(False)
    wrapped = add_lora(model, rank, 8, 0.0)
    model.deepfake_projector.requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_delta(wrapped, folder, {"name": "start", "sha256": fingerprint(world / "start")})


def test_lora_merge_is_certified(world: Path, tmp_path: Path) -> None:
    trained_delta(world, tmp_path / "delta")
    certificate = merge_delta(str(world / "start"), str(tmp_path / "delta"), tmp_path / "merged")
    assert certificate["max_delta_logit"] <= 1e-4
    assert certificate["tensors_in_delta"] == 2 * 7 * 2 + 4
    assert certificate["tensors_changed"] == 7 * 2 + 4
    base, merged = load_model(world / "start"), load_model(tmp_path / "merged")
    processor = load_processor(tmp_path / "merged", merged)
    moved = max(
        float((a - b).abs().max())
        for a, b in zip(sample_logits(base, processor), sample_logits(merged, processor), strict=True)
    )
    assert moved > 1e-2


def test_a_delta_comes_back_exactly(world: Path, tmp_path: Path) -> None:
    trained_delta(world, tmp_path / "delta")
    restored = attach(load_model(world / "start"), tmp_path / "delta")
    inner(restored).deepfake_projector.requires_grad_(True)
    save_delta(restored, tmp_path / "again", {"name": "start", "sha256": ""})
    for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
        assert (tmp_path / "delta" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_damaged_delta_restores_nothing(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained_delta(world, tmp_path / "delta")
    path = tmp_path / "delta" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    with pytest.raises(ValueError, match="LoRA tensors"):
        attach(load_model(world / "start"), tmp_path / "delta")
    with pytest.raises(FileNotFoundError, match="is no delta"):
        load_delta(load_model(world / "start"), tmp_path)


def test_a_wrong_base_is_refused(world: Path, tmp_path: Path) -> None:
    trained_delta(world, tmp_path / "delta")
    merge_detector(str(world / "base"), str(world / "detector"), tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="is not the base of this delta"):
        merge_delta(str(tmp_path / "other"), str(tmp_path / "delta"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_delta_that_changes_nothing_is_refused(world: Path, tmp_path: Path) -> None:
    model = load_model(world / "start").requires_grad_(False)
    model.deepfake_projector.requires_grad_(True)
    save_delta(model, tmp_path / "delta", {"name": "start", "sha256": fingerprint(world / "start")})
    with pytest.raises(ValueError, match="nothing was restored"):
        merge_delta(str(world / "start"), str(tmp_path / "delta"), tmp_path / "merged")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_bases_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    edit_config(tmp_path / "base", mm_vision_select_feature="patch")
    with pytest.raises(ValueError, match="must be 'cls_patch', because the detector reads the CLS"):
        merge_detector(str(tmp_path / "base"), None, tmp_path / "out")
    edit_config(tmp_path / "base", mm_vision_select_feature="cls_patch", deepfake_model_path=None)
    with pytest.raises(ValueError, match="--deepfake-model-path"):
        merge_detector(str(tmp_path / "base"), None, tmp_path / "out")
    edit_config(tmp_path / "base", deepfake_model_name="vit3")
    with pytest.raises(ValueError, match="names the detector 'vit3'"):
        merge_detector(str(tmp_path / "base"), str(world / "detector"), tmp_path / "out")
    with pytest.raises(ValueError, match="stage 2 starts from a LLaVA"):
        merge_detector(str(world / "start"), str(world / "detector"), tmp_path / "out")


def test_a_detector_of_another_tower_is_refused(world: Path, tmp_path: Path) -> None:
    from llava.detectors.base import load

    stranger = load(world / "detector")
    stranger.vision_encoder.model.post_layernorm.weight.data += 0.1
    stranger.save(tmp_path / "stranger")
    with pytest.raises(ValueError, match="another vision tower"):
        merge_detector(str(world / "base"), str(tmp_path / "stranger"), tmp_path / "out")


def test_loading_something_else_says_what_it_is(world: Path) -> None:
    with pytest.raises(ValueError, match="'m2f2det', not a merged explainer"):
        load_model(world / "detector")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantisation_leaves_the_score_alone(world: Path, explainer: Explainer, kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra gpu) is not installed")
    quantised = load_model(world / "start", quantization=kind)
    assert "Linear" in type(quantised.model.language_model.layers[0].self_attn.q_proj).__name__
    assert type(quantised.model.language_model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    pictures = [draw(i % 2, i) for i in range(4)]
    found = Explainer(quantised, load_processor(world / "start", quantised)).encode(pictures).evidence
    assert torch.equal(found, explainer.encode(pictures).evidence)
