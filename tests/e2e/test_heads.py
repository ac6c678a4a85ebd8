"""Labels, tags and vectors through the real vLLM: what the family files say is served is served, and is what was trained."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

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
    pytest.param(
        name, head, TASKS[head], marks=[] if (name, head) == ("bert", "sequence") else [pytest.mark.slow], id=f"{name}-{head}"
    )
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
        assert refused.json()["error"]["message"] == f"out-tune answers POST /v1/{PATHS[head]}; it has a {head} head"
    finally:
        server.end()


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
