"""Tokenizers that a recipe trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import tuner, write_rows
from tuner.bundle import open_bundle
from tuner.checkpoint import load_tokenizer
from tuner.data.example import IGNORE
from tuner.errors import RecipeError
from tuner.plan import make_plan
from tuner.recipe import read_recipe
from tuner.run import run

TEXTS = [
    f"The {adjective} {noun} number {number * 37} isn't far; {noun}s cost {number}.50 euros since 2024."
    for number, (adjective, noun) in enumerate([("old", "bridge"), ("new", "garden"), ("red", "engine"), ("tall", "window")] * 40)
]
SAMPLES = ["The old bridge isn't far.", "  two  spaces\n\nand lines\t", "été 日本語 🙂 \u200d", "12345678 x", "", "<|im_end|> no"]
LOSSLESS = [{"model": model, "pre_tokenizer": split} for model in ("bpe", "unigram") for split in ("gpt2", "llama3", "whitespace")]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def train(again: str = "", **options: Any) -> Path:
        key = json.dumps(options) + again
        if key not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            write_rows(folder / "train.jsonl", [{"text": text} for text in TEXTS])
            recipe = {"data": {"train": "train.jsonl"}, "stages": [{"tokenizer": {"vocab_size": 400, **options}}]}
            (folder / "recipe.yaml").write_text(json.dumps(recipe))
            run(make_plan(read_recipe(folder / "recipe.yaml"), folder / "out"), folder / "out")
            made[key] = folder / "out" / "tokenizer"
        return made[key]

    return train


@pytest.mark.parametrize("options", LOSSLESS, ids=str)
def test_every_text_comes_back_as_it_was(trained: Any, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(trained(**options))
    for text in [*SAMPLES, *TEXTS[:5]]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer(TEXTS[0])["input_ids"]) < 0.9 * len(TEXTS[0]), "it has learned pieces"


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), options=st.sampled_from(LOSSLESS))
def test_any_text_at_all_comes_back(trained: Any, text: str, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(trained(**options))
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("options", [*LOSSLESS[:1], LOSSLESS[3], {"model": "wordpiece"}], ids=str)
def test_the_same_text_makes_the_same_bytes(trained: Any, options: dict[str, Any]) -> None:
    """The library's own trainers differ from run to run, but for BPE."""
    made = [trained(again=str(number), **options) for number in range(4)]
    assert len(set(made)) == 4
    assert len({(each / "tokenizer.json").read_bytes() for each in made}) == 1


def test_the_library_alone_gives_the_same_ids(trained: Any) -> None:
    from tokenizers import Tokenizer

    for options in (*LOSSLESS, {"model": "wordpiece"}):
        folder = trained(**options)
        alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in SAMPLES:
            assert alone.encode(text).ids == load_tokenizer(folder)(text)["input_ids"]


def test_llama3_keeps_three_digits_together_at_most(trained: Any) -> None:
    def longest(split: str) -> int:
        tokenizer = load_tokenizer(trained(model="bpe", pre_tokenizer=split))
        numbers = [token.lstrip("Ġ") for token in tokenizer.get_vocab()]
        return max(len(number) for number in numbers if number.isdecimal())

    assert longest("llama3") <= 3 < longest("gpt2")


def test_wordpiece_frames_and_hides_as_bert_does(trained: Any) -> None:
    tokenizer = load_tokenizer(trained(model="wordpiece"))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("The OLD bridgé")["input_ids"])
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    assert "bridge" in "".join(tokens).replace("##", ""), "lower case, no accents"
    assert [tokenizer.convert_tokens_to_ids(each) for each in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert (tokenizer.mask_token, tokenizer.pad_token_id, tokenizer.unk_token_id) == ("[MASK]", 0, 1)


def test_special_tokens_and_the_template_are_what_the_recipe_says(trained: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained(chat_template="chatml", special_tokens=["<|tool|>"]))
    ids = tokenizer("a<|tool|>b<|im_end|>", add_special_tokens=False)["input_ids"]
    assert {tokenizer.convert_tokens_to_ids(each) for each in ("<|tool|>", "<|im_end|>")} <= set(ids)
    assert tokenizer.eos_token == "<|im_end|>"
    asked = [{"role": "user", "content": "hi"}]
    assert (
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert open_bundle(trained(vocab_size=300)).manifest.metrics["tokenizer"]["vocab_size"] == 300


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_roles_are_named_and_a_beginning_is_put_before_each_text(trained: Any, model: str) -> None:
    from tuner.data.rows import BadRows, Row
    from tuner.tasks import pretrain

    tokenizer = load_tokenizer(trained(model=model, bos_token="<|a text|>", eos_token="</s>", pad_token="<pad>"))
    roles = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    assert roles == ["<|a text|>", "</s>", "<pad>"]
    begin, end, pad = tokenizer.convert_tokens_to_ids(roles)
    assert len({begin, end, pad}) == 3
    ids = tokenizer("the bridge")["input_ids"]
    assert ids == [begin, *tokenizer("the bridge", add_special_tokens=False)["input_ids"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the bridge"
    rows = iter([Row("a:1", {"text": "the bridge"})])
    ((_, example),) = pretrain.examples(rows, tokenizer, pretrain.Options(max_tokens=64), BadRows())
    assert example.ids == [*ids, end]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bos_token": "<|bos:en|>"}, "bos_token: '<|bos:en|>' has a \":\""),
        ({"bos_token": "$BOS"}, "begins with"),
        ({"model": "wordpiece", "bos_token": "<s>"}, "bos_token: a wordpiece tokenizer is BERT's"),
        ({"vocab_size": 258, "bos_token": "<s>", "pad_token": "<pad>"}, "vocab_size: 258 leaves no room beside the 259 entries"),
        ({"model": "wordpiece", "pre_tokenizer": "gpt2"}, "pre_tokenizer: gpt2 is not for wordpiece, which takes words"),
        ({"pre_tokenizer": "words"}, "pre_tokenizer: words is not for bpe, which takes gpt2, llama3, whitespace"),
        ({"model": "wordpiece", "chat_template": "chatml"}, "chat_template: a wordpiece tokenizer is BERT's"),
        ({"special_tokens": ["a", "a"]}, "special_tokens: one is empty, or stands there twice"),
        ({"model": "bp"}, 'did you mean "bpe"'),
        ({"chat_template": "no.jinja"}, "stages.0.tokenizer.chat_template: "),
        ({"vocab_size": 259, "special_tokens": ["a", "b", "c"]}, "vocab_size: 259 leaves no room beside the 260 entries"),
    ],
)
def test_options_that_do_not_go_together_are_refused(trained: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        trained(**options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in messages %}{{ message.content }}", "no question and answer can be written down with it: "),
        ("{{ messages[0].content + 1 }}", "no question and answer can be written down with it: "),
        ("{{ messages[1].content }}", "it leaves out a question or its answer: of both it makes 'its answer'"),
    ],
)
def test_a_template_that_writes_down_no_conversation_is_refused_by_check(
    recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "t.jinja").write_text(template)

    def change(tree: dict[str, Any]) -> None:
        del tree["model"]
        tree["stages"] = [{"tokenizer": {"vocab_size": 300, "chat_template": "here/t.jinja"}}]

    path = recipe_file(change)
    with pytest.raises(RecipeError) as error:
        make_plan(read_recipe(path), tmp_path / "out")
    assert f"stages.0.tokenizer.chat_template: {said}" in str(error.value)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "good.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    make_plan(read_recipe(path, ["stages.0.tokenizer.chat_template=good.jinja"]), tmp_path / "out")


