"""GGUF files: their header without reading weights, and the ordinary checkpoint inside them."""

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

from tuner.errors import SourceError

# What llama.cpp calls the linears of a block, and what transformers does for Llama, Mistral and Qwen.
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_ENGLISH = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
# Where no token goes across, by the names in GGUF headers (`tokenizer.ggml.pre`); each is applied to what the one before left.
SPLITS = {
    ("default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "gigachat"): [_ENGLISH],
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "lfm2"): [_LLAMA3],
    ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"): [r"\p{N}", _ENGLISH],
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"): [_QWEN2],
    ("qwen35",): [_QWEN35],
    ("falcon",): [r"[\p{P}\$\+<=>\^~\|`]+", _ENGLISH, r"[0-9][0-9][0-9]"],
    ("deepseek-coder",): [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    ("deepseek-llm",): [
        r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+",
    ],
}  # fmt: skip
# Those whose words are tokens where the vocabulary has them, whatever the merges say.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "lfm2")
# Those that put characters and their accents together first.
COMPOSED = ("qwen2", "deepseek-r1-qwen")


def read_header(path: Path) -> tuple[dict[str, Any], int, dict[str, list[int]]]:
    """The scalar metadata of a GGUF file, its number of parameters, and the shape of each linear, read in milliseconds.

    The library gguf builds every tokenizer string and tensor first, which takes seconds; the layout is the one in its
    specification (GGUF version 2 and 3, little-endian). Raises SourceError for a file that is something else.
    """
    try:
        with path.open("rb") as file:
            magic, version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise SourceError(f"{path}: not a GGUF file of version 2 or 3")
            values = {_gguf_string(file): _gguf_value(file, _gguf_number(file, "I")) for _ in range(pairs)}
            parameters, shapes = 0, {}
            for _ in range(tensors):
                name = _gguf_string(file).split(".")
                sizes = [_gguf_number(file, "Q") for _ in range(_gguf_number(file, "I"))]
                _gguf_number(file, "I")  # the storage type
                _gguf_number(file, "Q")  # the offset
                parameters += math.prod(sizes)
                if len(name) == 4 and name[2] in LINEARS and name[3] == "weight":
                    shapes[f"model.layers.{name[1]}.{LINEARS[name[2]]}"] = sizes[::-1]  # GGUF counts from the fastest index
    except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError, OSError, RecursionError):
        raise SourceError(f"{path}: the GGUF header is damaged or cut off") from None
    return {key: value for key, value in values.items() if value is not None}, parameters, shapes


# GGUF value types 0 to 12, as struct writes them; 8 is a string and 9 an array.
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _gguf_number(file: BinaryIO, letter: str) -> Any:
    return struct.unpack("<" + letter, file.read(struct.calcsize("<" + letter)))[0]


def _gguf_string(file: BinaryIO) -> str:
    return file.read(_gguf_number(file, "Q")).decode("utf-8")


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _gguf_string(file)
    if kind != 9:
        return _gguf_number(file, GGUF_SCALARS[kind])
    item, count = _gguf_number(file, "I"), _gguf_number(file, "Q")
    if item in GGUF_SCALARS:
        file.seek(count * struct.calcsize("<" + GGUF_SCALARS[item]), os.SEEK_CUR)
    else:
        for _ in range(count):
            _gguf_value(file, item)
    return None


@contextmanager
def read_once() -> Iterator[None]:
    """While it lasts transformers, which asks anew for the configuration, the tokenizer and the weights, gets what was read before.

    That takes seconds for 49,000 tokens, and 280 MB while it is kept.
    """
    import gguf
    from gguf.gguf_reader import GGUFReader

    if gguf.GGUFReader is GGUFReader:
        with patch("gguf.GGUFReader", cache(GGUFReader)):
            yield
    else:
        yield


@read_once()
def unpack(path: Path, folder: Path) -> None:
    """Dequantize a GGUF file into an ordinary checkpoint in bfloat16, with its tokenizer and chat template."""
    from tuner.checkpoint import quiet, say_of_date
    from tuner.families import family_of

    quiet()
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    values, _, _ = read_header(path)
    family_of(str(values.get("general.architecture")))  # a sentence now rather than a failure after the conversion
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # A Q4 block keeps a 16-bit scale, so bfloat16 rounds by 0.1% where 4 bits had rounded by several; it halves the file.
    model.config.__dict__.pop("quantization_config", None)
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(path).save_pretrained(folder)
    say_of_date(str(values.get("tokenizer.chat_template", "")))


def embeddings(path: Path) -> Any:
    """(ids, width) of float32: the row that each token is looked up as. None where the file has none."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found = next((each for each in GGUFReader(path).tensors if each.name == "token_embd.weight"), None)
    return None if found is None else torch.from_numpy(dequantize(found.data, found.tensor_type).astype("float32"))


@read_once()
def load_tokenizer(path: Path) -> Any:
    """The tokenizer and chat template inside a GGUF file, with the special tokens that its header names.

    Raises SourceError where the file names a way of cutting text into words that is not known here.
    """
    from tuner.checkpoint import name_one_date, quiet

    quiet()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Clean-up on decoding is meant for BERT's word pieces and would eat spaces; transformers would say so at every use.
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, clean_up_tokenization_spaces=False)
    values, _, _ = read_header(path)
    if type(tokenizer) is not PreTrainedTokenizerFast:
        # A class named after a model brings that model's own rules along, and would again wherever the saved one is opened.
        template = tokenizer.chat_template
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, clean_up_tokenization_spaces=False, **tokenizer.special_tokens_map
        )
        tokenizer.chat_template = template
    # transformers 5.17 gives a GPT-2-style GGUF tokenizer its bos token as eos, so an answer would never end where the
    # model ends it. The file itself says which is which.
    for name, role in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        token_id = values.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(token_id)))
    _cut_as_named(tokenizer.backend_tokenizer, values, path)
    name_one_date(tokenizer)
    return tokenizer


def splits_of(values: dict[str, Any], path: Path) -> tuple[str, list[str]]:
    """(the name, the rules) by which the tokenizer in a file cuts text. Raises SourceError for those that are not known here."""
    named = str(values.get("tokenizer.ggml.pre") or "default")
    splits = next((splits for names, splits in SPLITS.items() if named in names), None)
    if splits is None and values.get("tokenizer.ggml.model") == "gpt2":
        raise SourceError(
            f'{path}: its tokenizer cuts text by rules called "{named}", which are not known here, so the tokens would not be '
            "those that the model has learned; use the original checkpoint"
        )
    return named, splits or []


def _cut_as_named(backend: Any, values: dict[str, Any], path: Path) -> None:
    """Let the tokenizer cut text as the model's own does. transformers 5.17 reads all GGUF files as GPT-2's or as Llama 2's."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    if values.get("tokenizer.ggml.model") == "gpt2":
        named, splits = splits_of(values, path)
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cuts = [pre_tokenizers.Split(Regex(each), "isolated") for each in splits]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, as_bytes])
        backend.decoder = decoders.ByteLevel()
        backend.normalizer = normalizers.NFC() if named in COMPOSED else None
        backend.model.ignore_merges = named in WHOLE_WORDS
    elif values.get("tokenizer.ggml.model") == "llama" and backend.normalizer is None:
        first = [normalizers.Prepend("▁")] if values.get("tokenizer.ggml.add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        backend.model.byte_fallback = True
