"""Which tokens of a conversation are learned."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.data.example import IGNORE, Example
from tuner.data.rows import BadRows, Row
from tuner.errors import DataError, SourceError
from tuner.tasks import sft

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "list vm"},
    {"role": "assistant", "content": "az vm list"},
    {"role": "user", "content": "show vnet"},
    {"role": "assistant", "content": "az vnet show"},
]


BARE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def encode(record: dict[str, Any], tokenizer: Any) -> Example:
    ((_, example),) = sft.examples(iter([Row("x:1", record)]), tokenizer, sft.Options(), BadRows())
    return example


def learned(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


def test_only_the_assistants_words_and_the_end_of_its_turns_are_learned(tokenizer: Any) -> None:
    example = encode({"messages": TURNS}, tokenizer)
    assert learned(example, tokenizer) == "az vm list<|im_end|>az vnet show<|im_end|>"


def test_the_tokens_are_those_that_the_template_renders(tokenizer: Any) -> None:
    example = encode({"messages": TURNS}, tokenizer)
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(example.ids) == rendered


def test_what_a_server_sends_is_the_beginning_of_what_was_trained_on(tokenizer: Any) -> None:
    example = encode({"messages": TURNS}, tokenizer)
    question = sft.question({"messages": TURNS}, tokenizer, sft.Options())["ids"]
    served = tokenizer.apply_chat_template(TURNS[:-1], add_generation_prompt=True, return_dict=False)
    assert question == served == example.ids[: len(question)]
    assert set(example.labels[: len(question)][-4:]) == {IGNORE}


def test_an_end_is_added_where_the_template_has_none(tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = BARE_TEMPLATE
    example = encode({"messages": TURNS[1:3]}, bare)
    assert example.ids[-1] == example.labels[-1] == bare.eos_token_id
    assert learned(example, bare).startswith("az vm list")


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "END{% endgeneration %}REST{{ '\n' }}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("inside", "behind"), [("<|im_end|>", ""), ("", "<|im_end|>")])
def test_a_template_that_marks_answers_is_believed(tokenizer: Any, inside: str, behind: str) -> None:
    import copy

    marked = copy.deepcopy(tokenizer)
    marked.chat_template = MARKED.replace("END", inside).replace("REST", behind)
    example = encode({"messages": TURNS}, marked)
    assert sft.has_markers(marked) and not sft.has_markers(tokenizer)
    assert learned(example, marked) == "az vm list<|im_end|>az vnet show<|im_end|>"
    assert example == encode({"messages": TURNS}, tokenizer), "the same text, with the mask derived"
    assert sft.told(marked, sft.Options(), {"messages": 1}) == [
        "what is learned is what the chat template marks as the assistant's"
    ]


def test_a_template_without_markers_and_one_without_ends_are_said(tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = BARE_TEMPLATE
    (derived,) = sft.told(tokenizer, sft.Options(), {"messages": 1})
    assert derived.startswith("the chat template marks no answers")
    (plain,) = sft.told(tokenizer, sft.Options(), {"prompt and completion": 1})
    assert plain.startswith("prompts and completions are learned as they are, without the chat template")
    assert sft.told(bare, sft.Options(), {"messages": 1})[1].startswith("the chat template ends no answer, so <|im_end|> is added")


def test_a_text_that_begins_twice_is_refused(tokenizer: Any) -> None:
    import copy

    from tokenizers import processors

    own: Any = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert own("list")["input_ids"][0] == own.bos_token_id == 1
    encode({"prompt": "list vm", "completion": " az"}, own)
    with pytest.raises(DataError, match="begins with <.im_start.> twice"):
        encode({"prompt": "<|im_start|>list vm", "completion": " az"}, own)


@pytest.mark.parametrize("marks", [True, False])
def test_an_answer_of_weight_0_is_read_and_not_learned(tokenizer: Any, marks: bool) -> None:
    """As in OpenAI's rows for fine-tuning."""
    import copy

    own = copy.deepcopy(tokenizer)
    if marks:
        own.chat_template = MARKED.replace("END", "<|im_end|>").replace("REST", "")
    rows = [{**turn, **({"weight": int(at != 2)} if turn["role"] == "assistant" else {})} for at, turn in enumerate(TURNS)]
    example, whole = encode({"messages": rows}, own), encode({"messages": TURNS}, own)
    assert example.ids == whole.ids
    assert learned(example, own) == "az vnet show<|im_end|>"
    assert "weight" not in str(sft.question({"messages": rows}, own, sft.Options())["messages"])


