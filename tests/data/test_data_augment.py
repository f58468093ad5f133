"""Augmentations: the planned random numbers, the batch operations, and DALI's RandAugment and TrivialAugment."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from pipeline.config import RunConfig
from pipeline.config_data import Augment
from pipeline.data import batch_ops
from pipeline.data.augment import (
    MAGNITUDES,
    NUM_OPS,
    Augmentations,
    AutoAugment,
    Color,
    Erase,
    Mix,
    draw_counts,
    plan_augmentations,
)
from pipeline.data.auto_augment import suite
from pipeline.data.dali import Batch, Loader
from pipeline.data.dataset import open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.philox import CROP, draw
from pipeline.data.plan import EvalPlan, TrainPlan, micro_batch
from pipeline.derived import derive
from pipeline.errors import ConfigError

N, SIDE = 4000, 64
ALL_ON = Augment(
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    lighting=0.1,
    auto_augment="randaugment",
    erase_prob=0.25,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
    mix_prob=0.9,
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plan(config: Augment, n: int = N, epoch: int = 3, first: int = 0) -> Augmentations:
    """Plans samples `first` to `first + n`, whose positions equal their ids."""
    ids = np.arange(first, first + n)
    draws = draw(7, np.full(n, epoch), ids, {CROP: 1} | draw_counts(config))
    return plan_augmentations(config, 7, ids, draws, SIDE)


def distance(values: np.ndarray, cdf: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic: the largest distance between the sorted values' empirical CDF and `cdf`."""
    return float(np.abs(np.arange(1, len(values) + 1) / len(values) - cdf).max())


CRITICAL = 1.95 / np.sqrt(N)  # p = 0.001


def test_disabled_augmentations_are_not_planned():
    assert plan(Augment()) == Augmentations()
    assert plan(Augment(lighting=0.1)).color is not None


def test_random_numbers_depend_on_seed_epoch_and_sample_and_not_on_the_batch():
    whole = plan(ALL_ON, 40)
    for start, stop in ((0, 6), (6, 40)):
        part = plan(ALL_ON, stop - start, first=start)
        for name in ("color", "auto_augment", "erase", "mix"):
            for field, values in vars(getattr(part, name)).items():
                assert np.array_equal(values, getattr(getattr(whole, name), field)[start:stop]), (name, field)
    assert not np.array_equal(plan(ALL_ON, 40, epoch=4).color.brightness_B, whole.color.brightness_B)


