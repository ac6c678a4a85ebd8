"""Whole runs on small models: what was tuned is opened again, merged, and answers the probe as it did."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import write_rows
from tests.grid.test_grid import ARCHITECTURES, LOSSES, TASKS, has_head, named
from tuner.errors import RecipeError
from tuner.plan import make_plan
from tuner.recipe import read_recipe
from tuner.run import run


def recipe(folder: Path, model: Path, task: str, stages: list[dict[str, Any]], **tune: Any) -> Path:
    options, rows = TASKS[task]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "heldout.jsonl", [HELDOUT[task]])
    first = {
        "tune": {"task": {"kind": task.partition("-")[0], **options}, "steps": 4, "batch_size": 4, "learning_rate": 0.003, **tune}
    }
    tree = {
        "model": str(model),
        "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
        "stages": [first, *stages],
        "probe": {"rows": 2, "answer_tokens": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


# A row that is not among the training rows.
HELDOUT: dict[str, dict[str, Any]] = {
    "pretrain": {"text": "show the virtual machine my9 az vm"},
    "sft": {"messages": [{"role": "user", "content": "show the vm"}, {"role": "assistant", "content": "az vm show"}]},
    **{f"preference-{loss}": {"prompt": "make the vm", "chosen": " az vm make", "rejected": " network"} for loss in LOSSES},
    "embed": {"anchor": "list it now", "positive": "az vm list one", "negative": "vm mylist"},
    "embed-cosine": {"sentence1": "create it", "sentence2": "az vm create one", "score": 0.45},
    "masked": {"text": "show the virtual machine az vnet"},
    "classify": {"text": "show the machine 9", "label": "machine"},
    "tokens": {"words": ["show", "machine"], "tags": ["VERB", "NOUN"]},
}


@pytest.mark.parametrize(
    ("model_type", "task"),
    [
        ("llama", "classify"),
        ("gpt2", "tokens"),
        ("bert", "classify"),
        ("bert", "tokens"),
        ("distilbert", "masked"),
        ("modernbert", "classify"),
        ("deberta-v2", "tokens"),
        ("mamba", "sft"),
        *(("llama", f"preference-{loss}") for loss in LOSSES),
        ("mamba2", "preference-dpo"),
        ("bert", "embed"),
        ("bert", "embed-cosine"),
        ("llama", "embed"),
        ("mamba2", "sft"),
        ("jamba", "classify"),
        ("falcon_h1", "sft"),
    ],
)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_tuned_is_what_is_opened_again_and_merged(
    checkpoints: Any, tmp_path: Path, model_type: str, task: str, method: str
) -> None:
    model = checkpoints(model_type).path
    merge = [{"merge": {}}] if method == "lora" else []
    plan = make_plan(read_recipe(recipe(tmp_path, model, task, merge, method=method)), tmp_path / "out")
    bundles = run(plan, tmp_path / "out")
    tuned = next(bundle for bundle in bundles if bundle.manifest.stage == "tune")
    assert tuned.manifest.head == named(task).HEAD
    assert tuned.manifest.metrics["probe"]["max_difference"] <= 1e-5, "it answers its own probe as it did"
    if method == "lora":
        # Float32 sums in another order; the manifest keeps five digits.
        assert bundles[-1].manifest.metrics["probe"]["max_difference"] <= 1e-4
        assert bundles[-1].manifest.head == tuned.manifest.head
        assert bundles[-1].manifest.metrics["heldout_loss"] == pytest.approx(tuned.manifest.metrics["heldout_loss"], abs=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2", "electra"])
def test_an_adapter_learns_masked_words_on_an_encoder_that_never_had_an_output_layer(
    checkpoints: Any, tmp_path: Path, model_type: str
) -> None:
    import transformers

    transformers.AutoModel.from_pretrained(checkpoints(model_type).path).save_pretrained(tmp_path / "bare")
    transformers.AutoTokenizer.from_pretrained(checkpoints(model_type).path).save_pretrained(tmp_path / "bare")
    plan = make_plan(read_recipe(recipe(tmp_path, tmp_path / "bare", "masked", [{"merge": {}}], method="lora")), tmp_path / "out")
    _, tuned, merged = run(plan, tmp_path / "out")
    assert tuned.manifest.metrics["probe"]["max_difference"] <= 1e-5
    assert merged.manifest.metrics["probe"]["max_difference"] <= 1e-4
    weights = load_file(merged.path / "model.safetensors")
    # The output layer is the embeddings' other face: it was neither copied nor lost.
    assert not [name for name in weights if re.search(r"(decoder|vocab_projector|generator_lm_head)\.weight$", name)]


REFUSED = [
    (model_type, task)
    for model_type in ARCHITECTURES
    for task in TASKS
    if not has_head(model_type, task) and task.partition("-")[2] in ("", "dpo")
]


@pytest.mark.parametrize(("model_type", "task"), REFUSED, ids=["-".join(cell) for cell in REFUSED])
def test_a_cell_without_a_head_is_refused_with_what_there_is(checkpoints: Any, tmp_path: Path, model_type: str, task: str) -> None:
    path, kind = recipe(tmp_path, checkpoints(model_type).path, task, []), task.partition("-")[0]
    with pytest.raises(
        RecipeError,
        match=rf"stages\.0\.tune\.task: {kind} needs a \w+ head, which {model_type} has not; tasks for it are \w+",
    ):
        make_plan(read_recipe(path), tmp_path / "out")


def test_a_linear_that_a_fused_kernel_reads_is_not_adapted(checkpoints: Any, tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoints("mamba2").path, "sft", [], method={"kind": "lora", "targets": r".*\.out_proj"})
    with pytest.raises(RecipeError, match=r"mixer\.out_proj, which cannot be adapted: the fused kernel reads its weight directly"):
        make_plan(read_recipe(path), tmp_path / "out")


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("onto", ["auto", "stored", "original"])
def test_an_adapter_of_rounded_weights_is_merged_onto_those_or_onto_the_original(
    checkpoints: Any, tmp_path: Path, storage: str, onto: str
) -> None:
    path = recipe(
        tmp_path,
        checkpoints("llama").path,
        "sft",
        [{"merge": {"onto": onto, "tolerance": 0.001 if onto == "stored" else 0.5}}],
        method={"kind": "lora", "storage": storage},
    )
    plan = make_plan(read_recipe(path), tmp_path / "out")
    _, tuned, merged = run(plan, tmp_path / "out")
    assert tuned.manifest.serving["storage"] == storage and not tuned.manifest.serving["live_adapter"]
    told = merged.manifest.metrics["merge"]
    moved = merged.manifest.metrics["probe"]["max_difference"]
    if onto == "auto":
        losses = {name: told[name] for name in ("stored", "original")}
        assert told["onto"] == min(losses, key=lambda name: losses[name])
        # Both were measured, on weights that are not the same, and what was kept is what was measured.
        assert losses["stored"] != losses["original"]
        assert merged.manifest.metrics["heldout_loss"] == pytest.approx(losses[told["onto"]], abs=1e-4)
        assert losses["stored"] == pytest.approx(tuned.manifest.metrics["heldout_loss"], abs=1e-4)
    elif onto == "stored":
        assert moved <= 1e-4
    else:
        assert moved > 1e-4


def test_four_bits_for_a_model_without_linears_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoints("gpt2").path, "sft", [], method={"kind": "lora", "storage": "nf4"})
    with pytest.raises(RecipeError, match=r"tune\.method: storage: nf4 is not for gpt2: it is not built of torch\.nn\.Linear"):
        make_plan(read_recipe(path), tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"storage": "nf4"}, "it was trained on weights rounded to nf4, and an engine has others"),
        ({"dora": True}, "vLLM takes no DoRA"),
        ({"rank": 513}, "vLLM takes ranks up to 512"),
    ],
)
def test_what_no_engine_takes_live_is_said_before_it_is_trained(
    checkpoints: Any, tmp_path: Path, method: dict[str, Any], said: str
) -> None:
    path = recipe(tmp_path, checkpoints("llama").path, "sft", [], method={"kind": "lora", **method})
    assert make_plan(read_recipe(path), tmp_path / "out").serving() == (
        f'the adapter cannot be served live: {said}; put "- merge: {{}}" last to serve it'
    )


def test_the_best_weights_are_kept_and_the_report_says_which(checkpoints: Any, tmp_path: Path) -> None:
    watch = {"every_steps": 1, "by": "accuracy", "patience": 3}
    method = {"kind": "lora", "storage": "fp32"}  # what is saved is measured in float32
    path = recipe(tmp_path, checkpoints("bert").path, "classify", [], watch=watch, method=method)
    _, tuned = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    training = tuned.manifest.metrics["training"]
    best = max(training["watched"], key=lambda each: each["accuracy"])
    assert training["kept_step"] == best["step"]
    assert tuned.manifest.metrics["heldout_loss"] == pytest.approx(best["heldout_loss"], abs=1e-4)
