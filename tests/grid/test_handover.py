"""Whole runs on small models: what was tuned is opened again, merged, and answers the probe as it did."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import write_rows
from tests.grid.test_grid import ARCHITECTURES, LOSSES, TASKS, has_head, named
from tuner.errors import GateError, RecipeError
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
    "classify-multi": {"text": "show both of the two", "labels": ["machine", "network"]},
    "classify-number": {"text": "show three", "score": 1.2},
    "tokens": {"words": ["show", "machine"], "tags": ["VERB", "NOUN"]},
}


CELLS = [
    ("llama", "classify"),
    ("bert", "classify-multi"),
    ("bert", "classify-number"),
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
]


@pytest.mark.parametrize(
    ("model_type", "task", "method"),
    [
        pytest.param(
            *cell, method, marks=pytest.mark.slow if method == "full" and cell[0] not in ("llama", "bert", "mamba2") else ()
        )
        for cell in CELLS
        for method in ("full", "lora")
    ],
)
def test_what_was_tuned_is_what_is_opened_again_and_merged(
    checkpoints: Any, tmp_path: Path, model_type: str, task: str, method: str
) -> None:
    model = checkpoints(model_type).path
    merge = [{"merge": {}}] if method == "lora" else []
    # Of one held-out row the loss may be zero from the beginning.
    path = recipe(tmp_path, model, task, merge, method=method, gate={"heldout_loss_drop": -0.5})
    plan = make_plan(read_recipe(path), tmp_path / "out")
    bundles = run(plan, tmp_path / "out")
    tuned = next(bundle for bundle in bundles if bundle.manifest.stage == "tune")
    assert tuned.manifest.head == named(task).HEAD
    assert tuned.manifest.metrics["probe"]["max_difference"] <= 1e-5, "it answers as it did before it was saved"
    options = named(task).Options(**TASKS[task][0])
    names = set(tuned.manifest.metrics.get("scores") or {}) - {"rows"}
    assert names == set(named(task).scored(options, plan.recipe.evaluate)), "what `watch.by` may be"
    if method == "lora":
        # Float32 sums in another order; the manifest keeps five digits.
        assert bundles[-1].manifest.metrics["probe"]["max_difference"] <= 1e-4
        assert bundles[-1].manifest.head == tuned.manifest.head
        assert bundles[-1].manifest.metrics["heldout_loss"] == pytest.approx(tuned.manifest.metrics["heldout_loss"], abs=1e-4)


@pytest.mark.parametrize(("model_type", "task"), [("bert", "classify"), ("llama", "sft"), ("llama", "embed")])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_save_that_loses_something_stops_the_run(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, task: str, method: str
) -> None:
    import torch

    from tuner.methods import full, lora

    module = {"full": full, "lora": lora}[method]
    save = module.save

    def loses(model: Any, folder: Path) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ("lora_B" in name or method == "full"):
                    parameter.mul_(0.5)
        save(model, folder)

    monkeypatch.setattr(module, "save", loses)
    path = recipe(tmp_path, checkpoints(model_type).path, task, [], method=method)
    with pytest.raises(GateError, match="what was saved does not answer as what was trained"):
        run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    assert not (tmp_path / "out" / "tune").exists()


@pytest.mark.parametrize("task", ["sft", "classify"])
def test_an_adapter_that_learns_nothing_on_rounded_weights_or_under_a_new_head_is_found(
    checkpoints: Any, tmp_path: Path, task: str
) -> None:
    method = {"kind": "lora", "storage": "nf4"}
    gate = {"heldout_loss_drop": -9.0}
    path = recipe(tmp_path, checkpoints("llama").path, task, [], method=method, learning_rate=1.0e-12, gate=gate)
    with pytest.raises(GateError, match="answers every probe exactly as the base does: training had no effect"):
        run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")


def test_a_new_head_has_to_learn_as_much_as_its_gate_asks(checkpoints: Any, tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoints("bert").path, "classify", [], method="full", gate={"heldout_loss_drop": 5.0})
    with pytest.raises(GateError, match=r"held-out loss went from \d\.\d+ to .*asks for more than 5\.0"):
        run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")


def test_the_gate_compares_losses_of_one_task_only(checkpoints: Any, tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoints("llama").path, "preference-dpo", [], method="full")
    tree = yaml.safe_load(path.read_text())
    write_rows(tmp_path / "train.jsonl", [{**row, "completion": row["chosen"]} for row in TASKS["preference-dpo"][1]])
    write_rows(tmp_path / "heldout.jsonl", [{**HELDOUT["preference-dpo"], "completion": " az vm make"}])
    first = {"tune": {**tree["stages"][0]["tune"], "task": {"kind": "sft", "max_tokens": 64}, "steps": 12}}
    tree["stages"] = [first, tree["stages"][0]]
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    tree["stages"][1]["tune"]["gate"] = {"heldout_loss_drop": 5.0}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    # A model compared with itself: ln 2 for each pair.
    with pytest.raises(GateError, match=r"held-out loss went from 0\.693 to"):
        run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")


LABELS = {
    "same": ["machine", "network"],
    "others": ["spam", "ham"],
    "more": ["spam", "ham", "machine", "network"],
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("which", LABELS)
def test_a_head_for_the_same_labels_is_trained_further_and_for_others_made_anew(
    checkpoints: Any, tmp_path: Path, method: str, which: str
) -> None:
    import torch
    import transformers

    labels = LABELS[which]
    made = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints("bert").path,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={b: a for a, b in enumerate(labels)},
    )  # as on the hub: without a problem_type
    with torch.no_grad():
        made.classifier.bias.copy_(torch.arange(len(labels)) * 7.0)
        embeddings = made.get_input_embeddings().weight.clone()
    made.save_pretrained(tmp_path / "given")
    transformers.AutoTokenizer.from_pretrained(checkpoints("bert").path).save_pretrained(tmp_path / "given")
    gate = {"heldout_loss_drop": -9.0}
    path = recipe(tmp_path, tmp_path / "given", "classify", [{"merge": {}}] * (method == "lora"), method=method, gate=gate)
    bundles = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    last = transformers.AutoModelForSequenceClassification.from_pretrained(bundles[-1].path)
    assert (
        list(last.config.id2label.values()) == ["machine", "network"] and last.config.problem_type == "single_label_classification"
    )
    kept = abs(float(last.classifier.bias[1]) - 7.0) < 0.1
    assert kept == (which == "same")
    assert float((last.get_input_embeddings().weight - embeddings).abs().max()) < 0.05, "the model itself is read from the files"
    # The model that was given is measured where it tells the recipe's labels apart.
    assert ("heldout_loss" in bundles[0].manifest.metrics) == (which == "same")
    assert bundles[-1].manifest.metrics["probe"]["max_difference"] <= 1e-4


def test_labels_in_another_order_than_the_heads_own_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    import transformers

    names = {0: "network", 1: "machine"}
    made = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints("bert").path, id2label=names)
    made.save_pretrained(tmp_path / "given")
    transformers.AutoTokenizer.from_pretrained(checkpoints("bert").path).save_pretrained(tmp_path / "given")
    with pytest.raises(RecipeError, match=r"task\.labels: .*in another order; write labels: \[network, machine\]"):
        make_plan(read_recipe(recipe(tmp_path, tmp_path / "given", "classify", [])), tmp_path / "out")


def test_the_labels_of_an_earlier_stage_in_another_order_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoints("bert").path, "classify", [], method="full")
    tree = yaml.safe_load(path.read_text())
    task = {**tree["stages"][0]["tune"]["task"], "labels": ["network", "machine"]}
    tree["stages"].append({"tune": {**tree["stages"][0]["tune"], "task": task}})
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(RecipeError, match=r"stages\.1\..*in another order; write labels: \[machine, network\]"):
        make_plan(read_recipe(path), tmp_path / "out")


WITHOUT_LABELS = [
    ("bert", "SequenceClassification", "embed"),
    ("bert", "TokenClassification", "masked"),
    ("llama", "SequenceClassification", "sft"),
    ("llama", "SequenceClassification", "embed"),
]


@pytest.mark.parametrize(("model_type", "auto", "then"), WITHOUT_LABELS)
def test_a_model_that_gave_labels_keeps_its_weights_for_a_task_without(
    checkpoints: Any, tmp_path: Path, model_type: str, auto: str, then: str
) -> None:
    import torch
    import transformers

    from tuner.bundle import open_bundle
    from tuner.checkpoint import open_base

    torch.manual_seed(3)
    given = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(checkpoints(model_type).path)
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    given.save_pretrained(tmp_path / "given")
    transformers.AutoTokenizer.from_pretrained(checkpoints(model_type).path).save_pretrained(tmp_path / "given")
    gate = {"heldout_loss_drop": -9.0}
    path = recipe(tmp_path, tmp_path / "given", then, [], method={"kind": "lora", "storage": "fp32"}, gate=gate)
    bundles = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    model, _ = open_base(open_bundle(tmp_path / "out/base"), str(bundles[-1].manifest.head), {}, new_head=True)
    kept = {name: weight for name, weight in given.base_model.state_dict().items() if "pooler" not in name}
    found = model.base_model.state_dict()
    assert kept and all(torch.equal(found[name], weight) for name, weight in kept.items())


def test_a_head_for_a_number_is_trained_further_whatever_it_is_called(checkpoints: Any, tmp_path: Path) -> None:
    import torch
    import transformers

    given = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints("bert").path, num_labels=1)
    with torch.no_grad():
        given.classifier.bias.fill_(7.0)
    given.save_pretrained(tmp_path / "given")
    transformers.AutoTokenizer.from_pretrained(checkpoints("bert").path).save_pretrained(tmp_path / "given")
    path = recipe(tmp_path, tmp_path / "given", "classify-number", [], method="full")
    base, tuned = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    assert base.manifest.metrics["heldout_loss"] > tuned.manifest.metrics["heldout_loss"] > 0
    assert abs(float(load_file(tuned.path / "model.safetensors")["classifier.bias"]) - 7.0) < 0.1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_ends_of_a_turn_are_those_of_the_checkpoint_and_travel_with_what_is_tuned(
    checkpoints: Any, tmp_path: Path, method: str
) -> None:
    import json
    import shutil

    from tuner.checkpoint import ends_of_turn, load_tokenizer

    base = checkpoints("llama").path
    assert ends_of_turn(load_tokenizer(base)) == {load_tokenizer(base).eos_token_id}
    shutil.copytree(base, tmp_path / "given")
    (tmp_path / "given/bundle.json").unlink()
    (tmp_path / "given/generation_config.json").unlink()
    (tmp_path / "given/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    path = recipe(tmp_path, tmp_path / "given", "sft", [{"merge": {}}] * (method == "lora"), method=method)
    bundles = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    assert [ends_of_turn(load_tokenizer(bundle.path)) for bundle in bundles] == [{2, 0}] * len(bundles)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_tasks_labels_are_not_anothers(checkpoints: Any, tmp_path: Path, method: str) -> None:
    path = recipe(tmp_path, checkpoints("bert").path, "classify", [{"merge": {}}] * (method == "lora"), method=method)
    tree = yaml.safe_load(path.read_text())
    for name, row in (("train", TASKS["tokens"][1]), ("heldout", [HELDOUT["tokens"]])):
        label = {"text": "show the vm", "label": "machine"}
        write_rows(tmp_path / f"{name}.jsonl", [{**each, **label, "text": f"show {at}"} for at, each in enumerate(row)])
    tags = {"kind": "tokens", "labels": ["VERB", "NOUN", "ADJ"], "max_tokens": 32}
    for stage in tree["stages"]:
        stage.get("tune", {}).update(gate={"heldout_loss_drop": -9.0})
    tree["stages"].append({"tune": {**tree["stages"][0]["tune"], "task": tags}})
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    bundles = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    assert bundles[-1].manifest.head == "token"
    found = list(bundles[-1].path.glob("*.safetensors"))
    shapes = [tuple(tensor.shape) for name, tensor in load_file(found[0]).items() if name.endswith("classifier.weight")]
    assert shapes == [(3, 64)]


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_the_stored_weights_are_those_that_were_computed_with(checkpoints: Any, tmp_path: Path, storage: str) -> None:
    import torch
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    from tuner.checkpoint import load_model, open_base

    path = recipe(tmp_path, checkpoints("llama").path, "sft", [], method={"kind": "lora", "storage": storage})
    _, tuned = run(make_plan(read_recipe(path), tmp_path / "out"), tmp_path / "out")
    trained_on, _ = open_base(tuned.base(), "causal", {}, storage)
    opened = load_model(tuned).get_base_model()
    compared = 0
    for name, module in trained_on.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            linear = opened.get_submodule(name).get_base_layer()
            state = type("State", (), {"SCB": getattr(module.weight, "SCB", None)})
            kept = dequantize_bnb_weight(module.weight, state=state).float()
            torch.testing.assert_close(linear.weight, kept, rtol=0, atol=0)
            compared += 1
    assert compared == 14


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
    # Of measurements that are equal in what decides, that with the lower loss.
    best = max(training["watched"], key=lambda each: (each["accuracy"], -each["heldout_loss"]))
    assert training["kept_step"] == best["step"]
    assert tuned.manifest.metrics["heldout_loss"] == pytest.approx(best["heldout_loss"], abs=1e-4)


ON = {"masked": "bert", "classify": "bert", "tokens": "bert"}


@pytest.mark.parametrize("task", [name for name in TASKS if name in HELDOUT])
def test_what_is_read_and_what_is_learned_can_be_looked_at(
    checkpoints: Any, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tuner.data.quality import examine
    from tuner.data.show import pictured, show
    from tuner.run import tokenizer_now

    model = checkpoints(ON.get(task.partition("-")[0], "llama")).path
    plan = make_plan(read_recipe(recipe(tmp_path, model, task, [])), tmp_path / "out")
    show(pictured(plan, tokenizer_now(plan, tmp_path / "out")[0], 2), examine(plan.recipe))
    said = capsys.readouterr().out
    assert "example 2" in said and "rows left out" in said
    names = {
        "preference-dpo": "rejected: ",
        "preference-kto": "good: ",
        "embed": "negative: ",
        "embed-cosine": "other, 0.",
        "tokens": "VERB NOUN: ",
    }
    names |= {"preference-orpo": "chosen: ", "preference-simpo": "chosen: ", "sft": "<|im_start|>assistant", "pretrain": "az vm"}
    names |= {
        "classify": "machine: ",
        "classify-multi": "network: ",
        "classify-number": "1.",
        "masked": "of its tokens are hidden: ",
    }
    assert names[task] in said
    assert ("show" in said) or ("list" in said)


@pytest.mark.parametrize(
    ("by", "said"), [("acuracy", 'did you mean "accuracy"'), ("loss", "there is: MCC, accuracy, heldout_loss, macro F1")]
)
def test_a_score_that_is_not_measured_cannot_be_watched(checkpoints: Any, tmp_path: Path, by: str, said: str) -> None:
    path = recipe(tmp_path, checkpoints("bert").path, "classify", [], watch={"by": by})
    with pytest.raises(RecipeError, match=rf'recipe.yaml:\d+: stages.0.tune.watch.by: "{by}" is not measured.*{said}'):
        make_plan(read_recipe(path), tmp_path / "out")


def test_attention_alone_is_refused_where_there_is_none(checkpoints: Any, tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoints("mamba2").path, "sft", [], method={"kind": "lora", "targets": "attention"})
    with pytest.raises(RecipeError, match="targets: attention means nothing for mamba2, which has none"):
        make_plan(read_recipe(path), tmp_path / "out")


def test_the_longest_text_of_a_roberta_is_shorter_than_its_table_of_positions(checkpoints: Any, tmp_path: Path) -> None:
    import transformers

    folder = checkpoints("roberta").path
    pad = transformers.AutoConfig.from_pretrained(folder).pad_token_id
    plan = make_plan(read_recipe(recipe(tmp_path, folder, "masked", [])), tmp_path / "out")
    longest = plan.facts.max_tokens
    assert longest == 256 - 1 - pad
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    import torch

    assert model(torch.full((1, longest), 5)).logits.shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_pooling_is_asked_for_where_the_model_makes_its_vectors_otherwise(checkpoints: Any, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(checkpoints("bert").path, tmp_path / "given")
    (tmp_path / "given/bundle.json").unlink()
    (tmp_path / "given/1_Pooling").mkdir()
    (tmp_path / "given/1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    path = recipe(tmp_path, tmp_path / "given", "embed", [])
    with pytest.raises(RecipeError, match="the model makes its vectors with pooling: cls; write that down, or another one"):
        make_plan(read_recipe(path), tmp_path / "out")
    make_plan(read_recipe(path, ["stages.0.tune.task.pooling=mean"]), tmp_path / "out")


def test_other_heldout_rows_are_another_choice_of_the_best_weights(checkpoints: Any, tmp_path: Path) -> None:
    from tuner.run import stage_fingerprint

    found = set()
    for watch in (None, {"every_steps": 1}):
        path = recipe(tmp_path, checkpoints("bert").path, "classify", [], **({"watch": watch} if watch else {}))
        for text in ("show the network", "list it"):
            write_rows(tmp_path / "heldout.jsonl", [{"text": text, "label": "network"}])
            plan = make_plan(read_recipe(path), tmp_path / "out")
            found.add(stage_fingerprint(plan, plan.steps[0], None))
    assert len(found) == 3, "without `watch` they only measure"


def test_a_bundle_that_was_changed_is_made_again(checkpoints: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, checkpoints("bert").path, "classify", [], method="full")
    plan = make_plan(read_recipe(path), tmp_path / "out")
    _, tuned = run(plan, tmp_path / "out")
    config = tuned.path / "config.json"
    config.write_text(config.read_text().replace('"0": "machine"', '"0": "network"'))
    capsys.readouterr()
    run(plan, tmp_path / "out")
    assert "tune: made again, since" in capsys.readouterr().err
    assert '"0": "machine"' in config.read_text()
