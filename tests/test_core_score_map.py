"""What a score means: likelihood ratio, posterior, verdict, and the file beside the weights."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava.core.score_map import Calibration, ScoreMap, read_calibration, write_calibration
from llava.core.types import Explanation, Verdict, VerdictLabel
from llava.core.weights import sha256_of_tensors
from llava.detectors.base import load, load_uncalibrated
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig

SCORES = np.array([0.0, 0.01, 0.3, 0.5, 0.8, 1.0])


def calibration(**changes):
    values = {
        "score_map": ScoreMap(method="temperature", scale=0.5),
        "real_below": 0.2,
        "fake_above": 0.9,
        "coverage": 0.9,
        "prior": 0.5,
        "data": "faces, split 'val'",
        "images": 40,
        "groups": 20,
        "class_groups": (20, 20),
        "weights_sha256": "",
    }
    return Calibration(**{**values, **changes})


ISOTONIC = ScoreMap(method="isotonic", knots=((0.0, 0.1), (0.4, 0.1), (0.6, 0.7), (1.0, 0.95)))


def test_temperature_divides_the_log_odds_and_keeps_one_half():
    odds = calibration().posterior(np.array([0.5, 0.8])) / (1 - calibration().posterior(np.array([0.5, 0.8])))
    assert odds == pytest.approx([1, math.sqrt(4)])  # 0.8 has odds 4; scale 0.5 is the square root


def test_isotonic_is_linear_between_its_knots_and_flat_outside():
    posterior = calibration(score_map=ISOTONIC).posterior(np.array([0.0, 0.2, 0.5, 0.6, 0.8, 1.0]))
    assert posterior == pytest.approx([0.1, 0.1, 0.4, 0.7, 0.825, 0.95])


@pytest.mark.parametrize("score_map", [ScoreMap(method="platt", scale=2, offset=-0.3), ISOTONIC])
@pytest.mark.parametrize("prior", [0.001, 0.1, 0.9])
def test_another_prior_is_bayes_rule(score_map, prior):
    found = calibration(score_map=score_map, prior=0.3)
    before = found.posterior(np.array([0.2, 0.7]))
    fakes, reals = before * prior / 0.3, (1 - before) * (1 - prior) / 0.7  # likelihoods up to a common factor, times
    assert found.posterior(np.array([0.2, 0.7]), prior) == pytest.approx(fakes / (fakes + reals))


def test_the_likelihood_ratio_is_posterior_odds_over_prior_odds():
    found = calibration(score_map=ISOTONIC, prior=0.2)
    for prior in (0.2, 0.6):
        posterior = found.posterior(0.8, prior)
        ratio = posterior / (1 - posterior) / (prior / (1 - prior))
        assert np.exp(found.score_map.log_likelihood_ratio(0.8)) == pytest.approx(ratio)


def test_scores_of_exactly_0_and_1_stay_finite():
    steep = ScoreMap(method="temperature", scale=50)
    assert np.exp(steep.log_likelihood_ratio(SCORES)[[0, -1]]) == pytest.approx([1e-6, 1e6], rel=1e-4)
    posterior = calibration(score_map=steep).posterior(SCORES)
    assert posterior[0] > 0 and posterior[-1] < 1


def test_the_verdict_needs_the_band_and_the_posterior():
    found = calibration()
    assert found.labels(np.array([0.19, 0.2, 0.5, 0.9, 0.91])) == ["REAL", *["UNCERTAIN"] * 3, "FAKE"]
    # odds 0.95 / 0.05 = 19, square root 4.36: with one fake in a hundred the posterior is 0.042
    assert found.posterior(0.95, 0.01) == pytest.approx(math.sqrt(19) / (math.sqrt(19) + 99))
    assert found.labels(np.array([0.1, 0.95]), 0.01) == ["REAL", "UNCERTAIN"]
    assert found.labels(np.array([0.1, 0.95]), 0.9) == ["UNCERTAIN", "FAKE"]


def test_without_a_band_the_posterior_decides():
    found = calibration(real_below=0.6, fake_above=0.3)
    assert found.labels(np.array([0.1, 0.4, 0.5, 0.59, 0.9])) == ["REAL", "REAL", "FAKE", "FAKE", "FAKE"]
    assert found.band() == (0.5, 0.5)
    assert found.labels(np.array([0.1, 0.59, 0.6, 0.9]), 0.01) == ["REAL", "REAL", "UNCERTAIN", "UNCERTAIN"]


@pytest.mark.parametrize("prior", [None, 0.02, 0.7])
@pytest.mark.parametrize("ends", [(0.2, 0.9), (0.6, 0.3), (0.7, 0.95), (0.1, 0.2)])
def test_the_band_in_posteriors_is_where_the_verdict_is_uncertain(prior, ends):
    found = calibration(real_below=ends[0], fake_above=ends[1])
    low, high = found.band(prior)
    raw = np.linspace(0.0037, 0.9963, 300)
    expected = ["REAL" if p < low else "FAKE" if p > high else "UNCERTAIN" for p in found.posterior(raw, prior)]
    assert found.labels(raw, prior) == expected


@pytest.mark.parametrize("prior", [0, 1, -0.1, 10])
def test_a_prior_is_a_share(prior):
    with pytest.raises(ValueError, match=rf"prior: {prior} is not usable; allowed: a share above 0 and below 1"):
        calibration().posterior(0.5, prior)


def test_impossible_maps_are_refused():
    with pytest.raises(ValueError, match="turns real and fake round"):
        ScoreMap(method="platt", scale=-1)
    for wrong in ({"method": "isotonic"}, {"method": "platt", "knots": ((0, 0), (1, 1))}):
        with pytest.raises(ValueError, match="only isotonic has them"):
            ScoreMap(**wrong)
    with pytest.raises(ValueError, match="in rising order"):
        ScoreMap(method="isotonic", knots=((0, 0.5), (1, 0.4)))


# ---- saved beside the weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("score_map", [ScoreMap(method="platt", scale=1 / 3, offset=-0.1), ISOTONIC])
def test_the_file_keeps_everything(tmp_path, score_map):
    before = calibration(score_map=score_map)
    write_calibration(tmp_path, before)
    assert read_calibration(tmp_path) == before
    assert read_calibration(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"score_mapp": 1}', "Unknown setting 'calibration.json.score_mapp'.*Did you mean 'score_map'"),
        ("{}", "Missing setting 'calibration.json.score_map'"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_calibration(tmp_path)


def test_a_detector_is_saved_and_loaded_with_its_calibration(tmp_path):
    detector = M2F2Det(M2F2DetConfig.tiny())
    detector.calibration = calibration(weights_sha256=detector.fingerprint())
    detector.save(tmp_path)
    assert load(tmp_path).calibration == detector.calibration
    detector.calibration = None
    detector.save(tmp_path)
    assert not (tmp_path / "calibration.json").exists() and load(tmp_path).calibration is None


def test_a_calibration_of_other_weights_is_refused(tmp_path):
    detector = M2F2Det(M2F2DetConfig.tiny())
    detector.calibration = calibration(weights_sha256=detector.fingerprint())
    with torch.no_grad():
        next(iter(detector.classifier.parameters())).add_(1e-6)
    detector.save(tmp_path)
    with pytest.raises(ValueError, match=r"calibration\.json' was fitted for other weights.*eval/calibrate\.py"):
        load(tmp_path)
    assert load_uncalibrated(tmp_path).calibration is None


def test_the_fingerprint_sees_every_tensor(tmp_path):
    detector = M2F2Det(M2F2DetConfig.tiny()).eval()
    own = detector.fingerprint()
    detector.save(tmp_path)
    assert load(tmp_path).fingerprint() == own
    assert M2F2Det(M2F2DetConfig.tiny()).fingerprint() != own
    for tensor in detector.state_dict().values():
        before = tensor.clone()
        tensor.add_(1)
        assert detector.fingerprint() != own
        tensor.copy_(before)
    assert detector.fingerprint() == own


def test_a_calibration_of_another_tower_is_refused(tmp_path):
    detector = M2F2Det(M2F2DetConfig.tiny())
    detector.calibration = calibration(weights_sha256=detector.fingerprint())
    detector.tower_tensors()["embeddings.class_embedding"].add_(1e-3)
    detector.save(tmp_path)
    with pytest.raises(ValueError, match=r"fitted for other weights.*score the validation split again"):
        load(tmp_path)


def test_a_detector_without_the_tower_it_needs_has_no_fingerprint_of_its_own():
    with pytest.raises(ValueError, match="computes its scores with a host's vision tower"):
        M2F2Det(M2F2DetConfig.tiny()).without_vision().fingerprint()


def test_the_hash_sees_names_types_shapes_and_values():
    base = {"a": torch.zeros(2, 3), "b": torch.tensor(1)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {**base, "a": torch.zeros(3, 2)},
        {**base, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**base, "b": torch.tensor(2)},
        {**base, "a": base["a"].double()},
    ]
    hashes = {sha256_of_tensors(tensors) for tensors in (base, *others)}
    assert len(hashes) == 6
    assert sha256_of_tensors(dict(reversed(base.items()))) == sha256_of_tensors(base)
    assert sha256_of_tensors({**base, "a": torch.zeros(3, 2).T}) == sha256_of_tensors(base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_hash_is_of_the_values_that_floats_of_16_bit_are_loaded_as(dtype):
    stored = {"a": torch.rand(5).to(dtype)}
    assert sha256_of_tensors(stored) == sha256_of_tensors({"a": stored["a"].float()})
    assert sha256_of_tensors(stored) != sha256_of_tensors({"a": stored["a"].float() + 1e-3})


# ---- said in words ----------------------------------------------------------------------------------------------


def verdict(p_fake, label="FAKE", **changes):
    return Verdict(label=VerdictLabel(label), p_fake=p_fake, probabilities={}, evidence={}, detector="toy", **changes)


@pytest.mark.parametrize(
    ("p_fake", "text"),
    [(0.8749, "87 % forged"), (0.9999, "over 99 % forged"), (1e-4, "under 1 % forged"), (0.01, "1 % forged")],
)
def test_a_calibrated_verdict_is_a_percentage_and_never_sure(p_fake, text):
    said = verdict(p_fake, calibration="calibrated on faces, n = 40", likelihood_ratio=2.0)
    assert str(said) == f"FAKE: {text} (calibrated on faces, n = 40)"


def test_a_bare_score_is_no_percentage():
    assert str(verdict(0.87)) == "FAKE: p_fake 0.870 (not calibrated)"
    assert verdict(None, "INCONCLUSIVE").score_text == "-"


def test_words_that_take_a_side_where_the_verdict_has_none_are_marked():
    answer = Explanation(verdict=verdict(0.5, "UNCERTAIN"), question="?", text="Fake.", text_verdict=1, agrees=None)
    assert answer.remark == "[The text says fake; the verdict is UNCERTAIN.]"
    assert replace(answer, text_verdict=None).remark == "[The text takes no side.]"
    assert json.loads(json.dumps(answer.to_dict()))["verdict"]["band"] is None
