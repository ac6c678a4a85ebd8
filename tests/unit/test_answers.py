"""Tokens become text, up to a stop, and the calls of tools in it."""

from typing import Any

import pytest

from serve.embedded.answers import CALL, END_OF_CALL, Calls, Text
from serve.embedded.sampling import Chooser, logprobs
from serve.requests import Sampling


def told(tokenizer: Any, text: str, stops: list[str]) -> tuple[list[str], bool]:
    answer = Text(tokenizer, [], stops)
    pieces = [answer.add(token) for token in tokenizer(text)["input_ids"]]
    return [*pieces, "" if answer.stopped else answer.rest()], answer.stopped


@pytest.mark.parametrize("text", ["list the vm", "größer als 日本語 🙂 ende", "a\n\n b  c"])
def test_the_pieces_are_the_text_and_no_piece_holds_half_a_letter(tokenizer: Any, text: str) -> None:
    pieces, stopped = told(tokenizer, text, [])
    assert "".join(pieces) == text
    assert not stopped
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stops", "left"), [(["vm"], "list the "), (["t the", "x"], "lis"), (["vmx"], "list the vm"), (["lis"], "")]
)
def test_nothing_of_a_stop_and_nothing_behind_it_is_told(tokenizer: Any, stops: list[str], left: str) -> None:
    pieces, stopped = told(tokenizer, "list the vm", stops)
    assert "".join(pieces) == left
    assert stopped == (left != "list the vm")


def test_calls_are_taken_out_of_the_text_however_it_is_cut() -> None:
    text = f'I look.{CALL}\n{{"name": "find", "arguments": {{"n": 3}}}}\n{END_OF_CALL}\n{CALL}{{"name": "b"}}{END_OF_CALL}'
    for size in (1, 3, 7, len(text)):
        calls, said = Calls(), ""
        for at in range(0, len(text), size):
            piece, _ = calls.add(text[at : at + size])
            said += piece
        said += calls.rest()
        assert said == "I look."
        assert [(each["function"]["name"], each["function"]["arguments"]) for each in calls.found] == [
            ("find", '{"n": 3}'),
            ("b", "{}"),
        ]
        assert len({each["id"] for each in calls.found}) == 2


@pytest.mark.parametrize(
    "text", ["no call", "<tool", f"{CALL}no json{END_OF_CALL} x", f'{CALL}{{"name": 3}}{END_OF_CALL}', f'a {CALL}{{"name": "x"']
)
def test_what_is_no_call_stays_in_the_text(text: str) -> None:
    calls, said = Calls(), ""
    for letter in text:
        piece, found = calls.add(letter)
        said += piece
        assert not found
    assert said + calls.rest() == text


def test_tokens_are_drawn_from_the_distribution_that_the_options_leave() -> None:
    import torch

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def drawn(count: int = 4000, **options: Any) -> torch.Tensor:
        chooser = Chooser(Sampling(seed=0, **options))
        return torch.bincount(torch.tensor([chooser.choose(logits.clone()) for _ in range(count)]), minlength=4) / count

    # Three standard deviations of a share drawn 4,000 times are 0.024 at most.
    assert torch.allclose(drawn(), logits.softmax(-1), atol=0.024)
    assert torch.allclose(drawn(temperature=0.5), (logits / 0.5).softmax(-1), atol=0.024)
    kept = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf]).softmax(-1)
    for options in ({"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.3}):
        assert torch.allclose(drawn(**options), kept, atol=0.024), options
    assert drawn(logit_bias={3: 100.0}).tolist() == [0, 0, 0, 1]
    assert drawn(10, temperature=0.0).tolist() == [1, 0, 0, 0]
    # Once it was said, the first token is two behind.
    chooser = Chooser(Sampling(temperature=0.0, presence_penalty=2.0))
    assert [chooser.choose(logits.clone()) for _ in range(3)] == [0, 1, 0]
    chosen, best, rank = logprobs(logits, 1, 2)
    assert chosen == pytest.approx(float(logits.log_softmax(-1)[1]))
    assert ([token for token, _ in best], rank) == ([0, 1], 2)
