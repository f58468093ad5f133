"""Packs what a GPU machine without package access lacks, in pieces small enough to be copied one by one.

    python -m benchmarks.gpu.kit [--output outputs/gpu-kit] [--python 3.12] [--architecture 90] [--present FILE]
        [--images FOLDER] [--cifar FOLDER] [--level 9]

The machine has a torch of its own, and the packages in FILE (the output of `pip list --format freeze` there). Tiers, in
the order of their use: `training` (what `pipeline.train` imports), `images` (a sample of FOLDER's JPEGs), `cifar`
(CIFAR-10, prepared as shards), `ray`, `mlflow` (the rest of the project's packages). A tier consists of compressed
parts, which `benchmarks.gpu.unpack` unpacks; OUTPUT/piece1, piece2, ... hold them and a manifest of all parts.
"""

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.common import load_images
from benchmarks.gpu.fatbin import keep_architecture
from benchmarks.gpu.unpack import KIT, MANIFEST, SUFFIX, Part

PROJECT = Path(__file__).parents[2]
PIECE_BYTES = 58 * 2**20
MANIFEST_BYTES = 2**18  # reserved in each piece
LARGE_FILE, PART_BYTES = 8_000_000, 40_000_000  # a large file is a part of its own; small files share parts
IMAGES = 300
TIERS = ("training", "images", "cifar", "ray", "mlflow")
TORCH = ("torch", "torchvision")
TRAINING = (
    "deepspeed", "filelock", "fsspec", "nvidia-dali-cuda130", "omegaconf", "pillow", "psutil", "pyarrow", "pydantic",
    "pyyaml", "rich", "safetensors", "scipy", "simplejpeg", "timm",
)  # fmt: skip
RAY = ("ray[default,train]",)
UNUSED = {"nvidia-libnvcomp-cu13", "nvidia-nvjpeg2k-cu13", "nvidia-nvtiff-cu13"}  # DALI's other image formats
SOURCE_ONLY = {"deepspeed"}
# Headers, tests, what is compiled at run time, Java, decoders of other image formats, web pages.
DROPPED = (
    "*/include/*", "*/tests/*", "*/test/*", "*.pyi", "*.h", "*.hpp", "*.cuh", "*.a", "*.map", "*.dist-info/RECORD",
    "*.dist-info/licenses/*", "*.dist-info/sboms/*", "*/__pycache__/*", "*.data/*", "deepspeed/ops/csrc/*",
    "nvidia/dali/Acknowledg*.txt", "nvidia/nvimgcodec/nvimgcodec_impl*.so",
    "nvidia/nvimgcodec/extensions/libnvtiff_ext*", "nvidia/nvimgcodec/tools/*",
    "nvidia/nvimgcodec/extensions/libnvjpeg2k_ext*", "ray/jars/*", "ray/rllib/*", "ray/cpp/*",
    "ray/dashboard/client/build/speedscope*/*", "mlflow/server/js/build/static/*", "mlflow/server/js/build/lib/*",
)  # fmt: skip
# pip compares platforms literally.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
NAMESPACE = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"  # torch's CUDA libraries stay visible


def main() -> None:
    """Fills a folder for each tier, compresses them, and distributes the parts over pieces."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=KIT)
    parser.add_argument("--python", default="3.12", help="Python version of the GPU machine")
    parser.add_argument("--architecture", type=int, default=90, help="CUDA architecture; 90: H100 and H200")
    parser.add_argument("--present", type=Path, help="file with the packages there, from `pip list --format freeze`")
    parser.add_argument("--images", type=Path, help="folder of JPEGs")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 in class folders: train/CLASS/*, val/CLASS/*")
    parser.add_argument("--level", type=int, default=9, help="compression, 0 (fast) to 9 (small)")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for tier, requirements in package_tiers(options.python, options.present).items():
            install(requirements, work / tier, options.python, options.architecture)
        if options.images:
            sample_images(options.images, work / "images")
        if options.cifar:
            prepare_cifar(options.cifar, work / "cifar")
        parts = [part for tier in TIERS if (work / tier).is_dir() for part in compress(work / tier, work, options)]
        write_pieces(parts, options.output, options.python)


def package_tiers(python: str, present: Path | None) -> dict[str, list[str]]:
    """Returns each tier's packages as NAME==VERSION, without those of earlier tiers and those on the machine."""
    environment = {k: str(v) for k, v in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    versions = locked_versions((PROJECT / "requirements.lock").read_text(encoding="utf-8"), environment)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    dependencies = project["project"]["dependencies"]
    taken = with_dependencies(TORCH, environment) | UNUSED
    if present is not None:
        exact = {canonicalize_name(r.name) for r in map(Requirement, dependencies) if "==" in str(r.specifier)}
        lines = present.read_text(encoding="utf-8").splitlines()
        taken |= {canonicalize_name(re.split("[=@ ]", line)[0]) for line in lines if line.strip()} - exact
    tiers = {}
    for tier, roots in {"training": TRAINING, "ray": RAY, "mlflow": dependencies}.items():
        names = with_dependencies(roots, environment) - taken
        tiers[tier] = [f"{name}=={versions[name]}" for name in sorted(names)]
        taken |= names
    return tiers


def locked_versions(lock: str, environment: dict[str, str]) -> dict[str, str]:
    """Returns the version of each package in a lock file."""
    lines = re.findall(r"^([a-zA-Z0-9][^\\\n]*==[^\\\n]*)", lock, re.MULTILINE)
    pins = [Requirement(line) for line in lines]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(environment)
    }


