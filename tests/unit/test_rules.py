"""The rules of the architecture, read off the source."""

import ast
import re
from pathlib import Path

import pytest

from tuner import kinds

ROOT = Path(__file__).parents[2]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


SERVE = sorted((ROOT / "serve").rglob("*.py"))
TUNER = sorted((ROOT / "tuner").rglob("*.py"))


@pytest.mark.parametrize("path", SERVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_serve_takes_only_bundle_and_errors_from_tuner(path: Path) -> None:
    taken = {name for name in imports(path) if name.split(".")[0] == "tuner"}
    assert all(name.startswith(("tuner.bundle", "tuner.errors")) for name in taken), taken


def test_an_engine_takes_back_what_trainings_want() -> None:
    from serve import engine
    from tuner import memory

    assert engine.OWN == memory.COMPILED | memory.SPIN


@pytest.mark.parametrize("path", TUNER, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_takes_anything_from_serve(path: Path) -> None:
    taken = {name for name in imports(path) if name.split(".")[0] == "serve"}
    assert not taken or path.name == "cli.py"


@pytest.mark.parametrize("path", SERVE + TUNER, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_vllm(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] == "vllm"}


def test_bundles_are_read_with_the_standard_library_alone() -> None:
    own = {name for name in imports(ROOT / "tuner/bundle.py") if name.split(".")[0] not in __import__("sys").stdlib_module_names}
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in own} == {"tuner.errors"}


@pytest.mark.parametrize("path", SERVE + TUNER, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_branch_on_a_family_task_or_method(path: Path) -> None:
    words = "|".join(word for folder in ("families", "tasks", "methods") for word in kinds.names(folder))
    assert not re.search(rf"\b(if|elif|case)\b.*==? *[\"']({words})[\"']", path.read_text())


@pytest.mark.parametrize("name", kinds.names("stages"))
def test_a_stage_file_has_what_the_chain_needs(name: str) -> None:
    stage = kinds.load("stages", name)
    assert {"Options", "TAKES", "RESULT", "VERSION", "gives", "run"} <= set(dir(stage))


@pytest.mark.parametrize("name", kinds.names("tasks"))
def test_a_task_file_has_what_stages_and_measuring_need(name: str) -> None:
    task = kinds.load("tasks", name)
    assert {"Options", "HEAD", "KEYS", "check_row", "examples", "question", "objective", "scores"} <= set(dir(task))
    assert task.HEAD in kinds.names("heads")
    assert {"kind", "max_tokens"} <= set(task.Options.model_fields)


@pytest.mark.parametrize("name", kinds.names("methods"))
def test_a_method_file_has_what_the_tune_stage_needs(name: str) -> None:
    method = kinds.load("methods", name)
    assert {"Options", "GIVES", "storage", "check", "prepare", "layers", "save", "serving"} <= set(dir(method))
