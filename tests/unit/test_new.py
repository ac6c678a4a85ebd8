"""A recipe from nothing but rows and a model."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WORDS, chat_rows, tuner, write_rows
from tuner.errors import DataError, RecipeError, SourceError
from tuner.new import new
from tuner.plan import make_plan
from tuner.recipe import read_recipe


@pytest.fixture(scope="session")
def tiny_bert(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that makes vectors."""
    import transformers

    folder = tmp_path_factory.mktemp("tiny-bert")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text(number: int) -> str:
    return " ".join(WORDS[(number * 7 + place * 3) % len(WORDS)] for place in range(8)) + f" {number}"


def some(row: Any, count: int = 40) -> list[dict[str, Any]]:
    return [row(number) for number in range(count)]


# Rows, the model, and what must stand in the recipe.
CASES: dict[str, tuple[Any, str, str]] = {
    "messages": (chat_rows(40), "llama", "task: {kind: sft, max_tokens: 64}"),
    "alpaca": (some(lambda n: {"instruction": text(n), "output": "az"}), "llama", "task: {kind: sft, max_tokens: 64}"),
    "pairs of answers": (some(lambda n: {"prompt": text(n), "chosen": " az", "rejected": " vm"}), "llama", "task: {kind: preference, loss: dpo, max_tokens: 32}"),
    "judged answers": (some(lambda n: {"prompt": text(n), "completion": " az", "label": n % 2 == 0}), "llama", "task: {kind: preference, loss: kto, max_tokens: 32}"),
    "text": (some(lambda n: {"text": text(n)}), "llama", "task: {kind: pretrain, max_tokens: 256}"),
    "labels, by GPT": (some(lambda n: {"text": text(n), "label": "ab"[n % 2]}), "llama", "task: {kind: classify, labels: [a, b], max_tokens: 32}"),
    "labels": (some(lambda n: {"text": text(n), "label": "ab"[n % 2]}), "bert", "task: {kind: classify, labels: [a, b], max_tokens: 32}"),
    "labels that are numbers": (some(lambda n: {"text": text(n), "label": n % 2}), "bert", "task: {kind: classify, labels: ['0', '1'], max_tokens: 32}"),
    "several labels": (some(lambda n: {"text": text(n), "labels": ["a", "b"][: n % 3]}), "bert", "task: {kind: classify, form: multi, labels: [a, b], max_tokens: 32}"),
    "numbers": (some(lambda n: {"text": text(n), "score": n / 7}), "bert", "task: {kind: classify, form: number, max_tokens: 32}"),
    "sentences": (some(lambda n: {"sentence1": text(n), "sentence2": text(n + 1)}), "bert", "task: {kind: embed, max_tokens: 32}"),
    "pairs with a score": (some(lambda n: {"anchor": text(n), "positive": text(n + 1), "score": n % 2}), "bert", "task: {kind: embed, loss: cosine, max_tokens: 32}"),
    "tags": (some(lambda n: {"words": ["az", f"vm{n}"], "tags": ["O", ["B-X", "O"][n % 2]]}), "bert", "task: {kind: tokens, labels: [O, B-X], max_tokens: 32}"),
    "tags, by GPT": (some(lambda n: {"words": ["az", f"vm{n}"], "tags": ["A", "B"]}), "llama", "task: {kind: tokens, labels: [A, B], at: last, max_tokens: 32}"),
    "triples": (some(lambda n: {"anchor": text(n), "positive": "az", "negative": "vm"}), "bert", "task: {kind: embed, max_tokens: 32}"),
    "scored pairs": (some(lambda n: {"sentence1": text(n), "sentence2": "az", "score": n / 40}), "bert", "task: {kind: embed, loss: cosine, max_tokens: 32}"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_task_follows_from_the_rows_and_the_recipe_passes(tiny_model: Path, tiny_bert: Path, tmp_path: Path, case: str) -> None:
    rows, model, task = CASES[case]
    write_rows(tmp_path / "rows.jsonl", rows)
    base = {"llama": tiny_model, "bert": tiny_bert}[model]
    said = new(str(tmp_path / "rows.jsonl"), str(base), tmp_path / "sub" / "mine.yaml", {})
    written = (tmp_path / "sub" / "mine.yaml").read_text()
    assert task in written
    assert "train: ../rows.jsonl" in written
    assert "mine.yaml: " in said[0]
    plan = make_plan(read_recipe(tmp_path / "sub" / "mine.yaml"), tmp_path / "out")
    assert plan.not_served() is None or model == "bert"
    assert plan.data.rows["heldout"] > 0


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_of_a_few_rows_some_are_held_out_or_none_and_it_is_said(tiny_model: Path, tmp_path: Path, count: int) -> None:
    """By their content, which may put none of five rows, or all of them, on one side."""
    for start in range(10):
        rows = write_rows(tmp_path / "rows.jsonl", chat_rows(count, start=10 * start))
        new(str(rows), str(tiny_model), tmp_path / f"{start}.yaml", {})
        recipe = read_recipe(tmp_path / f"{start}.yaml")
        assert recipe.data.holds_out == (make_plan(recipe, tmp_path / "out").data.rows.get("heldout", 0) > 0)
        if not recipe.data.holds_out:
            assert "too few rows to hold some out" in (tmp_path / f"{start}.yaml").read_text()
            assert count <= 5


def test_bad_text_rows_are_left_out_as_bad_chats_are(tiny_model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*some(lambda n: {"text": text(n)}), {"text": ""}, {"text": None}])
    new(str(tmp_path / "rows.jsonl"), str(tiny_model), tmp_path / "mine.yaml", {})
    assert "{empty: skip, too_long: skip}   # found: 2 empty" in (tmp_path / "mine.yaml").read_text()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"promt": "Frage"}, '--map promt=Frage: no task reads "promt"; did you mean "prompt"?'),
        ({"prompt": "Frage"}, 'beside prompt "completion" is missing; which of Antwort is it? Such as `--map prompt=Frage --map completion=Antwort`'),
    ],
)  # fmt: skip
def test_the_advice_on_columns_can_be_followed(tiny_model: Path, tmp_path: Path, columns: dict[str, str | int], said: str) -> None:
    write_rows(tmp_path / "rows.jsonl", some(lambda n: {"Frage": text(n), "Antwort": "az"}))
    with pytest.raises(DataError) as error:
        new(str(tmp_path / "rows.jsonl"), str(tiny_model), tmp_path / "mine.yaml", columns)
    assert said in str(error.value)
    new(str(tmp_path / "rows.jsonl"), str(tiny_model), tmp_path / "mine.yaml", {"prompt": "Frage", "completion": "Antwort"})


