"""Each lock agrees with pyproject.toml."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Lock to the extras that it holds, and whether the project's own dependencies are in it (serving is vLLM alone).
LOCKS = {
    "cpu": (["train", "serve-cpu", "demo", "dev"], True),
    "cuda-train": (["train", "demo", "dev"], True),
    "cuda-serve": (["serve"], False),
}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / f"requirements/{name}.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(package): Version(version) for package, version in pairs}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def wanted(name: str) -> list[Requirement]:
    extras, own = LOCKS[name]
    texts = list(PROJECT["dependencies"]) if own else []
    return [Requirement(text) for text in texts + [text for extra in extras for text in PROJECT["optional-dependencies"][extra]]]


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_is_pinned_to_a_version_that_satisfies_it(name: str) -> None:
    found = pins(name)
    for requirement in wanted(name):
        version = found.get(normal(requirement.name))
        assert version is not None, f"{requirement} is not in {name}.lock"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{name}.lock has {version}, pyproject.toml wants {requirement}"
        )


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_everything_once(name: str) -> None:
    lines = [line for line in (ROOT / f"requirements/{name}.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and ">" not in line for line in lines)
    assert len({normal(line.split("==")[0]) for line in lines}) == len(lines) > 50


def test_what_breaks_beside_the_cpu_build_of_torch_is_left_out() -> None:
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pins("cpu"))
    assert pins("cpu")["torch"].local == "cpu"
    assert pins("cuda-train")["torch"].local != "cpu"


def test_what_images_hold_of_the_cpu_lock_is_what_they_would_be_given_now() -> None:
    import sys

    if not importlib.metadata.version("torch").endswith("+cpu"):
        pytest.skip("this environment is not cpu.lock's")
    sys.path.insert(0, str(ROOT / "requirements"))
    import lock

    for name, of in lock.PARTS.items():
        roots = PROJECT["dependencies"] + [each for extra in of["extras"] for each in PROJECT["optional-dependencies"][extra]]
        lines = [line for line in (ROOT / f"requirements/{name}.lock").read_text().splitlines() if not line.startswith("#")]
        assert lock.part(roots, of["without"]) == lines, "`python requirements/lock.py --parts` writes them"


def test_this_environment_is_the_lock() -> None:
    import importlib.metadata

    # The first of a name is the one that is imported; setuptools, where something imported it, has put older copies of its own after it.
    paths = reversed(list(importlib.metadata.distributions()))
    found = {normal(each.metadata["Name"]): Version(each.version) for each in paths}
    lock = next(pins(name) for name in ("cpu", "cuda-train") if (name == "cpu") == (found["torch"].local == "cpu"))
    assert {name: version for name, version in lock.items() if found.get(name) != version} == {}
