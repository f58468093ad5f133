"""Resizing on the CPU, by torch's kernel: torchvision's pixels, and several times as fast as DALI's CPU operator."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Interpolation, Rgb
from pipeline.data.plan import PlannedBatch

_LONG = 8  # sides of the square: of a resized image that is longer only the square is computed
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_REACH = 4  # pixels that the filters look at beside the region, at most, where an image is not made smaller


class Pending:
    """Images that are being resized in threads; `windows` are kept until they are."""

    def __init__(self, images_NCHW: torch.Tensor, parts: list[Future[None]], windows: object) -> None:
        self._images_NCHW, self._parts, self._windows = images_NCHW, parts, windows

    def result(self) -> torch.Tensor:
        """The whole batch, fp32, normalized."""
        for part in self._parts:
            part.result()
        return self._images_NCHW


class Resizer:
    """Resizes decoded windows, cuts, mirrors and normalizes them: the part of the plan that comes after decoding."""

    def __init__(self, threads: int, interpolation: Interpolation, mean: Rgb, std: Rgb) -> None:
        self._threads, self._interpolation = threads, interpolation
        self._scale_C11 = (1 / (255 * np.array(std, np.float32)))[:, None, None]
        self._shift_C11 = -(np.array(mean, np.float32) / np.array(std, np.float32))[:, None, None]
        self._pool = ThreadPoolExecutor(threads, "resize")

    def close(self) -> None:
        """Ends the threads, after what has been submitted."""
        self._pool.shutdown()

    def submit(self, windows: Sequence[NDArray[np.uint8]], planned: PlannedBatch) -> Pending:
        """Begins to resize a batch; each window is [height, width, 3]."""
        images_NCHW = torch.empty(len(planned), 3, planned.side, planned.side)
        out_NCHW = images_NCHW.numpy()
        parts = [
            self._pool.submit(self._part, windows, planned, out_NCHW, range(first, len(planned), self._threads))
            for first in range(self._threads)
        ]
        return Pending(images_NCHW, parts, windows)

    def _part(
        self, windows: Sequence[NDArray[np.uint8]], p: PlannedBatch, out_NCHW: NDArray[np.float32], rows: range
    ) -> None:
        regions = p.regions()
        for i in rows:
            if p.sizes_B2[i].max() > _LONG * p.side:
                start_2, end_2 = (ends_B2[i] for ends_B2 in regions)
                cut_CHW = resized_region(windows[i], start_2, end_2, p.side, self._interpolation).transpose(2, 0, 1)
            else:
                cut_CHW = self._resized(windows[i], p.sizes_B2[i].tolist(), p.origins_B2[i].tolist(), p.side)
            if p.flips_B[i]:
                cut_CHW = cut_CHW[..., ::-1]
            # NumPy, because torch would start threads of its own from each of these.
            np.multiply(cut_CHW, self._scale_C11, out=out_NCHW[i])
            out_NCHW[i] += self._shift_C11

    def _resized(
        self, window_HWC: NDArray[np.uint8], size: list[int], origin: list[int], side: int
    ) -> NDArray[np.uint8]:
        """The square [3, side, side] of the whole window at its new size; the fast way, for all but very long ones."""
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
    """A region of a window, [side, side, 3], with the pixels of resizing all of it and cutting after, give or take 1.

    Of an image of 20,000 x 1 pixels resizing all would take gigabytes. PIL's `box` is in single precision, so what the
    filter does not reach is cut off first.
    """
    reach_2 = _REACH * np.maximum(1, (end_2 - start_2) / side)
    first_2 = np.floor(start_2 - reach_2).clip(0).astype(int)
    last_2 = np.minimum(np.ceil(end_2 + reach_2).astype(int), window_HWC.shape[:2])
    near = Image.fromarray(np.ascontiguousarray(window_HWC[first_2[0] : last_2[0], first_2[1] : last_2[1]]))
    (top, left), (bottom, right) = (start_2 - first_2).tolist(), (end_2 - first_2).tolist()
    # Rows first, then columns, as torch does; PIL by itself begins with the columns of some high images.
    rows = near.resize((side, near.height), _FILTERS[interpolation], box=(left, 0, right, near.height))
    return np.asarray(rows.resize((side, side), _FILTERS[interpolation], box=(0, top, side, bottom)))
