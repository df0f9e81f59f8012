"""Tensors equal transformers' processor; items are a function of (seed, epoch, index); the sampler survives Trainer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.core.types import InputSpec
from llava.data.dataset import DetectionDataset, EpochSampler, collate, mask_cells, to_tensor, view_tensors
from llava.data.sources import DataConfig, split_of
from llava.data.stills import CsvSource, FolderSource
from llava.ops.degrade import DegradeConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL = InputSpec(size=24, mean=MEAN, std=STD)


@pytest.mark.parametrize("size", [(336, 336), (224, 224), (257, 401), (641, 333), (335, 336), (97, 31), (336, 700)])
def test_tensor_equals_transformers_pil_processor(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    expected = processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    ours = to_tensor(image, InputSpec(size=336, mean=MEAN, std=STD, interpolation="bicubic"))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_a_crop_of_a_larger_resize_equals_transformers() -> None:
    image = np.random.default_rng(0).integers(0, 256, (301, 257, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 160, "width": 160})
    expected = processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    spec = InputSpec(size=160, resize_size=256, mean=MEAN, std=STD)
    torch.testing.assert_close(to_tensor(image, spec), expected, atol=1e-6, rtol=0)
    assert spec.seen == 0.625 and SMALL.seen == 1
    mask = np.zeros((301, 257), np.uint8)
    mask[:60] = 1  # above what is seen: 301 * (1 - 160 / 301 * 257 / 256) / 2 = 70 rows
    assert mask_cells(mask, spec, 10).max() == 0 and mask_cells(mask, SMALL, 4)[0].min() > 0
    with pytest.raises(ValueError, match="resize_size: 100 is below the crop of 160 pixels"):
        replace(spec, resize_size=100)


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (24, 24)])
def test_a_squashed_image_equals_torchvision_and_its_mask_goes_with_it(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    spec = replace(SMALL, fit="squash", interpolation="bilinear")
    expected = transforms.Compose(
        [transforms.ToPILImage(), transforms.Resize((24, 24)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )(image)
    torch.testing.assert_close(to_tensor(image, spec), expected, atol=1e-6, rtol=0)
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 4], mask[:, : size[1] // 4] = 1, 1  # the upper and left margin, which a crop would cut off
    cells = mask_cells(mask, spec, 4)
    assert cells[0].min() > 0.9 and cells[:, 0].min() > 0.9 and cells[1:, 1:].max() < 0.1
    assert spec.seen == 1
    with pytest.raises(ValueError, match="resize_size: 48 means nothing with fit 'squash'"):
        replace(spec, resize_size=48)


def test_interpolations_differ_and_a_plain_image_is_normalised_by_hand() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    kinds = [to_tensor(image, InputSpec(size=24, mean=MEAN, std=STD, interpolation=k)) for k in ("bilinear", "bicubic")]
    assert not torch.equal(*kinds)
    grey = to_tensor(np.full((30, 40, 3), 51, np.uint8), InputSpec(size=8, mean=(0.1,) * 3, std=(0.5,) * 3))
    torch.testing.assert_close(grey, torch.full((3, 8, 8), (0.2 - 0.1) / 0.5))


def test_views_are_in_the_declared_order() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    views = view_tensors(image, InputSpec(size=8, mean=MEAN, std=STD, views=("flip", "plain")))
    plain = to_tensor(image, SMALL.__class__(size=8, mean=MEAN, std=STD))
    assert views.shape == (2, 3, 8, 8)
    assert torch.equal(views[1], plain)
    assert torch.equal(views[0], plain.flip(-1))


@pytest.fixture
def dataset(class_folder: Path) -> DetectionDataset:
    source = FolderSource(DataConfig(path=str(class_folder)))
    return DetectionDataset(source, split_of(source, "train"), {"pixels": SMALL, "raw": SMALL}, DegradeConfig(), seed=3)


def test_items_hold_every_input_label_and_index(dataset: DetectionDataset) -> None:
    item = dataset[3]
    assert item.keys() == {"pixels", "raw", "labels", "index"}
    assert item["pixels"].shape == (3, 24, 24)
    assert (item["labels"].dtype, item["labels"].item(), item["index"].item()) == (torch.int64, 1, 3)
    batch = collate([dataset[0], dataset[15]])
    assert batch["pixels"].shape == (2, 3, 24, 24)
    assert batch["labels"].tolist() == [1, 0]
    assert dataset.targets == [1] * 8 + [0] * 8


def test_an_item_is_a_function_of_seed_epoch_and_index(dataset: DetectionDataset, class_folder: Path) -> None:
    assert torch.equal(dataset[1, 4]["pixels"], dataset[1, 4]["pixels"])
    assert torch.equal(dataset[5]["pixels"], dataset[0, 5]["pixels"])
    epochs = [dataset[e, 4]["pixels"] for e in range(12)]
    assert any(not torch.equal(epochs[0], other) for other in epochs[1:])
    cached = FolderSource(DataConfig(path=str(class_folder), cache=True))
    same = DetectionDataset(cached, split_of(cached, "train"), dataset.inputs, DegradeConfig(), seed=3)
    for _ in range(2):
        assert torch.equal(same[7, 4]["pixels"], dataset[7, 4]["pixels"])


def test_workers_give_what_one_process_gives(dataset: DetectionDataset) -> None:
    def batches(workers: int) -> torch.Tensor:
        sampler = EpochSampler(dataset.targets, seed=1, balanced=True)
        sampler.set_epoch(2)
        loader = DataLoader(dataset, 4, sampler=sampler, num_workers=workers, collate_fn=collate)
        return torch.cat([b["pixels"] for b in loader])

    assert torch.equal(batches(0), batches(2))


def test_views_without_degradation_and_unlabelled_records(class_folder: Path) -> None:
    source = FolderSource(DataConfig(path=str(class_folder)))
    spec = InputSpec(size=24, mean=MEAN, std=STD, views=("plain", "flip"))
    records = split_of(source, "val")
    views = DetectionDataset(source, records, {"pixels": spec}, with_views=True)
    assert collate([views[0], views[1]])["pixels"].shape == (2, 2, 3, 24, 24)
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"1 of 8 records have no label .first: val/fake/00.png"):
        DetectionDataset(source, [replace(records[0], label=None), *records[1:]], {"pixels": spec})
    with pytest.raises(ValueError, match="'labels' is taken"):
        DetectionDataset(source, records, {"labels": spec})


def drawn(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    pairs = list(sampler)
    assert {e for e, _ in pairs} == {epoch}
    return [i for _, i in pairs]


def test_balanced_epochs_draw_classes_equally_often() -> None:
    labels = [1] * 60 + [0] * 11
    sampler = EpochSampler(labels, seed=0, balanced=True)
    for epoch in range(3):
        indices = drawn(sampler, epoch)
        assert len(indices) == len(sampler) == 71
        assert Counter(labels[i] for i in indices) == {0: 36, 1: 35}
        times = Counter(indices)
        assert max(times[i] for i in range(60)) == 1  # majority: without replacement
        assert {times[i] for i in range(60, 71)} == {3, 4}  # minority: 36 = 3 * 11 + 3
    seen = {i for epoch in range(12) for i in drawn(sampler, epoch) if i < 60}
    assert seen == set(range(60))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    labels = [0, 1] * 20
    first, again, other = (EpochSampler(labels, seed=s, balanced=False) for s in (5, 5, 6))
    assert drawn(first, 3) == drawn(again, 3) != drawn(again, 4)
    assert drawn(first, 3) != drawn(other, 3)
    assert sorted(drawn(first, 0)) == list(range(40))
    assert drawn(EpochSampler(labels, seed=5, balanced=False, shuffle=False), 0) == list(range(40))
    with pytest.raises(ValueError, match="at least one"):
        EpochSampler([], seed=0, balanced=False)


class Pairs(torch.utils.data.Dataset):
    """Give the sampler's own pair back."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(item)


