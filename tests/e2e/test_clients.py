"""OpenAI's own clients, in Python and JavaScript, against both engines: each is told what the other is."""

import base64
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import BadRequestError, NotFoundError, OpenAI

from tests.e2e.test_deployments import Endpoint
from tests.grid.conftest import checkpoints, tokenizer  # noqa: F401 - fixtures
from tests.grid.test_handover import recipe
from tuner.plan import make_plan
from tuner.recipe import read_recipe
from tuner.run import run

pytestmark = pytest.mark.slow
MESSAGES: Any = [{"role": "user", "content": "show the vm"}]
BUNDLES = {"words": ("llama", "sft"), "label": ("bert", "classify"), "several": ("bert", "classify-multi"),
           "number": ("bert", "classify-number"), "tags": ("bert", "tokens"), "vectors": ("bert", "embed")}  # fmt: skip


@pytest.fixture(scope="module")
def folders(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """A small bundle of each kind of answer."""
    found = {}
    for name, (model_type, task) in BUNDLES.items():
        folder = tmp_path_factory.mktemp(name)
        path = recipe(folder, checkpoints(model_type).path, task, [], method="full", gate={"heldout_loss_drop": -9.0})
        run(make_plan(read_recipe(path), folder / "out"), folder / "out")
        found[name] = folder / "out" / "tune"
    return found


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def endpoint(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp(request.param)
    # Six engines of vLLM with 2 GiB of cache each are more than a small machine has.
    left_out = ("several", "number") if request.param == "vllm" else ()
    models = {name: str(path) for name, path in folders.items() if name not in left_out}
    (folder / "deploy.yaml").write_text(yaml.safe_dump({"models": models, "engine": request.param}))
    running = Endpoint(folder / "state", folder / "deploy.yaml")
    yield running
    assert running.end() == 0


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> OpenAI:
    return OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_chats(client: OpenAI) -> None:
    common: dict[str, Any] = {"model": "words", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**common, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert whole.model.startswith("words@")
    assert choice.message.content
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [len(each.top_logprobs) for each in choice.logprobs.content] == [2] * whole.usage.completion_tokens  # type: ignore[union-attr]
    assert "".join(each.token for each in choice.logprobs.content).startswith(choice.message.content[:3])
    pieces = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].delta.content or "" for each in pieces if each.choices) == choice.message.content
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
    assert all(each.usage is None for each in client.chat.completions.create(**common, stream=True))


def test_answers_are_drawn_again_with_the_same_seed_and_end_at_a_stop(client: OpenAI) -> None:
    def drawn(seed: int, **more: Any) -> list[str | None]:
        reply = client.chat.completions.create(
            model="words", messages=MESSAGES, temperature=1, seed=seed, max_tokens=8, n=3, **more
        )
        return [each.message.content for each in reply.choices]

    first = drawn(7)
    assert first == drawn(7) != drawn(8)
    assert len(set(first)) > 1
    text = client.completions.create(model="words", prompt="show the", temperature=0, max_tokens=12).choices[0].text
    stop = text[3:5]
    cut = client.completions.create(model="words", prompt="show the", temperature=0, max_tokens=12, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_an_answer_keeps_to_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object", "properties": {"n": {"type": "integer", "enum": [4, 5]}}, "required": ["n"], "additionalProperties": False,
    }  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for seed in range(3):
        reply = client.chat.completions.create(
            model="words", messages=MESSAGES, temperature=1, seed=seed, max_tokens=100, response_format=form
        )
        assert json.loads(str(reply.choices[0].message.content))["n"] in (4, 5)
    with pytest.raises(BadRequestError):
        client.chat.completions.create(
            model="words",
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}},
        )


def test_responses_are_told_like_chats(client: OpenAI) -> None:
    chat = client.chat.completions.create(model="words", messages=MESSAGES, temperature=0, max_tokens=8)
    whole = client.responses.create(model="words", input="show the vm", temperature=0, max_output_tokens=8)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage is not None and chat.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    given: Any = [{"role": "user", "content": "show the vm"}]
    events: list[Any] = list(client.responses.create(model="words", input=given, temperature=0, max_output_tokens=8, stream=True))
    kinds = [event.type for event in events]
    assert events[-1].response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == f"response.{whole.status}"
    assert "response.output_text.delta" in kinds
    with pytest.raises(BadRequestError, match="nothing is kept between two requests"):
        client.responses.create(model="words", input="x", previous_response_id="resp_1")


