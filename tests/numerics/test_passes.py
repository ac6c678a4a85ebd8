"""Rows of unlike length in several passes give what they give in one."""

import random
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import chat_rows
from tuner import passes
from tuner.data.example import Labelled, Texts
from tuner.data.order import plan
from tuner.data.rows import BadRows, Row
from tuner.heads.sequence import SINGLE, LabelLoss
from tuner.objective import Objective
from tuner.parallel import Parallel
from tuner.preference import PairLoss
from tuner.tasks import embed
from tuner.tasks import preference as task


def draw(length: int, seed: int) -> list[int]:
    return torch.randint(5, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("price", [0, 3, 10, 1000])
@pytest.mark.parametrize("lengths", [[4], [7, 7, 7], [3, 40, 4, 5, 38], [9, 1, 5, 5, 2, 30, 12, 11], [64, 3, 3, 3, 60, 4]])
def test_no_other_passes_cost_less(lengths: list[int], price: int) -> None:
    found = passes.groups(lengths, price)
    assert sorted(index for each in found for index in each) == list(range(len(lengths)))

    def cost(parts: list[list[int]]) -> int:
        return sum(price + len(part) * max(part) for part in parts)

    ordered = sorted(lengths)
    cuts = [[0, *chosen, len(ordered)] for count in range(len(ordered)) for chosen in combinations(range(1, len(ordered)), count)]
    cheapest = min(cost([ordered[a:b] for a, b in pairwise(cut)]) for cut in cuts)
    assert cost([[lengths[index] for index in each] for each in found]) == cheapest


def encoder(kind: Any) -> Any:
    made = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    torch.manual_seed(0)
    return kind(made).eval()


def objective(kind: str, tiny_model: Path, tokenizer: Any) -> tuple[Objective, list[Any]]:
    if kind == "labels":
        rows: list[Any] = [Labelled(draw(4 + 9 * (number % 3), number), [float(number % 3)]) for number in range(7)]
        return LabelLoss(encoder(transformers.BertForSequenceClassification), 0, SINGLE), rows
    if kind in ("contrastive", "cosine", "last"):
        score = 0.3 if kind == "cosine" else None
        rows = [Texts([draw(3 + number % 2, number), draw(11 + 7 * (number % 3), 99 + number)], score) for number in range(7)]
        options = embed.Options(loss="cosine" if score else "contrastive", pooling="last" if kind == "last" else "mean")
        return embed._objective(encoder(transformers.BertModel), 0, options), rows
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    records = [
        {"messages": row["messages"][:-1], "chosen": row["messages"][-1]["content"], "rejected": "no, never " * (1 + 9 * at)}
        for at, row in enumerate(chat_rows(4))
    ]
    some = (Row(f"f:{number}", record) for number, record in enumerate(records, 1))
    options = task.Options(loss=kind)  # type: ignore[arg-type]
    if kind == "dpo":
        model.get_output_embeddings().requires_grad_(False)  # then without logits
    pairs = [example for _, example in task.examples(some, tokenizer, options, BadRows())]
    return PairLoss(model, tokenizer.pad_token_id, options), pairs


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", ["labels", "contrastive", "cosine", "last", "dpo", "simpo"])
def test_several_passes_learn_what_one_does(
    kind: str, mixed: bool, tiny_model: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, rows = objective(kind, tiny_model, tokenizer)
    count = {"forward": 0}
    loss.model.register_forward_pre_hook(lambda *_: count.__setitem__("forward", count["forward"] + 1))
    found = []
    for price in (10**6, 1):
        monkeypatch.setitem(passes.PRICE, "cpu", price)
        count["forward"] = 0
        loss.zero_grad()
        with Parallel(mixed=mixed).products():
            value = loss(loss.collate(rows))
        value.backward()
        found.append((count["forward"], value.item(), {name: each.grad for name, each in loss.named_parameters()}))
    (once, one, gradients), (often, other, others) = found
    assert once == 1
    assert often > 1
    assert other == pytest.approx(one, rel=5e-3 if mixed else 1e-5)
    given = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    norm = float(torch.stack([gradient.norm() for gradient in given.values()]).norm())
    for name, gradient in given.items():
        assert float((others[name] - gradient).norm()) < (0.05 if mixed else 1e-5) * norm, name
    passes.in_one(loss.model)
    count["forward"] = 0
    loss(loss.collate(rows))
    assert count["forward"] == 1, "where processes share the weights, all gather them as often"


def test_the_first_step_is_on_the_largest_batch_as_it_is_gone_through() -> None:
    draw_ = random.Random(0)
    lengths = [min(512, max(3, round(draw_.lognormvariate(4, 1)))) for _ in range(3000)]
    sizes = {}
    for several in (False, True):
        batches = [[lengths[index] for index in batch] for batch in plan(lengths, 16, 0, 0, passes=several)]
        sizes[several] = [passes.padded(batch, "cpu") if several else len(batch) * max(batch) for batch in batches]
        assert sizes[several][0] == max(sizes[several])
    assert sizes[True][0] != sizes[False][0]
