"""Quantities are parsed exactly, and written in Kubernetes' canonical form."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.kubernetes.quantities import format_quantity, parse_quantity


@pytest.mark.parametrize(
    ("text", "canonical", "binary"),
    [
        ("1024Mi", "1Gi", True),
        ("1.5Gi", "1536Mi", True),
        ("0.5Ti", "512Gi", True),
        ("1000M", "1G", False),
        ("0.5", "500m", False),
        ("64", "64", False),
        ("1536", "1536", True),
        ("0", "0", False),
    ],
)
def test_canonical_forms(text, canonical, binary):
    assert format_quantity(parse_quantity(text), binary) == canonical


@given(st.integers(0, 10**18), st.booleans())
def test_a_written_quantity_is_read_as_the_same_value(number, binary):
    value = Fraction(number) if binary else Fraction(number, 1000)
    text = format_quantity(value, binary)
    assert parse_quantity(text) == value
    assert format_quantity(parse_quantity(text), binary) == text


@pytest.mark.parametrize("text", ["", "lots", "1X", "-1", "1 Gi", "Gi"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not a quantity"):
        parse_quantity(text)
