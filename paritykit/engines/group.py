"""Ending everything an engine's process started: politely first, so that shared memory is given back, then for sure."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

GRACE = 5.0
GLANCE = 0.05
TRACKER = "multiprocessing.resource_tracker"


def members(group: int) -> list[psutil.Process]:
    """The live processes of a process group, without this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [p for p in found if p.pid != os.getpid()]


def end_group(group: int) -> None:
    """Terminate the processes of ``group``, kill those still there after ``GRACE`` seconds, and at last all of it.

    multiprocessing's resource tracker comes last: when the others are gone it removes what they left in shared memory.
    """
    for how in (signal.SIGTERM, signal.SIGKILL):
        for process in members(group):
            with contextlib.suppress(psutil.Error):
                if not any(TRACKER in word for word in process.cmdline()):
                    process.send_signal(how)
        deadline = time.monotonic() + GRACE
        while members(group) and time.monotonic() < deadline:
            time.sleep(GLANCE)
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
