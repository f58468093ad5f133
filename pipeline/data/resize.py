"""Resizing on the CPU, by torch's kernel: torchvision's pixels, and several times as fast as DALI's CPU operator."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.config import Interpolation, Rgb
from pipeline.data.plan import PlannedBatch


class Pending:
    """Pictures that are being resized in threads; `windows` are kept until they are."""

    def __init__(self, images_NCHW: torch.Tensor, parts: list[Future[None]], windows: object) -> None:
        self._images_NCHW, self._parts, self._windows = images_NCHW, parts, windows

    def result(self) -> torch.Tensor:
        """The whole batch, fp32, normalised."""
        for part in self._parts:
            part.result()
        return self._images_NCHW


class Resizer:
    """Resizes decoded windows, cuts, mirrors and normalises them: the part of the plan that comes after decoding."""

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
        for i in rows:
            window_1CHW = torch.from_numpy(windows[i]).permute(2, 0, 1)[None]
            resized_1CHW = F.interpolate(window_1CHW, p.sizes_B2[i].tolist(), mode=self._interpolation, antialias=True)
            top, left = p.origins_B2[i]
            cut_CHW = resized_1CHW[0].numpy()[:, top : top + p.side, left : left + p.side]
            if p.flips_B[i]:
                cut_CHW = cut_CHW[..., ::-1]
            # NumPy, because torch would start threads of its own from each of these.
            np.multiply(cut_CHW, self._scale_C11, out=out_NCHW[i])
            out_NCHW[i] += self._shift_C11
