"""Engines: processes that answer for a bundle, spoken to over HTTP on a socket in the file system. Each file here defines:

PREFERENCE                                          the lowest that can serve a bundle is taken
missing()                                           why it cannot be started on this machine, or None
refusal(bundle)                                     why it cannot serve this bundle, or None
launch(name, model, adapters, *, path, max_tokens)  how to start it, listening at this path
with_threads(count)                                 variables by which it computes with so many threads
takes(adapters, bundle)                             whether an adapter can join these while it runs
memory_bytes(model, adapters)                       about what it will take
error_lines(log)                                    what its log says of its end, in one line

All take the same requests: those of vLLM that `serve/gateway` passes on and `serve/replay.py` asks.
"""

import importlib
import json
import pkgutil
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from serve.errors import ServeError
from tuner.bundle import Bundle

# Marks in a chat template around the calls of tools, and what vLLM calls the way to read them.
TOOL_PARSERS = {"<tool_call>": "hermes", "[TOOL_CALLS]": "mistral", "<|python_tag|>": "llama3_json"}
# Long enough to chat; a longer one costs memory for the cache of keys and values.
DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True)
class Launch:
    """A command line and environment, ready to be started."""

    command: list[str]
    environment: dict[str, str]
    dtype: str
    """What the engine computes in."""


@cache
def names() -> tuple[str, ...]:
    """The engines, the preferred one first: the names of the files here."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return tuple(sorted(found, key=lambda name: load(name).PREFERENCE))


def load(name: str) -> Any:
    """The engine of this name; raises ServeError where there is none."""
    if name not in {module.name for module in pkgutil.iter_modules(__path__)}:
        raise ServeError(f"there is no engine {name!r}; there is: {', '.join(names())}")
    module: ModuleType = importlib.import_module(f"{__name__}.{name}")
    return module


def choose(bundle: Bundle, wanted: str | None = None) -> tuple[str, str]:
    """(the engine that serves this bundle, why it is not the preferred one, or nothing).

    Raises ServeError, with every engine's reason, where none can.
    """
    if why := unservable(bundle):
        raise ServeError(f"{bundle.path}: {why}")
    reasons: list[str] = []
    needed = [bundle, bundle.base()] if bundle.manifest.kind == "adapter" else [bundle]
    for name in [wanted] if wanted else names():
        engine = load(name)
        why = engine.missing() or next(filter(None, map(engine.refusal, needed)), None)
        if not why:
            return name, "; ".join(reasons)
        reasons.append(f"{name}: {why}")
    raise ServeError(f"{bundle.path}: no engine here serves it. " + "; ".join(reasons))


def unservable(bundle: Bundle) -> str | None:
    """Why no engine can serve this bundle, in one sentence, or None."""
    manifest = bundle.manifest
    if manifest.kind == "tokenizer":
        return "a tokenizer alone answers nothing; serve a model"
    if manifest.kind == "adapter" and manifest.head != "causal":
        return "only an adapter that answers with words is served beside its base; add `- merge: {}` to the recipe and serve that"
    if manifest.kind == "adapter" and not manifest.serving.get("live_adapter"):
        why = manifest.serving.get("not_live") or f"vLLM takes no live adapters for {manifest.model_type}"
        return f"{why}; add `- merge: {{}}` to the recipe and serve that"
    return None


def longest(model: Bundle, adapters: dict[str, Bundle], max_tokens: int | None) -> int:
    """Tokens of the longest prompt and answer together; raises ServeError for more than the model reads."""
    most = int(model.manifest.serving.get("max_tokens") or 0) or None
    said = [each.manifest.serving.get("serve_max_tokens") for each in (model, *adapters.values())]
    wanted = max_tokens or max((each for each in said if each), default=None)
    if wanted and most and wanted > most:
        raise ServeError(f"{model.path}: reads {most} tokens at most, --max-tokens {wanted} was asked for")
    return wanted or min(DEFAULT_MAX_TOKENS, most or DEFAULT_MAX_TOKENS)


def tool_parser(model: Bundle) -> str | None:
    """What reads the calls of tools in this model's answers, by the mark that its chat template teaches it; None without one."""
    with suppress(OSError, ValueError, AttributeError, KeyError):
        file = model.path / "chat_template.jinja"
        if file.is_file():
            template = file.read_text(encoding="utf-8")
        else:
            template = json.loads((model.path / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
        return next((parser for mark, parser in TOOL_PARSERS.items() if mark in str(template)), None)
    return None


def errors_in(lines: list[str], count: int = 3) -> str:
    """The lines of a log that name an error, the root cause first, else its very last ones."""
    named = []
    if not lines:
        return "it wrote nothing"
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"[\w.]*(Error|Exception|Interrupt)\b.*: ", line):
            # pydantic's errors say what is wrong in the line below, indented.
            named.append(f"{line.strip()} {following.strip()}" if following.startswith("  ") else line.strip())
    # The root cause comes first and is then wrapped; the same line is often printed by several processes.
    chosen = list(dict.fromkeys(named))[:count] or [line.strip() for line in lines[-count:]]
    return " | ".join(line[:300] for line in chosen)