def test_vectors_labels_and_tags(client: OpenAI, endpoint: Endpoint, folders: dict[str, Path]) -> None:
    plain = client.embeddings.create(model="vectors", input=["list it now", "az vm list one", "show"], encoding_format="float")
    packed = client.embeddings.create(model="vectors", input="list it now", encoding_format="base64").data[0].embedding
    values = struct.unpack(f"<{len(plain.data[0].embedding)}f", base64.b64decode(str(packed)))
    assert values == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert sum(value**2 for value in values) == pytest.approx(1, abs=1e-4)

    def ask(path: str, **body: Any) -> Any:
        return httpx.post(f"{endpoint.url}{path}", json=body, timeout=60).raise_for_status().json()

    vectors = [each.embedding for each in plain.data]
    expected = [sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:]]
    score = ask("/v1/score", model="vectors", text_1="list it now", text_2=["az vm list one", "show"])
    assert [each["score"] for each in score["data"]] == pytest.approx(expected, abs=1e-4)
    ranked = ask("/v1/rerank", model="vectors", query="list it now", documents=["az vm list one", "show"], top_n=1)
    assert ranked["results"][0]["index"] == expected.index(max(expected))
    labelled = ask("/v1/classify", model="label", input=["show the machine 9", "x"])["data"]
    names = json.loads((folders["label"] / "bundle.json").read_text())["serving"]["labels"]
    assert [each["label"] for each in labelled] == [names[each["probs"].index(max(each["probs"]))] for each in labelled]
    tagged = ask("/v1/tokens/classify", model="tags", input="show machine")["data"][0]
    assert "".join(each["word"] for each in tagged["words"]).replace(" ", "") == "showmachine"
    assert {each["label"] for each in tagged["words"]} <= {"NOUN", "VERB", "O", "DET"}
    if any(each.id == "several" for each in client.models.list()):
        several = ask("/v1/classify", model="several", input="show both of the two")["data"][0]
        names = json.loads((folders["several"] / "bundle.json").read_text())["serving"]["labels"]
        assert [each["label"] for each in several["labels"]] == [
            name for name, value in zip(names, several["probs"], strict=True) if value > 0.5
        ]
        item = json.loads((folders["number"] / "bundle.json").read_text())["probe"][0]
        number = ask("/v1/classify", model="number", input=[item["ids"]])["data"][0]
        assert number["score"] == pytest.approx(item["scores"][0], abs=1e-3)


def test_mistakes_are_openais_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    for wrong in ({"temperature": 9}, {"max_tokens": 10**6}, {"n": 0}, {"messages": []}, {"stop": 5}, {"top_p": -1}):
        with pytest.raises(BadRequestError):
            client.chat.completions.create(**{"model": "words", "messages": MESSAGES, **wrong})  # type: ignore[call-overload]
    with pytest.raises(BadRequestError, match="it has a embedding head"):
        client.chat.completions.create(model="vectors", messages=MESSAGES)


def test_the_client_for_javascript_is_told_the_same(
    client: OpenAI, endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not shutil.which("npm"):
        pytest.skip("no npm here: `apt-get install npm` brings it")
    folder = tmp_path_factory.mktemp("node")
    done = subprocess.run(["npm", "install", "--silent", "openai@7"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.copy(Path(__file__).with_name("clients.mjs"), folder)
    done = subprocess.run(["node", "clients.mjs", f"{endpoint.url}/v1"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    chat = client.chat.completions.create(model="words", messages=MESSAGES, temperature=0, max_tokens=8)
    assert told["models"] == sorted(each.id for each in client.models.list())
    assert told["chat"] == told["stream"] == told["response"] == told["spoken"] == chat.choices[0].message.content
    assert told["usage"] == told["streamUsage"] == chat.usage.completion_tokens  # type: ignore[union-attr]
    assert told["logprobs"] == [2] * told["usage"]
    assert told["several"] == 3
    assert (
        told["completion"]
        == client.completions.create(model="words", prompt="show the", temperature=0, max_tokens=6).choices[0].text
    )
    assert told["kinds"][0] == "response.created"
    assert told["json"]["n"] in (4, 5)
    vectors = client.embeddings.create(model="vectors", input=["list it now", "az vm list one"]).data
    assert told["vectors"] == [len(each.embedding) for each in vectors]
    assert told["first"] == pytest.approx(vectors[0].embedding[0], abs=1e-6)
    assert (told["missing"], told["refused"]) == ([404, "model_not_found"], 400)
