"""The published RADAR and ours give the same numbers: fixtures in the golden format (`--golden-radar`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import Fixture, find
from torch import Tensor, nn

from llava.core.types import NORMALISATIONS, InputSpec
from llava.data.dataset import to_tensor
from llava.detectors.base import load
from llava.detectors.published import Unseen, layout_of
from llava.detectors.radar import Answer, Radar, RadarConfig, alike, smoothed_loss
from llava.detectors.radar_branches import Found, Reasoning, Reasons
from llava.detectors.radar_published import PublishedRadar
from llava.ops.edges import sobel_magnitude
from llava.ops.spectrum import published_gate, published_spectrum

pytestmark = pytest.mark.e2e
ANSWERS, INNER, SOBEL, PIXELS = 5e-5, 1e-4, 1e-5, 1e-5
TERMS, TERMS_OF_NET, NORMS, STEP, STATISTICS = 1e-6, 1e-5, 1e-3, 1e-6, 1e-5
KINDS = {"forward", "train_step", "functions", "reasoning", "loss", "transforms"}
BRANCHES = {(True, True): "both", (True, False): "boundary", (False, True): "frequency"}
MEAN, STD = NORMALISATIONS["imagenet"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for kind in KINDS & set(metafunc.fixturenames):
        found = fixtures(metafunc.config, kind)
        metafunc.parametrize(kind, found, ids=lambda fixture: fixture.name, scope="module")


@cache
def fixtures(config: pytest.Config, kind: str) -> list[Fixture]:
    root: Path = config.getoption("golden_radar")
    return find(root, config, f"radar/{kind}") if root.is_dir() else []


def published(case: Fixture, run: dict[str, Any], folder: Path) -> Radar:
    """Save the weights as the published file with its settings, convert it, and load the result."""
    given = case.manifest["radar_config"]
    folder.mkdir()
    settings = {"reasoning_iterations": run.get("reasoning_iterations", 3), "fft_size": given["fft_size"]}
    settings |= {"reasoning_heads": given["reasoning_heads"], "use_badm": run["use_badm"], "use_aadm": run["use_aadm"]}
    names = {f"_orig_mod.{name}": tensor for name, tensor in case.weights.items()}
    torch.save({"model_state_dict": names, "epoch": 3, "config": settings}, folder / "best.pth")
    assert layout_of(folder / "best.pth") is PublishedRadar
    heads = given["encoder"]["num_heads"] if "encoder" in given else None
    file = PublishedRadar.open(folder / "best.pth", Unseen(heads=heads))
    file.write(folder / "ours")
    assert len(file.plan.moves) == len(case.weights) and not file.plan.unexpected
    return load(folder / "ours", expected="radar")


def pixels(case: Fixture) -> Tensor:
    """Give the fixture's pictures (B, 3, S, S) as the published network reads them."""
    names = [name for name in case.manifest["inputs"] if name.startswith("image")]
    pictures = [case.image(case.manifest["inputs"][name]) for name in names]
    for name, picture in zip(names, pictures, strict=True):
        assert hashlib.sha256(picture.tobytes()).hexdigest() == case.manifest["inputs"][name]["sha256_rgb"]
    spec = InputSpec(size=pictures[0].shape[0], mean=MEAN, std=STD, interpolation="unfiltered", fit="squash")
    return torch.stack([to_tensor(picture, spec) for picture in pictures])


def with_operators(detector: Radar, run: str) -> Radar:
    kind = "published_batches" if "published" in run else "published"
    detector.config = replace(detector.config, operators=kind)
    return detector


def outputs(detector: Radar, answer: Answer) -> dict[str, Tensor]:
    """Give the published dictionary; a branch that is off is zeros there."""
    assert answer.reasons is not None and answer.alpha is not None
    logit, zeros = answer.logit[:, None], torch.zeros(len(answer.logit), 1)
    rounds = answer.reasons.logits
    attention = torch.zeros(*rounds.shape, 2)
    attention[..., : len(detector.branches)] = answer.reasons.attention
    known = {"logit": logit, "external_logit": answer.external[:, None], "reasoning_logit": rounds[:, -1:]}
    known |= {"iteration_logits": rounds, "iteration_probs": rounds.sigmoid(), "attention_history": attention}
    known |= {"prob": logit.sigmoid(), "reasoning_prob": rounds[:, -1:].sigmoid()}
    known |= {"gating_alpha": answer.alpha.expand(len(logit), 1)}
    known["convergence_delta"] = answer.reasons.last_step
    width = detector.config.evidence_dim
    for theirs, ours in (("badm", "boundary"), ("aadm", "frequency")):
        off = Found(torch.zeros(len(logit), width), torch.zeros(len(logit)))
        found = answer.found.get(ours, off)
        score = found.logit[:, None].sigmoid() if ours in answer.found else zeros
        known |= {f"{theirs}_evidence": found.evidence, f"{theirs}_logit": found.logit[:, None]}
        known[f"{theirs}_score"] = score
    return known


