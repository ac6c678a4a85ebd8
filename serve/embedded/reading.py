"""Reads texts for encoders: vectors, and probabilities of labels for a text or for each of its tokens.

Requests that wait are read together. Shapes: B texts, T tokens, D hidden, L labels.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

# Together these fill two cores; a batch of more waits longer for its longest text.
MAX_TEXTS = 32
MAX_TOKENS = 4096

Answer = list[float] | list[list[float]]


class Reader:
    """A thread that owns the model."""

    def __init__(self, model: Any, head: str, pooling: str = "mean") -> None:
        self._model, self._answer = model, ANSWERS[head]
        self._pooling = pooling
        self._reading = 0
        self._waiting: queue.SimpleQueue[tuple[list[int], Future[Answer]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="reader", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The thread still works."""
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """Texts that are read, and those that wait."""
        return self._reading, self._waiting.qsize()

    def submit(self, ids: list[int]) -> "Future[Answer]":
        """What the head says of these tokens.

        A vector of length one (D), the probabilities of the labels or a number (L), or those of each token (T, L).
        """
        future: Future[Answer] = Future()
        self._waiting.put((ids, future))
        return future

    def close(self) -> None:
        """Let the thread end once all is answered."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        with torch.inference_mode():
            while (first := self._waiting.get()) is not None:
                chosen, ended = [first], False
                while len(chosen) < MAX_TEXTS and not self._waiting.empty():
                    if (more := self._waiting.get()) is None:
                        ended = True
                        break
                    # All are as long as the longest is: one that is too long for these is read next, by itself.
                    if max(len(ids) for ids, _ in [*chosen, more]) * (len(chosen) + 1) > MAX_TOKENS:
                        self._read([each for each in chosen if each[1].set_running_or_notify_cancel()])
                        chosen = []
                    chosen.append(more)
                # Whoever went away meanwhile has cancelled.
                self._read([each for each in chosen if each[1].set_running_or_notify_cancel()])
                if ended:
                    return

    def _read(self, chosen: list[tuple[list[int], "Future[Answer]"]]) -> None:
        if not chosen:
            return
        self._reading = len(chosen)
        try:
            longest = max(len(ids) for ids, _ in chosen)
            pad = self._model.config.get_text_config().pad_token_id or 0
            device = self._model.device
            batch = {
                "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in chosen], device=device),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in chosen], device=device),
            }
            answers = self._answer(self._model, batch, self._pooling)
        except Exception as error:
            for _, future in chosen:
                future.set_exception(error)
            return
        finally:
            self._reading = 0
        for (ids, future), answer in zip(chosen, answers, strict=True):
            future.set_result(answer.tolist() if answer.dim() == 1 else answer[: len(ids)].tolist())


def _probabilities(model: Any, batch: dict[str, Tensor], pooling: str) -> Tensor:  # noqa: ARG001 - common signature
    """(B, L), by what transformers calls the problem; a number stays as it is."""
    logits_BL: Tensor = model(**batch).logits.float()
    problem = model.config.problem_type or ("regression" if model.config.num_labels == 1 else "single_label_classification")
    if problem == "regression":
        return logits_BL
    return logits_BL.sigmoid() if problem == "multi_label_classification" else logits_BL.softmax(-1)


def _probabilities_of_tokens(model: Any, batch: dict[str, Tensor], pooling: str) -> Tensor:  # noqa: ARG001 - common signature
    """(B, T, L)."""
    scores_BTL: Tensor = model(**batch).logits.float().softmax(-1)
    return scores_BTL


def _vectors(model: Any, batch: dict[str, Tensor], pooling: str) -> Tensor:
    """(B, D), each of length one."""
    hidden_BTD = model(**batch).last_hidden_state.float()
    mask_BT = batch["attention_mask"]
    if pooling == "mean":
        pooled_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
    else:
        place_B = mask_BT.sum(1) - 1 if pooling == "last" else torch.zeros(len(mask_BT), dtype=torch.long, device=mask_BT.device)
        pooled_BD = hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), place_B]
    return torch.nn.functional.normalize(pooled_BD, dim=-1)


ANSWERS: dict[str, Callable[[Any, dict[str, Tensor], str], Tensor]] = {
    "sequence": _probabilities,
    "token": _probabilities_of_tokens,
    "embedding": _vectors,
}
