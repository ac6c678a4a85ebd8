"""What a person sees of the data."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tuner, write_rows
from tuner.data.example import IGNORE, Example
from tuner.data.show import bins, pieces, render


def test_the_pieces_joined_are_what_the_model_reads_and_what_is_learned_is_marked(tokenizer: Any) -> None:
    ids = tokenizer("list the machine az vm", add_special_tokens=False)["input_ids"]
    text = render(pieces(Example(ids, [IGNORE] * 3 + ids[3:]), tokenizer))
    assert text.plain == tokenizer.decode(ids)
    learned = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert learned == [tokenizer.decode(each) for each in ids[3:]]


def test_a_character_of_several_tokens_is_one_piece(tokenizer: Any) -> None:
    ids = tokenizer("vm 日本", add_special_tokens=False)["input_ids"]
    found = [text for text, _ in pieces(Example(ids, ids), tokenizer)]
    assert "".join(found) == "vm 日本"
    assert not any("\ufffd" in text for text in found)


def test_a_histogram_counts_every_length_once() -> None:
    lengths = [3, 3, 4, 17, 40, 41]
    assert sum(count for _, count in bins(lengths)) == len(lengths)
    assert bins(lengths)[0] == ("3-6", 3)
    assert bins([]) == []


def test_tuner_data_shows_the_template_the_counts_and_the_lengths(recipe_file: Callable[..., Path]) -> None:
    done = tuner("data", recipe_file(), "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert "<|im_start|>assistant" in done.stdout
    assert "48 rows" in done.stdout
    assert "█" in done.stdout


@pytest.mark.slow
def test_a_recipe_with_its_own_tokenizer_is_shown_in_its_tokens_once_that_is_there(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    stages: list[Any] = [
        {"tokenizer": {"vocab_size": 300}},
        {"init": {"config": {"model_type": "gpt2"}}},
        {"tune": {"task": "pretrain"}},
    ]

    def change(tree: dict[str, Any]) -> None:
        write_rows(tmp_path / "train.jsonl", [{"text": f"list the machine {number}"} for number in range(48)])
        del tree["model"], tree["data"]["heldout"], tree["serve"]
        tree["stages"] = stages[:count]

    out, count = tmp_path / "out", 3
    before = tuner("data", recipe_file(change), "--out", out)
    assert before.returncode == 0, before.stderr
    assert "has yet to train the recipe's tokenizer in" in before.stdout
    assert "lengths in characters" in before.stdout
    assert "rows that are there twice" in before.stdout
    count = 1
    alone = recipe_file(change)
    assert tuner("run", alone, "--out", out).returncode == 0
    assert "no model reads these rows; `tuner tokens" in tuner("data", alone, "--out", out).stdout
    count = 3
    assert "in the tokens of" in (seen := tuner("data", recipe_file(change), "--out", out).stdout)
    assert "48 rows" in seen
    stages[0]["tokenizer"]["vocab_size"] = 310
    assert "has yet to train" in tuner("data", recipe_file(change), "--out", out).stdout, "that one is of other options"


@pytest.mark.slow
def test_a_recipe_that_extends_a_tokenizer_says_whose_tokens_it_shows(
    recipe_file: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["stages"] = [{"extend": {"listed": ["network"]}}, {"tune": {"task": {"kind": "sft", "max_tokens": 128}, "steps": 1}}]

    recipe, out = recipe_file(change), tmp_path / "out"
    before = tuner("data", recipe, "--out", out)
    assert "in the tokens of the model as it is: `tuner run" in before.stdout, before.stderr
    assert tuner("run", recipe, "--out", out, "--set", "stages.1.tune.gate.heldout_loss_drop=-9").returncode == 0
    after = tuner("data", recipe, "--out", out).stdout
    assert f"in the tokens of {out / '1-extend-'}" in after
    counted = [re.search(r"(\d+) tokens, ", each)[1] for each in (before.stdout, after)]  # type: ignore[index]
    assert int(counted[0]) > int(counted[1])


@pytest.mark.parametrize("stage", ["tokenizer"])
def test_prove_is_refused_before_the_work_where_nothing_could_be_served(
    recipe_file: Callable[..., Path], tmp_path: Path, stage: str
) -> None:
    def change(tree: dict[str, Any]) -> None:
        del tree["model"]
        tree["stages"] = [{stage: {}}]

    done = tuner("prove", recipe_file(change), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "nothing to serve and prove at its end: a tokenizer is not served" in done.stderr
    assert not (tmp_path / "out").exists()
