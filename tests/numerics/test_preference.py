"""The preference losses against TRL's, elementwise."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import chat_rows
from tuner import preference
from tuner.data.example import IGNORE, Example
from tuner.data.rows import BadRows, Row
from tuner.errors import DataError
from tuner.tasks import preference as task


def draws(*shape: int) -> torch.Tensor:
    """Log-likelihoods: below zero, from close to far."""
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 20


CHOSEN, REJECTED, REFERENCE = draws(7), draws(7) - 0.1, draws(7, 2)
LENGTHS = torch.tensor([[3, 5], [2, 9], [4, 4], [1, 7], [8, 2], [6, 6], [5, 3]])


def test_orpo_is_trls() -> None:
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = CHOSEN / LENGTHS[:, 0], REJECTED / LENGTHS[:, 1]
    told = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    # TRL returns what it adds to the loss, with the sign turned.
    theirs, *_ = ORPOTrainer.odds_ratio_loss(told, chosen, rejected)
    torch.testing.assert_close(preference.orpo(CHOSEN, REJECTED, LENGTHS, 0.3), -chosen - theirs)
    assert (preference.orpo(CHOSEN, REJECTED, LENGTHS, 0.3) + chosen).abs().min() > 0


def test_simpo_is_trls() -> None:
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = CHOSEN / LENGTHS[:, 0], REJECTED / LENGTHS[:, 1]
    told = SimpleNamespace(
        beta=2.0, simpo_gamma=1.5, loss_type="simpo", label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"), alpha=0.0
    )
    theirs, *_ = CPOTrainer.cpo_loss(told, chosen, rejected)
    torch.testing.assert_close(preference.simpo(CHOSEN, REJECTED, LENGTHS, 2.0, 1.5), theirs)


def rows(loss: str, tokenizer: Any) -> list[Any]:
    records = [
        {"messages": row["messages"][:-1], "chosen": row["messages"][-1]["content"], "rejected": f"no {number}" * (1 + number % 3)}
        for number, row in enumerate(chat_rows(4))
    ]
    if loss == "kto":
        records = [
            {"messages": record["messages"], "completion": record[key], "label": key == "chosen"}
            for record, key in zip(records, ["chosen", "rejected", "chosen", "chosen"], strict=True)
        ]
    options = task.Options(loss=loss)  # type: ignore[arg-type]
    places = (Row(f"f:{number}", record) for number, record in enumerate(records, 1))
    return [example for _, example in task.examples(places, tokenizer, options, BadRows())]


def model(folder: Any, seed: int) -> Any:
    """A model that differs from the one in the folder by noise."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return loaded.eval()


