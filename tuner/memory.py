"""Memory: the most that a piece of work held at a time, and how much more there is to be had; of this process, or of its GPU."""

import ctypes
import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Where control groups are mounted, the limit, what is used, and what of it are pages of files that can go; versions 2 and 1.
GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}

# The name in malloc.h, the size from which on a tensor lies outside of the heap, and that of a large page (bytes).
M_MMAP_THRESHOLD, APART, LARGE = -3, 8 * 2**20, 2 * 2**20
# So much of the most that was held may be free and stay with glibc.
SPARE = 0.1

# Threads of OpenMP wait for their next piece of work by turning so often (libgomp) before they sleep, some 50 microseconds. A step
# on few tokens is thousands of such pieces, and waking a thread up takes as long as most of them.
SPIN = {"GOMP_SPINCOUNT": "3000"}

# oneDNN, and torch's own layer above it, each keep what was compiled for 1,024 shapes of products, 280 KB a shape, and rows of
# every other length bring a dozen. These are enough for a few lengths in turns, and compiling one again takes a quarter of a
# millisecond. Read when they are first used.
COMPILED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


class _Heap:
    """What this process held when it last gave back what was free (bytes)."""

    used = 0


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
        give_back()
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        yield lambda: None
        return
    yield resident_peak


def give_back() -> None:
    """Let the system have what was freed: glibc keeps it unless asked (malloc_trim(3)). Raises AttributeError without glibc."""
    ctypes.CDLL(None).malloc_trim(0)
    _Heap.used = _status("VmRSS")


def tidy() -> None:
    """Between two pieces of work: what is free goes back where that may be more than a tenth of the most that was held.

    Rows of other lengths leave other holes. Without this 32 rows of up to 256 tokens, told as 2.01 GB and 1.95 at the largest step,
    held 2.61 after ten steps. glibc does not tell what is free; it is what came since it was last given back.
    """
    import torch

    if not torch.cuda.is_available():
        with suppress(OSError, AttributeError):
            if _status("VmRSS") - _Heap.used > SPARE * resident_peak():
                give_back()


def large_apart() -> None:
    """Have what is as large as 8 MB outside of glibc's heap from here on, so that it goes back when it is freed.

    Left alone, glibc raises that size to 32 MB (mallopt(3), M_MMAP_THRESHOLD), and its heap gets holes that differ from run to run.
    With 2 MB training an encoder in float32 took a seventh longer: each tensor comes in pages that are yet to be filled with zeros.
    Raises AttributeError without glibc.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, APART)


def resident_peak() -> int:
    """The largest resident memory of this process (bytes) since it was last counted anew."""
    return _status("VmHWM")


def held() -> int:
    """The bytes that are held now: allocated by torch on a GPU, else resident in this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    with suppress(AttributeError):
        give_back()
    return _status("VmRSS")


def room(processes: int = 1) -> tuple[int, str]:
    """(how many bytes more can be held, what ends there): a GPU, this machine, a control group (a container), or `ulimit -v`.

    So many `processes` share the machine's and the group's; a GPU and `ulimit -v` each has to itself.
    """
    import psutil
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()), "the GPU's memory"
    each = f", for each of {processes} processes" if processes > 1 else ""
    found = [(int(psutil.virtual_memory().available) // processes, f"this machine's memory{each}")]
    found += [(free // processes, f"its control group's limit, such as a container's{each}") for free in _rooms_of_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append((limit - _status("VmSize"), "`ulimit -v`"))
    return min(found)


def ran_out(error: BaseException) -> bool:
    """The error says that there was no memory left. torch has a class for a GPU's, and for the processor's nothing but words."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = ("can't allocate memory", "not enough memory", "start new thread", "out of memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _rooms_of_groups() -> Iterator[int]:
    """What is left below the limit of each control group that this process is in, and of the groups around it."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            for name, (mount, limit, used, files) in GROUPS.items():
                if name not in controllers.split(","):
                    continue
                # From inside a container its own group is the mount itself.
                inner = Path(mount) / own.lstrip("/")
                for folder in (each for each in (inner, *inner.parents) if each.is_relative_to(mount)):
                    with suppress(OSError, ValueError):
                        kept = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                        free = int((folder / limit).read_text()) - int((folder / used).read_text())
                        yield free + int(kept.get(files, 0))


def _status(name: str) -> int:
    """A size (bytes) from proc(5), status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
