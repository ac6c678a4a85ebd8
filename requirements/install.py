"""Set up `.venv` from a lock: `python3 requirements/install.py`. Only the standard library, since nothing else is there yet.

On a machine with an NVIDIA GPU there are two environments, because training and serving want different versions of torch.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
NEEDED_GB = {"cpu": 8, "cuda": 30}
ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    """Check the machine, make the environments, return the exit code."""
    try:
        check_python()
        gpu = shutil.which("nvidia-smi") is not None
        check_disk(NEEDED_GB["cuda" if gpu else "cpu"])
        if gpu:
            install(ROOT / ".venv", "cuda-train")
            install(ROOT / ".venv-serve", "cuda-serve")
        else:
            install(ROOT / ".venv", "cpu")
            need_library("libnuma.so.1", "libnuma1")
    except Failure as error:
        print(f"install: {error}", file=sys.stderr)
        return 2
    return 0


class Failure(Exception):
    """Something that the person at the keyboard can put right."""


def check_python() -> None:
    """Raises Failure where this Python is too old."""
    if sys.version_info < OLDEST:
        found = ".".join(map(str, sys.version_info[:3]))
        raise Failure(f"Python {found} is too old: 3.11 or newer is needed; name one with `make PYTHON=python3.11 ...`")


def check_disk(needed_gb: int) -> None:
    """Raises Failure where the disk is too small for the packages and a first run."""
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < needed_gb and not (ROOT / ".venv").exists():
        raise Failure(f"{free_gb:.1f} GB are free in {ROOT}, {needed_gb} GB are needed for the packages and a first run")


def install(folder: Path, lock_name: str) -> None:
    """Make the environment `folder` hold exactly the lock and, but for serving, this project."""
    lock = ROOT / "requirements" / f"{lock_name}.lock"
    stamp, wanted = folder / ".installed", hashlib.sha256(lock.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"install: {folder.name} from {lock.name} (2 to 5 minutes, about {'3.5' if lock_name == 'cpu' else '10'} GB)", flush=True)
    make_environment(folder)
    python = str(folder / "bin" / "python")
    if lock_name == "cpu":
        install_torch_cpu(python, lock)
    pip(python, "install", "--no-deps", "-r", str(lock))
    if lock_name != "cuda-serve":
        pip(python, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    stamp.write_text(wanted)


def make_environment(folder: Path) -> None:
    """An empty virtual environment; Debian and Ubuntu keep a part of it in a package of its own."""
    if (folder / "bin" / "pip").exists():
        return
    if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True).returncode:
        apt_install(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv", "Python's venv module is missing")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{folder} could not be made: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def install_torch_cpu(python: str, lock: Path) -> None:
    """PyTorch's CPU build: from wherever pip is told to look, else from PyTorch's own index."""
    pin = next(line for line in lock.read_text().splitlines() if line.startswith("torch=="))
    for place in ([], ["--index-url", TORCH_CPU_INDEX]):
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *place, pin], capture_output=True, text=True)
        if done.returncode == 0:
            return
    raise Failure(
        f"PyTorch's CPU build {pin} is not to be had, neither where pip looks nor at {TORCH_CPU_INDEX}: {last_error(done.stderr)}"
    )


def pip(python: str, *arguments: str) -> None:
    """Run pip; raises Failure with its own last error."""
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise Failure(f"pip could not install the packages: {last_error(done.stderr)}; the same command continues")


def last_error(text: str) -> str:
    """The line in which pip says what it could not find or reach."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("ERROR")]
    return (lines or text.strip().splitlines()[-1:] or ["pip said nothing"])[0]


def need_library(name: str, package: str) -> None:
    """Install a system library that vLLM loads, where it is missing."""
    try:
        ctypes.CDLL(name)
    except OSError:
        apt_install(package, f"vLLM needs {name}")


def apt_install(package: str, reason: str) -> None:
    """Install a Debian package as root or through sudo without a password; raises Failure with the command otherwise."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") and (not sudo or shutil.which("sudo")):
        print(f"install: {reason}: installing {package}", flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*sudo, "apt-get", "update"], **quiet)  # type: ignore[call-overload]
        done = subprocess.run([*sudo, "apt-get", "install", "-y", "--no-install-recommends", package], **quiet)  # type: ignore[call-overload]
        if done.returncode == 0:
            return
    raise Failure(f"{reason}, and it could not be installed from here; run: sudo apt-get install {package}")


if __name__ == "__main__":
    sys.exit(main())
