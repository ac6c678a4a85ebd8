"""New tokens: the mean of their parts at first, then trained beside an adapter and merged, in every architecture."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import chat_rows, write_rows
from tests.grid.test_grid import ARCHITECTURES, TASKS
from tests.grid.test_handover import recipe
from tuner import vocabulary
from tuner.checkpoint import load_model, load_tokenizer
from tuner.errors import DataError, GateError, RecipeError
from tuner.families import family_of
from tuner.plan import make_plan
from tuner.recipe import read_recipe
from tuner.report import rows, write_report
from tuner.run import run

EXTEND = {"extend": {"learned": 4, "min_frequency": 2, "listed": ["az vm"]}}


def extended(
    folder: Path, model: Path, task: str, *after: dict[str, Any], extend: dict[str, Any] | None = None, **tune: Any
) -> Any:
    """A plan that extends the model's tokenizer, then tunes; and the directory of its results."""
    path = recipe(folder, model, task, list(after), **tune)
    written = path.read_text().replace("stages:\n", f"stages:\n- extend: {EXTEND['extend'] if extend is None else extend}\n")
    path.write_text(written)
    return make_plan(read_recipe(path), folder / "out"), folder / "out"


def parts_of(old: Any, new: Any) -> dict[int, list[int]]:
    """Each new token, and what the old tokenizer cuts its text into: for learned tokens and listed ones the same."""
    first = max(old.get_vocab().values()) + 1
    return {
        number: old(new.decode([number]), add_special_tokens=False)["input_ids"]
        for number in new.get_vocab().values()
        if number >= first
    }


# One of each family, one with the embeddings apart, one whose layers are of two kinds; the others take another half minute.
FAST = ("llama", "gpt2", "gpt_neox", "bert", "mamba", "mamba2", "falcon_h1")


@pytest.mark.parametrize(
    "model_type", [pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in ARCHITECTURES]
)
def test_new_tokens_are_trained_beside_an_adapter_and_merged(checkpoints: Any, tmp_path: Path, model_type: str) -> None:
    import torch

    base = checkpoints(model_type)
    task = "embed" if family_of(model_type)[0].name == "bert" else "pretrain"
    if getattr(load_model(base).get_output_embeddings(), "bias", None) is not None and task == "pretrain":
        with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: stages.1.tune.*: the model's output layer has a bias"):
            extended(tmp_path, base.path, task)
        return
    plan, out = extended(tmp_path, base.path, task, {"merge": {}})
    *_, wider, tuned, merged = run(plan, out)
    first, end = wider.manifest.serving["new_tokens"]
    assert (
        end - first
        == len(load_tokenizer(wider.path)) - len(load_tokenizer(base.path))
        == wider.manifest.metrics["extend"]["tokens"]
        > 1
    )
    old, new, last = (load_model(each) for each in (base, wider, merged))
    rows = [
        [each.get_input_embeddings().weight, getattr(each.get_output_embeddings(), "weight", None)] for each in (old, new, last)
    ]
    parts = parts_of(load_tokenizer(base.path), load_tokenizer(wider.path))
    assert sorted(parts) == list(range(first, end))
    for before, filled, trained in zip(*rows, strict=True):
        if before is not None and filled is not None:
            torch.testing.assert_close(filled[:first], before[:first], rtol=0, atol=0)
            for number, pieces in parts.items():
                torch.testing.assert_close(filled[number], before[pieces].mean(0), rtol=0, atol=1e-8)
            if trained is not None:
                torch.testing.assert_close(trained[:first], before[:first], rtol=0, atol=0)
                texts = [text for row in TASKS[task][1] for text in row.values()]
                for number in vocabulary.count(load_tokenizer(wider.path), texts).keys() & parts.keys():
                    assert not torch.equal(trained[number], filled[number])
    assert merged.manifest.metrics["probe"]["max_difference"] <= 1e-4
    assert tuned.manifest.metrics["training"]["difference_from_base"] > 0


