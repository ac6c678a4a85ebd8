"""The most memory that a piece of work held at a time: of this process, or of its GPU."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peak() -> Iterator[Callable[[], int | None]]:
    """Watch the memory from here on; what is yielded gives the most bytes that were held since, whenever it is called.

    On a GPU, what torch had allocated there; otherwise the resident memory of the whole process, which Linux can be asked to count
    anew (proc(5), clear_refs). None where the system does not count.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    try:
        # What was freed before is no part of this piece of work: glibc keeps it unless asked (malloc_trim(3)).
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        yield lambda: None
        return
    yield resident_peak


def resident_peak() -> int:
    """The largest resident memory of this process (bytes) since it was last counted anew."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
