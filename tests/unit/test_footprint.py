"""Memory from shapes alone, against what the real model keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import chat_rows, saved_for_backward
from tuner import budget, footprint, kinds, memory
from tuner.data.rows import BadRows, Row
from tuner.errors import RecipeError
from tuner.families import family_of
from tuner.fit import Schedule, fit
from tuner.footprint import Footprint
from tuner.heads.causal import NextTokenLoss
from tuner.methods import full, lora
from tuner.needs import measurable, needs
from tuner.plan import make_plan
from tuner.recipe import read_recipe
from tuner.tasks import sft

SCHEDULE = Schedule(
    steps=3, batch_size=8, micro_batch_size=8, learning_rate=0.01, warmup_fraction=0.0, decay="constant", weight_decay=0.0,
    max_grad_norm=1.0, checkpoint_every_steps=100, seed=0,
)  # fmt: skip


@pytest.mark.parametrize("method", [full.Options(), lora.Options(rank=4), lora.Options(rank=4, storage="fp32", dropout=0.1)])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves(
    tiny_model: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuner import attention, elementwise

    monkeypatch.setattr(footprint, "HOLES", 0.0)
    kind = kinds.load("methods", method.kind)
    told, _ = Footprint(AutoConfig.from_pretrained(tiny_model), "causal", method)._gone_through(3, 200, learning=True)
    dtype = torch.bfloat16 if kind.storage(method) == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    attention.use(model)
    elementwise.use(model)
    model = kind.prepare(model, method, *family_of("llama"), []).train()
    with saved_for_backward(model) as saved:
        out = getattr(model, "get_base_model", lambda: model)().base_model(torch.zeros(3, 200, dtype=torch.long)).last_hidden_state
    # Beside what autograd saves there is what comes out.
    assert sum(saved.values()) <= told <= sum(saved.values()) + 2 * out.nbytes


def test_weights_gradients_and_state_are_counted(tiny_model: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig

    numbers = sum(each.numel() for each in load_file(tiny_model / "model.safetensors").values())
    sizes = Footprint(AutoConfig.from_pretrained(tiny_model), "causal", full.Options())
    assert (sizes.weights, sizes.gradients, sizes.state) == (4 * numbers, 4 * numbers, 8 * numbers)  # AdamW: two moments
    # Rank 4 on seven linears of two blocks, each with inputs + outputs; hidden 64, keys and values 32, inside the MLP 128.
    adapter = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    sizes = Footprint(AutoConfig.from_pretrained(tiny_model), "causal", lora.Options(rank=4))
    assert (sizes.weights, sizes.gradients, sizes.state) == (2 * numbers + 4 * adapter, 4 * adapter, 8 * adapter)


def test_blocks_that_are_computed_again_keep_less(tiny_model: Path) -> None:
    from transformers import AutoConfig

    once, again = (
        Footprint(AutoConfig.from_pretrained(tiny_model), "causal", lora.Options(), gradient_checkpointing=each)
        for each in (False, True)
    )
    assert again._gone_through(8, 200, learning=True)[0] < 0.3 * once._gone_through(8, 200, learning=True)[0]


def test_fewer_rows_are_taken_until_they_fit_and_not_even_one_is_said_with_numbers(tiny_model: Path) -> None:
    from transformers import AutoConfig

    sizes, task = Footprint(AutoConfig.from_pretrained(tiny_model), "causal", lora.Options()), sft.Options()
    row = budget.Batch(1, 1, 200, 100, 200)
    one, all_of_them = (budget.learning(sizes, task, row.times(count), more=False) for count in (1, 64))
    assert budget.rows_that_fit(sizes, task, row, 64, 2 * all_of_them, "memory") == 64
    some = budget.rows_that_fit(sizes, task, row, 64, all_of_them, "memory")
    assert 1 < some < 64
    assert budget.MARGIN * budget.learning(sizes, task, row.times(some), more=True) <= all_of_them
    # One turn fewer would take rows that do not fit.
    fewer_turns = -(-64 // (-(-64 // some) - 1))
    assert budget.MARGIN * budget.learning(sizes, task, row.times(fewer_turns), more=True) > all_of_them
    for fits, taken in ((7, 4), (5, 4), (3, 3), (2, 2), (1, 1)):  # of eight: in two turns, three, four and eight
        free = round(budget.MARGIN * budget.learning(sizes, task, row.times(fits), more=True))
        assert budget.rows_that_fit(sizes, task, row, 8, free, "memory") == taken
    with pytest.raises(
        RecipeError, match=r"a single row of 200 tokens takes about 0\.\d\d GB .*, and 0\.00 GB are left of the GPU"
    ) as told:
        budget.rows_that_fit(sizes, task, row, 64, one // 100, "the GPU")
    # What the recipe does already is no advice.
    assert str(told.value).endswith(
        "less memory is taken with gradient_checkpointing: true, weights of 4 bits (method: {kind: lora, storage: nf4}), a smaller task.max_tokens"
    )
    least = Footprint(AutoConfig.from_pretrained(tiny_model), "causal", lora.Options(storage="nf4"), gradient_checkpointing=True)
    assert least.lighter == ["a smaller task.max_tokens"]


def model_and_rows(folder: Path, tokenizer: Any) -> tuple[Any, list[Any]]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = lora.prepare(AutoModelForCausalLM.from_pretrained(folder), lora.Options(rank=4), *family_of("llama"), [])
    rows = (Row(f"x:{number}", record) for number, record in enumerate(chat_rows(24)))
    return model, [example for _, example in sft.examples(rows, tokenizer, sft.Options(), BadRows())]


class Small(NextTokenLoss):
    """Has memory for so many rows, and for so many batches."""

    most, batches = 3, 100

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.batches -= 1
        if len(batch["input_ids"]) > self.most or self.batches < 0:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return super().forward(batch)


def test_the_first_step_is_tried_with_fewer_rows_and_ends_at_the_weights_of_those(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    found = []
    for kind, rows in ((Small, 8), (NextTokenLoss, 2)):
        model, examples = model_and_rows(tiny_model, tokenizer)
        schedule = replace(SCHEDULE, micro_batch_size=rows)
        measured = fit(kind(model, 0), examples, schedule, layers=lora.layers(model), work=tmp_path / kind.__name__)
        assert measured["micro_batch_size"] == 2
        found.append({name: each.detach() for name, each in model.named_parameters() if each.requires_grad})
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_memory_that_runs_out_later_is_a_sentence(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    model, examples = model_and_rows(tiny_model, tokenizer)
    objective = Small(model, 0)
    objective.most, objective.batches = 8, 2
    with pytest.raises(RecipeError, match=r"memory ran out in step 3 with 8 rows at a time: .* `micro_batch_size` takes fewer"):
        fit(objective, examples, SCHEDULE, layers=lora.layers(model), work=tmp_path)
    objective = Small(model, 0)
    objective.batches = 0
    with pytest.raises(RecipeError, match="memory ran out in step 1 with 1 rows at a time"):
        fit(objective, examples, SCHEDULE, layers=lora.layers(model), work=tmp_path)


def test_the_largest_batch_is_the_first() -> None:
    from tuner.data.order import plan

    lengths = [10 + (7 * number) % 50 for number in range(100)] + [90]
    batches = plan(lengths, 8, 0, 0)
    sizes = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert sizes[0] == max(sizes)
    assert sorted(index for batch in batches for index in batch) == list(range(101))


def test_a_model_whose_weights_cannot_be_measured_is_refused_with_numbers(
    recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(read_recipe(recipe_file()), tmp_path / "out")
    assert plan.facts.parameters
    monkeypatch.setattr(memory, "room", lambda _processes=1: (4 * plan.facts.parameters, "the GPU's memory"))
    measurable(plan)
    monkeypatch.setattr(memory, "room", lambda _processes=1: (4 * plan.facts.parameters - 1, "the GPU's memory"))
    with pytest.raises(
        RecipeError, match=r"model: measuring the result takes about 0\.00 GB, .*0\.00 GB are left of the GPU's memory"
    ):
        measurable(plan)
    # What training needs is there, and unpacked a quantized model takes twice what it has.
    monkeypatch.setattr(memory, "room", lambda _processes=1: (10**9, "the GPU's memory"))
    (need,) = needs(plan, tmp_path / "out")
    monkeypatch.setattr(budget, "rows_that_fit", lambda *_: 8)
    monkeypatch.setattr(memory, "room", lambda _processes=1: (need.measuring - 1, "the GPU's memory"))
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: stages\.0\.tune: measuring the result takes about 0\.\d\d GB"):
        list(needs(plan, tmp_path / "out"))
