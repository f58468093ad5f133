"""Following a job's logs over lost connections."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from launch.cluster.jobs import _LogFollower


class Flaky:
    """A dashboard whose first connection breaks in a line; each connection sends the logs from their start."""

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        yield "one\nt"
        if self.connections == 1:
            raise ConnectionError
        yield "wo\n"
        yield "three\n"


def test_each_character_is_printed_once(capsys):
    dashboard, follower = Flaky(), _LogFollower()
    with pytest.raises(ConnectionError):
        asyncio.run(follower.follow(dashboard, "job"))
    asyncio.run(follower.follow(dashboard, "job"))
    asyncio.run(follower.follow(dashboard, "job"))
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
