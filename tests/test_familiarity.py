"""A score counts only for pictures that look like those a detector knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_world import calibration_of

from llava.core.config import to_dict
from llava.core.types import UNFAMILIAR, VerdictLabel
from llava.detectors.base import create
from llava.detectors.cnn import FaceCnnConfig
from llava.detectors.familiarity import LEFT, STRANGE, Familiarity, first_look
from llava.pipeline.crops import Face
from llava.pipeline.verdict import UNKNOWN_LOOK, judge

PEOPLE, EACH = 40, 5


def fitted() -> tuple[Familiarity, torch.Tensor]:
    """Fit on people who differ among each other, with correlated features; gives the part and its mixing matrix."""
    torch.manual_seed(0)
    mixing = torch.eye(4) + 0.5 * torch.ones(4, 4)
    features = (torch.randn(PEOPLE, 1, 4) + 0.3 * torch.randn(PEOPLE, EACH, 4)).flatten(0, 1) @ mixing
    targets = (torch.arange(PEOPLE * EACH) % EACH > 0).long()
    log_odds = 4.0 * targets - 1.0 + torch.randn(PEOPLE * EACH)
    part = Familiarity(4)
    groups = [f"person {n // EACH}" for n in range(PEOPLE * EACH)]
    part.fit(torch.cat([features, log_odds[:, None]], dim=1), targets, groups)
    return part, mixing


def test_people_who_were_not_there_are_known_as_often_as_promised() -> None:
    part, mixing = fitted()
    others = torch.randn(4000, 4) * (1 + 0.3**2) ** 0.5 @ mixing
    known = (part.strangeness(others) <= 1).float().mean()
    assert 0.9 < known < 0.99
    assert (part.strangeness(others + 20) > STRANGE).all()


def test_beyond_the_limit_a_score_counts_for_less_and_then_for_nothing() -> None:
    part, _ = fitted()
    assert 0.5 < float(part.centre) < 1.5  # halfway between -1 and 3
    way = torch.tensor([[1.0, 0, 0, 0]])
    unit = way / part.strangeness(part.mean + way).sqrt()
    away = part.mean + unit * torch.tensor([0.5, 1.0, 1.25, STRANGE, 4.0]).sqrt()[:, None]
    found, gone = part(away, torch.full((5,), 5.0))
    share = (found - part.centre) / (5 - part.centre)
    assert share.tolist() == pytest.approx([1, 1, 0.5, LEFT, LEFT], abs=1e-3)
    assert gone.tolist() == pytest.approx([0, 0, 0.5, 1 - LEFT, 1 - LEFT], abs=1e-3)


def test_a_detector_says_nothing_of_strangers_only() -> None:
    torch.manual_seed(0)
    config = to_dict(FaceCnnConfig.tiny()) | {"knows_strangers": True}
    detector = create("cnn", config).eval()
    images = torch.rand(30, 3, 64, 64) * 0.4
    with torch.inference_mode():
        before = detector(images).logits
        observed = detector.observe("familiarity", {"pixel_values": images[:, None]})
        detector.familiarity.fit(observed, torch.arange(30) % 2, [f"{n}" for n in range(30)])
        after, strange = detector(images), detector(torch.randn(4, 3, 64, 64) * 9)
    assert observed.shape[1] == detector.familiarity.mean.numel() + 1
    known = detector.familiarity.strangeness(observed[:, :-1]) <= 1
    assert known.sum() > 20
    torch.testing.assert_close(after.logits[known], before[known], atol=1e-5, rtol=0)
    log_odds = strange.logits[:, 1] - strange.logits[:, 0]
    assert (log_odds - detector.familiarity.centre).abs().max() < LEFT * 50
    assert len(set(log_odds.tolist())) == 4, "strange pictures can still be put in order"
    assert (after.evidence[known, -1] == 0).all() and (strange.evidence[:, -1] == 1 - LEFT).all()
    assert detector.evidence_names[-1] == UNFAMILIAR
    assert (detector.evidence_for_words(strange)[:, -1] == 0).all(), "words have learned from no such picture"
    softer = detector.soften(strange.evidence, torch.full((4,), 0.5))
    assert softer.shape == strange.evidence.shape and (softer[:, -1] == 1 - LEFT).all()


@pytest.mark.parametrize(("raw", "gone", "is_told"), [(0.5, 1.0, True), (0.5, 0.4, False), (0.99, 1.0, False)])
def test_who_reads_an_uncertain_verdict_learns_that_the_picture_looks_strange(
    raw: float, gone: float, is_told: bool
) -> None:
    detector = create("cnn", to_dict(FaceCnnConfig.tiny()) | {"knows_strangers": True})
    detector.calibration = replace(calibration_of(detector.fingerprint()), real_below=0.2, fake_above=0.8)
    scores = {"p_fake": raw, "probabilities": {}, "evidence": {UNFAMILIAR: gone}}
    verdict = judge(detector, Face(image="a.png", pixels=None), scores)
    assert (verdict.label == VerdictLabel.UNCERTAIN) == (raw == 0.5)
    assert (verdict.reason == UNKNOWN_LOOK) == is_told


def test_who_trains_on_knows_every_picture_until_the_part_is_fitted_again() -> None:
    part, _ = fitted()
    far = part.mean[None] + 100
    assert part.strangeness(far).item() > STRANGE
    part.before_training()
    assert part.strangeness(far).item() == 0 and part.is_fitted


@pytest.mark.parametrize("knows", [True, False])
def test_a_detector_starts_from_one_without_the_part_and_the_other_way_round(knows: bool) -> None:
    with_part, without = (
        create("cnn", to_dict(FaceCnnConfig.tiny()) | {"knows_strangers": it}) for it in (True, False)
    )
    with_part.familiarity.centre.fill_(3)
    new, origin = (with_part, without) if knows else (without, with_part)
    new.take_over(origin, "the phase before")
    assert {name: t.tolist() for name, t in origin.state_dict().items() if "familiarity" not in name}.items() <= {
        name: t.tolist() for name, t in new.state_dict().items()
    }.items()
    assert with_part.familiarity.centre == 3


def test_a_fold_needs_people_and_both_classes() -> None:
    part = Familiarity(4)
    with pytest.raises(ValueError, match="10 groups with real and fake images, got 3"):
        part.fit(torch.randn(30, 5), torch.arange(30) % 2, [f"{n % 3}" for n in range(30)])


def test_the_look_is_mean_and_spread_of_each_channel() -> None:
    maps = torch.randn(2, 3, 8, 8)
    found = first_look(maps)
    assert found[:, :3] == pytest.approx(maps.mean(dim=(2, 3)))
    assert found[:, 3:].exp() - 0.05 == pytest.approx(maps.std(dim=(2, 3)), abs=1e-5)