def test_every_output_of_every_run(forward: Fixture, tmp_path: Path) -> None:
    seen = pixels(forward)
    compared = 0
    for name, run in forward.manifest["runs"].items():
        if not (run["use_badm"] or run["use_aadm"]):
            continue
        detector = with_operators(published(forward, run, tmp_path / name), name)
        with torch.no_grad():
            if name.startswith("cached"):
                answer = from_given_maps(detector, seen, forward)
            else:
                parts = [detector.answer(part) for part in seen.split(run["batch_size"])]
                answer = parts[0] if len(parts) == 1 else joined(parts)
        for output, value in outputs(detector, answer).items():
            if f"{name}.{output}" not in forward.expected:
                continue
            wanted = forward.expected[f"{name}.{output}"]
            value = value.mean() if wanted.ndim == 0 else value
            forward.compare(f"{name}.{output}", value, ANSWERS)
            compared += 1
    assert compared > 100


def from_given_maps(detector: Radar, seen: Tensor, case: Fixture) -> Answer:
    """Judge by maps from a file, which the published network takes in the place of its own."""
    edges, spectra = case.input("sobel_cached")[:, None], case.input("freq_cached")[:, None]
    size = detector.config.spectrum_size
    spectra = nn.functional.interpolate(spectra, size=(size, size), mode="bilinear", align_corners=False)
    return detector.judge(detector.encoder.forward_features(seen), edges, spectra[:, 0])


def joined(parts: list[Answer]) -> Answer:
    """Put answers about single images together."""
    assert all(part.reasons for part in parts)
    reasons = [part.reasons for part in parts if part.reasons]
    found = {
        name: Found(*(torch.cat([getattr(p.found[name], what) for p in parts]) for what in ("evidence", "logit")))
        for name in parts[0].found
    }
    rounds, attention = (torch.cat([getattr(r, what) for r in reasons]) for what in ("logits", "attention"))
    external = torch.cat([p.external for p in parts])
    return Answer(
        torch.cat([p.logit for p in parts]), found, external, Reasons(rounds, attention), parts[0].alpha, None
    )


def test_what_there_is_inside(forward: Fixture, tmp_path: Path) -> None:
    run = forward.manifest["runs"]["both_it3"]
    detector = published(forward, run, tmp_path / "both")
    seen = pixels(forward)
    with torch.no_grad():
        tokens = detector.encoder.forward_features(seen)
        edges, spectra = detector.maps(seen)
        assert edges is not None and spectra is not None
        pooled = torch.cat([tokens[:, 1:].mean(dim=1), tokens[:, 1:].amax(dim=1)], dim=1)
        inside = {
            "vit_tokens": tokens,
            "sobel_map": edges,
            "edge_features": detector.boundary.map_encoder(edges).mean(dim=(2, 3)),
            "patch_features": detector.boundary.token_mlp(pooled),
            "spectrum": spectra,
            "frequency_features": detector.frequency.map_encoder(spectra[:, None]).mean(dim=(2, 3)),
            "cls_features": detector.frequency.token_mlp(tokens[:, 0]),
        }
    for name, value in inside.items():
        shape = forward.manifest["outputs"][f"inner.{name}"]["shape"]
        forward.compare(f"inner.{name}", value.reshape(shape), INNER)


def test_without_any_branch_there_is_nothing_to_build(forward: Fixture) -> None:
    names = [name for name, run in forward.manifest["runs"].items() if not (run["use_badm"] or run["use_aadm"])]
    assert names
    for name in names:
        assert not forward.expected[f"{name}.logit"].any() and (forward.expected[f"{name}.prob"] == 0.5).all()
    with pytest.raises(ValueError, match="one of them must be on"):
        RadarConfig(boundary=False, frequency=False)


