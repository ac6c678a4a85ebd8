"""What vLLM is told, and the combinations that are never used."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve import engines
from serve.engines import vllm
from serve.errors import ServeError
from serve.replay import tolerance
from tuner.bundle import Bundle, Manifest


def bundle(kind: str = "model", metrics: dict[str, Any] | None = None, **serving: Any) -> Bundle:
    return Bundle(
        Path("/b"),
        Manifest(kind=kind, stage="s", fingerprint="f", head="causal", model_type="llama", serving=serving, metrics=metrics or {}),
    )


@pytest.fixture(autouse=True)
def _has_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "python", lambda: "python")


def test_calls_of_tools_are_read_by_the_mark_in_the_chat_template_where_there_is_one(tmp_path: Path) -> None:
    there = Bundle(tmp_path, bundle().manifest)
    assert engines.tool_parser(there) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert engines.tool_parser(there) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }} [TOOL_CALLS]"}))
    assert engines.tool_parser(there) == "mistral"
    (tmp_path / "chat_template.jinja").write_text("<tool_call>")
    assert engines.tool_parser(there) == "hermes"


@pytest.mark.parametrize("name", ["vllm", "transformers"])
def test_an_engine_that_dies_without_a_word_is_said_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "log").write_text("")
    assert engines.load(name).error_lines(tmp_path / "log") == "it wrote nothing"


@pytest.mark.parametrize(
    ("scheme", "gpu", "dtype"),
    [(None, False, "float32"), ("w8a8-int8", False, "float32"), ("w4a16", False, "bfloat16"), (None, True, "bfloat16")],
)
def test_the_type_is_one_that_was_seen_to_answer_rightly(scheme: str | None, gpu: bool, dtype: str) -> None:
    assert vllm.dtype(bundle(scheme=scheme), gpu=gpu) == dtype


def test_on_a_cpu_nothing_is_compiled_and_no_port_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.shutil, "which", lambda name: None)
    plan = vllm.launch("m", bundle(), {}, path=Path("/s"), max_tokens=64)
    command = plan.command
    assert "--enforce-eager" in command
    assert plan.environment["TORCHDYNAMO_DISABLE"] == "1"
    assert command[command.index("--uds") + 1] == "/s"
    assert not {"--host", "--port"} & set(command)
    assert command[command.index("--generation-config") + 1] == "vllm"


def test_adapters_get_a_buffer_of_their_rank_and_all_at_once() -> None:
    adapters = {"a": bundle("adapter", adapter_rank=4), "b": bundle("adapter", adapter_rank=20)}
    command = vllm.launch("m", bundle(), adapters, path=Path("/s"), max_tokens=64).command
    assert command[command.index("--max-lora-rank") + 1] == "32"
    assert command[command.index("--max-loras") + 1] == "2"


def test_more_tokens_than_the_model_reads_are_refused() -> None:
    with pytest.raises(ServeError, match="reads 256 tokens at most, --max-tokens 300 was asked for"):
        vllm.launch("m", bundle(max_tokens=256), {}, path=Path("/s"), max_tokens=300)


@pytest.mark.parametrize(
    ("said", "reads", "asked", "length"),
    [(None, 64, None, "64"), (None, 9000, None, "1024"), (512, 9000, None, "512"), (512, 9000, 600, "600")],
)
def test_the_length_is_the_command_lines_the_recipes_or_what_fits(said: Any, reads: int, asked: Any, length: str) -> None:
    command = vllm.launch("m", bundle(max_tokens=reads, serve_max_tokens=said), {}, path=Path("/s"), max_tokens=asked).command
    assert command[command.index("--max-model-len") + 1] == length


@pytest.mark.parametrize(("rank", "bucket"), [(1, 1), (2, 8), (16, 16), (17, 32), (512, 512)])
def test_a_rank_goes_into_the_smallest_buffer_that_holds_it(rank: int, bucket: int) -> None:
    assert vllm.rank_bucket(rank) == bucket


def test_what_vllm_cannot_serve_is_refused_with_what_to_do() -> None:
    with pytest.raises(ServeError, match="merge it first"):
        vllm.rank_bucket(513)
    assert "serve a model" in str(engines.unservable(bundle("tokenizer")))
    assert "add `- merge: {}`" in str(engines.unservable(bundle("adapter", live_adapter=False)))
    assert vllm.refusal(bundle("adapter", live_adapter=True, adapter_rank=8)) is None


def test_a_quantized_bundle_may_be_as_far_off_as_its_own_noise_says() -> None:
    assert tolerance(bundle(), "float32") == 0.01
    assert tolerance(bundle("quantized", {"probe": {"mean_difference": 0.08}}), "float32") == pytest.approx(0.17)


def test_error_lines_are_the_engines_own_without_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO 11-23 fine\n(EngineCore pid=7) ERROR 11-23 19:47:30 [core.py:12] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 11-23 19:47:30 [core.py:12] ValueError: too long\nRuntimeError: Engine core failed\n"
        "pydantic_core.ValidationError: 1 validation error\n  Value error, too short\n"
    )
    assert vllm.error_lines(log).split(" | ") == [
        "ValueError: too long",
        "RuntimeError: Engine core failed",
        "pydantic_core.ValidationError: 1 validation error Value error, too short",
    ]


def test_every_type_that_an_engine_may_compute_in_has_a_tolerance() -> None:
    for stored in ("float32", "float16", "bfloat16"):
        for gpu in (False, True):
            assert 0 < tolerance(bundle(), vllm.dtype(bundle(dtype=stored), gpu=gpu)) <= 0.1


def test_a_runs_name_may_have_any_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = bundle("adapter", adapter_rank=8)
    command = vllm.launch("base", bundle(), {"lr=1e-3,a-tune": adapter}, path=Path("/s")).command
    assert json.loads(command[command.index("--lora-modules") + 1]) == {"name": "lr=1e-3,a-tune", "path": "/b"}
