"""The losses of heads against transformers' own, and rows that are refused."""

from typing import Any

import pytest
import torch

from tuner.data.example import IGNORE, Labelled, Tagged
from tuner.data.rows import BadRows, OnBadRow, Row
from tuner.errors import DataError
from tuner.heads.sequence import MULTI, REGRESSION, SINGLE, LabelLoss
from tuner.heads.token import TagLoss
from tuner.tasks import classify, embed, masked, preference, pretrain, sft, tokens


def bert(head: str, **config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    made = transformers.BertConfig(
        vocab_size=330, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0, **config
    )
    return getattr(transformers, f"BertFor{head}")(made).eval()


def texts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (4 + 2 * index,), generator=draw).tolist() for index in range(count)]


@pytest.mark.parametrize(
    ("problem", "labels", "targets"),
    [
        (SINGLE, 3, [[0.0], [2.0], [1.0], [2.0]]),
        (MULTI, 3, [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        (REGRESSION, 1, [[0.3], [-1.0], [2.5], [0.0]]),
    ],
)
def test_the_loss_of_labels_is_transformers_own(problem: str, labels: int, targets: list[list[float]]) -> None:
    model = bert("SequenceClassification", num_labels=labels, problem_type=problem)
    objective = LabelLoss(model, 0, problem)
    batch = objective.collate([Labelled(ids, target) for ids, target in zip(texts(4), targets, strict=True)])
    wanted = batch["target"][:, 0].long() if problem == SINGLE else batch["target"]
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=wanted).loss
    torch.testing.assert_close(objective(batch) / 4, theirs)
    assert theirs > 0.1


def test_class_weights_are_torchs() -> None:
    model = bert("SequenceClassification", num_labels=2, problem_type=SINGLE)
    weights = [0.25, 3.0]
    examples = [Labelled(ids, [float(index % 2)], weights[index % 2]) for index, ids in enumerate(texts(5))]
    objective = LabelLoss(model, 0, SINGLE)
    batch = objective.collate(examples)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    theirs = torch.nn.functional.cross_entropy(logits, batch["target"][:, 0].long(), weight=torch.tensor(weights))
    torch.testing.assert_close(objective(batch) / sum(each.supervised for each in examples), theirs)
    assert abs(float(theirs) - float(torch.nn.functional.cross_entropy(logits, batch["target"][:, 0].long()))) > 1e-3


def test_the_loss_of_tags_is_transformers_own() -> None:
    model = bert("TokenClassification", num_labels=4)
    examples = [Tagged(ids, [IGNORE, *(token % 4 for token in ids[1:])]) for ids in texts(4)]
    objective = TagLoss(model, 0)
    batch = objective.collate(examples)
    torch.testing.assert_close(objective(batch) / sum(each.supervised for each in examples), model(**batch).loss)


def test_the_loss_of_hidden_words_is_transformers_own_and_15_percent_are_hidden(tokenizer: Any) -> None:
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"mask_token": "<|mask|>"})
    model = bert("MaskedLM")
    objective = masked.objective(model, own, masked.Options())
    examples = [masked.Maskable(ids, [[place] for place in range(len(ids))], 0.15) for ids in texts(30)]
    torch.manual_seed(0)
    batch = objective.collate(objective.begin(examples, 30))
    hidden = batch["labels"] != IGNORE
    count = sum(each.supervised for each in examples)
    assert int(hidden.sum()) == count
    torch.testing.assert_close(objective(batch) / count, model(**batch).loss)
    shown = batch["input_ids"][hidden]
    # 80% of 165 are expected to show the mask; five standard deviations of that binomial are 26 tokens.
    assert abs(int((shown == own.mask_token_id).sum()) - 0.8 * count) < 5 * (count * 0.8 * 0.2) ** 0.5
    whole = torch.cat([torch.tensor(each.ids) for each in examples])
    read = batch["attention_mask"] == 1
    assert torch.equal(batch["input_ids"][read & ~hidden], whole[~hidden[read]]), "what is not guessed is shown as it is"
    assert not torch.equal(objective.collate(objective.begin(examples, 30))["labels"], batch["labels"]), "drawn anew"


def test_whole_words_are_hidden_together(tokenizer: Any) -> None:
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"mask_token": "<|mask|>"})
    rows = iter([Row("f:1", {"text": "zebra list quagga machine okapi network"})])
    ((_, block),) = masked.examples(rows, own, masked.Options(whole_words=True, fraction=0.5), BadRows())
    assert max(map(len, block.words)) > 1
    assert sorted(place for word in block.words for place in word) == list(range(len(block.ids)))
    objective = masked.objective(bert("MaskedLM"), own, masked.Options())
    counts = set()
    for seed in range(50):
        torch.manual_seed(seed)
        (tagged,) = objective.begin([block], 1)
        hidden = {place for place, label in enumerate(tagged.labels) if label != IGNORE}
        assert all(hidden >= set(word) or not hidden & set(word) for word in block.words)
        assert 0 < len(hidden) <= max(block.supervised, max(map(len, block.words)))
        counts.add(tagged.supervised)
    assert len(counts) > 1, "what is divided by is what was hidden"