def test_one_step_of_training(train_step: Fixture, tmp_path: Path) -> None:
    labels, seen = torch.tensor(train_step.manifest["labels"]), pixels(train_step)
    for name, run in train_step.manifest["results"].items():
        detector = with_operators(published(train_step, run, tmp_path / name), run["spectra"])
        weights = "ablation_loss_config" if "only" in name else "loss_config"
        detector.config = replace(detector.config, **loss_settings(train_step, weights))
        for module in detector.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        detector.train("train" in run["model_mode"])
        answer = detector.answer(seen)
        losses = detector.losses(answer, labels)
        sum(losses.values(), torch.zeros(())).backward()
        compare_terms(train_step, name, run["loss"], losses, detector)
        compare_step(train_step, name, run, detector)


def loss_settings(case: Fixture, which: str) -> dict[str, float]:
    given = dict(case.manifest["loss_config"])
    if which == "ablation_loss_config":
        given |= {"lambda_branch": 0.0, "lambda_orthogonal": 0.0}
    names = {"lambda_branch": "branch_weight", "lambda_orthogonal": "orthogonal_weight"}
    names |= {"lambda_deep_supervision": "deep_weight", "orthogonality_margin": "orthogonal_margin"}
    assert given.pop("lambda_main") == 1
    return {names.get(name, name): value for name, value in given.items()}


def compare_terms(
    case: Fixture, name: str, wanted: dict[str, float], losses: dict[str, Tensor], detector: Radar
) -> None:
    """Compare the loss and its terms, which are unweighted there; a term of no weight can not be told."""
    total = sum(value.item() for value in losses.values())
    case.close(f"{name}.total", total, wanted["total"], TERMS_OF_NET)
    weights = {"main": 1.0, "branch": detector.config.branch_weight, "orthogonal": detector.config.orthogonal_weight}
    weights["deep"] = detector.config.deep_weight
    for ours, value in losses.items():
        theirs = "deep_supervision" if ours == "deep" else ours
        if weights[ours]:
            case.close(f"{name}.{theirs}", value.item() / weights[ours], wanted[theirs], TERMS_OF_NET)


def compare_step(case: Fixture, name: str, run: dict[str, Any], detector: Radar) -> None:
    """Compare gradient norms, clipped gradients, statistics of normalisation, and weights after one step."""
    state = dict(theirs(detector, list(detector.named_parameters())))
    noise = set(run["grad_noise_params"]) | set(run["no_grad"])
    norms = {key: value for key, value in run["grad_norms"].items() if key not in noise}
    assert set(norms) <= set(state) and len(norms) > 60
    for key, wanted in norms.items():
        gradient = state[key].grad
        assert gradient is not None
        case.close(f"{name}.norm of {key}", float(gradient.norm()), wanted, 1e-9, NORMS)
    total = nn.utils.clip_grad_norm_(detector.parameters(), case.manifest["optimiser"]["clip_norm"])
    case.close(f"{name}.total norm", float(total), run["total_grad_norm"], 0, NORMS)
    given = case.manifest["optimiser"]
    optimiser = torch.optim.AdamW(
        detector.parameters(), lr=given["lr_first_step"], betas=given["betas_first_step"], weight_decay=0.05
    )
    before = dict(theirs(detector, detector.named_buffers()))
    compare_named(case, f"{name}.clipped_grad.", {key: p.grad for key, p in state.items() if p.grad is not None}, 1e-6)
    compare_named(case, f"{name}.bn.", before, STATISTICS)
    optimiser.step()
    compare_named(case, f"{name}.after_step.", {key: p.detach() for key, p in state.items()}, STEP)


def theirs(detector: Radar, named: Any) -> Iterator[tuple[str, Any]]:
    """Give tensors by their published names."""
    used = "dual" if len(detector.branches) > 1 else "single"
    ways = {"boundary.map_encoder": "badm.edge_encoder", "boundary.token_mlp": "badm.patch_processor"}
    ways |= {"frequency.map_encoder": "aadm.freq_encoder", "frequency.token_mlp": "aadm.cls_processor"}
    ways |= {"boundary.": "badm.", "frequency.": "aadm.", "gate_logit": "_gating_logit"}
    ways |= {"reasoning.start.": f"reasoning.init_proj_{used}.", "external.": f"external_classifier_{used}."}
    for name, tensor in named:
        ours = next((way for way in ways if name.startswith(way)), "")
        yield ways.get(ours, "") + name.removeprefix(ours), tensor


