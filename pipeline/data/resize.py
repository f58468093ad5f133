"""Resizes images on the CPU with torch's kernel: torchvision's pixels, several times as fast as DALI's CPU operator."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from pipeline.config_fields import Interpolation, Rgb
from pipeline.data.plan import PlannedBatch

_MAX_ASPECT = 8  # if a resized image is longer than this times the crop, only the crop is computed
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_FILTER_RADIUS = 4  # maximum radius of the filters in pixels, without downscaling


class PendingBatch:
    """A batch being resized in threads; holds a reference to `windows` until then."""

    def __init__(self, images_NCHW: torch.Tensor, parts: list[Future[None]], windows: object) -> None:
        self._images_NCHW, self._parts, self._windows = images_NCHW, parts, windows

    def result(self) -> torch.Tensor:
        """Waits for the threads; returns the batch, fp32, normalized."""
        for part in self._parts:
            part.result()
        return self._images_NCHW


class Resizer:
    """Applies the plan after decoding: resizes, crops, mirrors and normalizes decoded windows."""

    def __init__(self, threads: int, interpolation: Interpolation, mean: Rgb, std: Rgb) -> None:
        self._threads, self._interpolation = threads, interpolation
        self._scale_C11 = (1 / (255 * np.array(std, np.float32)))[:, None, None]
        self._shift_C11 = -(np.array(mean, np.float32) / np.array(std, np.float32))[:, None, None]
        self._pool = ThreadPoolExecutor(threads, "resize")

    def close(self) -> None:
        """Stops the threads after all submitted batches."""
        self._pool.shutdown()

    def submit(self, windows: Sequence[NDArray[np.uint8]], planned: PlannedBatch) -> PendingBatch:
        """Starts resizing a batch; each window is [height, width, 3]."""
        images_NCHW = torch.empty(len(planned), 3, planned.side, planned.side)
        out_NCHW = images_NCHW.numpy()
        parts = [
            self._pool.submit(self._resize_rows, windows, planned, out_NCHW, range(first, len(planned), self._threads))
            for first in range(self._threads)
        ]
        return PendingBatch(images_NCHW, parts, windows)

    def _resize_rows(
        self, windows: Sequence[NDArray[np.uint8]], p: PlannedBatch, out_NCHW: NDArray[np.float32], rows: range
    ) -> None:
        regions = p.regions()
        for i in rows:
            if p.sizes_B2[i].max() > _MAX_ASPECT * p.side:
                start_2, end_2 = (ends_B2[i] for ends_B2 in regions)
                cut_CHW = resized_region(windows[i], start_2, end_2, p.side, self._interpolation).transpose(2, 0, 1)
            else:
                cut_CHW = self._resize_whole(windows[i], p.sizes_B2[i].tolist(), p.origins_B2[i].tolist(), p.side)
            if p.flips_B[i]:
                cut_CHW = cut_CHW[..., ::-1]
            # NumPy, because torch would start its own threads from each of these threads.
            np.multiply(cut_CHW, self._scale_C11, out=out_NCHW[i])
            out_NCHW[i] += self._shift_C11

    def _resize_whole(
        self, window_HWC: NDArray[np.uint8], size: list[int], origin: list[int], side: int
    ) -> NDArray[np.uint8]:
        """Resizes the whole window and crops it to [3, side, side]; fast, except for very long images."""
        window_1CHW = torch.from_numpy(window_HWC).permute(2, 0, 1)[None]
        resized_1CHW = F.interpolate(window_1CHW, size, mode=self._interpolation, antialias=True)
        top, left = origin
        return resized_1CHW[0].numpy()[:, top : top + side, left : left + side]


def resized_region(
    window_HWC: NDArray[np.uint8],
    start_2: NDArray[np.float64],
    end_2: NDArray[np.float64],
    side: int,
    interpolation: Interpolation,
) -> NDArray[np.uint8]:
    """Resizes a region of a window to [side, side, 3]; equals resizing the whole window and cropping, within 1 of 255.

    Resizing a whole image of 20,000 x 1 pixels would take gigabytes. PIL's `box` is in single precision, so pixels
    outside the filter's support are cropped first.
    """
    radius_2 = _FILTER_RADIUS * np.maximum(1, (end_2 - start_2) / side)
    first_2 = np.floor(start_2 - radius_2).clip(0).astype(int)
    last_2 = np.minimum(np.ceil(end_2 + radius_2).astype(int), window_HWC.shape[:2])
    near = Image.fromarray(np.ascontiguousarray(window_HWC[first_2[0] : last_2[0], first_2[1] : last_2[1]]))
    (top, left), (bottom, right) = (start_2 - first_2).tolist(), (end_2 - first_2).tolist()
    # Horizontal pass first, then vertical, as torch; PIL alone starts with the vertical pass for some tall images.
    rows = near.resize((side, near.height), _FILTERS[interpolation], box=(left, 0, right, near.height))
    return np.asarray(rows.resize((side, side), _FILTERS[interpolation], box=(0, top, side, bottom)))
