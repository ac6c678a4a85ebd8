"""What a recipe may say, and how it is told what it may not."""

import json
import os
from pathlib import Path

import pytest

from tuner import kinds
from tuner.errors import RecipeError
from tuner.recipe import json_schema, read_recipe

GOOD = """\
model: some/model
data:
  train: train.jsonl
stages:
  - tune:
      task: sft
      learning_rate: 2.0e-3
  - merge: {}
"""


def read(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return read_recipe(path, list(overrides))


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text, *overrides)
    return str(error.value).replace(str(tmp_path) + "/", "")


def test_a_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    (name, tune), (second, _) = recipe.stages
    assert (name, second) == ("tune", "merge")
    assert (tune.task.kind, tune.method.kind, tune.method.rank) == ("sft", "lora", 16)
    assert tune.learning_rate == 2.0e-3


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD).data.train[0].path == str(tmp_path / "train.jsonl")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("learning_rate:", "learning_rat:", 'r.yaml:7: stages.0.tune.learning_rat: there is no key "learning_rat" here; did you mean "learning_rate"?'),
        ("2.0e-3", "2e-3", 'r.yaml:7: stages.0.tune.learning_rate: expected a number, found the text "2e-3" (YAML reads 2e-4 as text: write 2.0e-4)'),
        ("task: sft", "task: sftt", 'r.yaml:6: stages.0.tune.task: there is no "sftt"; did you mean "sft"?'),
        ("task: sft", "task: {kind: sft, max_token: 5}", 'r.yaml:6: stages.0.tune.task.max_token: there is no key "max_token" here; did you mean "max_tokens"?'),
        ("task: sft", "task: {kind: sft}\n      packing: true", 'r.yaml:7: stages.0.tune.packing: there is no key "packing" here; it belongs into task: `task: {packing: ...}`'),
        ("  - merge", "  - marge", 'r.yaml:8: stages.1.marge: there is no key "marge" here; did you mean "merge"?'),
        ("  train: train.jsonl", "  heldout: x", 'r.yaml:2: data: the key "train" is missing'),
        ("model:", "modle:", 'r.yaml:1: modle: there is no key "modle" here; did you mean "model"?'),
        ("learning_rate: 2.0e-3", "decay: cosin", 'r.yaml:7: stages.0.tune.decay: "cosin" is not one of the values; did you mean "cosine"?'),
        ("learning_rate: 2.0e-3", "batch_size: 8.5", "r.yaml:7: stages.0.tune.batch_size:"),
        ("learning_rate: 2.0e-3", "batch_size: 0", "r.yaml:7: stages.0.tune.batch_size: input should be greater than 0, found 0"),
        ("model:", "launch: 2\nmodel:", "r.yaml:1: launch: keys are expected below this one, found 2; there is: address, deepspeed, node"),
        ("some/model", "[1", "r.yaml:2: not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_with_its_line_and_the_nearest_name(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert said in complaint(tmp_path, GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("value", "said"),
    [("0", "input should be greater than 0, found 0"), ("many", '"many" is not one of the values; there is: auto')],
)
def test_what_may_be_a_word_or_a_number_is_one_complaint(tmp_path: Path, value: str, said: str) -> None:
    told = complaint(tmp_path, GOOD.replace("learning_rate: 2.0e-3", f"micro_batch_size: {value}"))
    assert told == f"r.yaml:7: stages.0.tune.micro_batch_size: {said}"


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    assert complaint(tmp_path, GOOD + "model: other/model\n") == 'r.yaml:9: the key "model" is there twice'


def test_steps_and_epochs_together_are_refused(tmp_path: Path) -> None:
    assert "steps and epochs both say how long to train" in complaint(
        tmp_path, GOOD, "stages.0.tune.steps=5", "stages.0.tune.epochs=2.0"
    )


def test_an_override_changes_a_key_and_is_named_in_complaints(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD, "stages.0.tune.steps=50").stages[0][1].steps == 50
    assert read(tmp_path, GOOD, "stages.0.tune.task.max_tokens=50").stages[0][1].task.max_tokens == 50
    assert complaint(tmp_path, GOOD, "stages.0.tune.stepz=5").startswith("--set stages.0.tune.stepz: ")
    assert "not one of the 2 entries" in complaint(tmp_path, GOOD, "stages.7.tune.steps=5")
    assert "expected KEY=VALUE" in complaint(tmp_path, GOOD, "steps")


