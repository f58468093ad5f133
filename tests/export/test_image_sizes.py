"""Very long images take no extra memory; images above the pixel limit (`max_pixels`) are rejected."""

import json
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from pipeline.config_fields import Interpolation
from pipeline.data.dataset import open_split, open_splits
from pipeline.data.images import NotAnImage, TooLarge, decode
from pipeline.data.plan import EvalPlan
from pipeline.data.resize import Resizer, resized_region
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.parts import convert
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError, UserError
from pipeline.export.open import open_model
from pipeline.model.card import ModelCard
from tests.conftest import PROJECT
from tests.kinds import chunk
from tests.models import write_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow's of its own type hints
    from pipeline.export.pyfunc_model import Classifier, InvalidImage, decode_image, evaluation_transform

LONG = [(10, 200), (200, 10), (3, 500), (500, 3), (2000, 100), (1, 3000), (3000, 1)]
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape", LONG)
def test_the_crop_of_a_long_image_equals_that_of_the_fully_resized_image(shape, interpolation: Interpolation):
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    image = Image.fromarray(pixels_HWC)
    planned = EvalPlan(np.array([shape[1]]), np.array([shape[0]]), 64, 56).batch(np.array([0]))
    (height, width), (top, left) = planned.sizes_B2[0], planned.origins_B2[0]
    rows = image.resize((width, shape[0]), FILTERS[interpolation])  # torch starts with rows, PIL may start with columns
    whole = rows.resize((width, height), FILTERS[interpolation])
    expected = np.asarray(whole.crop((left, top, left + 56, top + 56)), np.int16)
    (start_2,), (end_2,) = planned.regions()
    region = resized_region(pixels_HWC, start_2, end_2, 56, interpolation)
    assert np.abs(region - expected).max() <= (0 if min(shape) < 64 else 1)  # rounding when downscaling
    packaged = evaluation_transform(image, 64, 56, interpolation, [0, 0, 0], [1 / 255] * 3)
    assert (packaged[0].permute(1, 2, 0) - torch.tensor(region)).abs().max() < 0.01
    resizer = Resizer(1, interpolation, (0, 0, 0), (1 / 255,) * 3)
    trained = resizer.submit([pixels_HWC], planned).result()
    resizer.close()
    assert torch.allclose(trained, packaged, atol=0.01)


MEASURE_MEMORY = """
import resource, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from pipeline.export.open import open_model
model, folder = Path(sys.argv[1]), Path(sys.argv[2])
def run(name):
    open_model(model).predict_folder(folder / name, folder / "out.parquet", batch_size=4)
    open_model(model).predict(sorted((folder / name).iterdir()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(run("small"), run("long"))
"""


@pytest.mark.slow
def test_long_images_take_no_extra_memory(tmp_path):
    """In the data loader of evaluation and in the packaged code; fully resizing 65,500 x 1 pixels takes 20 GB."""
    transform = {"resize": 256, "crop": 224, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.2] * 3}
    model = write_model(tmp_path / "model", transform=transform)
    for folder, sizes in (("small", [(300, 300)]), ("long", [(65500, 1), (1, 65500), (20000, 1)])):
        (tmp_path / folder).mkdir()
        for i, size in enumerate(sizes):
            Image.new("L", size, 99).save(tmp_path / folder / f"{i}.jpg")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, str(model), str(tmp_path)], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < 200_000  # KB