@pytest.mark.parametrize(("model_type", "task"), [("bert", "masked"), ("phi", "pretrain")])
def test_an_output_layer_with_a_bias_gets_new_tokens_by_full_training(
    checkpoints: Any, tmp_path: Path, model_type: str, task: str
) -> None:
    plan, out = extended(tmp_path, checkpoints(model_type).path, task, method="full")
    *_, wider, tuned = run(plan, out)
    size = wider.manifest.serving["new_tokens"][1]
    assert load_model(tuned).get_output_embeddings().bias.shape == (size,)
    assert "new_tokens" not in tuned.manifest.serving


@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8"])
def test_new_tokens_are_float32_beside_short_weights(checkpoints: Any, tmp_path: Path, storage: str) -> None:
    plan, out = extended(
        tmp_path, checkpoints("llama").path, "pretrain", {"merge": {"onto": "stored"}}, method={"kind": "lora", "storage": storage}
    )
    *_, tuned, merged = run(plan, out)
    tensors = load_file(tuned.path / "adapter_model.safetensors")
    assert {str(tensor.dtype) for name, tensor in tensors.items() if "trainable_tokens" in name} == {"torch.float32"}
    assert merged.manifest.metrics["probe"]["max_difference"] <= 1e-3


def test_an_adapter_with_new_tokens_is_merged_before_it_is_served(checkpoints: Any, tmp_path: Path) -> None:
    plan, out = extended(tmp_path, checkpoints("llama").path, "pretrain")
    assert re.search(r'new tokens, and vLLM takes none; put "- merge: \{\}" last', plan.serving())
    wider, tuned = run(plan, out)[-2:]
    assert tuned.manifest.serving["live_adapter"] is False
    # The same is said of a model that an earlier run has extended.
    later = tmp_path / "later"
    later.mkdir()
    assert "new tokens" in make_plan(read_recipe(recipe(later, wider.path, "pretrain", [])), later / "out").serving()
    later = tmp_path / "merged"
    later.mkdir()
    plan, out = extended(
        later, checkpoints("llama").path, "pretrain", {"merge": {}}, {"tune": plan.recipe.stages[1][1].model_dump()}
    )
    assert "served live" in plan.serving()


def test_a_loss_is_told_by_the_byte_where_tokens_differ(checkpoints: Any, tmp_path: Path) -> None:
    import math

    plan, out = extended(tmp_path, checkpoints("llama").path, "pretrain")
    base, wider, _ = run(plan, out)
    for each in (base, wider):
        metrics, text = each.manifest.metrics, "show the virtual machine my9 az vm"
        ids = load_tokenizer(each.path)(text)["input_ids"]
        learned = load_tokenizer(each.path).decode(ids[1:])
        assert metrics["heldout_tokens"] == len(ids)  # the first is given, the end of the text is learned
        bits = metrics["heldout_loss"] * len(ids) / math.log(2) / len(learned.encode())
        assert metrics["bits_per_byte"] == pytest.approx(bits, abs=1e-4)
    assert wider.manifest.metrics["heldout_tokens"] < base.manifest.metrics["heldout_tokens"]
    assert [row["bits per byte"] for row in rows([base, wider], out)] == [
        f"{each.manifest.metrics['bits_per_byte']:.3f}" for each in (base, wider)
    ]


