"""Whole recipes with the real vLLM that take minutes each."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tuner
from tests.e2e.test_serving import QUICK, ROOT, Server, manifest

pytestmark = pytest.mark.slow


def sets(*changes: str) -> list[str]:
    return [part for each in changes for part in ("--set", each)]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a recipe's name to the directory of its results; each recipe is run once, as it is or with some keys changed."""
    made: dict[tuple[str, ...], Path] = {}

    def result(name: str, *changes: str, command: str = "run") -> Path:
        key = (name, *changes, command)
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / name
            done = tuner(command, ROOT / f"recipes/{name}.yaml", "--out", out, *sets(*changes), timeout=3600)
            assert done.returncode == 0, done.stderr
            made[key] = out
        return made[key]

    return result


def ask(server: Server, **body: Any) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=server.wait_for(r"serving .* at (http://\S+)"), api_key="none")
    return client.completions.create(temperature=0, **body).choices[0].text


def test_gpt2_from_nothing_but_text_is_served(tmp_path: Path) -> None:
    done = tuner("run", ROOT / "recipes/gpt2-pretrain.yaml", "--out", tmp_path / "gpt2", timeout=1800)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path / "gpt2", "tune")["metrics"]["heldout_loss"] < 5.6
    server = Server(tmp_path / "gpt2" / "tune", "--port", "0")
    try:
        assert len(ask(server, model="gpt2-tune", prompt="The people of the United States", max_tokens=20).split()) > 5
        assert re.search(r"proven on 8 questions: 100\.0%", server.said)
    finally:
        server.end()


def test_four_bit_weights_are_served_in_the_type_that_works(tmp_path: Path) -> None:
    changes = sets(
        *QUICK[:-1],
        "stages.2.quantize.scheme=w4a16",
        "stages.2.quantize.algorithm=gptq",
        "stages.2.quantize.calibration_rows=32",
        "stages.2.quantize.gate.heldout_loss_rise=0.5",
    )
    done = tuner("run", ROOT / "recipes/demo.yaml", "--out", tmp_path / "four", *changes, timeout=1800)
    assert done.returncode == 0, done.stderr
    # 576 wide: 128 does not divide it, 64 does.
    assert manifest(tmp_path / "four", "quantize")["serving"]["group_size"] == 64
    server = Server(tmp_path / "four" / "quantize", "--port", "0")
    try:
        assert ask(server, model="four-quantize", prompt="az vm", max_tokens=4)
    finally:
        server.end()


def test_the_demo_ends_with_its_table(results: Any) -> None:
    out = results("demo", command="prove")
    rows = [line.split("|")[1:-1] for line in (out / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[1:]] == ["base", "tuned", "merged", "quantized", "served"]
    words = {row[0].strip(): float(row[2].strip(" %")) for row in rows[1:]}
    assert words["base"] < 5
    assert min(words["tuned"], words["served"]) > 15


# What a recipe has to reach: the issue that asked for it, or a model that learned nothing, says how much.
# A tag's commonest class is 19% of the words (NOUN), a mail is ham in 72%.
RECIPES = {
    "minilm-classify": ("tune", "accuracy", 0.84),
    "minilm-tags": ("tune", "accuracy", 0.94),
    "minilm-spam": ("merge", "accuracy", 0.93),
    "minilm-masked-classify": ("tune-2", "accuracy", 0.80),
    "mamba2-pretrain": ("tune", None, 6.0),
    "smollm2-sources": ("merge", None, 2.8),
    "bert-from-text": ("tune-2", "accuracy", 0.60),
}


def test_new_tokens_make_text_shorter_and_are_learned_and_served(results: Any) -> None:
    out = results("smollm2-extend")
    heldout = manifest(out, "extend")["metrics"]["extend"]["heldout"]
    assert heldout["after"] < 0.8 * heldout["before"]
    before, untrained, after = (manifest(out, stage)["metrics"]["bits_per_byte"] for stage in ("base", "extend", "merge"))
    assert after < before - 0.2 < untrained
    served(out / "merge")


def served(folder: Path) -> None:
    """It is served, which is to say that vLLM answered its probe."""
    server = Server(folder, "--port", "0")
    try:
        server.wait_for(r"serving .* at (http://\S+)")
    finally:
        server.end()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reaches_its_target_and_is_served(results: Any, name: str) -> None:
    stage, score, least = RECIPES[name]
    metrics = manifest(results(name), stage)["metrics"]
    assert metrics["scores"][score] >= least if score else metrics["heldout_loss"] < least
    served(results(name) / stage)


def test_an_adapter_tells_reviews_apart_as_well_as_full_tuning_within_a_point(results: Any, tmp_path: Path) -> None:
    changes = sets("stages.0.tune.method=lora", "stages.0.tune.learning_rate=1.0e-3")
    done = tuner("run", ROOT / "recipes/minilm-classify.yaml", "--out", tmp_path / "lora", *changes, timeout=3600)
    assert done.returncode == 0, done.stderr
    adapter, full = (
        manifest(out, "tune")["metrics"]["scores"]["accuracy"] for out in (tmp_path / "lora", results("minilm-classify"))
    )
    assert adapter >= full - 0.01


def test_definitions_find_their_words_better_after_training(results: Any) -> None:
    out = results("minilm-embed")
    before, after = (manifest(out, stage)["metrics"]["scores"]["recall@10"] for stage in ("base", "merge"))
    assert after > before + 0.03  # twice the standard error of a share of 1,000
    served(out / "merge")


@pytest.mark.parametrize("name", ["smollm2-full", "smollm2-qlora"])
def test_other_methods_learn_the_demos_task(results: Any, name: str) -> None:
    out = results(name)
    before, after = (manifest(out, stage)["metrics"]["heldout_loss"] for stage in ("base", "tune"))
    assert after < before - 2
    if name == "smollm2-qlora":
        merge = manifest(out, "merge")["metrics"]
        assert merge["heldout_loss"] <= min(merge["merge"]["stored"], merge["merge"]["original"]) + 1.0e-3
    served(out / ("tune" if name == "smollm2-full" else "merge"))


def test_the_demos_model_learns_to_prefer_its_right_answers(results: Any, tmp_path: Path) -> None:
    demo = results("demo", command="prove") / "merge"
    script = ROOT / "recipes/data/azure_pairs.py"
    subprocess.run([sys.executable, script, demo, "--out", tmp_path], check=True, timeout=3600)
    changes = (f"model={demo}", f"data.train={tmp_path / 'train.jsonl'}", f"data.heldout={tmp_path / 'heldout.jsonl'}")
    out = results("smollm2-dpo", *changes, command="prove")
    scores = manifest(out, "tune")["metrics"]["scores"]
    assert scores["preferred"] > 0.61  # half, and twice the standard error of a share of 80; 0.649 was measured
    assert scores["margin"] > 0
    assert "| served |" in (out / "report.md").read_text()


def test_the_small_mamba_learns_a_form_of_answer(results: Any) -> None:
    out = results("mamba2-sft", f"model={results('mamba2-pretrain') / 'tune'}")
    before, after = (manifest(out, stage)["metrics"]["heldout_loss"] for stage in ("base", "tune"))
    assert after < before - 0.5
    served(out / "merge")
