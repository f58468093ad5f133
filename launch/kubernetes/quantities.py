"""Kubernetes quantities of CPU, memory and devices.

Source: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
"""

import re
from fractions import Fraction

_SUFFIXES = {"": Fraction(1), "m": Fraction(1, 1000)}
_SUFFIXES |= {suffix: Fraction(1000) ** (i + 1) for i, suffix in enumerate("kMGTP")}
_SUFFIXES |= {f"{suffix}i": Fraction(1024) ** (i + 1) for i, suffix in enumerate("KMGTP")}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]*)")


def parse_quantity(text: str) -> Fraction:
    """Returns the value of a quantity: cores, bytes or devices.

    Raises:
        ValueError: it is not a quantity.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{text} is not a quantity")
    return Fraction(match[1]) * _SUFFIXES[match[2]]


def format_quantity(value: Fraction, binary: bool) -> str:
    """Returns a quantity in Kubernetes' canonical form: an integer with the largest suffix that has no remainder.

    Kubernetes and its operators rewrite other forms, so that each apply would change the object again.

    Args:
        value: Cores, bytes or devices; a multiple of 1/1000, or of 1 with `binary`.
        binary: Whether suffixes are powers of 1024 (`Gi`), as for memory.
    """
    suffixes = [s for s in _SUFFIXES if not s or s.endswith("i") == binary]
    whole = [s for s in suffixes if (value / _SUFFIXES[s]).denominator == 1]
    suffix = max(whole, key=_SUFFIXES.__getitem__) if value else ""
    return f"{value / _SUFFIXES[suffix]}{suffix}"