@pytest.mark.parametrize(
    ("extend", "error", "said"),
    [
        ({}, RecipeError, "there is nothing to add"),
        ({"learned": 0, "listed": ["x", "x"]}, RecipeError, "'x' stands there twice"),
        ({"learned": 0, "listed": [" x"]}, RecipeError, "begins or ends with a space"),
        (
            {"learned": 0, "listed": ["<|im_end|>"]},
            RecipeError,
            r"recipe.yaml:\d+: stages.0.extend: listed: '<.im_end.>' is a token of this model already",
        ),
        (
            {"learned": 4, "min_frequency": 100_000},
            DataError,
            "train.jsonl: nothing to learn: no two tokens follow each other .* 100000 times",
        ),
    ],
    ids=["nothing", "twice", "space", "known", "rare"],
)
def test_tokens_that_cannot_be_learned_are_refused(
    checkpoints: Any, tmp_path: Path, extend: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(*extended(tmp_path, checkpoints("llama").path, "pretrain", extend=extend))


def test_a_token_that_there_is_already_is_refused_before_the_run(checkpoints: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages.0.extend: listed: '<.im_end.>' is a token of this model already"):
        extended(tmp_path, checkpoints("llama").path, "pretrain", extend={"listed": ["<|im_end|>"]})


def test_a_recipe_that_never_trains_its_new_tokens_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", chat_rows(2))
    alone = tmp_path / "alone.yaml"
    alone.write_text(f"model: {checkpoints('llama').path}\ndata: {{train: {path}}}\nstages: [extend: {{learned: 4}}]\n")
    with pytest.raises(RecipeError, match=r"alone.yaml:3: stages.0.extend: .* put a tune stage after it"):
        make_plan(read_recipe(alone), tmp_path / "out")


def test_an_answer_that_new_tokens_changed_fails_the_run() -> None:
    from tuner.stages.extend import Options, gate

    saved = {"extend": {"train": {"before": 10, "after": 9}}}
    given = Options(learned=1)
    gate(given, {**saved, "probe": {"agreement": 1.0}}, {})
    with pytest.raises(GateError, match=r"answers 98.0% of its probe as it did"):
        gate(given, {**saved, "probe": {"agreement": 0.98}}, {})
    with pytest.raises(GateError, match="is 11 tokens with the new ones, and was 10"):
        gate(given, {"extend": {"train": {"before": 10, "after": 11}}}, {})


def test_tokens_of_two_extend_stages_are_trained_together_and_so_are_those_of_an_earlier_run(
    checkpoints: Any, tmp_path: Path
) -> None:
    llama = checkpoints("llama").path
    path = recipe(tmp_path, llama, "pretrain", [])
    stages = f"stages:\n- extend: {EXTEND['extend']}\n- extend: {{listed: [my1 az]}}\n"
    path.write_text(path.read_text().replace("stages:\n", stages))
    base, first, second, tuned = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    size = len(load_tokenizer(base.path))
    assert [each.manifest.serving["new_tokens"][0] for each in (first, second)] == [size, size]
    saved = load_file(tuned.path / "adapter_model.safetensors")
    (rows,) = [tensor for name, tensor in saved.items() if "trainable_tokens" in name and "embed" in name]
    assert len(rows) == len(load_tokenizer(second.path)) - size > len(load_tokenizer(first.path)) - size
    later = tmp_path / "later"
    later.mkdir()
    *_, tuned = run(make_plan(read_recipe(recipe(later, first.path, "pretrain", [])), later / "out"), later / "out")
    saved = load_file(tuned.path / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in saved.items() if "trainable_tokens" in name} == {len(load_tokenizer(first.path)) - size}


def test_listed_tokens_that_no_text_has_are_told_and_rows_that_no_token_had_are_filled_alike(
    checkpoints: Any, tmp_path: Path
) -> None:
    import torch

    from tuner.stages.extend import _fill

    plan, out = extended(
        tmp_path, checkpoints("llama").path, "pretrain", extend={"learned": 2, "min_frequency": 2, "listed": ["<|tool|>"]}
    )
    wider = run(plan, out)[1]
    assert wider.manifest.metrics["extend"]["unseen"] == ["<|tool|>"]
    assert (
        "in no training text, so trained only where a chat template writes them: '<|tool|>'"
        in write_report([wider], out).read_text()
    )
    filled = []
    for _ in range(2):
        model = load_model(checkpoints("llama"))
        size = model.get_input_embeddings().weight.shape[0]
        _fill(model, {size + 3: [1, 2]})
        filled.append(model.get_input_embeddings().weight[size:])
    torch.testing.assert_close(filled[0], filled[1], rtol=0, atol=0)


def test_settings_of_generation_that_contradict_each_other_are_kept_as_they_are(checkpoints: Any, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(checkpoints("llama").path, model, ignore=shutil.ignore_patterns("bundle.json"))
    said = '{"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}'
    (model / "generation_config.json").write_text(said)
    for method in ("full", "lora"):
        folder = tmp_path / method
        folder.mkdir()
        plan, out = extended(folder, model, "pretrain", *([{"merge": {}}] if method == "lora" else []), method=method)
        for bundle in run(plan, out)[1:]:
            assert (bundle.path / "generation_config.json").read_text() == said
