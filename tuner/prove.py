"""Asks a running endpoint the held-out questions, as any client would, and compares with what the bundle's own files answer."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tuner import kinds, probe
from tuner.bundle import Bundle
from tuner.checkpoint import load_tokenizer
from tuner.data.dataset import heldout_rows, task_of
from tuner.data.example import IGNORE, Example
from tuner.data.rows import first_of_each
from tuner.errors import GateError
from tuner.progress import say, track
from tuner.recipe import Recipe
from tuner.report import write_served
from tuner.score import mean_scores

PARALLEL_REQUESTS = 8
# The engine rounds differently from the process that measured the bundle: on the demo's quantized model, where it matters most, the
# held-out losses differ by 0.007.
LOSS_TOLERANCE = 0.02
# Of the bundle's own distance from the tuned model. Two right computations of the quantized one are about as far off (0.9 to 1.3
# times was seen), the unquantized weights ten thousand times less.
LEAST_NOISE = 0.25


def prove(recipe: Recipe, bundles: list[Bundle], url: str, out_dir: Path) -> dict[str, Any]:
    """Figures of the endpoint at `url`, which serves the last of `bundles`; kept in `out_dir`/served.json.

    Raises GateError where the endpoint's held-out loss is not the bundle's.
    """
    from openai import OpenAI, OpenAIError

    from tuner.heads import causal

    bundle = bundles[-1]
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    model = client.models.list().data[0].id  # the one that was named; the base of an adapter comes behind it
    tokenizer = load_tokenizer(bundle.path)
    task = task_of(recipe)
    module = kinds.load("tasks", task.kind)
    if module.HEAD != "causal":
        # The endpoint only opens once the engine has given the recorded probabilities or vectors.
        say(f"{model}: there are no words to ask for; the engine has answered its probe")
        return {}
    rows, _ = heldout_rows(recipe, task, tokenizer)
    asked = [row for row, _ in first_of_each(rows)[: recipe.evaluate.rows]]

    longest = int(bundle.manifest.serving["serve_max_tokens"])

    def answer(row: Any) -> str:
        asks = module.question(row.record, tokenizer, task)
        most = min(recipe.evaluate.max_new_tokens, longest - len(asks["ids"]))
        common: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": most}
        if asks["messages"] and "tools" not in asks:  # with tools the engine would look for calls in the answer
            reply = client.chat.completions.create(messages=asks["messages"], **common)
            return str(reply.choices[0].message.content or "")
        return str(client.completions.create(prompt=asks["ids"], **common).choices[0].text)

    def forced(example: Example) -> dict[str, Any]:
        return read_back(client, model, example)

    # As in run.py: the last tuned bundle, or where nothing was tuned the one before.
    tuned = next(
        (each for each in reversed(bundles) if "training" in each.manifest.metrics), bundles[-2] if len(bundles) > 1 else bundle
    )
    items = tuned.manifest.probe
    # A loss that compares answers is no mean over tokens: of such a task the probe and the answers are asked.
    alone = [example for _, example in rows if isinstance(example, Example)] if recipe.data.holds_out else []
    if recipe.data.holds_out and not alone:
        say(f"{model}: the held-out loss of {task.kind} is not asked of the endpoint, only the probe and the answers")
    examples = alone + [causal.example(item) for item in items]
    answers, read = [], []
    try:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool, track("asking the endpoint", len(asked) + len(examples)) as advance:
            for text in pool.map(answer, asked):
                answers.append(text)
                advance()
            for each in pool.map(forced, examples):
                read.append(each)
                advance()
    except OpenAIError as error:
        raise GateError(f"the endpoint at {url} failed while it was asked held-out questions: {error}") from None
    logprobs = [value for each in read[: len(alone)] for value in each["logprobs"]]
    metrics: dict[str, Any] = {}
    if alone:
        metrics = {"heldout_loss": round(-sum(logprobs) / len(logprobs), 5), "heldout_tokens": len(logprobs)}
    metrics["probe"] = probe.compare(module.HEAD, items, read[len(alone) :])
    if recipe.evaluate.metrics:
        pairs = [(text, module.reference(row.record)) for text, row in zip(answers, asked, strict=True)]
        metrics["scores"] = {"rows": len(pairs), **mean_scores(recipe.evaluate.metrics, pairs)}
    _gate(bundle, metrics)
    write_served(out_dir, bundle, metrics)
    return metrics


def _gate(bundle: Bundle, metrics: dict[str, Any]) -> None:
    """Raises GateError where the endpoint serves something else than the bundle: other answers, or the unquantized weights."""
    served, own = metrics.get("heldout_loss"), bundle.manifest.metrics.get("heldout_loss")
    if served is not None and own is not None and not abs(served - own) <= LOSS_TOLERANCE:
        raise GateError(
            f"the endpoint's held-out loss is {served:.4f} and its bundle's is {own:.4f}: it does not serve {bundle.path} "
            f"({LOSS_TOLERANCE} is allowed)"
        )
    # The rounding of a quantized model shows: an endpoint that answers as exactly as the unquantized one does serves that.
    noise, seen = bundle.manifest.metrics["probe"]["mean_difference"], metrics["probe"]["mean_difference"]
    if bundle.manifest.kind == "quantized" and not LEAST_NOISE * noise <= seen:
        raise GateError(
            f"the endpoint is {seen:.5f} nats a token from the tuned model, and {bundle.path} is {noise:.5f}: "
            "it serves the unquantized weights"
        )


def read_back(client: Any, model: str, example: Example) -> dict[str, Any]:
    """`logprobs` of the supervised tokens and the tokens `preferred` there, from vLLM's `prompt_logprobs`."""
    reply = client.completions.create(
        model=model, prompt=example.ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 1}
    )
    found: list[Any] = reply.choices[0].model_extra["prompt_logprobs"]
    logprobs, preferred = [], []
    for position, label in enumerate(example.labels):
        if label != IGNORE and position:
            entry = found[position]
            logprobs.append(entry[str(label)]["logprob"])
            preferred.append(next(int(token) for token, value in entry.items() if value["rank"] == 1))
    return {"logprobs": logprobs, "preferred": preferred}
