"""Merging file by file gives what peft gives in memory, for every architecture and way of LoRA, and takes little memory."""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.grid.test_grid import ARCHITECTURES, TASKS, WAYS, has_head, named
from tuner import kinds
from tuner.bundle import Bundle, Manifest, write_json
from tuner.families import family_of

CASES = [(name, "masked" if family_of(name)[0].name == "bert" else "pretrain", "lora") for name in ARCHITECTURES]
CASES += [
    (name, task, "lora")
    for name in ("llama", "bert", "distilbert")
    for task in ("classify", "tokens", "embed")
    if has_head(name, task)
]
CASES += [(name, "masked" if name == "bert" else "pretrain", way) for name in ("llama", "bert", "mamba2") for way in WAYS]
CASES += [("gpt2", "pretrain", "dora"), ("llama", "classify", "nf4")]


def adapter(base: Bundle, folder: Path, task_name: str, way_name: str) -> Bundle:
    """An adapter of random numbers on this base, with the head that the task trains."""
    import torch

    from tuner.checkpoint import open_base

    method, task = kinds.load("methods", "lora"), named(task_name)
    family, architecture = family_of(str(base.manifest.model_type))
    way = method.Options(**{"storage": "fp32", "rank": 4, **WAYS.get(way_name, {})})
    options = task.Options(**TASKS[task_name][0])
    config = {**task.head_config(options), "pad_token_id": 0} if hasattr(task, "head_config") else {}
    model, fresh = open_base(base, task.HEAD, config, way.storage)
    model = method.prepare(model, way, family, architecture, fresh)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameters in method.layers(model).values():
            for parameter in parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
    method.save(model, folder)
    serving = {**method.serving(way, architecture), **({"head_config": config} if config else {})}
    return Bundle(
        folder,
        Manifest(
            kind="adapter", stage="tune", fingerprint="0", family=family.name, head=task.HEAD, model_type=base.manifest.model_type,
            base=os.path.relpath(base.path, folder.resolve()), serving=serving,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("model_type", "task", "way"), CASES, ids=["-".join(case) for case in CASES])
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_the_merged_files_hold_what_peft_makes_in_memory(
    checkpoints: Any, tmp_path: Path, model_type: str, task: str, way: str, many: bool
) -> None:
    import torch
    import transformers

    from tuner.checkpoint import load_model
    from tuner.shards import merge

    base: Bundle = checkpoints(model_type)
    if many:
        auto = getattr(transformers, kinds.load("heads", str(base.manifest.head)).AUTO)
        auto.from_pretrained(base.path).save_pretrained(tmp_path / "base", max_shard_size="100KB")
        base = Bundle(tmp_path / "base", replace(base.manifest, files={}))
        write_json(base.path / "bundle.json", asdict(base.manifest))
    made = adapter(base, tmp_path / "adapter", task, way)
    (tmp_path / "merged").mkdir()
    merge(made, tmp_path / "merged", torch.float32)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1 or not many
    expected = load_model(made).merge_and_unload(safe_merge=True).state_dict()
    opener = getattr(transformers, kinds.load("heads", named(task).HEAD).AUTO)
    opened, info = opener.from_pretrained(tmp_path / "merged", output_loading_info=True, dtype=torch.float32)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("pooler.") for name in info["missing_keys"])
    got = opened.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, msg=lambda said, name=name: f"{name}: {said}")


MERGING = """
import sys, json
from pathlib import Path
import torch
from tuner.bundle import Bundle, Manifest
from tuner.memory import peak, resident_peak
from tuner.shards import _outline, merge

base, folder = sys.argv[1:]
made = Bundle(Path(base), Manifest(**json.loads((Path(base) / "bundle.json").read_text())))
_outline(made)  # what is imported is no part of the count
Path(folder).mkdir()
with peak() as most:
    before = resident_peak()
    merge(made, Path(folder), torch.float32)
    sys.stdout.write(str(most() - before))
"""


@pytest.mark.slow
def test_merging_takes_the_memory_of_the_largest_file_and_not_of_the_model(checkpoints: Any, tmp_path: Path) -> None:
    import transformers

    small: Bundle = checkpoints("llama")
    config = transformers.AutoConfig.from_pretrained(small.path, num_hidden_layers=20, hidden_size=512, intermediate_size=2048)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    base = Bundle(tmp_path / "base", replace(small.manifest, files={}))
    write_json(base.path / "bundle.json", asdict(base.manifest))
    made = adapter(base, tmp_path / "adapter", "pretrain", "lora")
    write_json(made.path / "bundle.json", asdict(made.manifest))
    child = subprocess.run(
        [sys.executable, "-c", MERGING, made.path, tmp_path / "merged"], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr
    files = list(base.path.glob("*.safetensors"))
    largest, whole = max(file.stat().st_size for file in files), sum(file.stat().st_size for file in files)
    added = (made.path / "adapter_model.safetensors").stat().st_size
    # Promised is 1 GB beside the two; 80 MB is little enough that this model, 261 MB, could not hide in it.
    assert int(child.stdout) < largest + added + 80e6 < whole / 2


def test_a_base_that_lacks_a_weight_is_refused_by_name(checkpoints: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from tuner.errors import SourceError
    from tuner.shards import merge

    small: Bundle = checkpoints("llama")
    base = Bundle(tmp_path / "base", replace(small.manifest, files={}))
    made = adapter(small, tmp_path / "adapter", "pretrain", "lora")
    tensors = load_file(small.path / "model.safetensors")
    base.path.mkdir()
    for file in small.path.iterdir():
        (base.path / file.name).write_bytes(file.read_bytes())
    write_json(base.path / "bundle.json", asdict(base.manifest))
    lost = next(name for name in tensors if name.endswith("1.mlp.up_proj.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, base.path / "model.safetensors", {"format": "pt"})
    broken = Bundle(made.path, replace(made.manifest, base=os.path.relpath(base.path, made.path.resolve())))
    with pytest.raises(SourceError, match=f"has no weights for {lost}"):
        merge(broken, tmp_path, torch.float32)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba"])
def test_embeddings_that_were_resized_survive_a_merge(checkpoints: Any, tmp_path: Path, model_type: str) -> None:
    import torch
    import transformers

    from tuner.checkpoint import load_model
    from tuner.shards import merge

    small: Bundle = checkpoints(model_type)
    grown = transformers.AutoModelForCausalLM.from_pretrained(small.path)
    before = grown.get_input_embeddings().weight.shape[0]
    grown.resize_token_embeddings(before + 13)
    grown.save_pretrained(tmp_path / "base")
    base = Bundle(tmp_path / "base", replace(small.manifest, files={}))
    write_json(base.path / "bundle.json", asdict(base.manifest))
    made = adapter(base, tmp_path / "adapter", "pretrain", "lora")
    (tmp_path / "merged").mkdir()
    merge(made, tmp_path / "merged", torch.float32)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert opened.config.vocab_size == before + 13
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(opened, part)().weight, getattr(grown, part)().weight)
    ids = torch.tensor([[3, before + 12, 5]])
    torch.testing.assert_close(opened(ids).logits, load_model(made)(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(opened(ids).logits, grown.eval()(ids).logits, atol=1e-3)
