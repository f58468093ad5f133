"""The GPU kit: what is packed, piece sizes, CUDA architectures, and unpacking with corrupt and missing pieces."""

import argparse
import json
import struct
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from benchmarks.gpu.fatbin import entries, keep_architecture
from benchmarks.gpu.kit import (
    MANIFEST_BYTES,
    PROJECT,
    Compressed,
    compress,
    locked_versions,
    package_tiers,
    unpack_wheel,
    write_pieces,
)
from benchmarks.gpu.unpack import MANIFEST, KitError, unpack

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
LIMIT = MANIFEST_BYTES + 10_000


def write_tier(work: Path, tier: str, sizes: list[int]) -> list[Compressed]:
    """Returns parts with random content, which does not compress."""
    rng, parts = np.random.default_rng(len(tier)), []
    for i, size in enumerate(sizes):
        file = work / f"{tier}-{i:02d}.tar.xz"
        file.write_bytes(rng.bytes(size))
        parts.append(Compressed(file, tier))
    return parts


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Returns a kit of two pieces: `training` is in the first, `ray` in both."""
    rng, parts = np.random.default_rng(0), []
    for tier, sizes in {"training": [6000, 500], "ray": [2000]}.items():
        folder = tmp_path / "work" / tier
        (folder / tier).mkdir(parents=True)
        for i, size in enumerate(sizes):
            (folder / tier / f"{i}.bin").write_bytes(rng.bytes(size))
        parts += compress(folder, tmp_path / "work", argparse.Namespace(level=0))
    parts += write_tier(tmp_path / "work", "mlflow", [5000])
    write_pieces(parts, tmp_path / "kit", PYTHON, LIMIT)
    return tmp_path / "kit"


def pieces(kit: Path) -> dict[str, list[str]]:
    return {
        piece.name: sorted(file.name.removesuffix(".tar.xz") for file in piece.iterdir() if file.name != MANIFEST)
        for piece in sorted(kit.iterdir())
    }


def test_pieces_are_within_the_limit_and_first_tiers_come_first(tmp_path):
    parts = write_tier(tmp_path, "mlflow", [500, 7000])
    parts += write_tier(tmp_path, "training", [4000, 9000, 3000])
    write_pieces(parts, tmp_path / "kit", PYTHON, LIMIT)
    assert pieces(tmp_path / "kit") == {
        "piece1": ["mlflow-00", "training-01"],
        "piece2": ["training-00", "training-02"],
        "piece3": ["mlflow-01"],
    }
    for piece in (tmp_path / "kit").iterdir():
        assert sum(file.stat().st_size for file in piece.iterdir()) <= LIMIT
        assert len(json.loads((piece / MANIFEST).read_text())["parts"]) == 5


def test_a_part_larger_than_a_piece_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="training-00.tar.xz has .* MiB, more than a piece"):
        write_pieces(write_tier(tmp_path, "training", [10_001]), tmp_path / "kit", PYTHON, LIMIT)


def test_unpacking_restores_the_files_once(kit):
    (kit / "piece2").rename(kit.parent / "piece2")  # its `mlflow` is no archive
    unpacked = unpack(kit)
    assert unpacked.folders == {tier: kit / "unpacked" / tier for tier in ("training", "ray")}
    for tier, folder in unpacked.folders.items():
        for file in (kit.parent / "work" / tier / tier).iterdir():
            restored = folder / tier / file.name
            assert restored.read_bytes() == file.read_bytes()
            restored.unlink()
    assert unpack(kit) == unpacked
    assert not list((kit / "unpacked" / "training" / "training").iterdir())


def test_a_missing_piece_is_named(kit):
    (kit / "piece1").rename(kit.parent / "piece1")
    (kit / "piece2" / "mlflow-00.tar.xz").unlink()
    unpacked = unpack(kit)
    assert unpacked.folders == {}
    assert unpacked.problems["training"] == f"piece1 of {kit} is missing or incomplete: copy it to this machine"
    assert unpacked.problems["mlflow"].startswith("piece2 of")


def test_a_corrupt_part_is_refused(kit):
    (kit / "piece2").rename(kit.parent / "piece2")
    part = kit / "piece1" / "training-00.tar.xz"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + b"x")
    unpacked = unpack(kit)
    assert list(unpacked.folders) == ["ray"]
    message = f"{part} is corrupt, its SHA-256 is not the manifest's: copy piece1 again"
    assert unpacked.problems["training"] == message
    part.write_bytes(content)
    assert list(unpack(kit).folders) == ["training", "ray"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kit: [(kit / p / MANIFEST).unlink() for p in ("piece1", "piece2")], "has no pieces: copy piece1"),
        (lambda kit: (kit / "piece2" / MANIFEST).write_text("{}"), "piece1, piece2 in .* are of different kits"),
        (
            lambda kit: [(kit / p / MANIFEST).write_text('{"python": "3.9", "parts": []}') for p in pieces(kit)],
            f"is for Python 3.9, this is {PYTHON}: make gpu-kit TARGET={PYTHON}",
        ),
    ],
)
def test_a_kit_that_cannot_be_used_is_refused(kit, change, message):
    change(kit)
    with pytest.raises(KitError, match=message):
        unpack(kit)


def test_tiers_have_the_locked_packages_without_those_of_the_machine(tmp_path):
    present = tmp_path / "present.txt"
    present.write_text("scipy==1.0\nRich @ file:///tmp/rich\ndeepspeed==0.1\n")
    everything, tiers = package_tiers("3.12", None), package_tiers("3.12", present)
    names = [requirement.partition("==")[0] for tier in tiers.values() for requirement in tier]
    assert len(names) == len(set(names))
    assert {"scipy", "rich"} <= {text.partition("==")[0] for text in everything["training"]}
    assert not {"torch", "numpy", "scipy", "rich", "nvidia-cublas"} & set(names)
    pins = {r.name: str(r.specifier) for r in project_requirements() if r.name in ("deepspeed", "nvidia-dali-cuda130")}
    assert {f"{name}{version}" for name, version in pins.items()} <= set(tiers["training"])
    assert any(text.startswith("ray==") for text in tiers["ray"])
    assert any(text.startswith("mlflow==") for text in tiers["mlflow"])


def project_requirements() -> list[Requirement]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    return [Requirement(text) for text in project["project"]["dependencies"]]


def test_versions_are_those_of_the_target_python():
    lock = (
        "a-b==1 ; python_full_version < '3.12' \\\n    --hash=sha256:0\na-b==2 ; python_full_version >= '3.12'\nc==3\n"
    )
    assert locked_versions(lock, {"python_full_version": "3.12.0"}) == {"a-b": "2", "c": "3"}


def test_a_wheel_is_unpacked_without_other_pythons_and_headers(tmp_path):
    wheel = tmp_path / "a.whl"
    kept = ("a/code.py", "a/x.cpython-312-x86_64-linux-gnu.so", "a-1.dist-info/METADATA")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*kept, "a/x.cpython-311-x86_64-linux-gnu.so", "a/include/b.hpp", "a-1.dist-info/RECORD"):
            archive.writestr(name, "text")
    unpack_wheel(wheel, tmp_path / "out", "cp312", 90)
    found = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found == set(kept)


def library(codes: list[tuple[int, int, bytes]]) -> bytearray:
    """Returns an ELF file whose `.nv_fatbin` has code of each kind and architecture, and symbols."""
    body = b"".join(
        struct.pack("<HHIQ", kind, 0, 64, len(code)) + bytes(12) + struct.pack("<I", architecture) + bytes(32) + code
        for kind, architecture, code in codes
    )
    fatbin = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body + bytes(16)
    names = b"\0.nv_fatbin\0.symtab\0.shstrtab\0"
    contents = {b".nv_fatbin": fatbin, b".symtab": b"symbols", b".shstrtab": names}
    headers, data = b"", bytes(64)
    for name, content in contents.items():
        headers += struct.pack("<IIQQQQ", names.index(name), 1, 0, 0, len(data), len(content)) + bytes(24)
        data += content
    elf = bytearray(data + headers)
    elf[:4] = b"\x7fELF"
    struct.pack_into("<Q", elf, 40, len(data))
    struct.pack_into("<HHH", elf, 58, 64, len(contents), len(contents) - 1)
    return elf


def codes_of(elf: bytearray) -> list[tuple[int, int, bytes]]:
    return [(entry.kind, entry.architecture, bytes(elf[entry.start : entry.end])) for entry in entries(elf)]


def test_code_for_other_architectures_is_zeroed():
    codes = [(2, 80, b"ampere!!"), (2, 90, b"hopper!!"), (1, 90, b"ptx code")]
    elf = library(codes)
    size = len(elf)
    assert codes_of(elf) == codes
    keep_architecture(elf, 90)
    assert codes_of(elf) == [(2, 80, bytes(8)), (2, 90, b"hopper!!"), (1, 90, bytes(8))]
    assert len(elf) == size
    assert b"symbols" not in elf


def test_a_library_without_code_for_the_architecture_keeps_all():
    codes = [(2, 80, b"ampere!!"), (1, 90, b"ptx code")]
    elf = library(codes)
    keep_architecture(elf, 90)
    assert codes_of(elf) == codes
