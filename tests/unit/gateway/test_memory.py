"""Memory of large bodies goes back to the system."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import psutil
from moeless.gateway.memory import return_large_blocks

def resident_mb():
    return psutil.Process().memory_info().rss / 2**20

if sys.argv[1] == "set":
    assert return_large_blocks()
for size in (1, 2, 4, 8, 16):  # as bodies of growing size come and go
    bytearray(size * 2**20)
before = resident_mb()
blocks, kept = [], []
for _ in range(40):
    blocks.append(b"x" * (2 * 2**20))
    kept.append(b"y" * 100_000)  # something smaller that stays between them
del blocks
print(resident_mb() - before - 4)
"""


def growth_mb(mode: str) -> float:
    done = subprocess.run([sys.executable, "-c", "import sys\n" + SCRIPT, mode], capture_output=True, check=True)
    return float(done.stdout)


def test_freed_blocks_do_not_stay_between_small_ones_that_live() -> None:
    assert growth_mb("unset") > 40, "the C library gives blocks back by itself; the setting is of no use"
    assert growth_mb("set") < 10
