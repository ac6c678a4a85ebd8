"""The loop: gradients for every layer, a loss that falls, a resume that changes no bit."""

import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import chat_rows
from tuner import optimizers
from tuner.data.rows import BadRows, Row
from tuner.errors import GateError, RecipeError
from tuner.families import family_of
from tuner.fit import Schedule, Watch, fit
from tuner.heads.causal import NextTokenLoss
from tuner.methods import full, lora
from tuner.tasks import sft

SCHEDULE = Schedule(
    steps=6,
    batch_size=8,
    micro_batch_size=4,
    learning_rate=0.01,
    warmup_fraction=0.2,
    decay="cosine",
    weight_decay=0.01,
    max_grad_norm=1.0,
    checkpoint_every_steps=100,
    seed=0,
)


def adapted(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return lora.prepare(AutoModelForCausalLM.from_pretrained(folder), lora.Options(rank=4, **options), *family_of("llama"), [])


def examples(tokenizer: Any) -> list[Any]:
    rows = (Row(f"x:{number}", record) for number, record in enumerate(chat_rows(20)))
    return [example for _, example in sft.examples(rows, tokenizer, sft.Options(), BadRows())]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_linear_of_every_block_is_adapted_and_nothing_else(tiny_model: Path) -> None:
    names = set(lora.layers(adapted(tiny_model)))
    assert len(names) == 2 * 7
    assert all(".layers." in name for name in names)


def test_training_lowers_the_loss_and_moves_every_layer(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(tiny_model)
    before = trained(model)
    measured = fit(NextTokenLoss(model, 0), examples(tokenizer), SCHEDULE, layers=lora.layers(model), work=tmp_path)
    assert measured["train_loss_last"] < measured["train_loss_first"] - 0.1
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trained(model).items() if "lora_B" in name)


def test_a_run_that_was_cut_and_resumed_ends_with_the_same_bits(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    # Dropout makes the result depend on the state of the random generator; 20 rows in batches of 8 reach the third epoch.
    schedule = replace(SCHEDULE, steps=8, checkpoint_every_steps=5)
    rows = examples(tokenizer)
    whole = adapted(tiny_model, dropout=0.3)
    fit(NextTokenLoss(whole, 0), rows, schedule, layers=lora.layers(whole), work=tmp_path / "a")

    class Cut(Exception):
        pass

    cut = adapted(tiny_model, dropout=0.3)
    calls = 0

    def dies(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 13:  # forward passes: in the middle of step 7, after the checkpoint at step 5
            raise Cut

    cut.register_forward_pre_hook(dies)
    with pytest.raises(Cut):
        fit(NextTokenLoss(cut, 0), rows, schedule, layers=lora.layers(cut), work=tmp_path / "b")
    resumed = adapted(tiny_model, dropout=0.3)
    fit(NextTokenLoss(resumed, 0), rows, schedule, layers=lora.layers(resumed), work=tmp_path / "b")
    expected = trained(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(resumed).items())


def test_a_disk_that_fills_up_at_a_checkpoint_leaves_the_one_before(tiny_model: Path, tokenizer: Any, small_disk: Path) -> None:
    from dataclasses import replace

    from tuner.errors import DiskFull

    model = adapted(tiny_model)
    work = small_disk / "work"
    schedule = replace(SCHEDULE, checkpoint_every_steps=2)
    ballast = small_disk / "ballast"

    def fill_up(*_: Any) -> None:
        if (work / "step-00000002").exists() and not ballast.exists():
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"x" * 4096)

    model.register_forward_pre_hook(fill_up)
    with pytest.raises(DiskFull, match="the disk is full while writing .*what was finished before is intact"):
        fit(NextTokenLoss(model, 0), examples(tokenizer), schedule, layers=lora.layers(model), work=work)
    ballast.unlink()
    resumed = adapted(tiny_model)
    fit(NextTokenLoss(resumed, 0), examples(tokenizer), schedule, layers=lora.layers(resumed), work=work)
    whole = adapted(tiny_model)
    fit(NextTokenLoss(whole, 0), examples(tokenizer), SCHEDULE, layers=lora.layers(whole), work=small_disk.parent / "other")
    expected = trained(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(resumed).items())


def test_layers_that_get_no_gradient_are_named(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(tiny_model)
    # This projection's output multiplies its neighbour's: at zero, nothing flows into the one below and nothing comes back.
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data.zero_()
    for name, parameter in model.named_parameters():
        if "layers.1.mlp.up_proj.lora" in name:
            parameter.requires_grad_(False)
    with pytest.raises(
        GateError, match=r"2 of 13 .* no gradient.*: model\.layers\.1\.mlp\.gate_proj, model\.layers\.1\.mlp\.down_proj$"
    ):
        fit(NextTokenLoss(model, 0), examples(tokenizer), SCHEDULE, layers=lora.layers(model), work=tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(tiny_model)
    next(iter(model.parameters())).data.fill_(float("nan"))
    with pytest.raises(GateError, match="the loss is nan at step 1"):
        fit(NextTokenLoss(model, 0), examples(tokenizer), SCHEDULE, layers=lora.layers(model), work=tmp_path)


@pytest.mark.parametrize("targets", ["model.layers.*.q_prj", "nothing"])
def test_targets_that_match_nothing_are_refused(tiny_model: Path, targets: str) -> None:
    with pytest.raises(RecipeError, match="matches the whole name of no linear of the model"):
        adapted(tiny_model, targets=targets)


def test_a_pattern_adapts_what_it_matches(tiny_model: Path) -> None:
    assert set(lora.layers(adapted(tiny_model, targets=r".*layers\.1\..*q_proj"))) == {"model.layers.1.self_attn.q_proj"}
    assert len(lora.layers(adapted(tiny_model, targets="attention"))) == 8


def test_full_training_reaches_every_parameter(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = full.prepare(AutoModelForCausalLM.from_pretrained(tiny_model), full.Options(), *family_of("llama"), [])
    reached = {id(parameter) for parameters in full.layers(model).values() for parameter in parameters}
    assert reached == {id(parameter) for parameter in model.parameters()}


def test_the_rate_rises_and_falls_as_written() -> None:
    from dataclasses import replace

    schedule = replace(SCHEDULE, steps=10, warmup_fraction=0.2, learning_rate=1.0)
    assert [round(schedule.rate(step), 3) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    assert replace(schedule, decay="linear").rate(6) == pytest.approx(0.5)
    assert replace(schedule, decay="constant").rate(9) == 1.0


@pytest.mark.parametrize("name", typing.get_args(optimizers.Name))
def test_every_optimizer_learns_and_resumes_with_the_same_bits(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, name: optimizers.Name
) -> None:
    from dataclasses import replace

    # Rank 64 gives matrices of more than 4,096 numbers, which bitsandbytes keeps in 8 bits.
    schedule = replace(SCHEDULE, optimizer=name, checkpoint_every_steps=3, decay="constant")
    rows = examples(tokenizer)

    def model() -> Any:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model)
        return lora.prepare(plain, lora.Options(rank=64), *family_of("llama"), [])

    whole = model()
    measured = fit(NextTokenLoss(whole, 0), rows, schedule, layers=lora.layers(whole), work=tmp_path / "a")
    assert measured["train_loss_last"] < measured["train_loss_first"] - 0.1
    expected, half, again = trained(whole), model(), model()

    class Cut(Exception):
        pass

    def dies(module: Any, *_: Any) -> None:
        if (tmp_path / "c" / "step-00000003").exists():
            raise Cut

    half.register_forward_pre_hook(dies)
    with pytest.raises(Cut):
        fit(NextTokenLoss(half, 0), rows, schedule, layers=lora.layers(half), work=tmp_path / "c")
    fit(NextTokenLoss(again, 0), rows, schedule, layers=lora.layers(again), work=tmp_path / "c")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(again).items())


def test_gradient_checkpointing_changes_nothing(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = examples(tokenizer)
    plain, spared = adapted(tiny_model), adapted(tiny_model)
    spared.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = 0

    def count(*_: Any) -> None:
        nonlocal recomputed
        recomputed += 1

    objectives = NextTokenLoss(plain, 0), NextTokenLoss(spared, 0)
    spared.get_base_model().model.layers[1].mlp.register_forward_pre_hook(count)
    for name, model, objective in zip("ab", (plain, spared), objectives, strict=True):
        fit(objective, rows, SCHEDULE, layers=lora.layers(model), work=tmp_path / name)
    # Six steps of two micro-batches, one of four rows in the last of an epoch: twice each.
    assert recomputed == 2 * (2 * 6 - 2)
    for name, tensor in trained(spared).items():
        torch.testing.assert_close(tensor, trained(plain)[name], rtol=0, atol=1e-6)


def watched(model: Any, losses: list[float], patience: int | None, work: Path, rows: list[Any]) -> dict[str, Any]:
    remaining = iter(losses)
    watch = Watch(lambda: {"heldout_loss": next(remaining), "accuracy": 0.5}, "heldout_loss", 1, patience)
    return fit(NextTokenLoss(model, 0), rows, SCHEDULE, layers=lora.layers(model), work=work, watch=watch)


def test_the_weights_that_did_best_are_kept(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    rows = examples(tokenizer)
    model = adapted(tiny_model)
    measured = watched(model, [9.0, 5.0, 4.0, 3.0, 3.5, 3.2, 3.1], None, tmp_path / "a", rows)
    assert measured["kept_step"] == 3 and measured["steps"] == 6 and len(measured["watched"]) == 6
    three = adapted(tiny_model)

    class Cut(Exception):
        pass

    def dies(*_: Any) -> None:
        if (tmp_path / "b" / "step-00000003").exists():
            raise Cut

    three.register_forward_pre_hook(dies)
    with pytest.raises(Cut):
        fit(
            NextTokenLoss(three, 0),
            rows,
            replace(SCHEDULE, checkpoint_every_steps=3),
            layers=lora.layers(three),
            work=tmp_path / "b",
        )
    expected = trained(three)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(model).items())


def test_training_ends_when_nothing_gets_better(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    measured = watched(adapted(tiny_model), [9.0, 5.0, 4.0, 4.5, 4.2], 2, tmp_path, examples(tokenizer))
    assert measured["steps"] == 4 and measured["kept_step"] == 2


def test_a_score_that_nobody_measures_is_said(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(tiny_model)
    watch = Watch(lambda: {"heldout_loss": 1.0, "accuracy": 0.5}, "acuracy", 1, None)
    with pytest.raises(GateError, match='watch.by is "acuracy", and what is measured is heldout_loss, accuracy'):
        fit(NextTokenLoss(model, 0), examples(tokenizer), SCHEDULE, layers=lora.layers(model), work=tmp_path, watch=watch)
    assert all(not parameter.any() for name, parameter in trained(model).items() if "lora_B" in name), "before the first step"
