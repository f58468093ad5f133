"""Ten thousand corrupt images: each is decoded or reported by name; none crashes or hangs the process."""

import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config_data import MAX_PIXELS
from pipeline.data.folder_index import scan_images
from pipeline.data.images import TooLarge, check_size, decode, header
from tests.conftest import PROJECT
from tests.data import synthetic
from tests.data.test_data_loading import loader, run, train_plan

COUNT, FILES_IN_A_FOLDER = 10_000, 1000


def valid() -> list[bytes]:
    """Returns JPEGs of all kinds in training sets."""
    kinds: list[tuple[str, dict[str, object]]] = [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1, "quality": 40}),
        ("RGB", {"optimize": True, "restart_marker_blocks": 2}),
        ("RGB", {"exif": b"Exif\0\0II*\0" + b"\x08\0\0\0\0\0"}),
        ("L", {}),
        ("L", {"progressive": True}),
    ]
    return [
        synthetic.encoded(synthetic.image(number, (40 + 3 * number, 60), mode), **options)
        for number, (mode, options) in enumerate(kinds * 3)
    ]


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Corrupts an image at a random position, in the header as often as in the data."""
    data = bytearray(content)
    reach = len(data) if rng.random() < 0.5 else min(700, len(data))
    at = rng.randrange(reach)
    span = rng.randint(1, 64)
    match rng.randrange(7):
        case 0:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        case 1:
            data[at] = rng.randrange(256)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + span]
        case 4:
            data[at:at] = data[at : at + span]
        case 5:
            data[at : at + span] = bytes(min(span, len(data) - at))
        case 6:
            data[at:at] = rng.randbytes(span)
    return bytes(data)


def write(root: Path, seed: int, count: int) -> None:
    rng, images = random.Random(seed), valid()
    for i in range(count):
        file = root / f"{i // FILES_IN_A_FOLDER:02d}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(mutated(rng, rng.choice(images)))


def read_all(root: Path) -> Iterator[str]:
    """Yields a line for each file: `NAME decoded`, or `NAME PROBLEM`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index, problems, _ = scan_images(root)
    for name, problem in problems.items():
        yield f"{Path(name).name} {problem}"
    plan, batch = train_plan(index), 16
    with loader(index, batch, replacement_plan=plan) as reader:
        _, seen = run(reader, plan, steps=-(-len(index) // batch), batch=batch)
        skipped = reader.skipped
    for sample in set(range(len(index))) & set(seen):
        yield f"{index.path(sample).name} decoded"
    for sample, reason in skipped.items():
        yield f"{index.path(sample).name} {reason}"


def test_a_header_with_a_huge_size_is_refused():
    content = bytearray(valid()[0])
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = b"\xff\xdc\xff\xdc"
    head = header(bytes(content), bytes(content))
    with pytest.raises(TooLarge, match="has 65,500 x 65,500 pixels, more than the limit of 178,956,970"):
        check_size(head.width, head.height, MAX_PIXELS)
    with pytest.raises(TooLarge, match="has 65,500 x 65,500 pixels"):
        decode(bytes(content), MAX_PIXELS)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_corrupt_jpegs_are_decoded_or_reported_by_name(tmp_path):
    write(tmp_path / "set", seed=20261126, count=COUNT)
    program = "import sys; from pathlib import Path; from tests.data.test_fuzz import read_all\n"
    program += "for line in read_all(Path(sys.argv[1])): print(line)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "set")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert outcomes.keys() == {f"{i:05d}.jpg" for i in range(COUNT)}
    decoded = sum(outcome == "decoded" for outcome in outcomes.values())
    assert 1000 < decoded < COUNT - 1000, decoded