def test_color_factors_are_uniform_and_lighting_has_the_papers_covariance():
    color = plan(Augment(brightness=0.4, contrast=0.2, saturation=0.1, lighting=0.1)).color
    for values, strength in ((color.brightness_B, 0.4), (color.contrast_B, 0.2), (color.saturation_B, 0.1)):
        ordered = np.sort(values)
        assert distance(ordered, (ordered - 1 + strength) / (2 * strength)) < CRITICAL
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = vectors @ np.diag((0.1 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ vectors.T
    assert np.cov(color.lighting_B3.T) == pytest.approx(expected, rel=0.1, abs=2e-6)


def test_mixup_lambda_follows_the_beta_distribution_and_partners_have_the_same():
    from scipy.stats import beta

    mix = plan(Augment(mixup_alpha=0.2), 2 * N).mix
    assert np.array_equal(mix.image_lam_B[::2], mix.image_lam_B[1::2])
    assert np.array_equal(mix.image_lam_B, mix.target_lam_B)
    ordered = np.sort(mix.image_lam_B[::2].astype(float))
    assert distance(ordered, beta(0.2, 0.2).cdf(ordered)) < CRITICAL


def test_cutmix_lambda_is_the_clipped_boxs_area():
    mix = plan(Augment(cutmix_alpha=1.0)).mix
    top, left, height, width = mix.boxes_B4.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= SIDE).all() and (left + width <= SIDE).all()
    assert (mix.image_lam_B == 1).all()
    assert mix.target_lam_B == pytest.approx(1 - height * width / SIDE**2)
    assert 0.2 < (1 - mix.target_lam_B).mean() < 0.45  # below 1/2, since boxes are cut off at the border


def test_mixup_and_cutmix_have_the_configured_probabilities():
    mix = plan(Augment(mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=0.6, mix_switch_prob=0.25)).mix
    cut = mix.boxes_B4[:, 2] > 0
    blended = mix.image_lam_B < 1
    assert not (cut & blended).any()
    assert (cut | blended).mean() == pytest.approx(0.6, abs=0.05)
    assert cut.mean() == pytest.approx(0.15, abs=0.04)


def test_random_erasing_respects_probability_area_ratio_and_bounds():
    erase = plan(Augment(erase_prob=0.3, erase_scale=(0.1, 0.2), erase_ratio=(0.5, 2.0))).erase
    top, left, height, width = erase.boxes_B4[erase.boxes_B4[:, 2] > 0].T
    assert len(top) / N == pytest.approx(0.3, abs=0.03)
    area = height * width / SIDE**2
    assert 0.09 < area.min() < 0.11 and 0.19 < area.max() < 0.21
    assert (height / width).min() > 0.45 and (height / width).max() < 2.2
    assert (top + height <= SIDE).all() and (left + width <= SIDE).all()
    assert len(set(erase.seeds_B.tolist())) > 0.99 * N


def test_operators_and_magnitudes_are_drawn_evenly():
    auto = plan(Augment(auto_augment="trivialaugment")).auto_augment
    assert auto.ops_BM.shape == (N, 1)
    for values, count in ((auto.ops_BM, NUM_OPS), (auto.bins_BM, MAGNITUDES), (auto.signs_BM, 2)):
        counts = np.bincount(values.ravel(), minlength=count)
        assert len(counts) == count
        assert counts == pytest.approx(N / count, rel=0.35)
    fixed = plan(Augment(auto_augment="randaugment", randaugment_num_ops=3, randaugment_magnitude=12)).auto_augment
    assert fixed.ops_BM.shape == (N, 3)
    assert (fixed.bins_BM == 12).all()


def jittered(x_CHW: torch.Tensor, color: Color, i: int, order: tuple[str, ...]) -> torch.Tensor:
    """fb.resnet.torch's jitter, step by step, on RGB in [0, 1] that is not clamped."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x_CHW.dtype)[:, None, None]
    for name in order:
        luma_1HW = (weights * x_CHW).sum(0, keepdim=True)
        factor = float(getattr(color, f"{name}_B")[i])
        other = {
            "brightness": 0 * x_CHW,
            "contrast": luma_1HW.mean() + 0 * x_CHW,
            "saturation": luma_1HW.expand(3, -1, -1),
        }
        x_CHW = factor * x_CHW + (1 - factor) * other[name]
    return x_CHW + torch.from_numpy(color.lighting_B3[i].astype(np.float64))[:, None, None]


def test_color_jitter_equals_its_steps_in_any_order():
    color = plan(Augment(brightness=0.4, contrast=0.4, saturation=0.4, lighting=0.1), 6).color
    x = torch.rand(6, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    got = batch_ops.color((x - mean) / std, color, MEAN, STD) * std + mean
    for order in itertools.permutations(("brightness", "contrast", "saturation")):
        for i in range(6):
            assert torch.allclose(got[i], jittered(x[i], color, i, order), atol=1e-6), order


def test_random_erasing_fills_only_the_box_and_noise_repeats():
    boxes = np.array([[2, 3, 4, 5], [0, 0, 0, 0]])
    erase = Erase(boxes, np.array([11, 12]))
    images = torch.full((2, 3, 16, 16), 7.0)
    got = batch_ops.erase(images.clone(), erase, "mean")
    assert (got[0, :, 2:6, 3:8] == 0).all()
    assert (got == 7).sum() == 2 * 3 * 256 - 3 * 20
    noisy = [batch_ops.erase(images.clone(), erase, "noise") for _ in range(2)]
    assert torch.equal(noisy[0], noisy[1])
    assert 0.5 < noisy[0][0, :, 2:6, 3:8].std() < 1.5
    assert (noisy[0][1] == 7).all()


def test_mixup_blends_and_cutmix_pastes_neighbors():
    images = torch.stack([torch.full((3, 4, 4), float(i)) for i in range(4)])
    mix = Mix(
        image_lam_B=np.array([0.75, 0.75, 1, 1], np.float32),
        target_lam_B=np.array([0.75, 0.75, 0.875, 0.875], np.float32),
        boxes_B4=np.array([[0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 1, 2], [1, 2, 1, 2]]),
    )
    got, targets = batch_ops.mix(images, torch.tensor([0, 1, 2, 0]), mix, 3)
    assert got[:2].amax(dim=(1, 2, 3)).tolist() == [0.25, 0.75]
    assert (got[2] == 3).sum() == 6 and (got[2, :, 1, 2:] == 3).all()
    assert (got[3] == 2).sum() == 6
    expected = [[0.75, 0.25, 0], [0.25, 0.75, 0], [0.125, 0, 0.875], [0.875, 0, 0.125]]
    assert targets.tolist() == expected


@pytest.fixture
def index(folders, tmp_path: Path) -> DatasetIndex:
    return open_splits(str(folders()), "train", "val", tmp_path / "cache")[0]


def loader(index: DatasetIndex, batch: int, augment: Augment) -> Loader:
    return Loader(
        index,
        device="cpu",
        device_id=None,
        threads=2,
        max_batch_size=batch,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        augment=augment,
    )


def batches(index: DatasetIndex, workers: int, device_batch: int, augment: Augment) -> list[Batch]:
    """Returns all ranks' micro-batches, 12 samples per step, in order of the positions."""
    plan = TrainPlan(3, index.widths_N, index.heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, augment=augment)
    grad_accum = 12 // (workers * device_batch)
    by_rank = []
    for rank in range(workers):
        with loader(index, device_batch, augment) as reader:
            positions = [
                micro_batch(step, micro, rank, workers, device_batch, grad_accum)
                for step in range(5)
                for micro in range(grad_accum)
            ]
            by_rank.append(list(reader.run(plan.batch(p, 32) for p in positions)))
    return [by_rank[rank][i] for i in range(5 * grad_accum) for rank in range(workers)]


@pytest.mark.parametrize("auto", ["none", "randaugment", "trivialaugment"])
def test_augmented_batches_are_the_same_at_any_world_size(index, auto):
    config = ALL_ON.model_copy(update={"auto_augment": auto, "randaugment_num_ops": 1, "erase_fill": "noise"})
    whole = batches(index, 1, 12, config)
    assert whole[0].targets.shape == (12, 3)
    assert torch.allclose(whole[0].targets.sum(dim=1), torch.ones(12))
    for workers, device_batch in ((2, 6),) if auto != "none" else ((2, 6), (3, 2)):
        parts = batches(index, workers, device_batch, config)
        for name in ("images_NCHW", "targets"):
            one, other = (torch.cat([getattr(b, name) for b in bs]) for bs in (whole, parts))
            # Not bit for bit: matrix products of other batch sizes round differently.
            assert torch.allclose(one, other, atol=1e-5), (name, workers)


def test_targets_are_labels_without_mixup_and_cutmix(index):
    (first, *_) = batches(index, 1, 12, Augment(brightness=0.4))
    assert torch.equal(first.targets, first.labels_N)


def dali_ops(index: DatasetIndex, kind: str, planned: list[tuple[str, int, int]], side: int = 32) -> torch.Tensor:
    """Returns an image of 0..255 after each operator (name, magnitude bin, sign)."""
    names = [op.name for op in suite(kind)]
    n = len(planned)
    columns = np.array([[names.index(name), magnitude, sign] for name, magnitude, sign in planned], np.int32)
    auto = AutoAugment(*(np.ascontiguousarray(columns[:, i : i + 1]) for i in range(3)))
    batch = EvalPlan(index.widths_N, index.heights_N, side, side).batch(np.full(n, 7))
    batch = dataclasses.replace(batch, augmentations=Augmentations(auto_augment=auto))
    with Loader(
        index,
        device="cpu",
        device_id=None,
        threads=2,
        max_batch_size=n,
        interpolation="bilinear",
        mean=(0, 0, 0),
        std=(1 / 255, 1 / 255, 1 / 255),
        augment=Augment(auto_augment=kind, randaugment_num_ops=1),
    ) as reader:
        return next(reader.run([batch])).images_NCHW


@pytest.mark.parametrize("kind", ["randaugment", "trivialaugment"])
def test_the_plan_chooses_dalis_operators(index, kind):
    names = [op.name for op in suite(kind)]
    assert len(names) == NUM_OPS
    plain, *changed = dali_ops(index, kind, [("identity", 0, 0), *((name, 25, 1) for name in names)])
    for name, image in zip(names, changed, strict=True):
        assert torch.equal(image, plain) == (name == "identity"), name


def test_operators_equal_torchvisions_counterparts(index):
    cases = [
        ("brightness", 30, 0, lambda x: tv.adjust_brightness(x, 1.99)),
        ("brightness", 30, 1, lambda x: tv.adjust_brightness(x, 0.01)),
        ("contrast", 30, 1, lambda x: tv.adjust_contrast(x, 0.01)),
        ("posterize", 30, 0, lambda x: tv.posterize(x, 2)),
        ("solarize", 15, 0, lambda x: tv.solarize(x, 128)),
        ("auto_contrast", 0, 0, tv.autocontrast),
        # a shift of 32 of 224 pixels is 4.57 in DALI, whole pixels in torchvision
        ("translate_x", 30, 0, lambda x: tv.affine(x, 0, [5, 0], 1, [0, 0], fill=128)),
    ]
    planned = [("identity", 0, 0), *((name, magnitude, sign) for name, magnitude, sign, _ in cases)]
    plain, *got = dali_ops(index, "trivialaugment", planned)
    for (name, _, _, theirs), image in zip(cases, got, strict=True):
        expected = theirs(plain.to(torch.uint8)).float()
        assert (image - expected).abs().mean() < (8 if name == "translate_x" else 1.5), name


def test_dalis_graph_has_no_random_operator(index):
    with loader(index, 8, Augment(auto_augment="randaugment")) as reader:
        graph = reader._pipeline.serialize().decode("latin-1").lower()
    assert "warpaffine" in graph
    assert "random__" not in graph and "coinflip" not in graph


def test_mixup_needs_even_micro_batches():
    config = RunConfig.model_validate(
        {"augment": {"mixup_alpha": 0.2}, "train": {"global_batch_size": 12, "epochs": 1}}
    )
    fixed = {"cpus_per_worker": 1, "device": "cpu", "train_samples": 100, "val_samples": 1, "num_classes": 3}
    assert derive(config, workers=2, **fixed).device_batch_size == 6
    with pytest.raises(ConfigError, match="Set train.global_batch_size to a multiple of 8"):
        derive(config, workers=4, **fixed)
    small = config.model_copy(update={"train": config.train.model_copy(update={"max_device_batch_size": 5})})
    assert derive(small, workers=1, **fixed).device_batch_size == 4
    with pytest.raises(ValueError, match="erase_scale=\\[0.5, 0.2\\] must be two numbers with 0 < low"):
        Augment(erase_scale=(0.5, 0.2))