def test_a_child_recipe_changes_its_parent_and_keeps_the_places(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(GOOD.replace("learning_rate", "learning_rat"))
    (tmp_path / "good.yaml").write_text(GOOD)
    child = read(tmp_path, "extends: good.yaml\nseed: 7\ndata:\n  train_rows: 5\n")
    assert (child.seed, child.data.train_rows, Path(child.data.train[0].path).name) == (7, 5, "train.jsonl")
    assert "parent.yaml:7:" in complaint(tmp_path, "extends: parent.yaml\n")
    assert "extends itself" in complaint(tmp_path, "extends: r.yaml\n")


def test_a_parent_that_is_not_there_is_named_with_the_line_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    said = complaint(tmp_path, "seed: 1\nextends: god.yaml\n")
    assert 'r.yaml:2: extends: there is no recipe "god.yaml" beside it; did you mean "good.yaml"?' in said


def test_what_set_replaces_is_never_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    with pytest.raises(RecipeError) as error:
        read_recipe(tmp_path / "good.yaml", ["stages=[{tune: {task: {kind: sft, max_tokenz: 3}}}]"])
    assert str(error.value).startswith("--set stages: stages.0.tune.task.max_tokenz")
    for bad in ("stages.²=1", "seed=" + "[" * 5000):
        with pytest.raises(RecipeError):
            read_recipe(tmp_path / "good.yaml", [bad])


def test_what_the_child_replaces_is_never_blamed_on_the_parent(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    said = complaint(tmp_path, "extends: good.yaml\nstages:\n  - tune:\n      stepz: 1\n")
    assert "r.yaml:4:" in said
    assert "r.yaml:3: stages.0.tune" in said, "the missing task is the child's own"
    assert "good.yaml" not in said


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"did you mean .*demo\.yaml"):
        read_recipe(tmp_path / "dmo.yaml")


def test_yaml_that_would_build_objects_is_refused(tmp_path: Path) -> None:
    assert "is not plain data" in complaint(tmp_path, GOOD.replace("some/model", "!!python/object/apply:os.system ['true']"))


@pytest.mark.parametrize(
    "old_new",
    [("some/model", ""), ("some/model", "2024-99-99"), ("some/model", "!!float abc"), ("some/model", "&a [*a]"), ("model:", "? [a, b]\n:"),
     ("some/model", "*nowhere"), ("some/model", "[" * 3000), ("- merge: {}", "- [merge]"), ("- merge: {}", "- "), (GOOD, ""), (GOOD, "- 1"),
     ("task: sft", "task: {max_tokens: 5}")],
    ids=range(12),
)  # fmt: skip
def test_odd_yaml_is_a_complaint_or_fine_and_never_a_crash(tmp_path: Path, old_new: tuple[str, str]) -> None:
    said = "r.yaml: fine"
    try:
        read(tmp_path, GOOD.replace(*old_new))
    except RecipeError as error:
        said = str(error)
    assert "r.yaml:" in said


def test_a_stage_without_options_needs_no_braces(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD.replace("- merge: {}", "- merge:")).stages[1][0] == "merge"


def test_a_method_without_its_kind_is_lora(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD, "stages.0.tune.method.rank=8").stages[0][1].method.rank == 8


def test_full_training_of_rounded_weights_is_refused(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD.replace("task: sft", "task: sft\n      method: {kind: full, storage: nf4}"))
    assert 'there is no key "storage" here' in said


def test_the_schema_names_every_stage_task_and_method() -> None:
    text = json_schema()
    json.loads(text)
    for folder in ("stages", "tasks", "methods"):
        for name in kinds.names(folder):
            assert f'"{name}"' in text, (folder, name)


@pytest.mark.parametrize("folder", ["tasks", "methods"])
def test_the_word_after_kind_is_the_name_of_the_file(folder: str) -> None:
    for name in kinds.names(folder):
        assert kinds.load(folder, name).Options.model_fields["kind"].default == name


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(set(RECIPES.glob("*.yaml")) - {RECIPES / "deploy.yaml"}), ids=lambda path: path.name)
def test_every_recipe_that_is_shipped_can_be_read(path: Path) -> None:
    assert read_recipe(path).stages


def test_the_deployment_that_is_shipped_names_what_recipes_make() -> None:
    from serve.deployment import Deployment, read_deployment

    models, settings = read_deployment(RECIPES / "deploy.yaml")
    for path in models.values():
        # Not resolved: after a run the stage's name is a link to its newest result.
        run, stage = Path(os.path.normpath(path)).relative_to(RECIPES.parent / "runs").parts
        assert stage == "base" or stage in {name for name, _ in read_recipe(RECIPES / f"{run}.yaml").stages}
    said = {
        line.split("#")[1].split(":")[0].strip()
        for line in (RECIPES / "deploy.yaml").read_text().splitlines()
        if line.startswith("# ")
    }
    assert set(Deployment.model_fields) - {"models", "start_timeout_s"} <= said
    assert settings.port == 8000


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_a_number_is_finite(tmp_path: Path, value: str) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"stages\.0\.tune\.epochs: .*finite number"):
        read_recipe(tmp_path / "good.yaml", [f"stages.0.tune.epochs={value}"])
