"""Labels, tags and vectors through the real vLLM: what the family files say is served is served, and is what was trained."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import write_rows
from tests.e2e.test_serving import Server
from tests.grid.conftest import checkpoints, tokenizer  # noqa: F401 - fixtures
from tests.grid.test_handover import recipe
from tuner import kinds
from tuner.plan import make_plan
from tuner.recipe import read_recipe
from tuner.run import run

TASKS = {"sequence": "classify", "token": "tokens", "embedding": "embed"}
PATHS = {"sequence": "classify", "token": "tokens/classify", "embedding": "embeddings"}
CLAIMS = [
    pytest.param(name, head, TASKS[head], marks=pytest.mark.slow, id=f"{name}-{head}")
    for family in kinds.names("families")
    for name, architecture in kinds.load("families", family).FAMILY.architectures.items()
    for head in sorted(architecture.served)
]
# What several labels, and a number, become in vLLM: no softmax.
CLAIMS += [
    pytest.param("bert", "sequence", f"classify-{form}", marks=pytest.mark.slow, id=f"bert-{form}") for form in ("multi", "number")
]


@pytest.mark.parametrize(("model_type", "head", "task"), CLAIMS)
def test_a_head_is_served_as_it_was_trained(
    checkpoints: Any,  # noqa: F811
    tmp_path: Path,
    model_type: str,
    head: str,
    task: str,
) -> None:
    path = recipe(tmp_path, checkpoints(model_type).path, task, [], method="full", gate={"heldout_loss_drop": -9.0})
    tuned = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")[-1]
    server = Server(tmp_path / "out" / "tune", "--port", "0")
    try:
        url = server.wait_for(r"serving .* at (http://\S+)")
        assert "100.0% of" in server.said
        item = tuned.manifest.probe[0]
        body = {"model": "out-tune", "input": [item["ids"]]}
        (answer,) = httpx.post(f"{url}/{PATHS[head]}", json=body, timeout=60).json()["data"]
        values = {"sequence": "probs", "token": "data", "embedding": "embedding"}[head]
        assert answer[values]
        refused = httpx.post(f"{url}/chat/completions", json={"model": "out-tune", "messages": []}, timeout=60)
        assert refused.status_code == 400
        said = refused.json()["error"]["message"]
        assert said.startswith("out-tune answers POST /v1/")
        assert f"/v1/{PATHS[head]}" in said
        assert said.endswith(f"it has a {head} head")
    finally:
        server.end()


TOOLS_TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} \
{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def called(number: int) -> dict[str, Any]:
    """A conversation of two answers, of which the first calls a tool; the tool's keys in no one's order, its description left out."""
    arguments = json.dumps({"group": f"g{number}", "all": number % 2 == 0})
    parameters = {"type": "object", "required": ["group"], "properties": {"group": {"type": "string"}, "all": {"type": "boolean"}}}
    call = {"id": f"c{number}", "type": "function", "function": {"name": "list_vms", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": f"which machines are in group {number}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": f'["vm{number}"]'},
            {"role": "assistant", "content": f"vm{number} alone"},
        ],
        "tools": [{"function": {"parameters": parameters, "name": "list_vms"}, "type": "function"}],
    }


@pytest.mark.slow
def test_tools_and_calls_become_the_tokens_that_training_saw(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [called(number) for number in range(24)])
    write_rows(tmp_path / "heldout.jsonl", [called(number) for number in range(100, 104)])
    (tmp_path / "tools.jinja").write_text(TOOLS_TEMPLATE)
    own = {
        "special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>", "chat_template": "tools.jinja", "vocab_size": 400,
    }  # fmt: skip
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    tune = {"task": {"kind": "sft", "max_tokens": 512}, "method": "full", "steps": 6, "learning_rate": 0.002}
    stages = [{"tokenizer": own}, {"init": {"config": config}}, {"tune": tune}]
    tree = {"data": {"train": "train.jsonl", "heldout": "heldout.jsonl"}, "stages": stages}
    path = tmp_path / "tools.yaml"
    path.write_text(json.dumps(tree))
    bundle = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")[-1]
    assert all(item["tools"] for item in bundle.manifest.probe)
    server = Server(tmp_path / "out" / "tune", "--port", "0")
    try:
        server.wait_for(r"serving .* at (http://\S+)")
        assert "100.0% of" in server.said
    finally:
        server.end()


@pytest.mark.slow
def test_an_engine_with_another_classifier_never_gets_ready(checkpoints: Any, tmp_path: Path) -> None:  # noqa: F811
    path = recipe(tmp_path, checkpoints("bert").path, "classify", [], method="full", gate={"heldout_loss_drop": -9.0})
    bundle = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")[-1]
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    for item in manifest["probe"]:
        item["scores"] = item["scores"][::-1]
    (bundle.path / "bundle.json").write_text(json.dumps(manifest))
    server = Server(tmp_path / "out" / "tune", "--port", "0")
    try:
        assert server.process.wait(timeout=180) == 2
        assert "does not answer as" in server.said and "probabilities of labels differ by" in server.said
    finally:
        server.end()
