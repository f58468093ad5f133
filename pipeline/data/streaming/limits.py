"""Whether a data set can be trained within `data.stage_limit`: checked before training, with the arithmetic."""

import numpy as np

from pipeline.config_data import Data
from pipeline.data.index import DatasetIndex
from pipeline.errors import DataError
from pipeline.formatting import format_bytes


def check_limit(data: Data, train_index: DatasetIndex, val: int) -> None:
    """Checks that `data.stage_limit` is enough for the way in which the training split is read.

    `val` is the size of the shards for evaluation, bytes; they are copied whole, and count.

    Raises:
        DataError: it is not; the message has the sizes, and the settings that fit.
    """
    limit = data.stage_limit_bytes
    if limit is None:
        return
    if not train_index.shards:
        raise DataError(
            f"data.stage_limit={data.stage_limit} limits the disk space of shards, but data.root={data.root} has class "
            f"folders: prepare shards or unset data.stage and data.stage_limit."
        )
    train = shard_bytes(train_index)
    sizes = f"{format_bytes(train)} for training and {format_bytes(val)} for evaluation"
    if data.shuffle == "full":
        if train + val > limit:
            missing = 1 - max(0, limit - val) / train
            raise DataError(
                f"data.stage_limit={data.stage_limit} ({format_bytes(limit)}) is less than {sizes}. data.shuffle=full "
                f"reads samples of all shards at any time, so {missing:.0%} of the samples would be read over the "
                f"network one by one: use data.shuffle=windowed, which reads shards in the order of their use."
            )
        return
    sizes_S = np.sort([shard.bytes for shard in train_index.shards.values()])[::-1]
    needed = val + int(sizes_S[: 2 * data.window].sum())
    if needed > limit:
        fitting = int(np.searchsorted(np.cumsum(sizes_S), limit - val, "right")) // 2
        advice = f"or data.window={fitting} or less" if fitting else "or smaller shards (densenet data prepare)"
        raise DataError(
            f"data.stage_limit={data.stage_limit} ({format_bytes(limit)}) is too small for {sizes}: two windows of "
            f"data.window={data.window} shards need {format_bytes(needed - val)} on disk, since one is fetched while "
            f"the other is read. Set data.stage_limit to {-(-needed // 10**6)}MB or more, {advice}."
        )


def shard_bytes(index: DatasetIndex) -> int:
    """Returns the size of all shards of a split, bytes."""
    return sum(shard.bytes for shard in index.shards.values())
