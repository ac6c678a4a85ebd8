"""Train a tokenizer on the recipe's text: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909), WordPiece as BERT has it
(Wu et al. 2016, arXiv:1609.08144), or Unigram (Kudo 2018, arXiv:1804.10959). The algorithms are the tokenizers library's."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tuner.bundle import Manifest
from tuner.data import reading
from tuner.data.rows import BadRows
from tuner.data.text import TEXT_KEYS, text_of, texts
from tuner.errors import DataError
from tuner.kinds import Options as BaseOptions
from tuner.progress import say
from tuner.recipe import Recipe
from tuner.stages import Job

if TYPE_CHECKING:
    from tuner.plan import Plan, Step

TAKES = frozenset({"nothing"})
RESULT = "tokenizer"
VERSION = 3
KEYS = TEXT_KEYS
# Where no piece goes across, beside GPT-2's own. That of Llama 3 keeps at most three digits together. What is between them is
# learned as bytes, so that every text comes back as it was.
SPLITS = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "whitespace": r"\s*\S+|\s+",
}
# Tools are a turn of their own before all others, a JSON object a line, and a call is one behind the assistant's words. A line's
# end behind a block, such as that of the calls, is not written.
CHATML = """{% if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool['function'] | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}{% for call in message['tool_calls'] or [] %}
<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# The library's, in UnigramTrainer.finalize.
UNLEARNED_STEP = 1.0e-4
# More different characters than this are left to [UNK], as in BERT's own vocabularies.
MOST_CHARACTERS = 1_000
BERT_ROLES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


class Options(BaseOptions):
    """Keys of `- tokenizer:`."""

    model: Literal["bpe", "unigram", "wordpiece"] = "bpe"
    """`bpe` and `unigram` learn bytes and lose nothing; `wordpiece` is BERT's, with [CLS], [SEP] and [MASK], and loses spaces."""
    vocab_size: int = Field(4096, ge=257)
    """Entries: 256 bytes, special tokens, and pieces for the rest."""
    normalizer: Literal["none", "nfc", "nfkc", "bert"] | None = None
    """What is done to the text first: nothing, or for `wordpiece` what BERT does (lower case, no accents)."""
    pre_tokenizer: Literal["gpt2", "llama3", "whitespace", "words"] | None = None
    """Where no piece goes across: `gpt2` by default, `words` (spaces, punctuation) for `wordpiece`; `llama3` splits numbers."""
    eos_token: str = Field("<|endoftext|>", min_length=1)
    """Ends a document; with `chat_template: chatml` turns end in <|im_end|>, and this ends nothing. Not for `wordpiece`."""
    bos_token: str | None = Field(None, min_length=1)
    """Stands before each text, though not before a conversation, which begins as its template says; by default nothing does."""
    pad_token: str | None = Field(None, min_length=1)
    """Fills up a batch; `eos_token` by default. Neither is for `wordpiece`, where [CLS] and [PAD] do that."""
    special_tokens: list[str] = Field(default_factory=list)
    """Further tokens that no text is cut across, such as "<|tool|>"."""
    min_frequency: int = Field(2, ge=1)
    """A piece that occurs less often is not learned."""
    chat_template: str | None = None
    """How a conversation is written down: `chatml`, whose turns end in <|im_end|>, or a file with a Jinja template."""

    @model_validator(mode="after")
    def _go_together(self) -> "Options":
        wordpiece = self.model == "wordpiece"
        if (self.pre_tokenizer == "words") != wordpiece and self.pre_tokenizer is not None:
            fitting = "words" if wordpiece else f"gpt2, {', '.join(SPLITS)}"
            raise ValueError(f"pre_tokenizer: {self.pre_tokenizer} is not for {self.model}, which takes {fitting}")
        given = [key for key in ("chat_template", "eos_token", "bos_token", "pad_token") if key in self.model_fields_set]
        if wordpiece and given:
            raise ValueError(f"{given[0]}: a wordpiece tokenizer is BERT's, whose own tokens stand for that; leave it out")
        if self.bos_token and (":" in self.bos_token or self.bos_token.startswith("$")):
            raise ValueError(
                f'bos_token: {self.bos_token!r} has a ":" or begins with "$", which mean something else to the library'
            )
        named = {self.eos_token, self.bos_token, self.pad_token, *self.special_tokens} - {None}
        always = len(self.special_tokens) + 5 if wordpiece else len(named) + 256 + 2 * bool(self.chat_template)
        if self.vocab_size <= always:
            raise ValueError(f"vocab_size: {self.vocab_size} leaves no room beside the {always} entries that are always there")
        if len(set(self.special_tokens)) < len(self.special_tokens) or not all(self.special_tokens):
            raise ValueError("special_tokens: one is empty, or stands there twice")
        return self


