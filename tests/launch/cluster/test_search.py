"""Parsing of a sweep's search space."""

import pytest

from launch.cluster.search import parse_space
from pipeline.errors import UserError


def test_log_uniform_and_choice():
    space = parse_space(
        ["optim.lr=log(0.01, 1)", "model.drop_rate=uniform(0,0.5)", "schedule.name=choice(cosine,linear)"]
    )
    assert (space["optim.lr"].lower, space["optim.lr"].upper) == (0.01, 1)
    assert (space["model.drop_rate"].lower, space["model.drop_rate"].upper) == (0, 0.5)
    assert space["schedule.name"].categories == ["cosine", "linear"]


@pytest.mark.parametrize(
    "wrong", ["optim.lr", "optim.lr=log(1)", "optim.lr=log(0,1)", "optim.lr=uniform(2,1)", "a=any(1)"]
)
def test_other_forms_are_refused(wrong):
    with pytest.raises(UserError, match=r"is not of the form KEY=log\(LOW,HIGH\)"):
        parse_space([wrong])