def test_the_template_that_comes_along_shows_tools_and_calls(trained: Any) -> None:
    from tuner.data.rows import BadRows, Row
    from tuner.tasks import sft

    tokenizer = load_tokenizer(trained(chat_template="chatml"))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "sum"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": None, "parameters": {}}}]
    assert tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=True) == (
        '<|im_start|>tools\n{"name": "add", "description": null, "parameters": {}}\n<|im_end|>\n<|im_start|>user\nsum<|im_end|>\n'
        '<|im_start|>assistant\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    )
    record = {"messages": [*turns, {"role": "assistant", "content": "three"}], "tools": tools}
    ((_, example),) = sft.examples(iter([Row("a:1", record)]), tokenizer, sft.Options(max_tokens=512), BadRows())
    learned = tokenizer.decode([label for label in example.labels if label != IGNORE])
    assert learned == '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>three<|im_end|>'


@pytest.mark.parametrize(
    ("normalizer", "text", "becomes"),
    [
        ("none", "e\u0301 \ufb01ne \u00c9T", "e\u0301 \ufb01ne \u00c9T"),
        ("nfc", "e\u0301 \ufb01ne \u00c9T", "\u00e9 \ufb01ne \u00c9T"),
        ("nfkc", "e\u0301 \ufb01ne \u00c9T", "\u00e9 fine \u00c9T"),
        ("bert", "e\u0301 \ufb01ne \u00c9T", "e \ufb01ne et"),
    ],
)
def test_a_normalizer_does_to_the_text_what_its_name_says(trained: Any, normalizer: str, text: str, becomes: str) -> None:
    tokenizer = load_tokenizer(trained(normalizer=normalizer))
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == becomes


def test_an_edited_template_makes_another_tokenizer(tmp_path: Path) -> None:
    from tuner.run import stage_fingerprint

    write_rows(tmp_path / "train.jsonl", [{"text": "a b"}])
    recipe = {"data": {"train": "train.jsonl"}, "stages": [{"tokenizer": {"chat_template": "t.jinja"}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    made = set()
    for template in ("{{ messages }}", "{{ messages }} "):
        (tmp_path / "t.jinja").write_text(template)
        plan = make_plan(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
        made.add(stage_fingerprint(plan, plan.steps[0], None))
    assert len(made) == 2


@pytest.mark.slow
def test_an_encoder_is_made_from_text_alone(tmp_path: Path) -> None:
    """WordPiece, a new BERT, hidden words, then labels: one recipe, four stages."""
    write_rows(tmp_path / "train.jsonl", [{"text": text, "label": "far" if "old" in text else "near"} for text in TEXTS])
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    stages = [
        {"tokenizer": {"model": "wordpiece", "vocab_size": 300}},
        {"init": {"config": {**bert, "max_position_embeddings": 64}}},
        {"tune": {"task": {"kind": "masked", "max_tokens": 64}, "method": "full", "steps": 30, "learning_rate": 3.0e-3}},
        {"tune": {"task": {"kind": "classify", "labels": ["far", "near"], "max_tokens": 64}, "method": "full", "steps": 150, "learning_rate": 2.0e-3}},
    ]  # fmt: skip
    recipe = {"data": {"train": "train.jsonl", "heldout_fraction": 0.2}, "stages": stages}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = tuner("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out/tune-2/bundle.json").read_text())["metrics"]["scores"]
    assert scores["accuracy"] > 0.9
    assert json.loads((tmp_path / "out/tune/bundle.json").read_text())["head"] == "masked"