def compare_named(case: Fixture, prefix: str, known: dict[str, Tensor], atol: float) -> None:
    keys = [key for key in case.expected if key.startswith(prefix) and not key.endswith("@idx")]
    for key in keys:
        name = key.removeprefix(prefix)
        if name in known:
            case.compare(key, known[name], atol)


def test_spectra_edges_and_the_gate(functions: Fixture) -> None:
    sizes, entries = functions.manifest["target_size"], functions.manifest["inputs"]
    for output in functions.manifest["outputs"]:
        if output.startswith("high_pass_gate"):
            side = int(output.rpartition("_")[2])
            functions.compare(output, published_gate(side, side, torch.ones(())), INNER)
            continue
        name, _, how = output.partition(".")
        given = functions_input(functions, entries, name)
        if name.startswith("sobel"):
            functions.compare(output, sobel_magnitude(given, "zero"), SOBEL)
        else:
            size = sizes.get(name, int(name.rpartition("_")[2]) if name.rpartition("_")[2].isdigit() else 112)
            functions.compare(output, published_spectrum(given, size, rolled=how == "published"), INNER)


def functions_input(case: Fixture, entries: dict[str, Any], output: str) -> Tensor:
    """Give what an output was made of: noise, the picture of a face, or the constant in its name."""
    if output.endswith("face"):
        spec = InputSpec(size=entries["face"]["size_wh"][0], mean=MEAN, std=STD)
        return to_tensor(case.image(entries["face"]), spec)[None]
    if output in entries:
        return case.input(output)
    kind, *_, last = output.split("_")
    side = 224 if kind == "spec" else int(last)
    if "zeros" in output or "ones" in output:
        return torch.full((1, 3, side, side), float("ones" in output))
    value = torch.zeros(1, 3, side, side)
    value[..., side // 2, side // 2] = 1e-10
    return value


def test_reasoning_alone(reasoning: Fixture) -> None:
    given = reasoning.manifest["erm"]
    both = torch.stack([reasoning.input("badm_evidence"), reasoning.input("aadm_evidence")], dim=1)
    compared = 0
    for output in {name.partition(".")[0] for name in reasoning.manifest["outputs"]}:
        kind, rounds = output.split("_it")
        sources = 2 if kind == "dual" else 1
        module = Reasoning(given["evidence_dim"], given["num_heads"], sources, int(rounds), 0.0).eval()
        ways = {f"init_proj_{kind}.": "start."}
        state = {
            next((new + name.removeprefix(old) for old, new in ways.items() if name.startswith(old)), name): tensor
            for name, tensor in reasoning.weights.items()
        }
        module.load_state_dict({name: state[name] for name in module.state_dict()})
        with torch.no_grad():
            reasons = module(both[:, :sources])
        attention = torch.zeros(*reasons.logits.shape, 2)
        attention[..., :sources] = reasons.attention
        known = {"final_logit": reasons.logits[:, -1:], "iteration_logits": reasons.logits}
        known |= {"iteration_probs": reasons.logits.sigmoid(), "attention_history": attention}
        known["convergence_delta"] = reasons.last_step.mean()
        for name, value in known.items():
            reasoning.compare(f"{output}.{name}", value, ANSWERS)
            compared += 1
    assert compared >= 5 * 8


def test_losses_alone(loss: Fixture) -> None:
    labels = torch.tensor(loss.manifest["labels"])
    names = ("logit", "badm_logit", "aadm_logit", "badm_evidence", "aadm_evidence")
    for output, run in loss.manifest["runs"].items():
        given = {name: loss.input(name) for name in names}
        given["iteration_logits"] = loss.input(f"iteration_logits_{run['iterations']}")
        given["aadm_evidence"][0], given["aadm_evidence"][1] = given["badm_evidence"][0], -2 * given["badm_evidence"][1]
        if run["badm_evidence_row3_zero"]:
            given["badm_evidence"][3] = 0
        for value in given.values():
            value.requires_grad_()
        config = {"lambda_main": 1.0, "lambda_branch": 0.3, "lambda_orthogonal": 0.1, "lambda_deep_supervision": 0.05}
        config |= {"label_smoothing": 0.1, "orthogonality_margin": 0.1} | run["loss_config"]
        terms = loss_terms(given, labels, run, config)
        weights = [config[f"lambda_{name}"] for name in ("main", "branch", "orthogonal", "deep_supervision")]
        total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        loss.compare(output, torch.stack([total, *terms]), TERMS)
        total.backward()
        for name, value in given.items():
            if f"{output}.grad.{name}" in loss.expected:
                loss.compare(f"{output}.grad.{name}", value.grad, TERMS)


def loss_terms(
    given: dict[str, Tensor], labels: Tensor, run: dict[str, Any], config: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give main, branch, orthogonal and deep, unweighted, by the detector's own losses with weights of 1."""
    found = {
        ours: Found(given[f"{theirs}_evidence"], given[f"{theirs}_logit"][:, 0])
        for theirs, ours in (("badm", "boundary"), ("aadm", "frequency"))
        if run[f"use_{theirs}"]
    }
    logits = given["iteration_logits"]
    answer = Answer(given["logit"][:, 0], found, given["logit"][:, 0], Reasons(logits, logits[..., None]), None, None)
    settings = {"label_smoothing": config["label_smoothing"], "orthogonal_margin": config["orthogonality_margin"]}
    settings |= dict.fromkeys(("branch_weight", "orthogonal_weight", "deep_weight"), 1.0)
    detector = Radar(replace(RadarConfig.tiny(), **settings))
    losses = detector.losses(answer, labels)
    nothing = torch.zeros(())
    return losses["main"], losses["branch"], losses.get("orthogonal", nothing), losses["deep"]


def test_validation_pixels(transforms: Fixture) -> None:
    spec = InputSpec(size=transforms.manifest["img_size"], mean=MEAN, std=STD, interpolation="unfiltered", fit="squash")
    for entry in transforms.manifest["items"]:
        picture = transforms.image(entry)
        if entry.get("mode", "").startswith("L"):  # the house reads RGB: a grey picture has its one channel thrice
            picture = np.repeat(picture[..., :1], 3, axis=2)
        transforms.compare(f"{entry['name']}.pixels", to_tensor(picture, spec), PIXELS)


def test_the_published_file_is_accounted_for(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    keys = Path(request.config.getoption("golden_radar")).parents[2] / "specs" / "keys_radar.json"
    if not keys.is_file():
        pytest.skip("the list of published tensors lies elsewhere")
    listed = json.loads(keys.read_text(encoding="utf-8"))
    tensors = {
        name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in listed["keys"].items()
    }
    torch.save({"model_state_dict": tensors, "epoch": 0, "auc": 0.9}, tmp_path / "best.pth")
    with pytest.raises(ValueError, match=r"do not show reasoning_iterations, use_badm, use_aadm; put the config\.yaml"):
        PublishedRadar.open(tmp_path / "best.pth", Unseen())
    with pytest.raises(ValueError, match="do not show use_badm, use_aadm"):
        PublishedRadar.open(tmp_path / "best.pth", Unseen(iterations=2))
    sets = {"both": "both", "badm_only": "boundary", "aadm_only": "frequency"}
    for theirs_name, branches in sets.items():
        file = PublishedRadar.open(tmp_path / "best.pth", Unseen(iterations=2, branches=branches))
        dropped = {move.source for move in file.plan.moves if move.action == "dropped"}
        never = listed["never_trained"][theirs_name]
        expected = {name for name in tensors if any(name.startswith(part.rstrip("*")) for part in never)}
        if branches != "both":
            expected |= {
                name for name in tensors if name.startswith(("reasoning.attention.q_", "reasoning.attention.k_"))
            }
        assert dropped == expected and len(file.plan.moves) == len(tensors) == 237
        assert (file.config.iterations, file.config.operators, file.config.normalisation) == (
            2,
            "published",
            "imagenet",
        )
    (tmp_path / "config.yaml").write_text("reasoning_iterations: 5\nsource_domain: x\n")
    assert PublishedRadar.open(tmp_path / "best.pth", Unseen()).config.iterations == 5


def test_evidence_that_points_the_same_way() -> None:
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    second = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert float(alike(first, second, 0.1)) == pytest.approx((0.9 + 0) / 2)
    assert float(alike(first, second * torch.tensor([[1.0], [0.0]]), 0.1)) == 0
    loss = smoothed_loss(torch.tensor([0.0, 2.0]), torch.tensor([0, 1]), 0.2, torch.ones(2))
    assert float(loss) == pytest.approx((0.693147 + 0.9 * 0.126928 + 0.1 * 2.126928) / 2, abs=1e-5)
