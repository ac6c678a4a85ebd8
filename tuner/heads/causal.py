"""Predicts the next token: batches, log-likelihoods at supervised positions only, greedy answers, and the probe made of them.

Shapes: B batch, T tokens, D hidden, V vocabulary, N supervised positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuner import likelihood
from tuner.data.example import IGNORE, Example, Packed, Tagged
from tuner.documents import Documents, documents
from tuner.objective import Objective, in_turn
from tuner.progress import track

AUTO = "AutoModelForCausalLM"
# A step of generation costs hardly more for four times the rows: its time goes into reading the weights.
GENERATE_ROWS = 64


def collate(examples: Sequence[Example | Tagged], pad_id: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right to the longest."""
    longest = max(len(each.ids) for each in examples)
    rest = [longest - len(each.ids) for each in examples]
    pairs = list(zip(examples, rest, strict=True))
    return {
        "input_ids": torch.tensor([each.ids + [pad_id] * n for each, n in pairs], device=device),
        "attention_mask": torch.tensor([[1] * len(each.ids) + [0] * n for each, n in pairs], device=device),
        "labels": torch.tensor([each.labels + [IGNORE] * n for each, n in pairs], device=device),
    }


def collate_packed(rows: Sequence[Packed], pad_id: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """`input_ids`, `labels` and `position_ids`, each (B, T), with several documents in a row; positions begin anew with each.

    What fills up a row is one more document, of which nothing is learned.
    """
    longest = max(len(row.ids) for row in rows)
    rest = [longest - len(row.ids) for row in rows]
    pairs = list(zip(rows, rest, strict=True))
    return {
        "input_ids": torch.tensor([row.ids + [pad_id] * n for row, n in pairs], device=device),
        "labels": torch.tensor([row.labels + [IGNORE] * n for row, n in pairs], device=device),
        "position_ids": torch.tensor([row.positions + list(range(n)) for row, n in pairs], device=device),
    }


class NextTokenLoss(Objective):
    """Sum of the negative log-likelihood over a batch's supervised tokens (nats).

    The output layer runs at supervised positions alone: with a vocabulary of 49,152 it costs as much as eight of the
    model's blocks, and in chat data most positions only ask the question.

    Documents that share a row read themselves alone.
    """

    def __init__(self, model: Any, pad_id: int) -> None:
        super().__init__(model, pad_id)
        self._layer = (likelihood.plain_output(model),)  # a tuple, or it would be registered as one more module

    def collate(self, examples: Sequence[Example | Packed], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The batch that `forward` takes: of examples, or of packed rows."""
        packed = [each for each in examples if isinstance(each, Packed)]
        if packed:
            return collate_packed(packed, self.pad_id, device)
        return collate([each for each in examples if isinstance(each, Example)], self.pad_id, device)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A scalar."""
        (layer,) = self._layer
        if layer is None:
            log_likelihood_N, _ = supervised_log_likelihood(self.model, batch)
            return -log_likelihood_N.sum()
        with likelihood.hidden_instead(layer):
            hidden_ND, targets_N = _supervised(self.model, batch)
        return likelihood.loss_sum(hidden_ND, layer, targets_N)


def supervised_log_likelihood(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(log-likelihood (N,) of each supervised token, logits (N, V) it was computed from), in float32, row by row."""
    logits_NV, targets_N = _supervised(model, batch)
    logits_NV = logits_NV.float()
    return -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV


def supervised_losses(model: Any, batch: dict[str, Tensor], layer: Any | None) -> Tensor:
    """(N,) negative log-likelihoods of the supervised tokens (nats), row by row; with the model's `plain_output` without logits."""
    if layer is None or (torch.is_grad_enabled() and not likelihood.frozen(layer)):
        return -supervised_log_likelihood(model, batch)[0]
    with likelihood.hidden_instead(layer):
        hidden_ND, targets_N = _supervised(model, batch)
    return likelihood.loss_each(hidden_ND, layer, targets_N)


def _supervised(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(what the model gives (N, ...) where the next token is supervised, that token (N,)), row by row."""
    labels_BT = batch["labels"][:, 1:]
    keep_BT = labels_BT != IGNORE
    # Columns that no row of the batch supervises need no logits; transformers' own `logits_to_keep` leaves them out, and
    # keeps whatever else the architecture does to its logits (scaling, soft caps).
    columns = keep_BT.any(dim=0).nonzero().squeeze(-1)
    # A causal model reads nothing of the padding behind a row, so it needs no mask, without which attention is faster.
    given = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    with documents(Documents(batch["position_ids"] == 0) if "position_ids" in batch else None):
        output = model(**given, logits_to_keep=columns, use_cache=False)
    kept = keep_BT[:, columns]
    return output.logits[kept], labels_BT[:, columns][kept]


def record(model: Any, tokenizer: Any, questions: list[dict[str, Any]], answer_tokens: int) -> list[dict[str, Any]]:
    """Each question {"ids", "messages"} with its greedy answer's `answer_ids`, `logprobs` and `margins` (nats), of one length."""
    answers = generate(model, tokenizer, [question["ids"] for question in questions], answer_tokens)
    items = [{**question, "answer_ids": answer} for question, answer in zip(questions, answers, strict=True)]
    now = ask(model, items, str(model.device))
    return [
        {**item, **{name: [round(value, 5) for value in answer[name]] for name in ("logprobs", "margins")}}
        for item, answer in zip(items, now, strict=True)
    ]


def ask(model: Any, items: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """For each item: `logprobs` of the recorded answer's tokens, the top `margins` there, and the tokens `preferred` now.

    The recorded answer is read in one pass, so one early difference does not hide the rest.
    """
    batch = collate([example(item) for item in items], 0, device)
    with torch.inference_mode():
        log_likelihood_N, logits_NV = supervised_log_likelihood(model, batch)
        top_N2 = logits_NV.log_softmax(-1).topk(2).values
    lengths = [len(item["answer_ids"]) for item in items]
    values = {"logprobs": log_likelihood_N, "margins": top_N2[:, 0] - top_N2[:, 1], "preferred": logits_NV.argmax(-1)}
    parts = {name: torch.split(value, lengths) for name, value in values.items()}
    return [{name: parts[name][index].tolist() for name in parts} for index in range(len(items))]


def difference(item: dict[str, Any], answer: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """Per recorded token: the difference in log-probability (nats), and whether it is still preferred."""
    apart = [abs(new - old) for new, old in zip(answer["logprobs"], item["logprobs"], strict=True)]
    return apart, [new == old for new, old in zip(answer["preferred"], item["answer_ids"], strict=True)]


def example(item: dict[str, Any]) -> Example:
    """A probe item as an example whose answer is supervised."""
    return Example(item["ids"] + item["answer_ids"], [IGNORE] * len(item["ids"]) + item["answer_ids"])


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The greedy answer to each prompt as token ids up to and with the first eos, in the order of the prompts.

    All answers are shorter than `max_new_tokens` where the longest prompt leaves fewer of the model's positions.
    """
    from transformers import GenerationConfig

    # The checkpoint's own ends of a turn count, and nothing else of its generation_config: a repetition penalty in it would
    # make the model disagree with its own probabilities, and the engine is told to ignore it, too.
    named = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [] if named is None else [named])}
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    greedy = GenerationConfig(
        max_new_tokens=min(max_new_tokens, positions - longest) if positions else max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode(), _habits(model, greedy), track("answering held-out rows", len(prompts)) as advance:
        for chosen in in_turn([len(prompt) for prompt in prompts], GENERATE_ROWS):
            longest = max(len(prompts[index]) for index in chosen)
            # Padded on the left, so that every answer begins at the same column.
            ids = [[tokenizer.pad_token_id] * (longest - len(prompts[index])) + prompts[index] for index in chosen]
            mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen]
            device = model.device
            output = model.generate(torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device))
            for index, ids_after in zip(chosen, output[:, longest:].tolist(), strict=True):
                end = next((at + 1 for at, token in enumerate(ids_after) if token in ends), len(ids_after))
                answers[index] = ids_after[:end]
            advance(len(chosen))
    return answers


@contextmanager
def _habits(model: Any, wanted: Any) -> Iterator[None]:
    """The model with another generation_config: one that is only passed to `generate` is filled up from the checkpoint's own."""
    own, model.generation_config = model.generation_config, wanted
    try:
        yield
    finally:
        model.generation_config = own


def loss_bytes(sizes: Any, positions: int, supervised: int) -> int:  # noqa: ARG001 - a head's common signature
    """What `NextTokenLoss` holds at a time: logits of a few positions, and gradients of the hidden states and the output layer.

    Where logits are scaled or capped, they are there whole, with their float32 and its gradient.
    """
    if sizes.whole_logits:
        return int(sizes.vocabulary * supervised * (2 * sizes.width + 3 * 4))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    chunk, wide = (min(supervised * sizes.vocabulary, most[kind]) for most in (likelihood.MOST_LOGITS, likelihood.MOST_WIDE))
    whole = sizes.vocabulary * sizes.hidden
    trained = (2 * 4 * whole if sizes.output_trained else 0) + (sizes.width * whole if sizes.output_copied else 0)
    trained += 2 * whole if sizes.mixed else 0  # rounded
    return int(chunk * sizes.width + 4 * wide + 2 * supervised * sizes.hidden * sizes.width + trained)
