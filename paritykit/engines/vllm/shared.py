"""Shared memory of vLLM's ranks on a CPU: it has a name until the last process ends in peace, and some do not."""

from __future__ import annotations

import re
from pathlib import Path

MAPS = Path("/proc/self/maps")
SEGMENT = re.compile(r"(/dev/shm/\S*-cpushm_\d+)$")


def forget_names() -> None:
    """Remove the names of the segments that this process has mapped; the memory stays until all ranks are gone.

    Only for ranks that have met: names are there for them to find each other.
    """
    if MAPS.exists():
        for line in MAPS.read_text(encoding="utf-8").splitlines():
            found = SEGMENT.search(line)
            if found:
                Path(found[1]).unlink(missing_ok=True)
