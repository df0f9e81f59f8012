"""What every detector must keep, by its name in the table; then M2F2-Det's own promises."""

import copy
import inspect
import math
import shutil
from dataclasses import replace

import clip_detectors
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage
from torch import nn

from llava.core.config import build, to_dict
from llava.core.types import REGIONS, Record
from llava.core.weights import load_strictly
from llava.detectors import DETECTORS
from llava.detectors.backbones import (
    BACKBONES,
    SMALL_DENSENETS,
    high_pass,
    let_see_residual,
    make_backbone,
    stage_channels,
)
from llava.detectors.base import create, is_there, load, load_uncalibrated
from llava.detectors.cnn import cell_loss
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.detectors.m2f2det_parts import COSINE_SCALE, PromptEncoder, RegionPool, VisionEncoder, load_clip

DETECTORS.add("toy", "toy_detector:ToyDetector")
DETECTORS.add("three_class", "toy_detector:ThreeClassDetector")
DETECTORS.add("fitted_toy", "toy_detector:FittedToy")
DETECTORS.add("two_toys", "toy_detector:TwoToys")
clip_detectors.add_to_table()
NAMES = list(DETECTORS)
FUSIONS = ("similarity", "bridge", "none")


def batch_for(detector, n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = {name: torch.randn(n, *spec.shape, generator=generator) for name, spec in detector.inputs.items()}
    return batch, torch.arange(n) % len(detector.classes)


def tiny(name, **changes):
    """Build a detector; parts that it can not do without are fitted on noise."""
    torch.manual_seed(0)
    detector_class = DETECTORS.get(name)
    detector = detector_class(replace(detector_class.Config.tiny(), **changes))
    for part in detector.fitted_parts():
        if not detector.fitted_parts()[part].is_fitted:
            fit_on_noise(detector, part)
    return detector


@torch.no_grad()
def fit_on_noise(detector, part, seed=7):
    inputs, targets = batch_for(detector, n=16, seed=seed)
    observed = detector.eval().observe(part, {name: tensor[:, None] for name, tensor in inputs.items()})
    detector.fitted_parts()[part].fit(observed, targets, [f"{n}" for n in range(len(targets))])


def has_weights_to_train(detector):
    return any(p.requires_grad for p in detector.parameters())


def m2f2(**changes):
    torch.manual_seed(0)
    return M2F2Det(replace(M2F2DetConfig.tiny(), **changes))


# ---- the contract -----------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        *NAMES,
        *(f"m2f2det/{fusion}" for fusion in FUSIONS[1:]),
        "m2f2det/trained_towers",
        "m2f2det/grounded",
        "ensemble/frozen",
    ]
)
def detector(request):
    name, _, variant = request.param.partition("/")
    if variant == "trained_towers":
        return m2f2(freeze_text=False, freeze_vision=False)
    if variant == "grounded":
        return m2f2(local_features=True, region_evidence=True, resize_size=48)
    if variant == "frozen":
        return tiny(name, freeze_members=True)
    return m2f2(fusion=variant) if variant else tiny(name)


def test_forward_gives_logits_loss_and_named_evidence(detector):
    inputs, labels = batch_for(detector)
    output = detector.train()(**inputs, labels=labels)
    assert output.logits.shape == (4, len(detector.classes))
    assert output.evidence.shape == (4, len(detector.evidence_names))
    assert output.evidence.min() >= 0 and output.evidence.max() <= 1
    assert output.loss.shape == () and torch.isfinite(output.loss)
    if output.evidence_map is not None:
        assert output.evidence_map.dim() == 3 and output.evidence_map.min() >= 0 and output.evidence_map.max() <= 1
    assert detector.eval()(**inputs).loss is None


def test_every_trainable_weight_learns_and_no_frozen_one_does(detector):
    inputs, labels = batch_for(detector)
    loss = detector.train()(**inputs, labels=labels, **told_of(detector, len(labels))).loss
    assert loss.requires_grad == has_weights_to_train(detector)
    if loss.requires_grad:
        loss.backward()
    without = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert not [n for n, p in detector.named_parameters() if not p.requires_grad and p.grad is not None]