def told(figures: dict[str, Any]) -> list[str]:
    """For the report."""
    return [f"tokenizer: {figures['vocab_size']:,} entries"]


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A tokenizer."""
    return "tokenizer"


def run(job: Job) -> Manifest:
    """Count pieces in the training text, write tokenizer.json and its configuration."""
    from transformers import PreTrainedTokenizerFast

    from tuner.source import versions

    options: Any = job.options
    template, end = _chat(options)
    if options.model == "wordpiece":
        roles = BERT_ROLES
    else:
        roles = {each: getattr(options, each) or options.eos_token for each in ("bos_token", "eos_token", "pad_token")}
    if end:
        roles = {**roles, "eos_token": end}
    special = list(dict.fromkeys([*roles.values(), *(["<|im_start|>"] if end else []), *options.special_tokens]))
    bad = BadRows(job.recipe.data.on_bad_row)
    if options.model == "wordpiece":
        tokenizer = _wordpiece(job.recipe, options, special, bad)
    else:
        tokenizer = _of_bytes(job.recipe, options, special, bad)
    size = tokenizer.get_vocab_size()
    short = f"; {options.vocab_size:,} were asked for, and the text has no more pieces" if size < options.vocab_size else ""
    say(f"tokenizer: {size:,} entries{short}")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=options.special_tokens, **roles)
    fast.chat_template = template
    fast.save_pretrained(job.folder)
    return Manifest(
        kind="tokenizer",
        stage="tokenizer",
        fingerprint=job.fingerprint,
        recipe=job.told(),
        data={**reading.identity(job.recipe, "train"), **bad.told()},
        metrics={"tokenizer": {"vocab_size": size}},
        versions=versions(),
    )


def _require_rendering(template: str) -> None:
    """Raises DataError for a chat template that cannot write down one question and its answer."""
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    asked = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "its answer"}]
    try:
        (text,), _ = render_jinja_template([asked], chat_template=template, bos_token="", eos_token="", pad_token="")
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"no question and answer can be written down with it: {error}") from None
    if not all(each["content"] in text for each in asked):
        raise DataError(f"it leaves out a question or its answer: of both it makes {text[:80]!r}")


def _of_bytes(recipe: Recipe, options: Options, special: list[str], bad: BadRows) -> Any:
    """A trained BPE or Unigram tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    common = _common(options, special)
    common["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = options.model == "bpe"
    tokenizer: Any = Tokenizer(models.BPE() if bpe else models.Unigram())
    own = SPLITS.get(options.pre_tokenizer or "gpt2")
    as_bytes: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own is None)
    if own is not None:
        as_bytes = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(own), "isolated"), as_bytes])
    tokenizer.pre_tokenizer = as_bytes
    tokenizer.decoder = decoders.ByteLevel()
    _normalize(tokenizer, options.normalizer)
    trainer: Any = trainers.BpeTrainer(min_frequency=options.min_frequency, **common) if bpe else trainers.UnigramTrainer(**common)
    tokenizer.train_from_iterator(texts(recipe, bad), trainer)
    tokenizer = tokenizer if bpe else _settled(tokenizer, len(special))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if begin := options.bos_token:
        named = [(begin, tokenizer.token_to_id(begin))]
        before = processors.TemplateProcessing(single=[begin, "$A"], pair=[begin, "$A", begin, "$B:1"], special_tokens=named)
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, before])
    return tokenizer


