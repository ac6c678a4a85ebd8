"""A bundle: an ordinary checkpoint, adapter or tokenizer directory plus `bundle.json`, the manifest that says what it is.

Only the standard library is imported here, so that the serving side can read bundles without the training stack.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from tuner.errors import BundleError, disk_errors, nearest

MANIFEST = "bundle.json"
FORMAT = 1
KINDS = ("tokenizer", "model", "adapter", "quantized")


@dataclass(frozen=True)
class Manifest:
    """What `bundle.json` holds. Paths to other bundles are relative to this one, so that a run's directory can be moved."""

    kind: str
    stage: str
    fingerprint: str
    family: str | None = None
    head: str | None = None
    model_type: str | None = None
    base: str | None = None
    """The bundle that an adapter belongs to."""
    parents: list[dict[str, str]] = field(default_factory=list)
    """Oldest first: {"path", "stage", "fingerprint"} of each bundle that this one was made from."""
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)
    """Facts for an engine: dtype of the weights, max_tokens, adapter rank, whether it can be served as a live adapter."""
    probe: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name to {"size_bytes", "sha256"} of every file beside the manifest."""
    format: int = FORMAT


@dataclass(frozen=True)
class Bundle:
    """A directory and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The stage's name without number and fingerprint: `2-merge-1f0c9a7b` is called `merge`."""
        parts = self.path.resolve().name.split("-")
        return "-".join(parts[1:-1]) if len(parts) > 2 and parts[0].isdigit() else self.path.resolve().name

    def base(self) -> "Bundle":
        """The bundle that this adapter was trained on; raises BundleError where there is none."""
        if self.manifest.base is None:
            raise BundleError(f"{self.path}: a bundle of kind {self.manifest.kind} has no base")
        try:
            return open_bundle(self.path.resolve() / self.manifest.base)
        except BundleError as error:
            raise BundleError(
                f"{self.path}: is an adapter and useless without its base, "
                f"which should lie at {self.manifest.base} seen from it ({error})"
            ) from None


def open_bundle(path: Path) -> Bundle:
    """The bundle at `path`, its files present and of the right size. Raises BundleError, saying what is missing."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        found = "is not there" if not path.exists() else "is no directory" if not path.is_dir() else f"has no {MANIFEST}"
        siblings = [str(each.parent) for each in path.parent.glob(f"*/{MANIFEST}")] if not path.exists() else []
        inside = sorted(str(each.parent) for each in path.glob(f"[!.0-9]*/{MANIFEST}"))
        advice = nearest(str(path), inside or siblings) or "; a bundle is what `tuner run` leaves in runs/, such as runs/demo/merge"
        raise BundleError(f"{path} {found}{advice}")
    try:
        values = json.loads(manifest_path.read_text(encoding="utf-8"))
        unknown = set(values) - {each.name for each in fields(Manifest)}
        manifest = Manifest(**{key: value for key, value in values.items() if key not in unknown})
        _check_types(manifest)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{manifest_path}: not a manifest that this version reads ({error})") from None
    if manifest.format != FORMAT or manifest.kind not in KINDS:
        raise BundleError(f"{manifest_path}: format {manifest.format}, kind {manifest.kind!r}; this version reads format {FORMAT}")
    for name, facts in manifest.files.items():
        file = path / checked_name(name)
        size = file.stat().st_size if file.is_file() else None
        if size != facts["size_bytes"]:
            raise BundleError(
                f"{file}: {size if size is not None else 'no'} bytes, the manifest says {facts['size_bytes']}; "
                f"remove {path} and run the recipe again"
            )
    return Bundle(path, manifest)


def _check_types(manifest: Manifest) -> None:
    """Raises TypeError where a field is not of the form that `Manifest` says."""
    texts = (manifest.kind, manifest.stage, manifest.fingerprint)
    optional = (manifest.family, manifest.head, manifest.model_type, manifest.base)
    if not all(isinstance(each, str) for each in texts) or not all(each is None or isinstance(each, str) for each in optional):
        raise TypeError("a name is no text")
    mappings = {name: getattr(manifest, name) for name in ("recipe", "data", "serving", "metrics", "versions", "files")}
    for name, value in mappings.items():
        if not isinstance(value, dict):
            raise TypeError(f"{name} is no object")
    for name in ("parents", "probe"):
        value = getattr(manifest, name)
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise TypeError(f"{name} is no list of objects")
    if not all(isinstance(each.get(key), str) for each in manifest.parents for key in ("path", "stage", "fingerprint")):
        raise TypeError("a parent lacks its path, stage or fingerprint")
    if not all(isinstance(each, dict) and {"size_bytes", "sha256"} <= set(each) for each in manifest.files.values()):
        raise TypeError("a file lacks its size_bytes or sha256")


def verify(bundle: Bundle) -> None:
    """Hash every file again; raises BundleError at the first that is not the one that was sealed."""
    for name, facts in bundle.manifest.files.items():
        if sha256(bundle.path / checked_name(name)) != facts["sha256"]:
            raise BundleError(
                f"{bundle.path / name}: its sha256 is not the one in {MANIFEST}; the file was changed after it was made"
            )


def write_bundle(path: Path, partial: Path, fill: Callable[[Path], Manifest]) -> Bundle:
    """Let `fill` write files into the directory `partial`, hash and fsync them, add the manifest, rename to `path`.

    `path` either does not change or is whole: a killed process and a full disk (DiskFull) leave only `partial` behind.
    """
    with disk_errors(path):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            manifest = fill(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk, room for the next try
            raise
        files = {}
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                name = file.relative_to(partial).as_posix()
                files[name] = {"size_bytes": file.stat().st_size, "sha256": sha256(file)}
                fsync(file)
        sealed = Manifest(**{**asdict(manifest), "files": files})
        write_json(partial / MANIFEST, asdict(sealed))
        fsync(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        fsync(path.parent)
    return open_bundle(path)


def add_results(
    bundle: Bundle,
    *,
    metrics: dict[str, Any] | None = None,
    serving: dict[str, Any] | None = None,
    probe: list[dict[str, Any]] | None = None,
) -> Bundle:
    """Add what was measured, or how to serve it, to a finished bundle's manifest; its files and fingerprint stay as they are.

    A metric that is None is removed: it was measured under other conditions.
    """
    values = asdict(bundle.manifest)
    merged = {**values["metrics"], **(metrics or {})}
    values["metrics"] = {name: value for name, value in merged.items() if value is not None}
    values["serving"] |= serving or {}
    if probe is not None:
        values["probe"] = probe
    with disk_errors(bundle.path):
        write_json(bundle.path / MANIFEST, values)
    return open_bundle(bundle.path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(partial)
    partial.replace(path)


def checked_name(name: str) -> str:
    """The name, if it stays inside the bundle; raises BundleError where a manifest tries to point elsewhere."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise BundleError(f"the manifest names {name!r}, which is outside the bundle")
    return name


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change whenever any of the JSON-like parts changes."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fsync(path: Path) -> None:
    """Have a file or a directory on the disk before what comes next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