def test_parameter_groups_cover_each_trainable_weight_once(detector):
    grouped = [id(p) for group in detector.parameter_groups(1e-4) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in detector.parameters() if p.requires_grad}


def test_saved_and_loaded_it_answers_the_same(detector, tmp_path):
    inputs, _ = batch_for(detector)
    detector.train()(**inputs)  # moves BatchNorm statistics away from their initial values
    detector.eval().save(tmp_path / "model")
    loaded = load(tmp_path / "model", expected=detector.name)
    assert not loaded.training and loaded.config == detector.config
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, detector(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("also_norms", [False, True], ids=["by_config", "by_name"])
def test_frozen_parts_stay_in_eval_mode(detector, also_norms):
    """Neither their weights nor their BatchNorm statistics move in a real step; everything else does."""
    with_norms = [name for name, child in detector.named_children() if any(map(is_norm, child.modules()))]
    if also_norms:
        detector.freeze(with_norms)
    named = with_norms if also_norms else []
    frozen = [*detector.frozen_modules(), *map(detector.get_submodule, named)]
    detector.train()
    assert all(not m.training for part in frozen for m in part.modules())
    assert all(not p.requires_grad for part in frozen for p in part.parameters())
    kept = {id(t) for part in frozen for t in (*part.parameters(), *part.buffers())}
    statistics = {id(b) for m in detector.modules() if is_norm(m) for b in m.buffers()}
    before = copy.deepcopy(dict(tensors_of(detector)))
    without_gradient = take_steps(detector)
    moved = {name for name, tensor in tensors_of(detector) if not torch.equal(before[name], tensor)}
    expected = {n for n, p in detector.named_parameters() if p.requires_grad} - without_gradient
    expected |= {n for n, b in detector.named_buffers() if id(b) in statistics - kept}
    assert moved == expected
    assert bool(moved & {name for name, _ in detector.named_parameters()}) == has_weights_to_train(detector)
    assert not {name for name, tensor in tensors_of(detector) if id(tensor) in kept} & moved
    has_drifted = bool(statistics & {id(b) for n, b in detector.named_buffers() if n in moved})
    assert has_drifted == bool(statistics - kept)
    detector.freeze(["*"])
    before = copy.deepcopy(detector.state_dict())
    inputs, labels = batch_for(detector)
    detector.train()(**inputs, labels=labels)
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())


def is_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def tensors_of(detector):
    return [*detector.named_parameters(), *detector.named_buffers()]


