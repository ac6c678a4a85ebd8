"""Which token comes next.

Shapes: V vocabulary.
"""

from typing import Any

import numpy
import torch
from torch import Tensor

from serve.requests import Sampling

# Below this the likeliest token has all of the probability that a float can tell from one.
LEAST_TEMPERATURE = 1e-5


class Chooser:
    """Chooses the tokens of one answer, one after the other, and remembers what it chose."""

    def __init__(self, sampling: Sampling, *, copy: int = 0, grammar: Any = None) -> None:
        self.sampling, self.grammar = sampling, grammar
        self._temperature = 1.0 if sampling.temperature is None else sampling.temperature
        self._counts: dict[int, int] = {}
        self._generator: torch.Generator | None = None
        if sampling.seed is not None:
            # Each of the n answers to one request draws numbers of its own.
            self._generator = torch.Generator().manual_seed((sampling.seed + copy) % 2**63)

    def choose(self, logits_V: Tensor) -> int:
        """The next token. `logits_V` is float32 and is changed in place."""
        said = self.sampling
        if self.grammar is not None:
            logits_V[~self._allowed(len(logits_V))] = -torch.inf
        for token, bias in (said.logit_bias or {}).items():
            if 0 <= token < len(logits_V):
                logits_V[token] += bias
        if self._counts and (said.presence_penalty or said.frequency_penalty):
            tokens = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=logits_V.dtype)
            logits_V[tokens] -= said.presence_penalty + said.frequency_penalty * counts
        if self._temperature < LEAST_TEMPERATURE:
            token = int(logits_V.argmax())
        else:
            token = self._draw((logits_V - logits_V.max()) / self._temperature)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.grammar is not None:
            self.grammar.consume_token(token)
        return token

    def _draw(self, logits_V: Tensor) -> int:
        said = self.sampling
        if said.top_k > 0:
            least = logits_V.topk(min(said.top_k, len(logits_V))).values[-1]
            logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
        if said.min_p > 0:
            probabilities_V = logits_V.softmax(-1)
            logits_V = logits_V.masked_fill(probabilities_V < said.min_p * probabilities_V.max(), -torch.inf)
        if said.top_p is not None and said.top_p < 1:
            ordered_V, tokens_V = logits_V.softmax(-1).sort(descending=True)
            # A token stays if those before it do not reach top_p; the first always does.
            left_out_V = tokens_V[ordered_V.cumsum(-1) - ordered_V >= said.top_p]
            logits_V = logits_V.index_fill(0, left_out_V, -torch.inf)
        return int(torch.multinomial(logits_V.softmax(-1), 1, generator=self._generator))

    def _allowed(self, size: int) -> Tensor:
        bits = numpy.frombuffer(self.grammar.compute_bitmask(), dtype=numpy.uint8)
        allowed = numpy.zeros(size, dtype=bool)
        unpacked = numpy.unpackbits(bits, bitorder="little")[:size].astype(bool)
        allowed[: len(unpacked)] = unpacked  # embeddings may be padded beyond the vocabulary
        return torch.from_numpy(allowed)


def logprobs(logits_V: Tensor, chosen: int, count: int) -> tuple[float, list[tuple[int, float]], int]:
    """(log-probability of `chosen`, the `count` likeliest tokens with theirs, its rank from 1), before any penalty (nats)."""
    values_V = logits_V.log_softmax(-1)
    best = values_V.topk(min(count, len(values_V))) if count else None
    listed = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else []
    return float(values_V[chosen]), listed, int((values_V > values_V[chosen]).sum()) + 1