def wordpiece() -> Any:
    """BERT's kind of tokenizer: [CLS] and [SEP] around a text, and no token for what is no visible character."""
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "list", "vm", "qua", "##gga"]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)})


@pytest.mark.parametrize(
    ("task", "options", "row", "key"),
    [
        (pretrain, {}, {"text": "x"}, "text"),
        (masked, {}, {"text": "x"}, "text"),
        (classify, {"labels": ["a", "b"]}, {"text": "x", "label": "a"}, "text"),
        (embed, {}, {"anchor": "x", "positive": "y"}, "positive"),
        (preference, {}, {"prompt": "x", "chosen": "y", "rejected": "z"}, "chosen"),
        (sft, {}, {"prompt": "x", "completion": "y"}, "completion"),
    ],
)
def test_a_cell_without_text_is_empty_and_a_missing_one_is_another_shape(
    task: Any, options: dict[str, Any], row: dict[str, Any], key: str
) -> None:
    without = {name: value for name, value in row.items() if name != key}
    for wrong, kind in [({**row, key: ""}, "empty"), ({**row, key: None}, "empty"), ({**row, key: 7}, "shape"), (without, "shape")]:
        with pytest.raises(DataError) as refused:
            task.check_row(wrong, task.Options(**options))
        assert (refused.value.kind or "shape") == kind, wrong


def test_a_text_of_which_nothing_can_be_hidden_is_refused() -> None:
    with pytest.raises(DataError, match="makes no token of this text, so nothing can be hidden"):
        list(masked.examples(iter([Row("f:1", {"text": "\u200b"})]), wordpiece(), masked.Options(), BadRows()))


def test_a_tag_stands_at_the_first_or_the_last_token_of_its_word(tokenizer: Any) -> None:
    row = {"words": ["list", "quagga", "vm"], "tags": ["VERB", "NOUN", "NOUN"]}
    places = {}
    for at in ("first", "last"):
        options = tokens.Options(labels=["VERB", "NOUN"], at=at)
        ((_, example),) = tokens.examples(iter([Row("f:1", row)]), tokenizer, options, BadRows())
        assert example.ids == tokenizer("list quagga vm")["input_ids"], "what a client sends as text"
        assert [label for label in example.labels if label != IGNORE] == [0, 1, 1]
        places[at] = [place for place, label in enumerate(example.labels) if label != IGNORE]
    spelt = [piece.replace("Ġ", " ") for piece in tokenizer.convert_ids_to_tokens(example.ids)]
    # A space is a token of its own, and of no word, or the beginning of the word behind it.
    assert [spelt[place].strip()[0] for place in places["first"]] == ["l", "q", "v"]
    assert ["".join(spelt[: place + 1]) for place in places["last"]] == ["list", "list quagga", "list quagga vm"]
    ((_, example),) = tokens.examples(iter([Row("f:1", row)]), wordpiece(), options, BadRows())
    assert example.ids == [2, 5, 7, 8, 6, 3]
    assert example.labels == [IGNORE, 0, IGNORE, 1, 1, IGNORE]