def take_steps(detector, steps=2):
    """Train a little; gives the names of weights whose gradient was zero throughout, which therefore stay."""
    still = {name for name, p in detector.named_parameters() if p.requires_grad}
    if not still:
        return still  # all that could learn is declared frozen
    optimiser = torch.optim.Adam(detector.parameter_groups(0.01))
    for seed in range(steps):
        inputs, labels = batch_for(detector, seed=seed)
        optimiser.zero_grad()
        detector(**inputs, labels=labels, **told_of(detector, len(labels))).loss.backward()
        still -= {name for name, p in detector.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    assert len(still) < 3
    return still


def told_of(detector, count):
    """Give what training tells a detector that is taught more than classes."""
    if not detector.taught:
        return {}
    masks = torch.zeros(count, detector.mask_grid, detector.mask_grid)
    masks[::2, 0] = 1.0
    return {"masks": masks, **{tag: torch.arange(count) % len(values) for tag, values in detector.taught.items()}}


def test_a_missing_input_leaves_no_verdict_and_is_told_from_the_others(detector):
    reasons = dict.fromkeys(detector.inputs, "it is a still image")
    assert detector.lacking({}) == "" and detector.lacking(reasons) == "it is a still image"
    for tensor in batch_for(detector)[0].values():
        tensor[1].view(-1)[-1] = torch.nan
        assert is_there(tensor).tolist() == [True, False, True, True]


def test_freeze_names_the_nearest_module(detector):
    name = max((name for name, _ in detector.named_children()), key=len)
    with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
        detector.freeze([name[:-2] + name[-1]])


def test_p_real_and_p_fake_are_evidence_and_say_what_the_logits_say(detector):
    inputs, _ = batch_for(detector.eval())
    with torch.no_grad():
        output = detector(**inputs)
    evidence = dict(zip(detector.evidence_names, output.evidence.unbind(dim=1), strict=True))
    assert tuple(detector.evidence_meanings) == detector.evidence_names
    assert len(set(detector.evidence_meanings.values())) == len(detector.evidence_names), "each is something else"
    torch.testing.assert_close(evidence["p_fake"], detector.p_fake(output.logits))
    torch.testing.assert_close(evidence["p_real"], 1 - evidence["p_fake"])
    scores = detector.class_scores(output.logits)
    assert scores.shape == output.logits.shape
    for number, name in enumerate(detector.classes):
        if f"p_{name}" in evidence:
            torch.testing.assert_close(evidence[f"p_{name}"], scores[:, number])


@pytest.mark.parametrize("p_fake", [0.0, 1e-6, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("exponent", [0.1, 1.0])
def test_told_evidence_never_contradicts_itself(detector, p_fake, exponent):
    inputs, _ = batch_for(detector.eval())
    with torch.no_grad():
        own = detector(**inputs).evidence
    nothing = detector.with_p_fake(own, torch.zeros(4))
    for start in (own, nothing):
        softer = detector.soften(start, torch.full((4,), exponent))
        told = dict(zip(detector.evidence_names, detector.with_p_fake(softer, torch.full((4,), p_fake)).T, strict=True))
        torch.testing.assert_close(told["p_fake"], torch.full((4,), p_fake))
        torch.testing.assert_close(told["p_real"], torch.full((4,), 1 - p_fake))
        kinds = [told[f"p_{name}"] for name in detector.classes if name not in ("real", "fake") and f"p_{name}" in told]
        assert all((kind >= 0).all() and (kind <= told["p_fake"] + 1e-6).all() for kind in kinds)
        if kinds:
            torch.testing.assert_close(torch.stack(kinds).sum(dim=0), told["p_fake"])


def test_other_p_fake_keeps_the_shares_and_softening_levels_them():
    detector = tiny("three_class")  # evidence: p_ai_generated, energy, p_real, p_fake, p_deepfake
    evidence = torch.tensor([[0.6, 0.3, 0.2, 0.8, 0.2]])
    told = detector.with_p_fake(evidence, torch.tensor([0.4]))
    torch.testing.assert_close(told, torch.tensor([[0.3, 0.3, 0.6, 0.4, 0.1]]))
    softer = detector.soften(evidence, torch.tensor([0.5]))
    torch.testing.assert_close(softer[0, 0] / softer[0, 4], torch.tensor(3.0).sqrt())
    torch.testing.assert_close(softer[0, [0, 4]].sum(), torch.tensor(0.8))


def record(label, class_name):
    return Record(id="a.png", label=label, class_name=class_name, video="a", group="a", where="a.png")


def test_the_class_of_a_record_is_the_target():
    detector = tiny("three_class")
    names = [(0, "original"), (0, "real"), (1, "deepfake"), (1, " AI_generated ")]
    assert [detector.target(record(*name)) for name in names] == [1, 1, 2, 0]
    with pytest.raises(
        ValueError, match=r"no class for 'FaceSwap' \(first: 'a.png'\); its classes are ai_generated, real"
    ):
        detector.target(record(1, "FaceSwap"))
    with pytest.raises(ValueError, match="no class for 'real'"):
        detector.target(record(1, "real"))
    with pytest.raises(ValueError, match="has no label; add it"):
        detector.target(record(None, "deepfake"))


def test_a_binary_detector_covers_every_kind_of_fake():
    detector = tiny("toy")
    assert [detector.target(record(*name)) for name in [(0, "original"), (1, "FaceSwap"), (1, "fake")]] == [0, 1, 1]


def test_forward_takes_its_inputs_and_labels_by_name_and_nothing_else(detector):
    inputs, labels = batch_for(detector)
    inspect.signature(detector.forward).bind(**inputs, labels=labels)
    assert not detector.accepts_loss_kwargs, "Trainer would leave the loss of accumulated batches undivided"
    for name in inputs:
        with pytest.raises(TypeError, match=name):
            detector(**{other: tensor for other, tensor in inputs.items() if other != name})
    with pytest.raises(TypeError, match="num_items_in_batch"):
        detector(**inputs, num_items_in_batch=4)


def test_eval_is_deterministic_and_samples_are_independent(detector):
    inputs, _ = batch_for(detector.eval())
    other, _ = batch_for(detector, seed=1)
    mixed = {name: torch.cat([inputs[name][:1], other[name][1:]]) for name in inputs}
    with torch.no_grad():
        first = detector(**inputs).logits
        torch.testing.assert_close(detector(**inputs).logits, first, rtol=0, atol=0)
        torch.testing.assert_close(detector(**mixed).logits[0], first[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.05)])
def test_other_precisions_agree(detector, dtype, tolerance):
    inputs, labels = batch_for(detector.eval())
    with torch.no_grad():
        expected = detector(**inputs).evidence
        moved = detector.to(dtype)
        output = moved(**{name: x.to(dtype) for name, x in inputs.items()}, labels=labels)
    assert torch.isfinite(output.loss)
    torch.testing.assert_close(output.evidence.float(), expected.float(), rtol=0, atol=tolerance)


def test_class_weights_enter_the_loss(detector):
    if detector.name == "radar":  # whose loss has more parts than that of the class
        weights = ("label_smoothing", "branch_weight", "orthogonal_weight", "deep_weight")
        detector.config = replace(detector.config, **dict.fromkeys(weights, 0.0))
    inputs, _ = batch_for(detector.eval())
    last = len(detector.classes) - 1
    labels = torch.tensor([0, last, last, last])
    weights = torch.linspace(3.0, 1.0, last + 1)
    with torch.no_grad():
        logits = detector(**inputs).logits
        detector.class_weights.copy_(weights)
        loss = detector(**inputs, labels=labels).loss
    nll = -logits.log_softmax(-1)[torch.arange(4), labels]
    expected = (nll * weights[labels]).sum() / 6
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_to_tell_noise_from_flat(name):
    detector = tiny(name).train()
    assert has_weights_to_train(detector), "tiny() must be able to learn"
    optimizer = torch.optim.Adam(detector.parameter_groups(1e-2))
    inputs, labels = batch_for(detector, n=16)
    inputs = {k: x * labels.view(-1, *[1] * (x.dim() - 1)) for k, x in inputs.items()}
    losses = []
    for _ in range(15 * (len(detector.classes) - 1)):
        loss = detector(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_yaml_and_misspelt_keys_are_named(name):
    config = DETECTORS.get(name).Config.tiny()
    assert build(type(config), to_dict(config)) == config
    field = next(iter(to_dict(config)))
    with pytest.raises(ValueError, match=rf"Unknown setting 'model.{field}x'.*Did you mean '{field}'"):
        create(name, {f"{field}x": 1})


def test_another_detectors_checkpoint_is_refused(tmp_path):
    tiny("toy").save(tmp_path)
    with pytest.raises(ValueError, match="holds detector 'toy', not detector 'm2f2det'"):
        load(tmp_path, expected="m2f2det")


def test_fitted_parts_are_saved_strictly_and_asked_for_by_name(detector, tmp_path):
    for name, part in detector.fitted_parts().items():
        before, sha256 = copy.deepcopy(part.state_dict()), detector.fingerprint()
        fit_on_noise(detector, name, seed=1)
        assert part.is_fitted and detector.fingerprint() != sha256
        detector.save(tmp_path / name)
        loaded = load(tmp_path / name).fitted_parts()[name].state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in part.state_dict().items())
        assert any(not torch.equal(before[key], tensor) for key, tensor in loaded.items())
        part.load_state_dict({key: torch.full_like(tensor, torch.nan) for key, tensor in loaded.items()})
        detector.save(tmp_path / name)
        with pytest.raises(
            ValueError, match=rf"no verdicts yet.*: {name} must be fitted first; add a phase `kind: fit`"
        ):
            load(tmp_path / name)
        assert list(load_uncalibrated(tmp_path / name).fitted_parts()) == list(detector.fitted_parts())
        part.load_state_dict(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_without_a_default_is_unfitted_at_first(name):
    fresh_one = DETECTORS.get(name)(DETECTORS.get(name).Config.tiny())
    assert all(part.is_fitted == part.has_default for part in fresh_one.fitted_parts().values())


def test_members_load_alone_and_no_other_is_taken_for_them(detector, tmp_path):
    detector.eval().save(tmp_path)
    own = load_file(tmp_path / "model.safetensors")
    assert not [name for name in own if name.startswith("members.")]
    for name, member in detector.members.items():
        folder = tmp_path / "members" / name
        alone = load(folder, expected=member.name)
        inputs, _ = batch_for(alone)
        with torch.no_grad():
            torch.testing.assert_close(alone(**inputs).logits, member(**inputs).logits, rtol=0, atol=0)
        weights = next(iter(alone.parameters()))
        with torch.no_grad():
            weights.view(-1)[0] += 1
        alone.save(folder)
        with pytest.raises(ValueError, match=rf"Member '{name}' .* is not the one that it was saved with"):
            load(tmp_path)
        shutil.rmtree(folder)
        with pytest.raises(FileNotFoundError, match=rf"lacks its member '{name}' .*; copy the whole folder again"):
            load(tmp_path)
        member.save(folder)
        load(tmp_path)


# ---- M2F2-Det ---------------------------------------------------------------------------------------------------


def test_learning_rates_are_the_published_ones():
    detector = m2f2()
    rates = {id(p): group["lr"] for group in detector.parameter_groups(0.5) for p in group["params"]}
    assert rates[id(detector.vision_alpha)] == 1e-3
    assert rates[id(detector.text_alpha)] == 3e-3
    assert rates[id(detector.text_encoder.prompt_tokens)] == rates[id(detector.classifier.weight)] == 0.5


def test_passed_features_replace_the_own_tower():
    detector = m2f2().eval()
    inputs, _ = batch_for(detector)
    with torch.no_grad():
        features = detector.vision_encoder(inputs["pixel_values"])
        expected = detector(**inputs).logits
        without = M2F2Det(replace(detector.config, own_vision=False)).eval()
        state = {k: v for k, v in detector.state_dict().items() if not k.startswith("vision_encoder.")}
        load_strictly(without, state, "test")
        torch.testing.assert_close(without(**inputs, clip_features=features).logits, expected)
    with pytest.raises(ValueError, match="pass clip_features"):
        without(**inputs)
    with pytest.raises(ValueError, match=r"expected \(4, 17, 24\), got \(4, 16, 24\)"):
        without(**inputs, clip_features=features[:, 1:])


def test_vision_tower_gives_transformers_second_last_hidden_state():
    tower = VisionEncoder(M2F2DetConfig.tiny().vision, frozen=True).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = tower.model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(tower(pixels), expected)


def test_prompt_encoder_is_transformers_text_model_on_embedded_tokens():
    encoder = PromptEncoder(M2F2DetConfig.tiny().text, tokens=3, frozen=True).eval()
    ids = torch.tensor([[4, 1, 6]])
    with torch.no_grad():
        encoder.prompt_tokens.copy_(encoder.model.embeddings.token_embedding(ids))
        encoder.model.eos_token_id = 6  # transformers pools at this token
        torch.testing.assert_close(encoder(), encoder.model(ids).pooler_output)


def test_prompt_vector_is_kept_in_eval_mode_only_and_dropped_by_every_change():
    encoder = PromptEncoder(M2F2DetConfig.tiny().text, tokens=3, frozen=True)
    holder = nn.ModuleDict({"inner": encoder})
    with torch.no_grad():
        encoder.train()
        encoder()
        assert encoder._cached is None
        encoder.eval()
        kept = encoder()
        assert encoder() is kept
        for change in (
            lambda: holder.load_state_dict({k: v + 1 for k, v in holder.state_dict().items()}),
            lambda: holder.double(),
            lambda: holder.train(),
        ):
            change()
            assert encoder._cached is None
            encoder.eval()
            kept = encoder()
    encoder.eval()
    assert encoder().requires_grad, "with gradients wanted, the prompt must stay in the graph"
    with torch.inference_mode():
        encoder.eval()
        encoder()
    assert not encoder._cached.is_inference()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_evidence_map_follows_the_patches(fusion):
    detector = m2f2(fusion=fusion).eval()
    inputs, _ = batch_for(detector)
    output = detector(**inputs)
    assert (output.evidence_map is None) == (fusion == "none")
    if output.evidence_map is not None:
        assert output.evidence_map.shape == (4, 4, 4)
        prompt = detector.text_proj(detector.text_encoder())[0]
        patch = detector.vision_proj(detector.vision_encoder(inputs["pixel_values"]))[2, 1 + 4 * 1 + 3]
        cosine = patch @ prompt / (patch.norm() * prompt.norm())
        torch.testing.assert_close(output.evidence_map[2, 1, 3], (cosine + 1) / 2)


def test_the_bridge_depends_on_image_features_and_prompt():
    detector = m2f2(fusion="bridge").eval()
    seen = []
    detector.bridge.register_forward_hook(lambda module, arguments, output: seen.append(output.detach()))
    inputs, _ = batch_for(detector)
    with torch.no_grad():
        features = detector.vision_encoder(inputs["pixel_values"])
        detector(**inputs, clip_features=features)
        detector(**inputs, clip_features=features.flip(0))
        detector(inputs["pixel_values"].flip(0), clip_features=features)
        detector.text_encoder.prompt_tokens.neg_()
        detector.eval()  # drops the kept prompt vector
        detector(**inputs, clip_features=features)
    plain, *others = seen
    assert plain.std(dim=0).max() > 0.01, "the published bridge was the same for every image"
    for other in others:
        assert (plain - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_say_their_channels(name):
    with torch.device("meta"):
        backbone, channels = make_backbone(name)
        features, stages = backbone.forward_stages(torch.zeros(1, 3, 64, 64))
    assert features.shape[1] == channels
    assert [m.shape[1] for m in stages] == stage_channels(backbone)
    if name == "efficientnet_b4":
        assert stage_channels(backbone) == [112, 160, 272]


def test_densenet_features_end_without_relu():
    backbone, _ = make_backbone(next(iter(SMALL_DENSENETS)))
    assert backbone.eval()(torch.randn(2, 3, 32, 32)).min() < 0


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'densenet121'"):
        make_backbone("densenet12")
    with pytest.raises(ValueError, match="no ImageNet weights"):
        make_backbone("densenet_tiny", pretrained=True)


def test_clip_weights_come_from_a_folder_strictly(tmp_path):
    source, target = m2f2(), M2F2Det(M2F2DetConfig.tiny())
    source.vision_encoder.model.save_pretrained(tmp_path / "vision")
    load_clip(str(tmp_path / "vision"), None, target.vision_encoder)
    for a, b in zip(source.vision_encoder.parameters(), target.vision_encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    larger = VisionEncoder(replace(target.config.vision, intermediate_size=96), frozen=True)
    with pytest.raises(ValueError, match="of another shape"):
        load_clip(str(tmp_path / "vision"), None, larger)
    with pytest.raises(FileNotFoundError, match="No model at"):
        load_clip("no_such_clip", None, target.vision_encoder)


# ---- the map: local features, regions, masks --------------------------------------------------------------------


def grounded(**changes):
    return m2f2(residual=True, local_features=True, region_evidence=True, map_weight=1.0, region_weight=1.0, **changes)


def test_regions_are_named_evidence_of_the_verdict():
    detector = grounded().eval()
    inputs, _ = batch_for(detector)
    output = detector(**inputs)
    assert detector.evidence_names == ("p_real", "p_fake", *REGIONS)
    assert detector.evidence_meanings["nose"] == "Map: nose"
    assert output.evidence.shape == (4, 7) and output.evidence.min() >= 0
    torch.testing.assert_close(output.evidence[:, 2:].sum(dim=1), torch.ones(4))
    assert M2F2Det.evidence_names == ("p_real", "p_fake"), "the class is left as it is"
    guest = detector.without_vision().eval()
    again = guest(**inputs, clip_features=detector.vision_encoder(inputs["pixel_values"]))
    torch.testing.assert_close(again.evidence, output.evidence)


def test_a_region_answers_to_its_own_cells():
    pool = RegionPool(shortest_edge=160, crop=160, grid=10)
    torch.testing.assert_close(pool.weights.sum(dim=1), torch.ones(5))
    calm = torch.full((1, 100), -0.4)
    for region in range(5):
        cell = int(pool.weights[region].argmax())
        alarmed = calm.clone()
        alarmed[0, cell] = 0.6
        rise = (pool(alarmed) - pool(calm))[0]
        assert int((pool.weights[:, cell] * (rise >= 0)).argmax()) == int(rise.argmax())
        assert rise[region] > 1, REGIONS[region]
    uniform = torch.full((1, 100), 0.2)
    torch.testing.assert_close(pool(uniform), torch.full((1, 5), 2.0), msg="equal cells give their own logit")


def test_regions_of_a_cropped_view_are_those_of_its_pixels():
    whole = RegionPool(shortest_edge=160, crop=160, grid=10)
    tight = RegionPool(shortest_edge=160, crop=96, grid=6)
    eyes = REGIONS.index("eyes")
    cells = whole.weights[eyes].reshape(10, 10)[2:8, 2:8]
    torch.testing.assert_close(tight.weights[eyes].reshape(6, 6), cells / cells.sum())


def test_region_loss_asks_for_what_was_forged():
    pool = RegionPool(shortest_edge=160, crop=160, grid=10).double()
    eyes = REGIONS.index("eyes")
    of_regions = torch.tensor([[0.0, 0.5, 1.0, -1.0, 2.0]] * 4, dtype=torch.float64, requires_grad=True)
    cells = pool.weights.argmax(dim=0).eq(eyes)  # those that lie in the eyes more than in any other region
    local, whole, real, unknown = torch.zeros(4, 10, 10, dtype=torch.float64)
    local.view(-1)[cells], whole[:], unknown[0, 0] = 1, 1, -1
    log_shares = of_regions[0].detach().log_softmax(dim=0)
    squares = pool.weights[:, cells].sum(dim=1) ** 2
    target = squares / squares.sum()
    assert target[eyes] > 0.8
    of_eyes = -float(target @ log_shares)
    assert pool.loss(of_regions[:1], local[None]).item() == pytest.approx(of_eyes)
    assert pool.loss(of_regions[:1], whole[None]).item() == pytest.approx(-log_shares.mean().item())
    masks = torch.stack([local, whole, real, unknown])
    loss = pool.loss(of_regions, masks)
    assert loss.item() == pytest.approx((of_eyes - log_shares.mean().item()) / 2)
    loss.backward()
    assert of_regions.grad[:2].abs().sum() > 0 and of_regions.grad[2:].abs().sum() == 0
    assert pool.loss(of_regions[2:], masks[2:]).item() == 0


def test_softer_evidence_keeps_its_order_and_the_verdict():
    detector = grounded().eval()
    evidence = torch.tensor([[0.3, 0.7, 0.95, 0.0125, 0.0125, 0.0125, 0.0125], [0.9, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]])
    softer = detector.soften(evidence, torch.tensor([0.2, 0.5]))
    torch.testing.assert_close(softer[:, :2], evidence[:, :2])
    torch.testing.assert_close(softer[:, 2:].sum(dim=1), torch.ones(2))
    torch.testing.assert_close(softer[0, 2:4], torch.tensor([0.373, 0.157]), atol=1e-3, rtol=0)
    torch.testing.assert_close(softer[1], evidence[1])
    torch.testing.assert_close(detector.soften(evidence, torch.ones(2)), evidence)
    plain = m2f2()
    torch.testing.assert_close(plain.soften(evidence[:, :2], torch.tensor([0.2, 0.5])), evidence[:, :2])


def test_the_cell_loss_is_the_weighted_cross_entropy_of_known_cells():
    similarity = torch.tensor([[0.1, -0.2, 0.3, 0.9]], dtype=torch.float64)
    masks = torch.tensor([[[1.0, 0.0], [0.5, -1.0]]], dtype=torch.float64)
    logits, target, weight = [1.0, -2.0, 3.0], [1.0, 0.0, 0.5], [4.0, 1.0, 2.5]
    p = [1 / (1 + math.exp(-x)) for x in logits]
    terms = [-w * (t * math.log(q) + (1 - t) * math.log(1 - q)) for w, t, q in zip(weight, target, p, strict=True)]
    assert cell_loss(COSINE_SCALE * similarity, masks).item() == pytest.approx(sum(terms) / sum(weight))
    assert cell_loss(similarity, torch.full((1, 2, 2), -1.0)).item() == 0


def test_masks_teach_the_map():
    detector = grounded(freeze_vision=False, freeze_text=False).train()
    assert detector.mask_grid == 4 and m2f2().mask_grid is None
    inputs, labels = batch_for(detector)
    masks = torch.zeros(4, 4, 4)
    masks[labels == 1, 1, 2] = 1.0
    optimizer = torch.optim.Adam(detector.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        output = detector(**inputs, labels=labels, masks=masks)
        assert output.loss.item() == pytest.approx(sum(part.item() for part in output.losses.values()), rel=1e-5)
        losses.append(output.losses["map"].item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    fakes = output.evidence_map[labels == 1].flatten(1).argmax(dim=1)
    assert set(fakes.tolist()) == {1 * 4 + 2}


def test_a_map_needs_cosines():
    with pytest.raises(ValueError, match="fusion: 'none' has no patch-prompt cosines"):
        m2f2(fusion="none", region_evidence=True)
    with pytest.raises(ValueError, match=r"region_weight: 1\.0 teaches the evidence of regions; set region_evidence"):
        m2f2(region_weight=1.0)
    with pytest.raises(ValueError, match="resize_size: 24 is below the crop of 32 pixels; give 32 or more"):
        m2f2(resize_size=24)


def test_the_residual_is_what_a_binomial_filter_takes_away():
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    smooth = np.stack([[ndimage.convolve(c, kernel, mode="mirror") for c in image] for image in images.numpy()])
    torch.testing.assert_close(high_pass(images), 4 * (images - torch.from_numpy(smooth)), atol=1e-5, rtol=1e-5)
    assert high_pass(torch.ones(1, 3, 8, 8)).abs().max() == 0


@pytest.mark.parametrize("name", ["densenet_micro", "efficientnet_b0", "densenet121"])
def test_a_backbone_that_sees_the_residual_keeps_what_it_had_learned(name):
    torch.manual_seed(0)
    plain, _ = make_backbone(name)
    seeing = copy.deepcopy(plain)
    let_see_residual(seeing)
    flat = torch.full((1, 3, 32, 32), 0.3)  # without detail there is no residual
    with torch.no_grad():
        torch.testing.assert_close(seeing.eval().forward_stages(flat)[0], plain.eval().forward_stages(flat)[0])
        detailed = torch.randn(1, 3, 32, 32)
        assert not torch.equal(seeing.forward_stages(detailed)[0], plain.forward_stages(detailed)[0])
