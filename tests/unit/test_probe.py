"""What a probe records, and how a difference shows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import probe
from tuner.heads import causal
from tuner.heads.causal import NextTokenLoss, generate
from tuner.measure import heldout_loss
from tuner.tasks import sft

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def items(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    return causal.record(model, tokenizer, [{"ids": ids, "messages": None} for ids in PROMPTS], 8)


def test_an_answer_is_the_models_own_greedy_one(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> None:
    for item in items:
        ids = list(item["ids"])
        for token in item["answer_ids"]:
            # The definition, one token at a time and without a cache or padding.
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            position = len(ids) - len(item["ids"])
            top = logprobs.topk(2).values
            assert token == int(logprobs.argmax())
            assert item["logprobs"][position] == pytest.approx(float(logprobs[token]), abs=2e-5)
            assert item["margins"][position] == pytest.approx(float(top[0] - top[1]), abs=2e-5)
            ids.append(token)


def test_a_model_agrees_with_itself_and_not_with_another(model: Any, items: list[dict[str, Any]]) -> None:
    same = probe.asked("causal", model, items)
    assert same["agreement"] == 1.0
    assert same["max_difference"] <= 2e-5  # the manifest keeps five digits
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.mul_(2.0)
        other = probe.asked("causal", model, items)
        weight.div_(2.0)
    assert other["max_difference"] > 1e-3


def test_generation_in_a_batch_is_generation_alone(model: Any, tokenizer: Any) -> None:
    together = generate(model, tokenizer, PROMPTS, 6)
    assert together == [generate(model, tokenizer, [prompt], 6)[0] for prompt in PROMPTS]


def test_an_answer_ends_where_the_models_positions_do(tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    short = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    answers = generate(short, tokenizer, [list(range(5, 15)), [5, 6]], 24)
    assert [len(answer) <= 6 for answer in answers] == [True, True]
    assert answers[0]


def test_a_checkpoints_own_sampling_habits_do_not_change_its_answers(model: Any, tokenizer: Any) -> None:
    before = generate(model, tokenizer, PROMPTS, 8)
    model.generation_config.repetition_penalty = 1.8
    model.generation_config.do_sample = True
    assert generate(model, tokenizer, PROMPTS, 8) == before
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, before[0][1]]
    short = generate(model, tokenizer, PROMPTS, 8)[0]
    assert short == before[0][: before[0].index(before[0][1]) + 1]
    model.generation_config = type(model.generation_config)()


def test_held_out_loss_is_transformers_own(model: Any, tokenizer: Any) -> None:
    from tests.conftest import chat_rows
    from tuner.data.rows import BadRows, Row

    rows = (Row(str(number), record) for number, record in enumerate(chat_rows(5)))
    examples = [example for _, example in sft.examples(rows, tokenizer, sft.Options(), BadRows())]
    total, count = 0.0, 0
    for example in examples:
        supervised = example.supervised
        total += float(model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.labels])).loss) * supervised
        count += supervised
    measured = heldout_loss(NextTokenLoss(model, 0), examples)
    assert measured["heldout_tokens"] == count
    assert measured["heldout_loss"] == pytest.approx(total / count, abs=1e-4)
