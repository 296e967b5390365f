"""Values that a policy writes as text: amounts of memory, and ranges of layers or experts."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
MEMORY_PATTERN = r"^[0-9]+(\.[0-9]+)?(%|k|M|G|T|Ki|Mi|Gi|Ti)?$"
RANGES_PATTERN = r"^[0-9]+(-[0-9]*)?(,[0-9]+(-[0-9]*)?)*$"


def memory_bytes(amount: int | str, *, whole_bytes: int) -> int:
    """Bytes of an amount such as 1000, "12Gi", "1.5G", or "25%", which is a share of `whole_bytes`.

    Raises: ValueError that says what an amount looks like.
    """
    if isinstance(amount, int):
        return amount
    if re.match(MEMORY_PATTERN, amount) is None:
        raise ValueError(f"must be bytes, with a unit (12Gi, 500M) or a share (25%), got {amount!r}")
    number, unit = re.fullmatch(r"([0-9.]+)(.*)", amount).groups()  # type: ignore[union-attr]  # it matched above
    return int(Decimal(number) * whole_bytes / 100 if unit == "%" else Decimal(number) * _UNITS[unit])


def indices_in(ranges: str, *, count: int) -> list[int]:
    """Indices, ascending, that "0-3,7,20-" names of `count`: ends are included, an open end is the last.

    Raises: ValueError that says what ranges look like, or that an index is too high.
    """
    if re.match(RANGES_PATTERN, ranges) is None:
        raise ValueError(f"must be indices and ranges such as '0-3,7,20-', got {ranges!r}")
    indices: set[int] = set()
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last or (count - 1 if dash else first))
        if max(low, high) >= count:
            raise ValueError(f"must be below {count}, got {part!r}")
        if low > high:
            raise ValueError(f"must be ranges from a lower to a higher index, got {part!r}")
        indices.update(range(low, high + 1))
    return sorted(indices)
