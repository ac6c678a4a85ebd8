"""A bundle is whole or not there."""

import json
from pathlib import Path

import pytest

from tuner.bundle import Manifest, add_results, open_bundle, verify, write_bundle
from tuner.errors import BundleError, DiskFull


def fill(folder: Path) -> Manifest:
    (folder / "weights").write_bytes(b"x" * 1000)
    return Manifest(kind="model", stage="merge", fingerprint="abc")


@pytest.fixture
def bundle(tmp_path: Path):
    return write_bundle(tmp_path / "2-merge-12345678", tmp_path / ".part", fill)


def test_a_bundle_is_found_again_with_sizes_and_hashes(bundle) -> None:
    assert bundle.manifest.files["weights"]["size_bytes"] == 1000
    assert bundle.name == "merge"
    verify(open_bundle(bundle.path))


def test_results_are_added_without_touching_the_files(bundle) -> None:
    assert add_results(bundle, metrics={"a": 1, "b": 2}).manifest.metrics == {"a": 1, "b": 2}
    assert add_results(bundle, metrics={"b": None}).manifest.metrics == {}
    verify(open_bundle(bundle.path))


def test_a_changed_file_is_noticed(bundle) -> None:
    (bundle.path / "weights").write_bytes(b"y" * 1000)
    with pytest.raises(BundleError, match="weights: its sha256 is not the one"):
        verify(open_bundle(bundle.path))
    (bundle.path / "weights").write_bytes(b"y")
    with pytest.raises(BundleError, match="1 bytes, the manifest says 1000"):
        open_bundle(bundle.path)
    (bundle.path / "weights").unlink()
    with pytest.raises(BundleError, match="no bytes"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_point_outside(bundle, name: str) -> None:
    path = bundle.path / "bundle.json"
    values = json.loads(path.read_text())
    values["files"][name] = {"size_bytes": 1, "sha256": ""}
    path.write_text(json.dumps(values))
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(bundle.path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("files", []),
        ("files", {"weights": {}}),
        ("metrics", "x"),
        ("probe", [1]),
        ("parents", [{}]),
        ("serving", None),
        ("fingerprint", 1),
        ("base", ["/"]),
    ],
)
def test_a_manifest_with_a_field_of_another_form_is_refused(bundle, name: str, value: object) -> None:
    path = bundle.path / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(BundleError, match=r"bundle\.json: not a manifest that this version reads"):
        open_bundle(bundle.path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "[]", "{}", '{"kind": "model"}', '{"kind": "x", "stage": "", "fingerprint": ""}']
)
def test_a_damaged_manifest_is_said_in_one_sentence(bundle, text: str) -> None:
    (bundle.path / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        open_bundle(bundle.path)


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="is not there"):
        open_bundle(tmp_path / "x")


def test_a_failed_save_leaves_the_earlier_result_alone(bundle, tmp_path: Path) -> None:
    def fails(folder: Path) -> Manifest:
        (folder / "weights").write_bytes(b"z")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFull, match="the disk is full while writing .*what was finished before is intact"):
        write_bundle(bundle.path, tmp_path / ".part", fails)
    verify(open_bundle(bundle.path))


def test_a_disk_that_fills_up_is_a_clear_error_whichever_library_writes(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    first = write_bundle(small_disk / "1-a-00000000", small_disk / ".part", fill)

    def by_safetensors(folder: Path) -> Manifest:
        save_file({"a": torch.zeros(1_000_000)}, folder / "weights.safetensors")
        return Manifest(kind="model", stage="merge", fingerprint="b")

    def by_python(folder: Path) -> Manifest:
        (folder / "weights").write_bytes(b"x" * 4_000_000)
        return Manifest(kind="model", stage="merge", fingerprint="c")

    for number, each in enumerate((by_safetensors, by_python)):
        with pytest.raises(DiskFull, match="make room and run the same command again"):
            write_bundle(small_disk / f"2-b-{number}", small_disk / ".part", each)
        assert not (small_disk / f"2-b-{number}").exists()
    verify(open_bundle(first.path))


def test_an_adapter_without_its_base_says_where_that_should_be(bundle) -> None:
    path = bundle.path / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "adapter", "base": "../0-base-x"}))
    with pytest.raises(BundleError, match=r"is an adapter and useless without its base, which should lie at \.\./0-base-x"):
        open_bundle(bundle.path).base()


def test_a_runs_directory_in_place_of_a_bundle_names_the_bundles_in_it(bundle) -> None:
    (bundle.path.parent / "merge").symlink_to(bundle.path)
    with pytest.raises(BundleError, match=r"has no bundle\.json; did you mean .*merge"):
        open_bundle(bundle.path.parent)
