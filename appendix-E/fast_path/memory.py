"""Memory: how much a call takes at most, and freed memory kept for the next training step."""

import ctypes
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def keep_freed_memory():
    """Let glibc keep freed buffers for the next step instead of mapping new pages.

    Holds for the whole process. Does nothing except on Linux with glibc.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(library, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_of_allocations(function):
    """Return the most bytes of tensors that are in CPU memory at once because of `function()`."""
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def quiet_stderr():
    """Drop what native code writes to standard error, such as the profiler's start message."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(function, device):
    """Return the most bytes in use while `function()` runs, everything allocated before it included.

    On a CUDA device what torch has allocated there, elsewhere the resident memory of this process
    (outside Linux since the process started; None on Windows).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # Linux, if permitted, forgets the earlier peak
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    function()
    return resident_peak()


def resident_peak():
    """Return the peak resident bytes of this process, None if unknown."""
    if sys.platform.startswith("linux"):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
