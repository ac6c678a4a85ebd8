"""`tuner serve` and `tuner chat`."""

import asyncio
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from serve.endpoint import Settings, arrange, serve_until, serving
from serve.errors import ServeError
from tuner.bundle import open_bundle

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for the user on standard error."""
    console.print(text, soft_wrap=True, markup=False)


def serve(folders: list[Path], settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish what is under way and leave no process behind."""
    engines = arrange(folders, settings, say)
    waiting = console.status("waiting for the engines")

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def ask_to_stop() -> None:
            say("shutting down: requests under way may finish")
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ask_to_stop)

        def opened(url: str) -> None:
            waiting.stop()
            names = ", ".join(name for engine in engines for name in (engine.name, *engine.adapters))
            say(f"serving {names} at {url}")

        await serve_until(engines, settings, stop, opened)

    if console.is_terminal:
        waiting.start()
    try:
        asyncio.run(main())
    finally:
        waiting.stop()


def chat(target: str, system: str | None) -> None:
    """Read lines, stream answers. An empty line or end of input ends it."""
    from openai import OpenAIError

    with _address(target) as url:
        client, model = _connect(url)
        messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        say(f"talking to {model}; an empty line ends it")
        for line in _lines():
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                for piece in _answer(client, model, messages):
                    answer += piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            except OpenAIError as error:
                raise ServeError(f"{url}: {error}") from None
            sys.stdout.write("\n")
            messages.append({"role": "assistant", "content": answer})


def _answer(client: Any, model: str, messages: list[dict[str, str]]) -> Iterator[str]:
    """The pieces of the next answer; of a model that has no chat template, of what it makes of the last line."""
    from openai import BadRequestError

    try:
        events = client.chat.completions.create(model=model, messages=messages, stream=True, temperature=0)
    except BadRequestError as error:
        if "chat template" not in str(error):
            raise
        say(f"{model} has no chat template, so it goes on from your line alone")
        for event in client.completions.create(
            model=model, prompt=messages[-1]["content"], stream=True, temperature=0, max_tokens=64
        ):
            yield event.choices[0].text if event.choices else ""
        return
    for event in events:
        yield (event.choices[0].delta.content or "") if event.choices else ""


@contextmanager
def _address(target: str) -> Iterator[str]:
    if target.startswith(("http://", "https://")):
        yield target.rstrip("/") if target.rstrip("/").endswith("/v1") else target.rstrip("/") + "/v1"
    elif re.fullmatch(r"[\w.-]+:\d+(/.*)?", target) and not Path(target).exists():
        with _address(f"http://{target}") as url:
            yield url
    else:
        if (bundle := open_bundle(Path(target))).manifest.head not in (None, "causal"):
            raise ServeError(
                f"{target}: it has a {bundle.manifest.head} head, which answers without words; there is nothing to talk to"
            )
        with serving([Path(target)], Settings(port=0), say) as url:
            yield url


def _connect(url: str) -> tuple[Any, str]:
    import os

    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        models = [each.id for each in client.models.list()]
    except OpenAIError as error:
        raise ServeError(f"{url}: no endpoint answers there ({error})") from None
    if not models:
        raise ServeError(f"{url}: the endpoint serves no model")
    return client, models[-1]


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