def large(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG with a large size in its header and no pixel data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders with two images of 40 x 30 pixels per split, and one training image of 60 x 50 pixels."""
    root = tmp_path / "set"
    for split in ("train", "val"):
        for i, label in enumerate("ab"):
            (root / split / label).mkdir(parents=True)
            Image.new("L", (40, 30), 10 * i + len(split)).save(root / split / label / "0.png")
    Image.new("L", (60, 50), 9).save(root / "train" / "a" / "1.png")
    return root


TOO_LARGE = (
    r"has 60 x 50 pixels, more than the limit of 2,000 \(data.max_pixels in training, --max-pixels of `densenet data`"
)


def test_training_rejects_or_skips_images_above_the_limit(classes, tmp_path):
    cache = tmp_path / "cache"
    assert len(open_splits(str(classes), "train", "val", cache)[0]) == 3
    with pytest.raises(DataError, match=f"train/a/1.png: {TOO_LARGE}"):  # the cached index does not bypass the limit
        open_splits(str(classes), "train", "val", cache, max_pixels=2000)
    warnings: list[str] = []
    train, _ = open_splits(str(classes), "train", "val", cache, True, warnings.append, max_pixels=2000)
    assert len(train) == 2
    assert "1 of 3 training files are skipped" in warnings[0]
    assert len(open_splits(str(classes), "train", "val", cache)[0]) == 3


def test_prepared_data_sets_are_checked_against_the_limit_too(classes, tmp_path):
    with Pool(1, lambda what, done, total: None) as pool:
        with pytest.raises(DataError, match=f"a/1.png: {TOO_LARGE}"):
            index_in_place(classes, pool, max_pixels=2000)
        with pytest.raises(DataError, match=f"a/1.png in .*: {TOO_LARGE}"):
            prepare(classes, tmp_path / "less", PrepareOptions(), pool, max_pixels=2000)
        (finding,) = verify(classes, pool, max_pixels=2000).errors
        assert (finding.kind, finding.where) == ("large", "train/a/1.png")
        index_in_place(classes, pool)
    with pytest.raises(DataError, match=rf"1 of 3 images in .* are too large:\n  .*a/1.png {TOO_LARGE}"):
        open_split(classes, "train", tmp_path, max_pixels=2000)
    assert len(open_split(classes, "train", tmp_path, max_pixels=3000)) == 3


def test_predictions_use_the_limit_of_the_model_card(classes, tmp_path):
    model = write_model(tmp_path / "model", max_pixels=2000)
    with pytest.raises(UserError, match=r"1.png has 60 x 50 pixels, more than the limit of 2,000 \(max_pixels in the"):
        open_model(model).predict(classes / "train" / "a" / "1.png")
    done = open_model(model).predict_folder(classes, tmp_path / "out.parquet")
    assert (done.classified, done.corrupt) == (4, 1)
    (error,) = [row["error"] for row in pq.read_table(tmp_path / "out.parquet").to_pylist() if row["error"]]
    assert "has 60 x 50 pixels, more than the limit of 2,000" in error


def test_a_header_of_gigabytes_is_too_large_and_not_corrupt(tmp_path):
    (tmp_path / "0.png").write_bytes(large())
    message = "has 20,000 x 20,000 pixels, more than the limit of 178,956,970"
    with pytest.raises(TooLarge, match=message):
        convert(large(), PrepareOptions())
    model = write_model(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        open_model(model).predict(tmp_path / "0.png")
    packaged = Classifier()
    card = json.loads((model / "model.json").read_text())
    del card["max_pixels"]  # as in older model cards
    (model / "model.json").write_text(json.dumps(card))
    assert ModelCard.read(model).max_pixels == 178_956_970

    class Context:
        artifacts = {"card": str(model / "model.json"), "weights": str(model / "model.safetensors")}  # noqa: RUF012

    packaged.load_context(Context())  # type: ignore[arg-type]
    small = np.zeros((40, 40), np.uint8)
    with pytest.raises(MlflowException, match=f"row 1 of `image` {message}"):
        packaged.predict(None, pd.DataFrame({"image": [small, large()]}))


def test_a_limit_above_pils_own_is_respected(tmp_path):
    """PIL's `open` would reject the image before its size is known."""
    wide = tmp_path / "0.png"
    Image.new("1", (60_000, 3_000)).save(wide)
    assert 60_000 * 3_000 > 178_956_970
    with pytest.raises(TooLarge, match="60,000 x 3,000"):
        convert(wide.read_bytes(), PrepareOptions())
    _, width, height = convert(wide.read_bytes(), PrepareOptions(shorter_side=16), max_pixels=200_000_000)
    assert (width, height) == (320, 16)


def tiled(side: int) -> bytes:
    """A TIFF of 61 x 50 pixels in one deflated tile of `side` x `side` pixels with little data."""
    data = zlib.compress(bytes(100))
    tags = {256: 61, 257: 50, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tile_of_gigabytes_is_not_decoded():
    message = "has tiles of 32,768 x 32,768 pixels, more than the limit of 178,956,970"
    with pytest.raises(TooLarge, match=message):
        decode(tiled(1 << 15))
    with pytest.raises(InvalidImage, match=message):
        decode_image(tiled(1 << 15))
    with pytest.raises(NotAnImage, match="cannot be decoded"):
        decode(tiled(256), 61 * 50)  # a tile may be larger than the image