@pytest.mark.parametrize("processes", [1, 2])
def test_sampler_survives_accelerates_sharding(processes: int) -> None:
    """Every process sees its own part of the same epoch order, and the epoch advances with set_epoch."""
    sampler = EpochSampler([0, 1] * 6, seed=0, balanced=True)
    for epoch in range(2):
        expected = drawn(sampler, epoch)
        seen = []
        for rank in range(processes):
            own = EpochSampler([0, 1] * 6, seed=0, balanced=True)
            loader = prepare_data_loader(
                DataLoader(Pairs(), batch_size=2, sampler=own), num_processes=processes, process_index=rank
            )
            loader.set_epoch(epoch)
            pairs = torch.cat(list(loader))
            assert set(pairs[:, 0].tolist()) == {epoch}
            seen += pairs[:, 1].tolist()
        assert Counter(seen) == Counter(expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_epoch_goes_on_where_it_stopped(processes: int) -> None:
    """In the middle of an epoch and with two processes, accelerate cannot reach the sampler: set its epoch yourself."""
    sampler = EpochSampler([0, 1] * 6, seed=0, balanced=True)
    whole = prepare_data_loader(DataLoader(Pairs(), 2, sampler=sampler), num_processes=processes, process_index=0)
    whole.set_epoch(1)
    unbroken = torch.cat(list(whole))
    fresh = EpochSampler([0, 1] * 6, seed=0, balanced=True)
    loader = prepare_data_loader(DataLoader(Pairs(), 2, sampler=fresh), num_processes=processes, process_index=0)
    resumed = skip_first_batches(loader, 2)
    resumed.set_epoch(1)
    assert fresh.epoch == (1 if processes == 1 else 0)
    fresh.set_epoch(1)
    assert torch.equal(torch.cat(list(resumed)), unbroken[4:])


@pytest.fixture
def masked(tmp_path: Path) -> DetectionDataset:
    """Give a table of one real image, a fake with a mask on its lower right quarter, and a fake without a mask."""
    rng = np.random.default_rng(0)
    for name in ("real", "fake", "other"):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[24:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    rows = "real.png,real,\nfake.png,fake,mask.png\nother.png,fake,\n"
    (tmp_path / "table.csv").write_text(f"file,label,mask\n{rows}")
    source = CsvSource(DataConfig(source="csv", path=str(tmp_path / "table.csv"), masks=True))
    return DetectionDataset(source, source.records, {"pixels": SMALL}, mask_grid=4)


def test_masks_become_the_forged_part_of_each_cell(masked: DetectionDataset) -> None:
    real, fake, other = (masked[i]["masks"] for i in range(3))
    assert torch.equal(real, torch.zeros(4, 4))
    assert torch.equal(other, torch.full((4, 4), -1.0)), "what is unknown is not called real"
    # 48 x 64 is shrunk to 24 x 32 and loses 4 columns on each side, so the quarter stays a quarter.
    assert fake[2:, 2:].min() > 0.9 and fake[:2].max() < 0.1 and fake[2:, :2].max() < 0.1


def test_masks_are_flipped_with_the_image(masked: DetectionDataset) -> None:
    flipping = DegradeConfig(blur_probability=0, jpeg_probability=0, flip_probability=1)
    flipped = DetectionDataset(masked.source, masked.records, masked.inputs, flipping, mask_grid=4)
    torch.testing.assert_close(flipped[1]["masks"], masked[1]["masks"].flip(-1))
    torch.testing.assert_close(flipped[1]["pixels"], masked[1]["pixels"].flip(-1), atol=0.05, rtol=0)


def test_masks_that_are_missing_or_do_not_fit_are_refused_by_name(masked: DetectionDataset, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png: the mask is \(16, 16\), its image \(48, 64\)"):
        masked[1]
    (tmp_path / "mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"fake\.png: its mask 'mask\.png' does not exist"):
        masked[1]
    with pytest.raises(ValueError, match="masks: they belong to whole images"):
        DataConfig(path="x", masks=True, face_crop=True)


def test_pairs_put_each_real_beside_a_fake_made_from_it() -> None:
    labels = [0, 1, 1, 0, 1, 0, 1]
    origins = ["a", "a", "a", "b", "b", "c", ""]  # c has no fake, the last fake no real
    sampler = EpochSampler(labels, seed=0, balanced=False, origins=origins)
    assert len(sampler) == 4
    seen = Counter()
    for epoch in range(20):
        order = drawn(sampler, epoch)
        assert drawn(sampler, epoch) == order
        pairs = list(zip(order[::2], order[1::2], strict=True))
        assert sorted(real for real, _ in pairs) == [0, 3]
        assert all(labels[fake] == 1 and origins[fake] == origins[real] for real, fake in pairs)
        seen.update(fake for _, fake in pairs)
    assert seen.keys() == {1, 2, 4} and seen[4] == 20
    with pytest.raises(ValueError, match="No fake was made from a real record here"):
        EpochSampler([0, 1], seed=0, balanced=False, origins=["", ""])
