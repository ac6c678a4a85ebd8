"""What a machine that is not ready is told, in one sentence."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installer() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_an_old_python_is_named_with_what_is_needed(installer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer.sys, "version_info", (3, 9, 2))
    with pytest.raises(installer.Failure, match=r"Python 3\.9\.2 is too old: 3\.11 or newer is needed"):
        installer.check_python()


def test_a_small_disk_is_said_before_anything_is_fetched(installer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installer, "ROOT", tmp_path)
    with pytest.raises(installer.Failure, match=r"GB are free in .*, 1000000 GB are needed"):
        installer.check_disk(1_000_000)


def test_a_package_that_is_not_to_be_had_is_pips_own_sentence(installer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(installer.Failure, match="pip could not install the packages: ERROR: .*no-such-package-of-ours"):
        installer.pip(sys.executable, "install", "--dry-run", "no-such-package-of-ours==1.0")


def test_a_missing_cpu_build_of_torch_names_both_places(installer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    lock = tmp_path / "cpu.lock"
    lock.write_text("torch==0.0.1+cpu\n")
    with pytest.raises(
        installer.Failure, match="PyTorch's CPU build torch==0.0.1\\+cpu is not to be had, neither where pip looks nor at"
    ):
        installer.install_torch_cpu(sys.executable, lock)


def test_a_system_library_is_installed_or_the_command_is_said(installer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installer.need_library("libc.so.6", "libc6")  # there: nothing happens
    monkeypatch.setattr(installer.shutil, "which", lambda name: None)
    with pytest.raises(installer.Failure, match=r"vLLM needs libnot-there\.so\.1, .*run: sudo apt-get install libnot-there1"):
        installer.need_library("libnot-there.so.1", "libnot-there1")


def test_what_is_installed_already_is_left_alone() -> None:
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("this environment was not made by `make install`")
    done = subprocess.run([sys.executable, str(ROOT / "requirements/install.py")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
