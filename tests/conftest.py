"""Small real things: a tokenizer trained on a few lines, a Llama of 100,000 parameters, rows, recipes, and the command line."""

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What is worked out of data here is of no use to anyone, and must not be found again by accident.
os.environ["TUNER_CACHE"] = tempfile.mkdtemp(prefix="tuner-cache-")
atexit.register(shutil.rmtree, os.environ["TUNER_CACHE"], ignore_errors=True)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "list",
    "show",
    "create",
    "delete",
    "the",
    "a",
    "virtual",
    "machine",
    "network",
    "storage",
    "account",
    "group",
    "az",
    "vm",
    "vnet",
    "--name",
    "my",
    "one",
    "two",
    "three",
]


def chat_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Distinct little conversations, the same for the same arguments."""
    rows = []
    for number in range(start, start + count):
        verb, noun = WORDS[number % 4], WORDS[6 + number % 4]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"{verb} the {noun} {number}"},
                    {"role": "assistant", "content": f"az {noun} {verb} --name my{number}"},
                ]
            }
        )
    return rows


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines; text is written as it is, so that a test can write a damaged line."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template whose turns end in <|im_end|>, which is its eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [" ".join(WORDS)] * 3,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Llama of two blocks, random weights, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Writes a recipe for the tiny model beside its data; `change` gets the tree before it is written."""
    import yaml

    def write(change: Callable[[dict[str, Any]], object] = lambda tree: None) -> Path:
        write_rows(tmp_path / "train.jsonl", chat_rows(48))
        write_rows(tmp_path / "heldout.jsonl", chat_rows(8, start=100))
        tree: dict[str, Any] = {
            "model": str(tiny_model),
            "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
            "stages": [
                {
                    "tune": {
                        "task": {"kind": "sft", "max_tokens": 128},
                        "method": {"kind": "lora", "rank": 4},
                        "steps": 6,
                        "learning_rate": 0.01,
                        "checkpoint_every_steps": 2,
                    }
                }
            ],
            "probe": {"rows": 3, "answer_tokens": 6},
            "serve": {"max_tokens": 200},
        }
        change(tree)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system can only be mounted as root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def free_port() -> int:
    """A port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tuner(*arguments: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment})


def command(*arguments: str | Path) -> list[str]:
    """The command line of `tuner` in this environment."""
    return [str(Path(sys.executable).parent / "tuner"), *map(str, arguments)]


@contextmanager
def saved_for_backward(model: Any) -> Iterator[dict[int, int]]:
    """Filled with the size of each piece of memory that autograd saves in the block, the model's own weights left out."""
    import torch

    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