def test_a_last_answer_of_weight_0_is_refused() -> None:
    with pytest.raises(DataError, match="the last answer has the weight 0"):
        sft.check_row({"messages": [*TURNS[:4], {**TURNS[4], "weight": 0}]}, sft.Options())


@pytest.mark.parametrize(("at", "weight"), [(2, 0.5), (2, "0"), (1, 0)])
def test_another_weight_is_refused(tokenizer: Any, at: int, weight: Any) -> None:
    turns = [{**turn, **({"weight": weight} if at == index else {})} for index, turn in enumerate(TURNS)]
    with pytest.raises(DataError, match=rf"messages\[{at}\]: the weight is .*, expected 0 or 1, of an assistant's message"):
        sft.check_row({"messages": turns}, sft.Options())


@pytest.mark.parametrize("template", ["{{ 'a' * (10**14) }}", "{{ '\\ud800' }}"])
def test_a_template_that_makes_no_text_is_one_sentence(tokenizer: Any, template: str) -> None:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    with pytest.raises(DataError, match="refuses this conversation"):
        encode({"messages": TURNS}, own)


SAID = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4), system=st.none() | SAID)
def test_whatever_is_said_the_answers_and_nothing_else_are_learned(tokenizer: Any, turns: Any, system: str | None) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    for asked, said in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    example = encode({"messages": messages}, tokenizer)
    ends = sum(
        token == tokenizer.eos_token_id and label != IGNORE for token, label in zip(example.ids, example.labels, strict=True)
    )
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert learned(example, tokenizer) == "".join(said + "<|im_end|>" for _, said in turns)
    assert ends == len(turns)


def test_a_template_that_lets_question_and_answer_share_a_token_is_refused(tokenizer: Any) -> None:
    import copy

    odd = copy.deepcopy(tokenizer)
    odd.chat_template = BARE_TEMPLATE.replace(":\n", ": ")
    with pytest.raises(DataError, match="joins the question and the answer into one token"):
        encode({"messages": TURNS[1:3]}, odd)


def test_a_prompt_with_its_completion_needs_no_template(tokenizer: Any) -> None:
    example = encode({"prompt": "list vm", "completion": " az vm list"}, tokenizer)
    assert learned(example, tokenizer) == " az vm list<|im_end|>"


def test_a_model_without_a_template_is_refused_with_what_works(tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match='no chat template.*"prompt" and "completion"'):
        encode({"messages": TURNS}, bare)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    import copy

    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="renders the turns before it differently"):
        encode({"messages": TURNS}, odd)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ '{0} {1}'.format(1) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ x.y }}"]
)
def test_a_template_that_fails_in_whatever_way_is_a_bad_row(tokenizer: Any, template: str) -> None:
    import copy

    odd = copy.deepcopy(tokenizer)
    odd.chat_template = template
    with pytest.raises(DataError, match="refuses this conversation") as error:
        encode({"messages": TURNS}, odd)
    assert error.value.kind == "turns"
    odd.chat_template = "{% for %}"
    with pytest.raises(SourceError, match="chat template cannot be read"):  # no row is to blame
        encode({"messages": TURNS}, odd)


def test_the_template_runs_in_a_sandbox(tokenizer: Any) -> None:
    import copy

    evil = copy.deepcopy(tokenizer)
    evil.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="refuses this conversation"):
        encode({"messages": TURNS}, evil)


def test_the_token_that_ends_a_turn_may_be_another_than_the_one_that_ends_a_text(tokenizer: Any) -> None:
    import copy

    # As in Gemma and Phi-3: eos is of texts, and generation_config.json names what ends a turn beside it.
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    example = encode({"messages": TURNS}, other)
    assert learned(example, other).endswith("<|im_end|>\n<|endoftext|>")
    other.ends_of_turn = [tokenizer.eos_token_id]
    example = encode({"messages": TURNS}, other)
    assert learned(example, other) == "az vm list<|im_end|>az vnet show<|im_end|>"
    assert other.decode(example.ids) == other.apply_chat_template(TURNS, tokenize=False)


def test_the_blanks_of_an_answer_are_learned_though_the_tokenizer_gives_them_no_characters(tokenizer: Any) -> None:
    import copy

    from tokenizers import processors

    trimming: Any = copy.deepcopy(tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [{"role": "user", "content": "list"}, {"role": "assistant", "content": "az vm:\n        list   it"}]
    assert any(left == right for left, right in trimming(turns[1]["content"], return_offsets_mapping=True)["offset_mapping"])
    assert learned(encode({"messages": turns}, trimming), trimming) == turns[1]["content"] + "<|im_end|>"
