"""What is refused before any weight is loaded, and with which sentence."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from tuner.data.dataset import task_of
from tuner.errors import RecipeError, TunerError
from tuner.plan import make_plan
from tuner.recipe import read_recipe

Change = Callable[[dict[str, Any]], object]
MERGE, QUANTIZE = {"merge": {}}, {"quantize": {}}


def refused(recipe_file: Callable[..., Path], tmp_path: Path, change: Change) -> str:
    with pytest.raises(TunerError) as error:
        make_plan(read_recipe(recipe_file(change)), tmp_path / "out")
    return str(error.value).replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree["stages"].append(QUANTIZE), 'quantize takes a model, but tune gives an adapter; put "- merge: {}" before it'),
        (lambda tree: tree.update(stages=[MERGE]), "stages.0.merge: merge takes an adapter, but model gives a model"),
        (lambda tree: tree["stages"].extend([MERGE, QUANTIZE, QUANTIZE]), "quantize takes a model, but quantize gives a quantized"),
        (lambda tree: tree.pop("model"), 'tune takes a model, but model gives nothing; name one with "model:"'),
        (lambda tree: tree["stages"][0]["tune"]["task"].update(max_tokens=999), "max_tokens 999 is more than the 256 that llama reads"),
        (lambda tree: tree["serve"].update(max_tokens=999), "serve.max_tokens: max_tokens 999 is more than the 256 that llama reads"),
        (lambda tree: tree["data"].update(heldout="train.jsonl"), "the held-out rows are all training rows"),
        (lambda tree: tree["data"].update(heldout="heldou.jsonl"), "recipe.yaml:4: data.heldout: heldou.jsonl: there is no such file"),
        (lambda tree: tree["serve"].update(max_tokens=128), "serve.max_tokens: max_tokens 128 leaves no room for an answer to rows of up to 128"),
        (lambda tree: tree.update(revision="main"), "revision main: only a model on the hub has revisions"),
        (lambda tree: tree.update(model="./tiny"), "recipe.yaml:1: model: "),
        (
            lambda tree: tree["stages"][0]["tune"].update(method={"kind": "lora", "targets": "q_prj"}),
            'stages.0.tune.method: targets: "q_prj" matches the whole name of no linear of the model',
        ),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_does_not_go_together_is_refused(recipe_file: Callable[..., Path], tmp_path: Path, change: Change, said: str) -> None:
    assert said in refused(recipe_file, tmp_path, change)


def plain_rows(folder: Path) -> None:
    """Rows for a model without a chat template, in place of the conversations."""
    for name, start in (("train", 0), ("heldout", 100)):
        rows = [{"prompt": f"list {number}", "completion": f" az list {number}"} for number in range(start, start + 8)]
        write_rows(folder / f"{name}.jsonl", rows)


def test_a_quantization_group_that_divides_nothing_is_refused(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    odd = tmp_path / "odd"
    shutil.copytree(tiny_model, odd)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(odd, intermediate_size=136)).save_pretrained(odd)

    def change(tree: dict[str, Any]) -> None:
        tree["model"] = str(odd)
        tree["stages"] += [MERGE, {"quantize": {"scheme": "w4a16"}}]

    assert (
        "quantize: w4a16 needs a group of 128 or 64 or 32 that divides the inputs of all linears, which are 64, 136 wide"
        in refused(recipe_file, tmp_path, change)
    )


def test_conversations_are_refused_for_a_model_without_a_chat_template(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_model, plain)
    (plain / "chat_template.jinja").unlink()
    said = refused(recipe_file, tmp_path, lambda tree: tree.update(model=str(plain)))
    assert 'train.jsonl:1: the model has no chat template, so "messages" cannot be rendered' in said


def test_held_out_rows_that_were_trained_on_are_counted_and_refused_where_all_are(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_file()
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    first = train.read_text().splitlines(keepends=True)[:3]
    heldout.write_text(heldout.read_text() + first[0])
    assert make_plan(read_recipe(recipe), tmp_path / "out").data.copied == 1
    heldout.write_text("".join(first))
    with pytest.raises(RecipeError, match="the held-out rows are all training rows"):
        make_plan(read_recipe(recipe), tmp_path / "out")


def test_the_vocabulary_of_a_new_model_is_the_tokenizers(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    stages = [{"tokenizer": {}}, {"init": {"config": {"model_type": "gpt2", "vocab_size": 7}}}]
    said = refused(recipe_file, tmp_path, lambda tree: (tree.pop("model"), tree.update(stages=stages)))
    assert "stages.1.init.config: vocab_size: the tokenizer says that" in said


def test_a_rank_that_no_server_takes_is_said(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    def rank(value: int) -> str:
        recipe = recipe_file(lambda tree: tree["stages"][0]["tune"]["method"].update(rank=value))
        return make_plan(read_recipe(recipe), tmp_path / "out").serving()

    # serve/engines/vllm.py: its largest buffer
    assert rank(512) == "the adapter is served live on its base"
    assert rank(513) == 'the adapter cannot be served live: vLLM takes ranks up to 512; put "- merge: {}" last to serve it'


def test_what_is_served_has_room_for_the_rows_and_their_answers(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    def tokens(change: Change) -> int:
        return make_plan(read_recipe(recipe_file(change)), tmp_path / "out").served_tokens()

    assert tokens(lambda tree: None) == 200, "the recipe's own"
    assert tokens(lambda tree: tree.pop("serve")) == 256, "no more than the model reads"


def test_keys_of_rows_that_nothing_reads_are_named(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file()
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    write_rows(tmp_path / "train.jsonl", [{**row, "mood": "good", "id": 1}])
    assert make_plan(read_recipe(recipe), tmp_path / "out").remarks() == ["rows also have id, mood, which nothing reads"]


def test_each_result_is_measured_by_the_last_task_trained_by_then(recipe_file: Callable[..., Path]) -> None:
    stages = [{"tune": {"task": kind, "method": "full"}} for kind in ("pretrain", "sft")] + [QUANTIZE]
    recipe = read_recipe(recipe_file(lambda tree: tree.update(stages=stages)))
    assert [task_of(recipe, index).kind for index in range(3)] == ["pretrain", "sft", "sft"]


def test_gpt2_is_not_quantized_and_not_served_with_a_live_adapter(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    def gpt2(stages: list[dict[str, Any]]) -> Change:
        first: list[dict[str, Any]] = [{"tokenizer": {}}, {"init": {"config": {"model_type": "gpt2"}}}]
        return lambda tree: (tree.pop("model"), tree.pop("serve"), tree.update(stages=first + stages), plain_rows(tmp_path))

    assert "gpt2 is not quantized: it is not built of torch.nn.Linear" in refused(recipe_file, tmp_path, gpt2([QUANTIZE]))
    plan = make_plan(read_recipe(recipe_file(gpt2([{"tune": {"task": "sft"}}]))), tmp_path / "out")
    assert (
        plan.serving()
        == 'the adapter cannot be served live: vLLM takes no live adapters for this architecture; put "- merge: {}" last to serve it'
    )


def test_a_tokenizer_alone_is_trained_on_text(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        del tree["model"]
        tree["stages"] = [{"tokenizer": None}]
        del tree["data"]["heldout"]

    recipe = recipe_file(change)
    write_rows(tmp_path / "train.jsonl", [{"text": "some words"}])
    assert make_plan(read_recipe(recipe), tmp_path / "out").result == "tokenizer"


@pytest.mark.parametrize(
    "config",
    [
        *({"hidden_size": value} for value in ("64", 2.5, None, [1], -16)),
        {"hidden_size": 15, "num_attention_heads": 2},
        {"hidden_act": "nope"},
    ],
)
def test_settings_that_make_no_model_are_refused_at_once(
    recipe_file: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    stages = [{"tokenizer": None}, {"init": {"config": {"model_type": "llama", **config}}}]
    said = refused(recipe_file, tmp_path, lambda tree: (tree.pop("model"), tree.update(stages=stages)))
    assert "stages.1.init.config: no model can be made from it: " in said and "\n" not in said


def test_a_setting_that_the_architecture_has_not_is_refused_at_once(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    stages = [{"tokenizer": None}, {"init": {"config": {"model_type": "llama", "hiden_size": 64}}}]
    said = refused(recipe_file, tmp_path, lambda tree: (tree.pop("model"), tree.update(stages=stages)))
    assert 'llama has no setting "hiden_size"; did you mean "hidden_size"?' in said


def test_an_unknown_architecture_is_named_where_it_stands(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    stages = [{"tokenizer": None}, {"init": {"config": {"model_type": "lama"}}}]
    said = refused(recipe_file, tmp_path, lambda tree: (tree.pop("model"), tree.update(stages=stages)))
    assert "stages.1.init.config.model_type: " in said
    assert 'did you mean "llama"?' in said


def test_a_disk_that_is_too_small_is_said_before_the_work(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert "the run writes about 0.1 GB more and 0.0 GB are free" in refused(recipe_file, tmp_path, lambda tree: None)


def test_planning_loads_nothing_heavy(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from tuner.plan import make_plan; from tuner.recipe import read_recipe;"
        "make_plan(read_recipe(Path(sys.argv[1])), Path(sys.argv[2]));"
        "sys.exit(str({'torch', 'transformers', 'peft', 'vllm', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe_file()), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
