"""Following a job's output over connections that break."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from launch.cluster.jobs import _Output


class Flaky:
    """A dashboard whose connection breaks in the middle of a line the first time; each one begins anew."""

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
    dashboard, output = Flaky(), _Output()
    with pytest.raises(ConnectionError):
        asyncio.run(output.follow(dashboard, "job"))
    asyncio.run(output.follow(dashboard, "job"))
    asyncio.run(output.follow(dashboard, "job"))
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