def test_dpo_through_the_whole_model_is_trls_trainers(tiny_model: Any, tokenizer: Any, tmp_path: Any) -> None:
    """TRL tokenizes, collates and computes for itself; the loss of the whole batch is compared."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    now, before = model(tiny_model, 1), model(tiny_model, 2)
    pairs = rows("dpo", tokenizer)
    pairs = preference.PairLoss(before, 0, task.Options(beta=0.3)).prepared(pairs)
    objective = preference.PairLoss(now, 0, task.Options(beta=0.3))
    with torch.no_grad():
        ours = objective(objective.collate(pairs)) / len(pairs)
    config = DPOConfig(
        output_dir=str(tmp_path), beta=0.3, per_device_train_batch_size=4, use_cpu=True, report_to=[], bf16=False, max_length=None,
        gradient_checkpointing=False,
    )  # fmt: skip
    prompts = [tokenizer.decode(pair.chosen.ids[: prompt_length(pair.chosen)]) for pair in pairs]
    # Our tokens, spelled out: the end of the answer is in the text, so that TRL's own must not be added.
    data = Dataset.from_list(
        [
            {
                "prompt": prompt,
                "chosen": tokenizer.decode(learned(pair.chosen)[:-1]),
                "rejected": tokenizer.decode(learned(pair.rejected)[:-1]),
            }
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]
    )
    trainer = DPOTrainer(model=now, ref_model=before, args=config, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    now.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(now, batch)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)
    assert abs(float(ours) - 0.6931) > 1e-2, "the models differ"


def test_kto_through_the_whole_model_is_trls_trainers(tiny_model: Any, tokenizer: Any, tmp_path: Any) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    now, before = model(tiny_model, 1), model(tiny_model, 2)
    judged = rows("kto", tokenizer)
    options = task.Options(loss="kto", beta=0.3, good_weight=1.5, bad_weight=0.7)
    judged = preference.JudgedLoss(before, 0, options).prepared(judged)
    objective = preference.JudgedLoss(now, 0, options)
    config = KTOConfig(
        output_dir=str(tmp_path), beta=0.3, desirable_weight=1.5, undesirable_weight=0.7, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], bf16=False, max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list(
        [
            {
                "prompt": tokenizer.decode(row.answer.ids[: prompt_length(row.answer)]),
                "completion": tokenizer.decode(learned(row.answer)[:-1]),
                "label": row.good,
            }
            for row in judged
        ]
    )
    trainer = KTOTrainer(model=now, ref_model=before, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.calculate_KL = False  # it mixes prompts and answers in another order; the divergence has a test of its own below
    batch = next(iter(trainer.get_train_dataloader()))
    now.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(now, batch)
        ours = objective(objective.collate(judged)) / len(judged)
        objective._divergence = torch.tensor(1.0)
        moved = objective(objective.collate(judged)) / len(judged)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)
    assert abs(float(ours) - float(moved)) > 1e-3, "the divergence counts"


def test_ktos_divergence_is_the_mean_change_on_mismatched_answers_and_not_below_zero(tiny_model: Any, tokenizer: Any) -> None:
    now, before = model(tiny_model, 1), model(tiny_model, 2)
    judged, options = rows("kto", tokenizer), task.Options(loss="kto")
    for first, second in ((now, before), (before, now)):
        prepared = preference.JudgedLoss(second, 0, options).prepared(judged)
        objective = preference.JudgedLoss(first, 0, options)
        objective.begin(prepared, 2)
        changes = []
        for row in prepared:
            assert row.mismatched is not None
            # Each by itself, with transformers' own loss: the mean over the answer's tokens.
            ids, labels = torch.tensor([row.mismatched.ids]), torch.tensor([row.mismatched.labels])
            with torch.no_grad():
                apart = [-each(input_ids=ids, labels=labels).loss * row.mismatched.supervised for each in (first, second)]
            changes.append(float(apart[0] - apart[1]))
        assert float(objective._divergence) == pytest.approx(max(0.0, sum(changes) / len(changes)), abs=1e-4)
    assert abs(sum(changes)) > 1e-2


def test_a_mismatched_answer_belongs_to_another_prompt(tiny_model: Any, tokenizer: Any) -> None:
    objective = preference.JudgedLoss(model(tiny_model, 1), 0, task.Options(loss="kto"))
    judged = objective.prepared(rows("kto", tokenizer))
    for at, row in enumerate(judged):
        other = judged[at - 2].answer
        assert row.mismatched is not None
        assert row.mismatched.ids[: prompt_length(row.answer)] == row.answer.ids[: prompt_length(row.answer)]
        assert learned(row.mismatched) == learned(other) != learned(row.answer)


def test_the_reference_is_the_model_with_its_adapter_off(tiny_model: Any, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    from tuner.families import family_of
    from tuner.methods import lora

    plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    pairs = rows("dpo", tokenizer)
    wanted = preference.PairLoss(plain, 0, task.Options()).prepared(pairs)
    adapted = lora.prepare(plain, lora.Options(rank=4), *family_of("llama"), []).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    loss = preference.PairLoss(adapted, 0, task.Options())
    found = loss.prepared(pairs)
    assert [pair.reference for pair in found] == [pair.reference for pair in wanted]
    assert loss.answers([pairs[0].chosen])[0] != wanted[0].reference[0], "the adapter is on again"


@pytest.mark.parametrize(
    ("options", "record", "said"),
    [
        ({}, {"prompt": "a", "chosen": "b"}, '"rejected" is None, expected text'),
        ({}, {"prompt": "a", "chosen": "b", "rejected": "b"}, '"chosen" and "rejected" are the same'),
        ({}, {"chosen": "b", "rejected": "c"}, 'expected "prompt" with text in it, or "messages"'),
        ({"loss": "kto"}, {"prompt": "a", "completion": "b"}, '"label" is None, expected true for a good answer'),
        ({"loss": "kto"}, {"prompt": "a", "completion": "b", "label": 1}, '"label" is 1, expected true for a good answer'),
        ({"loss": "kto"}, {"prompt": "a"}, 'expected text, or "completion" and "label"'),
        (
            {},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "chosen": "b", "rejected": "c"},
            'the last message is from "assistant", expected "user"',
        ),
        ({}, {"messages": "a", "chosen": "b", "rejected": "c"}, "messages"),
    ],
)
def test_a_row_without_anything_to_prefer_is_said(options: dict[str, Any], record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        task.check_row(record, task.Options(**options))
    assert said in str(error.value)


def test_only_the_last_answer_is_learned(tokenizer: Any) -> None:
    earlier = chat_rows(1)[0]["messages"]
    record = {"messages": [*earlier, {"role": "user", "content": "and now"}], "chosen": "az vm", "rejected": "az vnet"}
    ((_, pair),) = task.examples(iter([Row("f:1", record)]), tokenizer, task.Options(), BadRows())
    assert tokenizer.decode(learned(pair.chosen)) == "az vm<|im_end|>"
    assert earlier[-1]["content"] in tokenizer.decode(pair.chosen.ids)


def learned(example: Any) -> list[int]:
    return [label for label in example.labels if label != IGNORE]


def prompt_length(example: Any) -> int:
    return next(at for at, label in enumerate(example.labels) if label != IGNORE)


def test_a_model_that_was_not_trained_yet_is_the_one_it_is_compared_with(tokenizer: Any, tmp_path: Any) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=330, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert config.resid_pdrop == config.attn_pdrop == 0.1
    drops = transformers.GPT2LMHeadModel(config)
    objective = preference.PairLoss(drops, 0, task.Options())
    pairs = objective.prepared(rows("dpo", tokenizer))
    objective.train()
    assert drops.training
    loss = objective(objective.collate(pairs)) / len(pairs)
    assert float(loss) == pytest.approx(0.693147, abs=1e-5), "ln 2"
    ids = torch.arange(3, 30)[None]
    assert torch.equal(drops(ids).logits, drops(ids).logits)


def test_what_kto_compares_with_is_no_longer_than_a_row_may_be(tokenizer: Any) -> None:
    import transformers

    options = task.Options(loss="kto", max_tokens=20)
    config = transformers.GPT2Config(vocab_size=330, n_embd=32, n_layer=1, n_head=2, n_positions=20)
    objective = preference.JudgedLoss(transformers.GPT2LMHeadModel(config), 0, options)
    long = [Example(list(range(3, 23)), [IGNORE] * at + list(range(3 + at, 23))) for at in (2, 17)]
    judged = objective.prepared([preference.Judged(each, True) for each in long])
    assert [len(row.mismatched.ids) for row in judged] == [5, 20]
    (alone,) = objective.begin(objective.prepared([preference.Judged(long[0], True)]), 1)
    # It has no other prompt to compare with, so sigmoid(0) is all that there is before training.
    objective.eval()
    assert float(objective(objective.collate([alone]))) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_orpo_and_simpo_through_the_whole_model_are_made_of_transformers_own_losses(
    tiny_model: Any, tokenizer: Any, loss: str
) -> None:
    """transformers' loss of a row is the mean over its labels: each answer's own, as the papers have it, not the batch's."""
    now, pairs = model(tiny_model, 1), rows(loss, tokenizer)
    options = task.Options(loss=loss, beta=0.3)  # type: ignore[arg-type]
    objective = preference.PairLoss(now, 0, options)

    def mean(example: Example) -> torch.Tensor:
        return -now(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.labels])).loss

    with torch.no_grad():
        ours = objective(objective.collate(pairs))
        expected = torch.zeros(())
        for pair in pairs:
            good, bad = mean(pair.chosen), mean(pair.rejected)
            if loss == "orpo":
                odds = torch.log(good.exp() / (1 - good.exp())) - torch.log(bad.exp() / (1 - bad.exp()))
                expected += -good - 0.3 * torch.log(torch.sigmoid(odds))
            else:
                expected += -torch.log(torch.sigmoid(0.3 * (good - bad) - options.margin))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert len({len(pair.chosen.ids) for pair in pairs} | {len(pair.rejected.ids) for pair in pairs}) > 1, "rows are padded"
