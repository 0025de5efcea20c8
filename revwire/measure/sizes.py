"""Bytes as people read and write them: in binary units, of which a mebibyte (MiB) is 2^20 bytes."""

from __future__ import annotations

import re
from math import ceil, isfinite

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_SIZES = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_SIZES |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # decimal, understood but never written


def spelled(count: float, *, up: bool = False) -> str:
    """A number of bytes in GiB, MiB or KiB, whichever is apt; rounded ``up`` where it is the least of something.

    Example:
        >>> spelled(111_280_128), spelled(-1000), spelled(6 * 2**30 + 1, up=True)
        ('106.1 MiB', '-1.0 KiB', '6.01 GiB')
    """
    sizes = ((GIB, "GiB", 2), (MIB, "MiB", 1), (KIB, "KiB", 1))
    size, name, places = next((one for one in sizes if abs(count) >= one[0]), sizes[-1])
    value = ceil(count * 10**places / size) / 10**places if up else count / size
    return f"{value:.{places}f} {name}"


def parsed(text: str) -> int | None:
    """The number of bytes that a text such as ``"6GiB"``, ``"512 MB"`` or ``"1000"`` says; None where it says none.

    Example:
        >>> parsed("1.5 KiB"), parsed("2kB"), parsed("much")
        (1536, 2000, None)
    """
    match = re.fullmatch(r"(\d+\.?\d*)\s*(\w*)", text.strip())
    if match is None or match[2] not in _SIZES:
        return None
    count = float(match[1]) * _SIZES[match[2]]
    return int(count) if isfinite(count) else None
