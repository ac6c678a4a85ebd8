"""Generates for many requests at once: a row joins as soon as its prompt is read and leaves as soon as its answer ends.

A prompt is read by itself, without padding. Its state then joins those of the other rows, padded at the front to the longest, so
that one pass over the weights gives every row its next token (continuous batching: Orca, OSDI 2022, section 3.2).

Shapes: B rows, T tokens of the longest row, V vocabulary.
"""

import inspect
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from serve.embedded.sampling import Chooser, logprobs
from serve.errors import EngineError

# One step reads all weights once; more rows than this add more time than they save.
MAX_ROWS = 16
# What a cache can consist of here. A window is kept whole: its mask leaves out what lies before it.
WHOLE = {
    DynamicSlidingWindowLayer: DynamicLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: LinearAttentionAndFullAttentionLayer,
}
MERGED = (DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    logprob: float
    """Natural logarithm of its probability, before temperature and penalties."""
    top: list[tuple[int, float]]
    """The likeliest tokens and their log-probabilities, as many as were asked for."""


@dataclass
class Job:
    """One answer to be generated."""

    prompt: list[int]
    chooser: Chooser
    max_tokens: int
    ends: frozenset[int]
    """Tokens after which nothing more comes."""
    heard: Callable[[Any], None]
    """Called, in the generator's thread, with each Token, at the end with "stop" or "length", or with an Exception."""
    adapter: str | None = None
    top: int = 0
    """How many alternatives to give with each token."""
    read_back: Callable[[list[tuple[float, list[tuple[int, float]], int]]], None] | None = None
    """Called with the log-probability, alternatives and rank of every token of the prompt but the first."""
    count: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set by whoever no longer listens."""


class _Change:
    """Something to do to the model between two steps."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.done: Future[None] = Future()

    def apply(self) -> None:
        """Do it."""
        try:
            self._work()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


class Generator:
    """A thread that owns the model. Jobs are handed over by `submit`; nothing else may touch the model meanwhile."""

    def __init__(self, model: Any, adapters: tuple[str, ...] = ()) -> None:
        self._model, self._adapters = model, adapters
        inner = model.get_base_model() if adapters else model
        self._config = inner.config
        self._takes = set(inspect.signature(inner.forward).parameters)
        self._waiting: queue.SimpleQueue[Job | _Change | None] = queue.SimpleQueue()
        self._changes: queue.SimpleQueue[_Change] = queue.SimpleQueue()
        kinds = {type(layer) for layer in self._new_cache().layers}
        if odd := kinds - set(MERGED):
            raise EngineError(f"the state of {self._config.model_type} is a {odd.pop().__name__}, which cannot be batched here")
        self._attends = kinds != {LinearAttentionLayer}
        self._jobs: list[Job] = []
        self._next: list[int] = []
        self._cache: Any = None
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long)
        self._thread = threading.Thread(target=self._work, name="generator", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The thread still works."""
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """Answers that are generated, and those that wait."""
        return len(self._jobs), self._waiting.qsize()

    def submit(self, job: Job) -> None:
        """Let it be answered; what comes is told to `job.heard`."""
        self._waiting.put(job)

    def load_adapter(self, name: str, path: str) -> "Future[None]":
        """Let an adapter join; only a generator that was made with adapters can."""
        return self._change(lambda: self._model.load_adapter(path, adapter_name=name))

    def unload_adapter(self, name: str) -> "Future[None]":
        """Let an adapter go. Rows that use it are ended."""

        def work() -> None:
            for job in self._jobs:
                if job.adapter == name:
                    job.heard(EngineError(f"{name} was taken away"))
            self._keep([job.adapter != name for job in self._jobs])
            if len(self._model.peft_config) > 1:  # peft asks the last one even for what the base alone is to answer
                self._model.delete_adapter(name)

        return self._change(work)

    def _change(self, work: Callable[[], Any]) -> "Future[None]":
        change = _Change(work)
        self._changes.put(change)
        self._waiting.put(change)  # wakes a thread that has nothing to do; by then it may be done already
        return change.done

    def close(self) -> None:
        """Let the thread end once all is answered."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        open_ = True
        with torch.inference_mode():
            while open_ or self._jobs:
                while not self._changes.empty():
                    self._changes.get().apply()
                # With nothing to do it waits; between two steps it takes what has come, one prompt at a time, so that the
                # rows that run are never held up by more than one.
                if len(self._jobs) < MAX_ROWS and (not self._jobs or not self._waiting.empty()):
                    job = self._waiting.get() if open_ else None
                    if isinstance(job, Job):
                        self._begin(job)
                    elif job is None:
                        open_ = False
                        continue
                if self._jobs:
                    self._step()

    def _begin(self, job: Job) -> None:
        """Read the prompt, choose the first token, and let the row join the others."""
        if job.stopped.is_set():
            return
        try:
            cache = self._new_cache()
            logits_TV = self._forward([job.prompt], None, cache, [job.adapter], all_positions=job.read_back is not None)[0]
            if job.read_back is not None:
                job.read_back([logprobs(row_V, token, job.top) for row_V, token in zip(logits_TV, job.prompt[1:], strict=False)])
            token = self._choose(job, logits_TV[-1])
            if token is not None:
                self._join(job, token, cache)
        except Exception as error:
            job.heard(error)

    def _step(self) -> None:
        """The next token of every row."""
        self._keep([not job.stopped.is_set() for job in self._jobs])
        if not self._jobs:
            return
        try:
            self._mask_BT = torch.cat([self._mask_BT, torch.ones(len(self._jobs), 1, dtype=torch.long)], 1)
            adapters = [job.adapter for job in self._jobs]
            logits_BTV = self._forward([[token] for token in self._next], self._mask_BT, self._cache, adapters)
        except Exception as error:
            for job in self._jobs:
                job.heard(error)
            self._forget()
            return
        tokens = []
        for job, logits_TV in zip(self._jobs, logits_BTV, strict=True):
            try:
                tokens.append(self._choose(job, logits_TV[-1]))
            except Exception as error:  # what one asks for is not the others' fault
                job.heard(error)
                tokens.append(None)
        self._next = [token or 0 for token in tokens]
        self._keep([token is not None for token in tokens])

    def _choose(self, job: Job, logits_V: Tensor) -> int | None:
        """Tell the job its next token, and return it where another one is to follow."""
        raw_V = logits_V.float()
        token = job.chooser.choose(raw_V.clone())
        logprob, top, _ = logprobs(raw_V, token, job.top)
        job.count += 1
        job.heard(Token(token, logprob, top))
        finish = "stop" if token in job.ends else "length" if job.count >= job.max_tokens else None
        if finish:
            job.heard(finish)
            return None
        return token

    def _forward(
        self, ids: list[list[int]], mask_BT: Tensor | None, cache: Any, adapters: list[str | None], *, all_positions: bool = False
    ) -> Tensor:
        """Logits (B, T, V), of the last position unless all are asked for."""
        device = self._model.device
        given: dict[str, Any] = {"input_ids": torch.tensor(ids, device=device), "use_cache": True}
        given["cache_params" if "cache_params" in self._takes else "past_key_values"] = cache
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 0 if all_positions else 1
        if mask_BT is not None and self._attends:  # a state of fixed size has no columns to leave out
            given["attention_mask"] = mask_BT.to(device)
            if "position_ids" in self._takes:
                given["position_ids"] = mask_BT.sum(1, keepdim=True).to(device) - 1
        if self._adapters:
            given["adapter_names"] = [name or "__base__" for name in adapters]
        logits: Tensor = self._model(**given).logits
        return logits.cpu()

    def _new_cache(self) -> Any:
        cache = DynamicCache(config=self._config)
        cache.layers = [WHOLE[type(layer)]() if type(layer) in WHOLE else layer for layer in cache.layers]
        return cache

    def _join(self, job: Job, token: int, one: Any) -> None:
        """Add the row, whose next input is `token`, and the state of its prompt to those that run."""
        longest = max(self._mask_BT.shape[1], len(job.prompt))
        self._mask_BT = torch.cat(
            [_front(self._mask_BT, longest, 1), _front(torch.ones(1, len(job.prompt), dtype=torch.long), longest, 1)]
        )
        if self._cache is None:
            self._cache = one
        else:
            for mine, new in zip(self._cache.layers, one.layers, strict=True):
                if isinstance(mine, DynamicLayer):
                    mine.keys = torch.cat([_front(mine.keys, longest, -2), _front(new.keys, longest, -2)])
                    mine.values = torch.cat([_front(mine.values, longest, -2), _front(new.values, longest, -2)])
                if isinstance(mine, LinearAttentionLayer):
                    for states, more in ((mine.conv_states, new.conv_states), (mine.recurrent_states, new.recurrent_states)):
                        for index, state in states.items():
                            if state is not None:
                                states[index] = torch.cat([state, more[index]])
        self._jobs.append(job)
        self._next.append(token)

    def _keep(self, wanted: list[bool]) -> None:
        """Drop the rows that have ended, and the columns that only they needed."""
        if all(wanted):
            return
        if not any(wanted):
            self._forget()
            return
        chosen = torch.tensor([index for index, keep in enumerate(wanted) if keep])
        self._jobs = [self._jobs[index] for index in chosen.tolist()]
        self._next = [self._next[index] for index in chosen.tolist()]
        self._mask_BT = self._mask_BT[chosen]
        unused = int(self._mask_BT.sum(0).ne(0).int().argmax())
        self._mask_BT = self._mask_BT[:, unused:]
        for layer in self._cache.layers:
            if isinstance(layer, DynamicLayer):
                layer.keys, layer.values = layer.keys[chosen, :, unused:], layer.values[chosen, :, unused:]
            if isinstance(layer, LinearAttentionLayer):
                for states in (layer.conv_states, layer.recurrent_states):
                    for index, state in states.items():
                        if state is not None:
                            states[index] = state[chosen]

    def _forget(self) -> None:
        self._jobs, self._next, self._cache = [], [], None
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long)


def _front(tensor: Tensor, length: int, dimension: int) -> Tensor:
    """The tensor with zeros before it along `dimension`, so that it is `length` long there."""
    shape = list(tensor.shape)
    shape[dimension] = length - shape[dimension]
    return torch.cat([tensor.new_zeros(shape), tensor], dimension) if shape[dimension] else tensor