def _wordpiece(recipe: Recipe, options: Options, special: list[str], bad: BadRows) -> Any:
    """A trained WordPiece tokenizer, with [CLS] before and [SEP] behind a text.

    The library numbers the characters within words in the order of a hash table, and settles ties by number: they get theirs first.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def empty(vocabulary: dict[str, int] | None = None) -> Any:
        made: Any = Tokenizer(
            models.WordPiece(vocabulary, unk_token="[UNK]") if vocabulary else models.WordPiece(unk_token="[UNK]")
        )
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        _normalize(made, options.normalizer or "bert")
        return made

    learner = empty()
    seen: Counter[str] = Counter()
    for text in texts(recipe, BadRows(recipe.data.on_bad_row)):
        seen.update(learner.normalizer.normalize_str(text) if learner.normalizer else text)
    # Each character takes two entries, at the beginning of a word and within one; half of the rest is for pieces.
    most = min(MOST_CHARACTERS, max(1, (options.vocab_size - len(special)) // 4))
    commonest = sorted((each for each in seen if not each.isspace()), key=lambda each: (-seen[each], each))[:most]
    inside = [f"##{each}" for each in sorted(commonest)]
    common = {**_common(options, [*special, *inside]), "initial_alphabet": sorted(commonest), "limit_alphabet": len(commonest)}
    learner.train_from_iterator(texts(recipe, bad), trainers.WordPieceTrainer(min_frequency=options.min_frequency, **common))
    tokenizer = empty(learner.get_vocab())
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _common(options: Options, special: list[str]) -> dict[str, Any]:
    """What every trainer takes."""
    return {"vocab_size": options.vocab_size, "special_tokens": special, "show_progress": sys.stderr.isatty()}


def _normalize(tokenizer: Any, wanted: str | None) -> None:
    from tokenizers import normalizers

    kinds: dict[str, Any] = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC, "bert": normalizers.BertNormalizer}
    if wanted in kinds:
        tokenizer.normalizer = kinds[wanted]()


def _settled(tokenizer: Any, special: int) -> Any:
    """The Unigram tokenizer with scores that do not depend on the order of a hash table, so that one text makes one tokenizer.

    The library adds up floats in that order. To the characters of which it has seen nothing, or next to nothing, it gives the
    lowest score, that and a step, that and two steps, ...: which of them gets which is settled by their own order here.
    """
    from tokenizers import Tokenizer

    tree = json.loads(tokenizer.to_str())
    pieces = {piece: round(score, 9) for piece, score in tree["model"]["vocab"][special:]}
    least = min(pieces.values(), default=0.0)
    steps = {piece: (score - least) / UNLEARNED_STEP for piece, score in pieces.items() if len(piece) == 1}
    rare = sorted(piece for piece, step in steps.items() if step < 256.5 and abs(step - round(step)) < 1e-3)
    pieces |= dict(zip(rare, sorted(pieces[piece] for piece in rare), strict=True))
    ranked = sorted(pieces.items(), key=lambda each: (-each[1], each[0]))
    tree["model"]["vocab"][special:] = [list(each) for each in ranked]
    return Tokenizer.from_str(json.dumps(tree))


def check(plan: "Plan", step: "Step") -> None:
    """Raises RecipeError for a chat template that is not there, or writes down no conversation."""
    try:
        template, _ = _chat(step.options)
        if template is not None:
            _require_rendering(template)
    except DataError as error:
        raise plan.recipe.error(str(error), "stages", step.index, "tokenizer", "chat_template") from None


def reads(recipe: Recipe, options: Options) -> list[Any]:  # noqa: ARG001 - a stage's common signature
    """The text of the chat template, wherever it is from."""
    return [_chat(options)[0]]


def _chat(options: Options) -> tuple[str | None, str | None]:
    """(the chat template, the token that ends its turns where the template decides that). Raises DataError."""
    if options.chat_template is None:
        return None, None
    if options.chat_template == "chatml":
        return CHATML, "<|im_end|>"
    path = Path(options.chat_template)
    try:
        return path.read_text(encoding="utf-8"), None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; `chatml` is the one that comes along") from None


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool) -> None:  # noqa: ARG001 - a row's common signature
    """Raises DataError for a record without text."""
    text_of(record)
