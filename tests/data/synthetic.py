"""Synthetic data sources in every layout, with all the irregularities of real ones."""

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

CLASSES = ("n01440764", "n02105855", "n04557648")
Images = dict[str, dict[str, dict[str, bytes]]]  # split, class, file name


def image(number: int, size: tuple[int, int] = (60, 50), mode: str = "RGB") -> Image.Image:
    """Returns a smooth image, unique for each number."""
    coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def ycck(image: Image.Image) -> bytes:
    """Encodes an image as Adobe's YCCK: a CMYK file whose first three planes are YCbCr."""
    cmyk = np.asarray(image.convert("CMYK"))
    stored = Image.fromarray(cmyk[..., :3]).convert("YCbCr")  # the inverse of what is stored in plain YCbCr
    planes = np.concatenate([255 - np.asarray(stored), cmyk[..., 3:]], axis=2)  # PIL inverts what it writes
    content = bytearray(encoded(Image.fromarray(planes, "CMYK"), quality=95, subsampling=0))
    marker = content.index(b"Adobe")
    content[marker + 11] = 2  # the transform flag
    return bytes(content)


def images() -> Images:
    """Returns three classes of eight training and three validation images, and unusual training images."""
    tree: Images = {"train": {}, "val": {}}
    number = 0
    for wnid in CLASSES:
        tree["train"][wnid] = {}
        for i in range(8):
            number += 1
            tree["train"][wnid][f"{wnid}_{i}.JPEG"] = encoded(image(number, (60 + number, 50)))
        tree["val"][wnid] = {}
    order = (2, 0, 1, 1, 2, 0, 0, 1, 2)  # validation images are not sorted by class
    for val_number, i in enumerate(order, start=1):
        name = f"ILSVRC2012_val_{val_number:08d}.JPEG"
        tree["val"][CLASSES[i]][name] = encoded(image(100 + val_number, (50, 70)))
    unusual = tree["train"]["n02105855"]
    unusual["n02105855_2933.JPEG"] = encoded(image(50), "PNG")
    unusual["n02105855_cmyk.JPEG"] = encoded(image(51, mode="CMYK"))
    unusual["n02105855_ycck.JPEG"] = ycck(image(52))
    unusual["n02105855_gray.JPEG"] = encoded(image(53, mode="L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    unusual["n02105855_turned.JPEG"] = encoded(image(54, (80, 40)), exif=exif)
    unusual["n02105855_exif.JPEG"] = encoded(image(55), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xee" * 40)
    unusual["it's a #1 \u00e9\u4f8b.jpg"] = encoded(image(56))
    unusual["UPPER.JPG"] = encoded(image(57))
    return tree


def write_folders(root: Path, tree: Images, flat_val: bool = False) -> None:
    for split, classes in tree.items():
        for wnid, files in classes.items():
            folder = root / split if flat_val and split == "val" else root / split / wnid
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_devkit(root: Path, tree: Images) -> None:
    """Writes the development kit, whose class numbers are in reverse order of the WordNet ids."""
    ids = {wnid: len(CLASSES) - rank for rank, wnid in enumerate(CLASSES)}
    rows = [(ids[w], w, f"words of {w}") for w in sorted(CLASSES, key=ids.__getitem__)] + [(4, "n00001740", "entity")]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets.reshape(-1, 1)})
    of = {name: wnid for wnid, files in tree["val"].items() for name in files}
    truth = "".join(f"{ids[of[name]]}\n" for name in sorted(of))
    base = "ILSVRC2012_devkit_t12/data"
    files = {f"{base}/meta.mat": buffer.getvalue(), f"{base}/ILSVRC2012_validation_ground_truth.txt": truth.encode()}
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar(files)))


def write_ilsvrc(root: Path, tree: Images) -> None:
    root.mkdir(parents=True, exist_ok=True)
    inner = {f"{wnid}.tar": tar(files) for wnid, files in reversed(tree["train"].items())}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    flat = {name: content for files in tree["val"].values() for name, content in files.items()}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(dict(sorted(flat.items()))))
    write_devkit(root, tree)


def write_kaggle(root: Path, tree: Images) -> None:
    write_folders(root / "ILSVRC" / "Data" / "CLS-LOC", tree, flat_val=True)
    write_kaggle_labels(root, tree)
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} some, words\n" for wnid in CLASSES))


def write_kaggle_labels(root: Path, tree: Images) -> None:
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for wnid, files in tree["val"].items():
            for name in files:
                boxes = f"{wnid} 1 2 30 40 {CLASSES[0]} 5 6 70 80 "  # several boxes: the first one's class counts
                rows.writerow([Path(name).stem, boxes])


def samples(tree: Images, split: str) -> list[tuple[int, str, bytes]]:
    rank = {wnid: label for label, wnid in enumerate(CLASSES)}
    rows = [(rank[w], name, content) for w, files in tree[split].items() for name, content in files.items()]
    np.random.default_rng(1).shuffle(rows)  # type: ignore[arg-type]
    return [(int(label), str(name), content) for label, name, content in rows]


def write_parquet(root: Path, tree: Images, names: tuple[str, ...] | None = None, prefix: str = "{wnid}_") -> None:
    (root / "data").mkdir(parents=True)
    for split, word in (("train", "train"), ("val", "validation")):
        rows = samples(tree, split)
        paths = [prefix.format(wnid=CLASSES[label]) + name for label, name, _ in rows]
        image = pa.array([{"bytes": c, "path": p} for (_, _, c), p in zip(rows, paths, strict=True)])
        table = pa.table({"image": image, "label": pa.array([label for label, *_ in rows], pa.int64())})
        features = {"info": {"features": {"label": {"names": list(names)}}}} if names else {}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        half = len(table) // 2
        for i, part in enumerate((table.slice(0, half), table.slice(half))):
            pq.write_table(part, root / "data" / f"{word}-0000{i}-of-00002.parquet", row_group_size=4)


def write_webdataset(root: Path, tree: Images) -> None:
    """Writes shards with a mix of extensions and label files."""
    root.mkdir(parents=True)
    for split, word in (("train", "train"), ("val", "validation")):
        files: list[dict[str, bytes]] = [{}, {}]
        for i, (label, name, content) in enumerate(samples(tree, split)):
            key = f"{CLASSES[label]}_{i:03d}"
            shard = files[i % 2]
            shard[f"{key}.{('jpg', 'JPEG', 'jpeg')[i % 3]}"] = content
            if i % 2:
                shard[f"{key}.cls"] = str(label).encode()
            else:
                shard[f"{key}.json"] = json.dumps({"label": label, "filename": name}).encode()
        for i, shard in enumerate(files):
            (root / f"set-{word}-{i:04d}.tar").write_bytes(tar(shard))
