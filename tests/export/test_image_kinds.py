"""Every image format gives the same pixels in every code path, or is rejected by name in all of them."""

import base64
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray
from PIL import Image

from pipeline.config_data import Augment
from pipeline.data import reading
from pipeline.data.augment import Augmentations, AutoAugment
from pipeline.data.auto_augment import suite
from pipeline.data.dali import Loader
from pipeline.data.dataset import open_split
from pipeline.data.folder_index import scan_images
from pipeline.data.images import NotAnImage, encode, ignore_pil_warnings
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, PlannedBatch, TrainPlan
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.parts import PrepareOptions, convert
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.stats import stats
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError, UserError
from pipeline.evaluation.samples import _thumbnail
from pipeline.export.open import open_model
from tests.kinds import HEIGHT, KINDS, REFUSED, UNKNOWN, WIDTH
from tests.models import write_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow's of its own type hints
    from pipeline.export.pyfunc_model import Classifier, InvalidImage, decode_image, evaluation_transform

CROP = 48
NAMES = {name: f"{i:03d}" for i, name in enumerate(KINDS)}
PATHS = ("evaluation", "evaluation by DALI", "training", "packaged")


def loaded(index: DatasetIndex, planned: PlannedBatch, **options: object) -> NDArray[np.float32]:
    """Pixels in [0, 255], [N, H, W, 3]."""
    with Loader(
        index,
        device="cpu",
        device_id=None,
        threads=1,
        max_batch_size=len(index),
        interpolation="bilinear",
        mean=(0, 0, 0),
        std=(1 / 255, 1 / 255, 1 / 255),
        **options,
    ) as reader:
        (batch,) = reader.run([planned])
    return batch.images_NCHW.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[np.float32]]:
    """Pixels of all formats by code path, in the order of `KINDS`."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, kind in KINDS.items():
        (folder / NAMES[name]).write_bytes(kind.content)
    index, problems, _ = scan_images(folder)
    assert not problems
    ids = np.arange(len(index))
    evaluated = EvalPlan(index.widths_N, index.heights_N, HEIGHT, CROP).batch(ids)
    nothing = np.zeros((len(ids), 1), np.int32)
    identity = [op.name for op in suite("trivialaugment")].index("identity")
    by_dali = PlannedBatch(
        **vars(evaluated)
        | {"augmentations": Augmentations(auto_augment=AutoAugment(nothing + identity, nothing, nothing))}
    )
    whole = TrainPlan(0, index.widths_N, index.heights_N, (1, 1), (WIDTH / HEIGHT,) * 2, 0)
    packaged = [
        evaluation_transform(decode_image(kind.content), HEIGHT, CROP, "bilinear", [0, 0, 0], [1 / 255] * 3)
        for kind in KINDS.values()
    ]
    order = np.argsort(whole.locate(ids)[1])  # the plan shuffles
    return {
        "evaluation": loaded(index, evaluated),
        "evaluation by DALI": loaded(index, by_dali, augment=Augment(auto_augment="trivialaugment")),
        "training": loaded(index, whole.batch(ids, CROP))[order],
        "packaged": torch.cat(packaged).permute(0, 2, 3, 1).numpy(),
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_the_same_in_every_path(pixels, name, path):
    whole = Image.fromarray(KINDS[name].pixels_HWC)
    left, top = round((WIDTH - CROP) / 2), round((HEIGHT - CROP) / 2)
    cut = whole.crop((left, top, left + CROP, top + CROP))
    expected = whole.resize((CROP, CROP), Image.Resampling.BILINEAR) if path == "training" else cut
    difference = np.abs(pixels[path][list(KINDS).index(name)] - np.asarray(expected, np.float32))
    assert difference.mean() < 0.2 and difference.max() < 1.01


@pytest.mark.parametrize("name", KINDS)
def test_prepare_and_thumbnails_use_the_same_pixels(name, tmp_path):
    content, pixels_HWC = KINDS[name].content, KINDS[name].pixels_HWC
    image = Image.fromarray(pixels_HWC)
    if (pixels_HWC == pixels_HWC[..., :1]).all():
        image = image.convert("L")
    with ignore_pil_warnings():
        copied, *size = convert(content, PrepareOptions())
        small, *_ = convert(content, PrepareOptions(shorter_side=HEIGHT, quality=90))
    assert size == [WIDTH, HEIGHT]
    options = (encode(image, 95), encode(image.convert("RGB"), 95))  # gray may be kept in three channels
    assert copied == content or copied in options
    if not content.startswith(b"\xff\xd8"):
        assert small in (encode(image, 90), encode(image.convert("RGB"), 90))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0").write_bytes(content)
    index, _, _ = scan_images(tmp_path)
    thumbnail = io.BytesIO()
    Image.fromarray(pixels_HWC).save(thumbnail, "JPEG", quality=85)
    assert base64.b64decode(_thumbnail(index, 0)) == thumbnail.getvalue()


def test_statistics_use_the_same_pixels(tmp_path):
    for split in ("train", "val"):
        for name, kind in KINDS.items():
            (tmp_path / split / NAMES[name]).mkdir(parents=True)
            (tmp_path / split / NAMES[name] / "0.img").write_bytes(kind.content)
    with Pool(1, lambda what, done, total: None) as pool:
        found = stats(tmp_path, 0, pool).splits["train"]
        report = verify(tmp_path, pool)
    assert (found.decoded, found.unreadable, report.errors) == (len(KINDS), 0, [])
    means = [kind.pixels_HWC.reshape(-1, 3).mean(axis=0) / 255 for kind in KINDS.values()]
    assert found.mean == pytest.approx(np.mean(means, axis=0).tolist(), abs=1e-6)


def test_single_and_folder_predictions_agree(tmp_path):
    model, folder = write_model(tmp_path / "model"), tmp_path / "set"
    folder.mkdir()
    files = {name: folder / number for name, number in NAMES.items()}
    for name, file in files.items():
        file.write_bytes(KINDS[name].content)
    import pyarrow.parquet as pq

    done = open_model(model).predict_folder(folder, tmp_path / "out.parquet", topk=3)
    assert (done.classified, done.corrupt) == (len(KINDS), 0)
    rows = {row["image"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    for prediction, name in zip(open_model(model).predict(list(files.values()), 3), files, strict=True):
        row = rows[NAMES[name]]
        assert row["class_name"] == prediction.best, name
        assert row["probability"] == pytest.approx(max(prediction.classes.values()), abs=3e-3), name


def packaged_model(folder: Path, **card: object) -> Classifier:
    from types import SimpleNamespace

    path = write_model(folder, **card)
    model = Classifier()
    model.load_context(
        SimpleNamespace(artifacts={"card": str(path / "model.json"), "weights": str(path / "model.safetensors")})
    )
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_pixel_formats_are_rejected_by_name_everywhere(name, tmp_path):
    content, reason = REFUSED[name]
    fix = "convert it to an 8-bit JPEG or PNG"
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / "set" / split / label).mkdir(parents=True)
            (tmp_path / "set" / split / label / "0.img").write_bytes(
                KINDS["PNG RGB"].content + split.encode() + label.encode()
            )
    unsupported = tmp_path / "set" / "train" / "a" / "1.img"
    unsupported.write_bytes(content)
    with pytest.raises(DataError, match=f"a/1.img: .*{reason}.*{fix}"):
        open_split(tmp_path / "set", "train", tmp_path / "cache")
    with Pool(1, lambda what, done, total: None) as pool:
        (finding,) = verify(tmp_path / "set", pool).errors
        with pytest.raises(DataError, match=f"a/1.img: .*{reason}.*{fix}"):
            index_in_place(tmp_path / "set", pool)
    assert finding.kind == "unsupported"
    assert reason in finding.detail
    with pytest.raises(NotAnImage, match=reason):
        convert(content, PrepareOptions())
    _, problems, _ = scan_images(tmp_path / "set")
    assert [reason in problem for problem in problems.values()] == [True]
    model = write_model(tmp_path / "model")
    with pytest.raises(UserError, match=f"1.img has pixels of .*{fix}"):
        open_model(model).predict(unsupported)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unsupported_file_formats_are_rejected_everywhere(kind, tmp_path):
    (tmp_path / "0.jpg").write_bytes(UNKNOWN[kind])
    _, problems, _ = scan_images(tmp_path)
    assert "is not an image of a known format (JPEG, PNG, BMP, TIFF, WEBP)" in problems["0.jpg"]
    with pytest.raises(InvalidImage, match="^is not an image$"):
        decode_image(UNKNOWN[kind])


def test_an_old_index_does_not_let_an_unsupported_image_pass(tmp_path):
    """An index of an older version may list an image that is unsupported now: training names it, or replaces it."""
    (tmp_path / "a").mkdir()
    for i in range(8):
        (tmp_path / "a" / f"{i}.img").write_bytes(KINDS["PNG RGB"].content)
    index, _, _ = scan_images(tmp_path)
    content = REFUSED["TIFF floats"][0]
    (tmp_path / "a" / "3.img").write_bytes(content)
    index.columns.lengths_N[3] = len(content)
    planned = EvalPlan(index.widths_N, index.heights_N, HEIGHT, CROP).batch(np.arange(8))
    with pytest.raises(DataError, match="a/3.img: has pixels of PIL's mode F"):
        loaded(index, planned)
    plan = TrainPlan(0, index.widths_N, index.heights_N, (1, 1), (1, 1), 0)
    assert len(loaded(index, plan.batch(np.arange(8), CROP), replacement_plan=plan)) == 8


def test_pil_decodes_what_dali_rejects(tmp_path, monkeypatch):
    """DALI gets only formats that it decodes; if a version of DALI rejects one of them, PIL decodes it."""
    for i, name in enumerate(("PNG RGB", "TIFF, lzma", "JPEG RGB")):
        (tmp_path / str(i)).write_bytes(KINDS[name].content)
    index, _, _ = scan_images(tmp_path)
    planned = EvalPlan(index.widths_N, index.heights_N, HEIGHT, CROP).batch(np.arange(3))
    expected = loaded(index, planned)
    monkeypatch.setattr(reading, "dali_matches_pil", lambda content: True)
    assert np.array_equal(loaded(index, planned), expected)


ARRAY = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)


@pytest.mark.parametrize(
    ("array", "rgb"),
    [
        (ARRAY[..., 0], np.repeat(ARRAY[..., :1], 3, axis=2)),
        (ARRAY[..., :1], np.repeat(ARRAY[..., :1], 3, axis=2)),
        (np.concatenate([ARRAY, ARRAY[..., :1]], axis=2), ARRAY),
        (ARRAY.tolist(), ARRAY),
    ],
    ids=["gray", "gray of one channel", "RGBA", "lists"],
)
def test_arrays_are_decoded(array, rgb):
    assert np.array_equal(np.asarray(decode_image(array)), rgb)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (ARRAY.astype(np.uint16), "an array of dtype uint16, which must be uint8"),
        (ARRAY / 255, "an array of dtype float64, which must be uint8"),
        (ARRAY.astype(bool), "an array of dtype bool"),
        ((ARRAY.astype(np.int64) + 1).tolist(), "values from 1 to 256, pixels must be from 0 to 255"),
        (ARRAY[..., :2], r"an array of shape \[60, 70, 2\]"),
        (ARRAY[None], r"an array of shape \[1, 60, 70, 3\]"),
        (ARRAY[:0], r"an array of shape \[0, 70, 3\]"),
        ([], "an array of dtype float64"),
        (np.uint8(3), r"an array of shape \[\]"),
        ([[1, 2], [3]], "is not an image"),
        (json.loads("[" * 200 + "]" * 200), "is not an image"),
        ({"a": 1}, "is not an image"),
        (None, "is not an image"),
    ],
)
def test_invalid_arrays_are_rejected_with_their_row(value, message, tmp_path):
    with pytest.raises(MlflowException, match=f"row 1 of `image` .*{message}.*: pass the bytes of a JPEG"):
        packaged_model(tmp_path / "model").predict(None, pd.DataFrame({"image": [ARRAY, value]}))