@pytest.mark.slow
def test_what_was_written_is_trained_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    """Through the command line, from a table whose columns have names of their own and in which some rows are bad."""
    lines = ["question,answer", *(f"list {number},az list {number}" for number in range(60)), "empty,", f"{'long ' * 300},az"]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    recipe = tmp_path / "mine.yaml"
    given = ("--data", tmp_path / "rows.csv", "--base", tiny_model, "--out", recipe)
    refused = tuner("new", *given)
    assert refused.returncode == 2
    assert (
        "the keys question, answer are none of the known shapes; say what they are, such as `--map prompt=question --map completion=answer`"
        in refused.stderr
    )
    done = tuner("new", *given, "--map", "prompt=question", "--map", "completion=answer")
    assert done.returncode == 0, done.stderr
    assert "on_bad_row: {" in recipe.read_text()
    assert "too_long: skip" in recipe.read_text()
    assert tuner("check", recipe).returncode == 0
    done = tuner("run", recipe, "--out", tmp_path / "out", "--set", "stages.0.tune.learning_rate=0.01")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/merge/bundle.json").read_text())["metrics"]["heldout_loss"] < 5
    again = tuner("new", *given, "--map", "prompt=question", "--map", "completion=answer")
    assert again.returncode == 2
    assert f"{recipe} exists; choose another name with --out" in again.stderr


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        (some(lambda n: {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}), RecipeError, "for sft, and bert has no causal head; name another model with --base"),
        (some(lambda n: {"text": text(n), "label": "a"}), DataError, "every row has the same label, 'a'"),
        (some(lambda n: {"text": "a", "label": f"{n}"}, 600), DataError, "more than 500 different labels"),
        (some(lambda n: {"body": text(n), "kind": "ab"[n % 2]}), DataError, "such as `--map text=body --map label=kind`"),
        (some(lambda n: {"words": ["New", "York"], "tags": ["O", "I-LOC"]}), DataError, "the rows' labels make no task: labels: I-LOC"),
        (some(lambda n: {"sentence1": text(n), "sentence2": "az", "score": float(n % 6)}), DataError, "rows cannot be used, such as"),
        (["{", "{"], DataError, "none of its rows can be used; the first: "),
        ([{}, {}], DataError, "its first row has no keys"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said(tiny_bert: Path, tmp_path: Path, rows: Any, error: Any, said: str) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(error) as raised:
        new(str(tmp_path / "rows.jsonl"), str(tiny_bert), tmp_path / "mine.yaml", {})
    assert said in str(raised.value)
    assert not (tmp_path / "mine.yaml").exists()
    with pytest.raises(SourceError):
        new(str(tmp_path / "rows.jsonl"), "./nowhere", tmp_path / "mine.yaml", {})
