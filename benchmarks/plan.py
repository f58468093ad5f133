"""Sampler speed on one core: planned samples per second, and the order of an ImageNet-sized epoch.

python -m benchmarks.plan [--rounds 5]
"""

import argparse
from collections.abc import Callable

import numpy as np

from benchmarks.common import interleaved, machine, save_result, seconds
from benchmarks.epoch_order import whole_order
from pipeline.config_data import Augment
from pipeline.data.plan import TrainPlan

N, BATCH, BATCHES = 1_281_167, 256, 200


def main() -> None:
    """Plans batches with crop and flip only, and with all augmentations."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    all_augmentations = Augment(
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        lighting=0.1,
        auto_augment="randaugment",
        erase_prob=0.25,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
    )
    cases = {"crop and flip": throughput(Augment()), "all augmentations": throughput(all_augmentations)}
    values = interleaved(cases, options.rounds)
    print(f"\nsampler, one core: {machine()}")
    for name, speeds in values.items():
        print(f"  {name:20} {np.median(speeds):12,.0f} samples/s  ({min(speeds):,.0f} - {max(speeds):,.0f})")
        save_result("sampler, one core", name, float(np.median(speeds)), "samples/s", rounds=options.rounds)
    order_s = min(seconds(lambda: whole_order(N, 57)) for _ in range(options.rounds))
    print(f"  order of {N:,} samples: {order_s:.3f} s")
    save_result("sampler, one core", f"order of {N:,} samples", order_s, "s", rounds=options.rounds)


def throughput(augment: Augment) -> Callable[[], float]:
    """Returns a function that measures planned samples per second."""
    rng = np.random.default_rng(0)
    widths_N, heights_N = rng.integers(200, 800, (2, N))
    plan = TrainPlan(0, widths_N, heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, augment=augment)

    def measured() -> float:
        def all_batches() -> None:
            for step in range(BATCHES):
                plan.batch(np.arange(step * BATCH, (step + 1) * BATCH), 224)

        return BATCH * BATCHES / seconds(all_batches)

    return measured


if __name__ == "__main__":
    main()