@pytest.mark.parametrize("tags", [["O", "I-PER"], ["B-LOC", "I-PER"], ["B-PER", "B-ORG"]])
def test_tags_that_go_on_with_nothing_or_that_no_label_names_are_refused_before_there_is_a_tokenizer(tags: list[str]) -> None:
    options = tokens.Options(labels=["O", "B-PER", "I-PER", "B-LOC"])
    with pytest.raises(DataError, match=r"tags\[1\]: .*(expected B-PER here|none of the recipe's labels)"):
        tokens.check_row({"words": ["a", "b"], "tags": tags}, options)
    tokens.check_row({"words": ["a", "b", "c"], "tags": ["B-PER", "I-PER", "I-PER"]}, options)


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        (tokens, {"labels": ["O", "B-PER", "S-PER"]}, "S-PER is neither O nor begins with B- or I-"),
        (tokens, {"labels": ["A", "B", "A"]}, "labels: A stands there twice"),
        (classify, {"labels": ["a", "b", "a"]}, "labels: a stands there twice"),
        (classify, {"labels": ["a", "b"], "class_weights": [-1.0, 1.0]}, "greater than 0"),
    ],
)
def test_labels_that_make_no_sense_are_refused(task: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task.Options(**options)


def test_a_sentence_of_which_no_word_is_left_is_refused() -> None:
    rows = iter([Row("f:1", {"words": ["\u200b", "vm"], "tags": ["A", "B"]})])
    options = tokens.Options(labels=["A", "B"], max_tokens=2)
    with pytest.raises(DataError, match="the tokenizer leaves no token of"):
        list(tokens.examples(rows, wordpiece(), options, CUTTING))


def test_a_word_that_the_cut_went_through_has_no_last_token() -> None:
    row = {"words": ["list", "quagga", "vm"], "tags": ["A", "B", "A"]}
    for at, places in (("last", [1]), ("first", [1, 2])):
        options = tokens.Options(labels=["A", "B"], max_tokens=4, at=at)  # [CLS] list qua [SEP]
        ((_, example),) = tokens.examples(iter([Row("f:1", row)]), wordpiece(), options, CUTTING)
        assert [place for place, label in enumerate(example.labels) if label != IGNORE] == places
        assert example.cut


def test_of_several_labels_the_f1_counts_those_that_were_given(tokenizer: Any) -> None:
    from tuner.recipe import Evaluate

    model = bert("SequenceClassification", num_labels=1)
    with torch.no_grad():
        model.classifier.bias.fill_(-9.0)  # it never gives the label
        model.classifier.weight.zero_()
    options = classify.Options(form="multi", labels=["spam"])
    rows = [(Row(f"f:{at}", {}), Labelled(ids, [float(at == 0)])) for at, ids in enumerate(texts(4))]
    assert classify.scores(model, None, rows, options, Evaluate())["micro F1"] == 0.0


# The examples of CoNLL-2003's evaluation: an entity counts only whole and with its type.
@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["O", "B-PER", "I-PER", "O", "B-LOC"], [("PER", 1, 2), ("LOC", 4, 4)]),
        (["B-PER", "B-PER"], [("PER", 0, 0), ("PER", 1, 1)]),
        (["I-LOC", "I-LOC", "I-PER"], [("LOC", 0, 1), ("PER", 2, 2)]),
        (["B-LOC", "I-PER"], [("LOC", 0, 0), ("PER", 1, 1)]),
        (["O"], []),
    ],
)
def test_entities_are_read_as_conlls_script_does(tags: list[str], found: list[tuple[str, int, int]]) -> None:
    assert tokens.entities(tags) == found


def test_entity_f1_is_the_harmonic_mean_over_whole_entities() -> None:
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"]]
    guess = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "O"]]
    # 1 of 3 found is right, 1 of 2 wanted is found: 2 / (3 + 2).
    assert tokens.entity_f1(truth, guess) == 0.4
    assert tokens.entity_f1(truth, truth) == 1.0


CUTTING = BadRows(OnBadRow(too_long="truncate"))
LABELS = {"labels": ["good", "bad"]}


@pytest.mark.parametrize(
    ("options", "record", "said"),
    [
        (LABELS, {"text": "x", "label": "god"}, 'f:1: "label": \'god\' is none of the recipe\'s labels; did you mean "good"?'),
        (LABELS, {"text": "x"}, 'f:1: the key "label" is missing beside "text"'),
        (LABELS, {"label": "good"}, 'f:1: found "label", expected the key "text"'),
        ({**LABELS, "form": "multi"}, {"text": "x", "labels": "good"}, "f:1: \"labels\" is 'good', expected a list"),
        ({"form": "number"}, {"text": "x", "score": "3"}, "f:1: \"score\" is '3', expected a number"),
        (
            {**LABELS, "max_tokens": 2},
            {"text": "list the vm", "label": "good"},
            "3 tokens, expected at most max_tokens: 2; `data.on_bad_row: {too_long: skip}` leaves such rows out and counts them, "
            "`{too_long: truncate}` cuts them off",
        ),
    ],
)
def test_a_row_that_cannot_be_classified_is_said(
    tokenizer: Any, options: dict[str, Any], record: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as error:
        list(classify.examples(iter([Row("f:1", record)]), tokenizer, classify.Options(**options), BadRows()))
    assert said in str(error.value)


def test_a_cut_text_is_counted(tokenizer: Any) -> None:
    rows = iter([Row("f:1", {"text": "list the vm", "label": "bad"}), Row("f:2", {"text": "vm", "label": "bad"})])
    found = list(classify.examples(rows, tokenizer, classify.Options(**LABELS, max_tokens=2), CUTTING))
    assert [example.cut for _, example in found] == [True, False]
    assert len(found[0][1].ids) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the classes are missing"),
        ({"labels": ["one"]}, "the classes are missing"),
        ({"form": "number", "labels": ["a", "b"]}, "a number has none"),
        ({**LABELS, "class_weights": [1.0]}, "one for each of 2 classes"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        classify.Options(**options)
    with pytest.raises(ValueError, match="I-LOC continues an entity that no B-LOC begins"):
        tokens.Options(labels=["O", "I-LOC"])
