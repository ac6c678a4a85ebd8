"""What `tuner tokens` counts, by closed forms."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tuner, write_rows
from tuner import gguf
from tuner.errors import DataError, RecipeError, SourceError
from tuner.tokens import WHOLE, Embeddings, measure, pieces, untrained

ROWS = [
    {"text": "plain words here", "language": "en"},
    {"text": "été à côté", "language": "fr"},
    {"text": "日本語", "language": "ja"},
]


@pytest.fixture(scope="session")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that has learned nothing: each byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made: Any = Tokenizer(models.BPE({each: at for at, each in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=alphabet[0]).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "rows.jsonl", ROWS))


def test_a_token_a_byte_is_what_the_closed_form_says(of_bytes: Path, rows: str) -> None:
    (found,) = measure([str(of_bytes)], rows, by="language")
    counts = {name: (each.texts, each.words, each.bytes, each.tokens) for name, each in found.groups.items()}
    assert counts == {"en": (1, 3, 16, 16), "fr": (1, 3, 15, 15), "ja": (1, 1, 9, 9), WHOLE: (3, 7, 40, 40)}
    assert found.groups["fr"].fertility == 5.0
    assert {each.bytes_per_token for each in found.groups.values()} == {1.0}
    assert found.groups[WHOLE].changed == 0
    unused = {each["token"] for each in found.listed()}
    assert len(unused) == len(found.unused) == 256 - len(set("".join(row["text"] for row in ROWS).encode()))
    assert "q" in unused
    assert "p" not in unused


def test_what_is_lost_is_counted_and_shown(rows: str, tmp_path: Path) -> None:
    from tests.unit.test_tasks import wordpiece

    wordpiece().save_pretrained(tmp_path / "words")
    (found,) = measure([str(tmp_path / "words")], rows)
    assert found.groups[WHOLE].changed == 3
    assert found.groups[WHOLE].unknown > 0
    assert "comes back as" in found.example_lost


def test_embeddings_that_nothing_trained_are_named(tmp_path: Path, tiny_model: Path, rows: str) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    clean = measure([str(folder)], rows)[0].embeddings
    weights[name][5:8] = weights[name][4]
    weights[name][20:22] *= 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert clean == Embeddings(same=[], short=[0], beyond=0), "a new model's padding is zero"
    assert measure([str(folder)], rows)[0].embeddings == Embeddings(same=[5, 6, 7], short=[0, 20, 21], beyond=0)
    done = tuner("tokens", folder, "--data", rows, "--list", tmp_path / "list.jsonl")
    assert "3 embeddings hardly trained: '<|endoftext|>', " in done.stdout
    listed = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["id"] for each in listed if each["why"] == "hardly trained"] == [0, 20, 21]
    assert {each["why"] for each in listed} == {"unused", "same embedding as another", "hardly trained"}


def test_embeddings_in_a_gguf_file_are_looked_at_too(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    rows = np.random.default_rng(0).normal(size=(12, 64)).astype(np.float32)
    rows[7], rows[3] = rows[2], 0.0
    for kind, tolerance in ((GGMLQuantizationType.F32, 0.0), (GGMLQuantizationType.Q8_0, 0.02)):
        writer = GGUFWriter(tmp_path / f"{kind.name}.gguf", "llama")
        writer.add_tensor("token_embd.weight", quantize(rows, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read = gguf.embeddings(tmp_path / f"{kind.name}.gguf").numpy()
        assert np.abs(read - rows).max() <= tolerance
        assert untrained(torch.from_numpy(read), 12) == Embeddings(same=[7], short=[3], beyond=0)


def test_marks_belong_to_their_words(of_bytes: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "हिन्दी भाषा"}])
    assert measure([str(of_bytes)], str(tmp_path / "rows.jsonl"))[0].groups[WHOLE].words == 2


def test_a_text_is_cut_where_its_tokens_are(tokenizer: Any) -> None:
    text = "list the machine 日"
    assert "".join(pieces(text, tokenizer)) == text
    assert len(pieces(text, tokenizer)) < len(text)


def test_pieces_that_keep_no_spaces_are_shown_as_words() -> None:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "list", "qua", "##gga", "vm"]
    own = BertTokenizer(vocab={name: number for number, name in enumerate(names)})
    assert pieces("list quagga vm", own) == ["list", " qua", "gga", " vm"]


@pytest.mark.slow
def test_a_text_that_is_shown_without_colours_has_a_stroke_between_tokens(of_bytes: Path) -> None:
    done = tuner("tokens", of_bytes, "--text", "az vm")
    assert done.stdout.splitlines()[-1] == "a|z| |v|m"


def test_the_command_compares_them_side_by_side(of_bytes: Path, tiny_model: Path, rows: str) -> None:
    done = tuner("tokens", of_bytes, tiny_model, "--data", rows, "--by", "language", "--only", "fr,ja", "--text", "list été")
    assert done.returncode == 0, done.stderr
    assert "5.00 / 1.00" in done.stdout
    assert f"{of_bytes}: 10 tokens" in done.stdout
    assert "plain" not in done.stdout
    assert "24 tokens for 24 bytes in 2 texts" in done.stdout
    refused = tuner("tokens", tiny_model)
    assert refused.returncode == 2
    assert "give --data FILE, --text TEXT, or both" in refused.stderr


def test_what_cannot_be_counted_is_said(tiny_model: Path, rows: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--by lang: .*rows\.jsonl:1 has no such key, but text, language"):
        measure([str(tiny_model)], rows, by="lang")
    with pytest.raises(RecipeError, match="no row of it is in the group zz"):
        measure([str(tiny_model)], rows, by="language", only=["zz"])
    with pytest.raises(RecipeError, match="no row of it is in the group zz"):
        measure([str(tiny_model)], rows, by="language", only=["fr", "zz"])
    with pytest.raises(DataError, match="there is no such file"):
        measure([str(tiny_model)], str(tmp_path / "no.jsonl"))
    write_rows(tmp_path / "numbers.jsonl", [{"n": 1}])
    with pytest.raises(
        DataError, match=r"none of its rows can be used; the first: .*numbers\.jsonl:1: found no text under the keys n"
    ):
        measure([str(tiny_model)], str(tmp_path / "numbers.jsonl"))
    (tmp_path / "a[b]").mkdir()
    write_rows(tmp_path / "a[b]" / "[x].jsonl", ROWS)
    assert (
        "[x].jsonl: tokens a word" in tuner("tokens", tiny_model, "--data", tmp_path / "a[b]" / "[x].jsonl", COLUMNS="300").stdout
    )
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(SourceError, match="its tokenizer cannot be opened"):
        measure([str(tmp_path)], rows)
