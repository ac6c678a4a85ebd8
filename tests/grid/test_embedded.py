"""The embedded engine's generator gives every architecture the answers that transformers gives it alone, whatever else runs."""

import queue
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve.embedded.generation import Generator, Job, Token
from serve.embedded.sampling import Chooser
from serve.requests import Sampling
from tests.grid.architectures import SMALL, TOKENS
from tuner import kinds

CAUSAL = [
    name
    for family in kinds.names("families")
    if "causal" in (facts := kinds.load("families", family).FAMILY).heads
    for name, architecture in facts.architectures.items()
    if "causal" not in architecture.lacks
]
SLIDING = ("mistral", "gemma2", "gemma3_text")
# Lengths that make rows of every age stand side by side; the last comes when the first are gone.
PROMPTS = [[5 + at for at in range(length)] for length in (3, 11, 7, 18, 1)]
ANSWERS = [4, 12, 9, 6, 8]


def small(name: str, **more: Any) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(name, vocab_size=97, **TOKENS, **{**SMALL[name], **more})
    return AutoModelForCausalLM.from_config(config).eval()


def answered(heard: "queue.Queue[Any]") -> tuple[list[Token], str]:
    tokens = []
    while isinstance(event := heard.get(timeout=60), Token):
        tokens.append(event)
    if isinstance(event, Exception):
        raise event
    return tokens, event


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in CAUSAL), *((name, {"sliding_window": 8}) for name in SLIDING)])
def test_rows_that_join_and_leave_change_nothing(name: str, more: dict[str, Any]) -> None:
    model = small(name, **more)
    expected = []
    with torch.inference_mode():
        for prompt, count in zip(PROMPTS, ANSWERS, strict=True):
            ids = torch.tensor([prompt])
            for _ in range(count):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            answer = ids[0, len(prompt) :]
            expected.append((answer.tolist(), logprobs[len(prompt) - 1 : -1].gather(1, answer[:, None])[:, 0]))
    generator = Generator(model)
    heard: list[queue.Queue[Any]] = [queue.Queue() for _ in PROMPTS]
    jobs = [
        Job(prompt, Chooser(Sampling(temperature=0)), count, frozenset(), each.put)
        for prompt, count, each in zip(PROMPTS, ANSWERS, heard, strict=True)
    ]
    for job in jobs[:-1]:
        generator.submit(job)
    first = answered(heard[0])
    generator.submit(jobs[-1])
    found = [first, *(answered(each) for each in heard[1:])]
    generator.close()
    for (tokens, finish), (ids, logprobs) in zip(found, expected, strict=True):
        assert finish == "length"
        assert [token.id for token in tokens] == ids
        torch.testing.assert_close(torch.tensor([token.logprob for token in tokens]), logprobs, atol=1e-4, rtol=0)
    assert len({tuple(ids[:4]) for ids, _ in expected}) > 1  # not the same answer whatever is asked


def test_nothing_more_is_generated_for_a_job_that_nobody_listens_to() -> None:
    generator = Generator(small("llama"))
    heard: queue.Queue[Any] = queue.Queue()
    job = Job([5, 6, 7], Chooser(Sampling(temperature=0)), 1_000_000, frozenset(), heard.put)
    generator.submit(job)
    for _ in range(5):
        assert isinstance(heard.get(timeout=60), Token)
    job.stopped.set()
    # Another one is answered, and stands alone by then.
    other: queue.Queue[Any] = queue.Queue()
    generator.submit(Job([5, 6], Chooser(Sampling(temperature=0)), 3, frozenset(), other.put))
    assert len(answered(other)[0]) == 3
    generator.close()  # ends only once every row has ended: a million tokens would take longer than any test
    before = heard.qsize()
    assert generator.load == (0, 0)
    assert heard.qsize() == before


def test_an_error_in_one_prompt_reaches_that_job_alone() -> None:
    generator = Generator(small("llama"))
    wrong, right = queue.Queue[Any](), queue.Queue[Any]()
    generator.submit(Job([10**6], Chooser(Sampling(temperature=0)), 3, frozenset(), wrong.put))
    generator.submit(Job([5, 6], Chooser(Sampling(temperature=0)), 3, frozenset(), right.put))
    assert isinstance(wrong.get(timeout=60), Exception)
    assert len(answered(right)[0]) == 3
    generator.close()
