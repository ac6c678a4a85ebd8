"""New entries for a tokenizer that there is: what is learned, what it saves, and what transformers opens."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_rows
from tuner import vocabulary
from tuner.errors import SourceError

TEXTS = [message["content"] for row in chat_rows(60) for message in row["messages"]] + [
    "the reservoir's porosity",
    "permeability",
] * 9


def bpe(size: int) -> Any:
    """A byte-level BPE tokenizer of the library's own trainer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")


def wordpiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "[PAD]", "the", "per", "po", "##me", "##ab", "##ility", "##ros", "##ity", "##s", "reservoir", "'", "s"]
    made: Any = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("▁", -1.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz'")]
    made: Any = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")


def learned(tokenizer: Any, most: int, min_frequency: int = 2) -> vocabulary.Entries:
    return vocabulary.learn(tokenizer, vocabulary.words(tokenizer, TEXTS), most, min_frequency)


def total(tokenizer: Any) -> int:
    return vocabulary.count(tokenizer, TEXTS).total()


def test_learning_goes_on_where_the_librarys_own_training_would_have() -> None:
    longer = json.loads(bpe(300).backend_tokenizer.to_str())["model"]["merges"]
    begun = json.loads(bpe(280).backend_tokenizer.to_str())["model"]["merges"]
    found = learned(bpe(280), 20)
    assert len(begun) < len(longer)
    assert [tuple(each) for each in longer] == [*map(tuple, begun), *found.merges]


def test_each_merge_saves_as_many_tokens_as_its_pair_occurs(tmp_path: Path) -> None:
    old = bpe(280)
    new = vocabulary.extend(old, learned(old, 20), [], tmp_path)
    # A pair that is merged is one token less: the sum of what each merge was chosen for.
    words, saved = vocabulary.words(old, TEXTS), 0
    for pair in learned(old, 20).merges:
        joined: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            after = tuple(vocabulary._joined(list(word), pair, "".join(pair)))
            saved += times * (len(word) - len(after))
            joined[after] += times
        words = joined
    assert saved > 50
    assert total(old) - total(new) == saved


def test_text_without_new_tokens_is_cut_as_before_and_all_text_comes_back(tmp_path: Path) -> None:
    old = bpe(280)
    new = vocabulary.extend(old, learned(old, 20), ["<|tool|>", "vm"], tmp_path)
    for text in ("qwxyz 0123", "ümlaut\n\tand 漢字"):
        assert new(text)["input_ids"] == old(text)["input_ids"]
    for text in [*TEXTS, "a <|tool|>vm, vms <|end|>"]:
        assert new.decode(new(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_numbers_of_old_tokens_stay_even_of_marks_that_are_no_part_of_the_models_vocabulary(tmp_path: Path) -> None:
    old = bpe(280)
    assert "<|end|>" not in json.loads(old.backend_tokenizer.to_str())["model"]["vocab"]
    before = dict(old.get_vocab())
    new = vocabulary.extend(old, learned(old, 20), ["<|tool|>"], tmp_path)
    assert {token: new.get_vocab()[token] for token in before} == before
    assert sorted(set(new.get_vocab().values()) - set(before.values())) == list(range(len(before), len(before) + 21))
    assert new.eos_token_id == old.eos_token_id


def test_a_listed_word_is_found_only_as_a_whole_word(tmp_path: Path) -> None:
    old = bpe(280)
    new = vocabulary.extend(old, vocabulary.Entries(), ["vm", "--name"], tmp_path)
    own = new.convert_tokens_to_ids("vm")
    assert own in new("az vm list")["input_ids"]
    assert own not in new("az vms list")["input_ids"]
    assert new.convert_tokens_to_ids("--name") in new("vm --name=my1")["input_ids"]


def test_wordpiece_gets_the_words_that_save_most(tmp_path: Path) -> None:
    old = wordpiece()
    found = learned(old, 2)
    # permeability: 4 pieces, 9 times; porosity: 3 pieces, 9 times.
    assert found.pieces == {"permeability": ["per", "##me", "##ab", "##ility"], "porosity": ["po", "##ros", "##ity"]}
    assert not found.merges
    new = vocabulary.extend(old, found, [], tmp_path)
    assert total(old) - total(new) == 9 * 3 + 9 * 2
    assert new.tokenize("Permeability's") == ["permeability", "'", "s"]


def test_a_word_that_would_make_a_longer_one_unknown_is_not_learned(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(
        models.WordPiece({piece: at for at, piece in enumerate(["[UNK]", "ab", "##c", "##cd", "##e"])}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    old = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]")
    texts = ["abc abc abc abce abcd"]
    found = vocabulary.learn(old, vocabulary.words(old, texts), 5, 1)
    assert set(found.pieces) == {"abce", "abcd"}, "abc would leave a d, for which there is no piece"
    assert old.unk_token_id not in vocabulary.count(vocabulary.extend(old, found, [], tmp_path), texts)


def test_listed_tokens_of_wordpiece_are_whole_words_as_they_are_written(tmp_path: Path) -> None:
    old = wordpiece()
    new = vocabulary.extend(old, learned(old, 2), ["HbA1c", "<|tool|>"], tmp_path)
    assert new.tokenize("the HbA1c <|tool|> permeability") == ["the", "HbA1c", "<|tool|>", "permeability"]
    assert "HbA1c" not in new.tokenize("the HbA1cs")


def test_what_a_byte_level_tokenizer_would_give_back_as_bytes_is_not_listed(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match="with 'reservatório' listed this tokenizer does not give a text back.*leave it to `learned`"
    ):
        vocabulary.extend(bpe(280), vocabulary.Entries(), ["reservatório"], tmp_path)


def test_a_listed_word_of_a_script_without_spaces_is_found_among_others(tmp_path: Path) -> None:
    old = unigram()
    new = vocabulary.extend(old, vocabulary.Entries(), ["貯留層"], tmp_path)
    assert new.convert_tokens_to_ids("貯留層") in new("この貯留層の特性")["input_ids"]


def test_no_more_words_are_taken_up_than_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = vocabulary.words(bpe(280), TEXTS)
    monkeypatch.setattr(vocabulary, "MOST_TOKENS", 20)
    some = vocabulary.words(bpe(280), TEXTS)
    assert 20 <= sum(map(len, some)) < sum(map(len, whole))
    assert all(whole[word] == times for word, times in some.items())
    assert "learning from the words that come first" in capsys.readouterr().err


def test_unigram_takes_listed_tokens_and_says_why_it_learns_none(tmp_path: Path) -> None:
    old = unigram()
    with pytest.raises(SourceError, match="the tokenizer is Unigram, and tokens are learned for BPE and WordPiece; list some"):
        vocabulary.require_learnable(old)
    before = copy.deepcopy(old)("the porosity")["input_ids"]
    new = vocabulary.extend(old, vocabulary.Entries(), ["porosity"], tmp_path)
    assert len(new("the porosity")["input_ids"]) < len(before)


def test_a_length_in_the_tokenizers_file_changes_no_count() -> None:
    plain, limited = bpe(280), bpe(280)
    limited.backend_tokenizer.enable_padding(length=64)
    limited.backend_tokenizer.enable_truncation(3)
    assert vocabulary.count(limited, TEXTS) == vocabulary.count(plain, TEXTS)
    assert vocabulary.words(limited, TEXTS) == vocabulary.words(plain, TEXTS)


def test_nothing_rarer_than_the_least_frequency_is_learned() -> None:
    assert set(learned(wordpiece(), 5, min_frequency=9).pieces) == {"permeability", "porosity"}
    assert not learned(wordpiece(), 5, min_frequency=10).pieces
    assert not learned(bpe(280), 5, min_frequency=10_000).pieces
