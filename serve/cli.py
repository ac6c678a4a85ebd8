"""`tuner serve`, `tuner chat`, and the commands of whoever operates an endpoint."""

import asyncio
import json
import os
import re
import signal
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve import keys as keyring
from serve.deployment import read_deployment
from serve.endpoint import OPERATOR, Settings, named, serve_until, serving
from serve.errors import ServeError
from serve.fleet import Fleet
from serve.state import State
from tuner.bundle import open_bundle
from tuner.errors import nearest

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for the user on standard error."""
    console.print(text, soft_wrap=True, markup=False)


def serve(targets: list[Path], *, name: str | None, state: Path | None, max_tokens: int | None, **changes: Any) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish what is under way and leave no process behind.

    `changes` are the settings that the command line names; those that are None stay as they are.
    """
    if len(targets) == 1 and targets[0].suffix in (".yaml", ".yml"):
        if name:
            raise ServeError(f"--name {name}: a deployment names its models itself")
        bundles, settings = read_deployment(targets[0])
    else:
        bundles, settings = named(targets, name), Settings()
    settings = replace(settings, **{key: value for key, value in changes.items() if value is not None})
    settings = replace(settings, state=state or settings.state or default_state())
    if max_tokens:
        settings = replace(settings, care=replace(settings.care, max_tokens=max_tokens))
    waiting = console.status("waiting for the engines")

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def ask_to_stop() -> None:
            say("shutting down: requests under way may finish")
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ask_to_stop)

        def opened(url: str, fleet: Fleet) -> None:
            waiting.stop()
            fine = [name for name, pointer in fleet.names.items() if fleet.versions[str(pointer.current)].ready]
            say(f"serving {', '.join(fine)} at {url}")

        await serve_until(bundles, settings, say, stop, opened)

    if console.is_terminal:
        waiting.start()
    try:
        import uvloop

        uvloop.run(main())
    finally:
        waiting.stop()


def default_state() -> Path:
    """Where an endpoint keeps what must outlive it, and where commands look for it."""
    return Path(os.environ.get("TUNER_STATE") or "runs/serve")


def order(path: str, state: Path | None, url: str | None, **body: Any) -> dict[str, Any]:
    """Tell a running endpoint what to do and wait until it is done. Raises ServeError with what it says against it."""
    import httpx

    address, secret, certificate = _operator(state, url)
    # The endpoint's own certificate, which need not be made out to the address that its commands call it by.
    trusted: Any = True
    if certificate:
        trusted = ssl.create_default_context(cafile=certificate)
        trusted.check_hostname = False
    try:
        # Bringing a model up takes as long as it takes.
        headers = {"authorization": f"Bearer {secret}"}
        waiting = console.status("the endpoint brings it up and asks it its probe") if "bundle" in body else nullcontext()
        with waiting, httpx.Client(timeout=None, headers=headers, verify=trusted, trust_env=bool(url)) as client:
            reply = client.post(address + path, json=body) if body else client.get(address + path)
            told = reply.json()
    except KeyboardInterrupt:
        if "bundle" in body:
            say("the endpoint goes on with it; `tuner deployments` shows how it ends, and `tuner rollback` undoes it then")
        raise
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ServeError(f"{address}: no endpoint answers there ({type(error).__name__})") from None
    if not isinstance(told, dict) or not {"name", "names", "error"} & set(told):
        raise ServeError(f"{address}: what answers there is no endpoint of this kind")
    if reply.status_code != 200:
        raise ServeError(str(told.get("error", {}).get("message", reply.text[:300])))
    return told