def with_dependencies(roots: Iterable[str], environment: dict[str, str]) -> set[str]:
    """Returns the names of packages and of all that they require, from the metadata of the installed packages."""
    found: set[str] = set()
    seen: set[str] = set()
    pending = [Requirement(root) for root in roots]
    while pending:
        required = pending.pop()
        name, extras = canonicalize_name(required.name), required.extras or {""}
        found.add(name)
        if f"{name}{sorted(extras)}" in seen:
            continue
        seen.add(f"{name}{sorted(extras)}")
        try:
            texts = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # required only by the other Python
            continue
        for child in map(Requirement, texts):
            if child.marker is None or any(child.marker.evaluate(environment | {"extra": extra}) for extra in extras):
                pending.append(child)
    return found


def install(requirements: list[str], folder: Path, python: str, architecture: int) -> None:
    """Downloads wheels for the other machine and unpacks them, without what is not needed there."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    tag = f"cp{python.replace('.', '')}"
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    target += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    built = [text for text in requirements if text.partition("==")[0] in SOURCE_ONLY]
    with tempfile.TemporaryDirectory() as wheels:
        downloaded = [text for text in requirements if text not in built]
        subprocess.run([*pip, "download", "--no-deps", *target, "--dest", wheels, *downloaded], check=True)
        if built:
            build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, *built]
            subprocess.run(build, check=True, env=os.environ | {"DS_BUILD_OPS": "0"})
        for wheel in Path(wheels).glob("*.whl"):
            unpack_wheel(wheel, folder, tag, architecture)
    if (folder / "nvidia").is_dir():
        (folder / "nvidia" / "__init__.py").write_text(NAMESPACE)


def unpack_wheel(wheel: Path, folder: Path, tag: str, architecture: int) -> None:
    """Unpacks a wheel; libraries keep code for one CUDA architecture."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name, other = entry.filename, re.search(r"\.cpython-(\d+)-", entry.filename)
            if entry.is_dir() or any(fnmatch.fnmatch(name, pattern) for pattern in DROPPED):
                continue
            if other and f"cp{other[1]}" != tag:  # DALI's wheel has libraries for several Pythons
                continue
            content = bytearray(archive.read(entry))
            if content.startswith(b"\x7fELF"):
                keep_architecture(content, architecture)
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o755 if entry.external_attr >> 16 & 0o111 else 0o644)


def sample_images(source: Path, folder: Path) -> None:
    """Copies images at equal distances in the order of their names."""
    files = load_images(source, folder)
    count = min(IMAGES, len(files))
    folder.mkdir()
    for i in range(count):
        shutil.copy(files[i * len(files) // count], folder)


def prepare_cifar(source: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "data", "prepare", source, folder, "--shard-size", "8"]
    subprocess.run(command, check=True, cwd=PROJECT)


@dataclass(frozen=True)
class Compressed:
    """A part before it has a piece."""

    file: Path
    tier: str


def compress(folder: Path, work: Path, options: argparse.Namespace) -> list[Compressed]:
    """Compresses a tier's folder in parts; similar files share one."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: (file.suffix, file))
    groups, free = [[file] for file in files if file.stat().st_size >= LARGE_FILE], 0
    for file in files:
        size = file.stat().st_size
        if size < LARGE_FILE:
            if free < size:
                groups.append([])
                free = PART_BYTES
            groups[-1].append(file)
            free -= size
    targets = [work / f"{folder.name}-{i:02d}{SUFFIX}" for i in range(len(groups))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        count = len(groups)
        list(pool.map(write_part, targets, [folder] * count, groups, [options.level] * count))
    before, after = (sum(file.stat().st_size for file in found) for found in (files, targets))
    print(f"{folder.name:10} {before / 1e6:6.0f} MB, compressed {after / 1e6:6.1f} MB", flush=True)
    return [Compressed(target, folder.name) for target in targets]


def write_part(target: Path, folder: Path, files: list[Path], level: int) -> None:
    filters: list[dict[str, int]] = [{"id": lzma.FILTER_LZMA2, "preset": level, "dict_size": 64 << 20}]
    if files[0].suffix == ".so" or ".so." in files[0].name:
        filters.insert(0, {"id": lzma.FILTER_X86})
    with lzma.open(target, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for file in files:
            archive.add(file, file.relative_to(folder))


def write_pieces(compressed: list[Compressed], output: Path, python: str, limit: int = PIECE_BYTES) -> None:
    """Distributes parts over as few pieces as possible, first tiers first, and writes the manifest into each.

    Raises:
        ValueError: a part is larger than a piece.
    """
    free: list[int] = []
    parts = []
    for part in sorted(compressed, key=lambda part: (TIERS.index(part.tier), -part.file.stat().st_size)):
        size = part.file.stat().st_size
        if size > limit - MANIFEST_BYTES:
            raise ValueError(f"{part.file.name} has {size / 2**20:.1f} MiB, more than a piece of {limit / 2**20:.0f}.")
        number = next((i for i, space in enumerate(free) if space >= size), len(free))
        if number == len(free):
            free.append(limit - MANIFEST_BYTES)
            (output / f"piece{number + 1}").mkdir(parents=True)
        free[number] -= size
        target = output / f"piece{number + 1}" / part.file.name
        shutil.move(part.file, target)
        sha256 = hashlib.sha256(target.read_bytes()).hexdigest()
        parts.append(Part(part.file.name, part.tier, target.parent.name, sha256))
    manifest = json.dumps({"python": python, "parts": [asdict(part) for part in parts]}, indent=1)
    for piece in sorted(output.glob("piece*")):
        (piece / MANIFEST).write_text(f"{manifest}\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in piece.iterdir())
        tiers = dict.fromkeys(part.tier for part in parts if part.piece == piece.name)
        print(f"{piece}: {size / 2**20:.1f} MiB, {', '.join(tiers)}")


if __name__ == "__main__":
    main()