def _operator(state: Path | None, url: str | None) -> tuple[str, str, str | None]:
    """(address, secret, its certificate) of the endpoint to order: one elsewhere, or that of a state folder."""
    if url:
        secret = os.environ.get("TUNER_ADMIN_KEY")
        if not secret:
            raise ServeError(f"--url {url}: TUNER_ADMIN_KEY holds no admin key; `tuner keys create --admin` there makes one")
        return url.rstrip("/").removesuffix("/v1"), secret, None
    folder = state or default_state()
    try:
        told = json.loads((folder / OPERATOR).read_text())
        return str(told["url"]), str(told["secret"]), told.get("certificate")
    except (OSError, ValueError, KeyError, TypeError):
        raise ServeError(
            f"{folder}: no endpoint runs with its state there; `tuner serve` starts one, --state and --url name another"
        ) from None


def show_deployments(told: dict[str, Any]) -> None:
    """A line for each version of each name, and why the last deployments failed that did."""
    table = Table("name", "version", "share", "status", "engine", "bundle")
    for each in told["names"]:
        for version in each["versions"]:
            share = ""
            if version["id"] == each["current"]:
                share = f"{100 - each['weight']}%"
            elif version["id"] == each["canary"]:
                share = f"{each['weight']}%"
            elif version["id"] == each["shadow"]:
                share = "shadow"
            cells = (each["name"], version["id"], share, version["status"], version["engine"], version["path"])
            table.add_row(*map(Text, cells))
    Console(width=max(console.width, 140)).print(table)
    for each in told["deployments"]:
        if each["status"] != "done":
            reason = f": {each['reason']}" if each["reason"] else ""
            say(f"{each['name']}: {each['path']}: {each['status']}{reason}")


def create_key(state: Path | None, file: Path | None, **options: Any) -> str:
    """A new key, to be shown once."""
    if file:
        return keyring.create(file, **options)
    folder = state or default_state()
    opened = State(folder / "state.sqlite")
    try:
        made = keyring.create(opened, **options)
    finally:
        opened.close()
    say(f"kept, as a hash, in {folder}; an endpoint that keeps its state there asks for a key from now on")
    return made


def list_keys(state: Path | None) -> None:
    """Every key but for its secret."""
    opened = State((state or default_state()) / "state.sqlite")
    table = Table("id", "label", "models", "a minute", "made", "ends", "")
    for key in opened.keys().values():
        limits = [f"{count} {what}" for count, what in ((key.rpm, "requests"), (key.tpm, "tokens")) if count is not None]
        expired = key.expires is not None and key.expires <= time.time()
        cells = (
            key.id, key.label, ", ".join(key.models) + (" admin" if key.admin else ""), ", ".join(limits), _day(key.created),
            _day(key.expires) if key.expires else "", "revoked" if key.revoked else "expired" if expired else "",
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    opened.close()
    Console(width=max(console.width, 120)).print(table)


def revoke_key(state: Path | None, key_id: str) -> None:
    """End a key; a running endpoint refuses it from its next request on."""
    opened = State((state or default_state()) / "state.sqlite")
    try:
        opened.revoke_key(key_id, time.time())
    finally:
        opened.close()


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def chat(target: str, system: str | None, model: str | None = None) -> None:
    """Read lines, stream answers. An empty line or end of input ends it."""
    from openai import OpenAIError

    with _address(target) as url:
        client, model = _connect(url, model)
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


def _connect(url: str, model: str | None) -> tuple[Any, str]:
    import os

    from openai import AuthenticationError, OpenAI, OpenAIError

    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        models = [each.id for each in client.models.list()]
    except AuthenticationError:
        raise ServeError(f"{url}: the endpoint wants a key that may ask its models; put it into OPENAI_API_KEY") from None
    except OpenAIError as error:
        raise ServeError(f"{url}: no endpoint answers there ({error})") from None
    if not models:
        raise ServeError(f"{url}: the endpoint serves no model")
    if model and model not in models:
        raise ServeError(f"{url}: serves no model {model!r}{nearest(model, models)}")
    if not model and len(models) > 1:
        say(f"{', '.join(models[1:])} can be talked to as well: --model names one")
    return client, model or models[0]


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
