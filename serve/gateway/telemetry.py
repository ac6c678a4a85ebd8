"""What is seen of requests from outside: Prometheus' metrics, a line of JSON for each, and spans where OpenTelemetry is configured.

Nothing of what is asked or answered is in any of them.
"""

import json
import os
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.fleet import Fleet
from serve.gateway.passing import Asked, Outcome

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# Lines that wait for a slow disk; more are dropped and counted.
MOST_LINES = 10_000
# A file that is longer is put aside, in place of the one that was before.
LOG_BYTES = 100_000_000
WHO = ("name", "version", "key")


class Metrics:
    """Counters of requests by name, version and key id."""

    def __init__(self, fleet: Fleet, log: "Log") -> None:
        self._fleet, self._log = fleet, log
        self.registry = CollectorRegistry()

        def made(kind: Any, name: str, what: str, labels: tuple[str, ...], **more: Any) -> Any:
            return kind(f"tuner_{name}", what, labels, registry=self.registry, **more)

        self._requests = made(Counter, "requests", "Requests that are over", (*WHO, "path", "status"))
        self._tokens = made(Counter, "tokens", "Tokens read and written", (*WHO, "direction"))
        self._first = made(Histogram, "first_token_seconds", "Until an answer begins", ("name", "version"), buckets=SECONDS)
        self._between = made(
            Histogram,
            "inter_token_seconds",
            "Between two tokens of a stream, its mean",
            ("name", "version"),
            buckets=TOKEN_SECONDS,
        )
        self._whole = made(Histogram, "request_seconds", "Until an answer is whole", ("name", "version"), buckets=SECONDS)
        self._active = made(Gauge, "active_requests", "Requests under way", ("name", "version"))
        self._ready = made(Gauge, "version_ready", "1 for a version that is proven and can be asked", ("name", "version"))
        self._restarts = made(Gauge, "engine_restarts", "Starts after the first", ("engine",))
        self._queue = made(Gauge, "engine_requests", "Requests in an engine", ("engine", "state"))
        self._lost = made(Gauge, "log_lines_lost", "Lines of the log that could not be written", ())
        self._shadow = made(Counter, "shadow_answers", "Answers of shadows, by how they compare", ("name", "version", "result"))

    def count(self, asked: Asked, outcome: Outcome) -> None:
        """A request is over."""
        name = (asked.version or "").partition("@")[0]
        who = (name, asked.version or "", asked.key.id if asked.key else "")
        self._requests.labels(*who, asked.path, str(outcome.status)).inc()
        if outcome.prompt_tokens:
            self._tokens.labels(*who, "read").inc(outcome.prompt_tokens)
        if outcome.completion_tokens:
            self._tokens.labels(*who, "written").inc(outcome.completion_tokens)
        if asked.version and outcome.first_s is not None:
            took = time.monotonic() - asked.began
            self._first.labels(name, asked.version).observe(outcome.first_s)
            self._whole.labels(name, asked.version).observe(took)
            if outcome.pieces > 1 and outcome.completion_tokens > 1:
                self._between.labels(name, asked.version).observe((took - outcome.first_s) / (outcome.completion_tokens - 1))

    def compare(self, name: str, version: str, result: str) -> None:
        """A shadow has answered."""
        self._shadow.labels(name, version, result).inc()

    async def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        for gauge in (self._active, self._ready, self._restarts, self._queue):
            gauge.clear()
        for version in self._fleet.versions.values():
            self._active.labels(version.name, version.id).set(version.active)
            self._ready.labels(version.name, version.id).set(version.ready)
        for engine in self._fleet.engines:
            self._restarts.labels(engine.name).set(engine.restarts)
            for state, count in (await engine.queue()).items():
                self._queue.labels(engine.name, state).set(count)
        self._lost.set(self._log.lost)
        return generate_latest(self.registry)


class Log:
    """A line of JSON for each request and event, written by a thread of its own: a disk that is full or slow holds up nobody."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lost = 0
        """Lines that could not be written."""
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        if path:
            self._thread.start()

    def add(self, kind: str, **values: Any) -> None:
        """Let a line be written."""
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, **values}, ensure_ascii=False)
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what is left."""
        if self.path:
            with suppress(queue.Full):
                self._lines.put(None, timeout=1)
            self._thread.join(5)

    def _write(self) -> None:
        assert self.path is not None
        while (line := self._lines.get()) is not None:
            count = 1
            try:
                if self.path.exists() and self.path.stat().st_size > LOG_BYTES:
                    self.path.replace(self.path.with_suffix(".old.jsonl"))
                self.path.touch(mode=0o600)
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(line + "\n")
                    while not self._lines.empty() and (line := self._lines.get()) is not None:
                        count += 1
                        file.write(line + "\n")
                if line is None:
                    return
            except OSError:
                self.lost += count


class Spans:
    """A span for each request, where OTEL_EXPORTER_OTLP_ENDPOINT or its like for traces says where they go."""

    def __init__(self) -> None:
        self._tracer: Any = None
        if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "tuner")}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("tuner.gateway")

    def add(self, asked: Asked, outcome: Outcome) -> None:
        """A request is over. Attributes have the names of OpenTelemetry's conventions for generative models."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        parent = TraceContextTextMapPropagator().extract({"traceparent": asked.traceparent} if asked.traceparent else {})
        span = self._tracer.start_span(
            f"POST {asked.path}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=end - int((time.monotonic() - asked.began) * 1e9),
            attributes={
                "http.response.status_code": outcome.status,
                "gen_ai.request.model": str(asked.body.get("model", ""))[:100],
                "gen_ai.response.model": asked.version or "",
                "gen_ai.usage.input_tokens": outcome.prompt_tokens,
                "gen_ai.usage.output_tokens": outcome.completion_tokens,
                "tuner.request_id": asked.request_id,
            },
        )
        if outcome.status >= 500:
            span.set_status(Status(StatusCode.ERROR, outcome.reason))
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        if self._tracer is not None:
            self._provider.shutdown()


class Telemetry:
    """All three."""

    def __init__(self, fleet: Fleet, log: Path | None) -> None:
        self.log = Log(log)
        self.metrics = Metrics(fleet, self.log)
        self._spans = Spans()

    def __call__(self, asked: Asked, outcome: Outcome) -> None:
        """A request is over."""
        self.metrics.count(asked, outcome)
        self._spans.add(asked, outcome)
        self.log.add(
            "request",
            request_id=asked.request_id,
            path=asked.path,
            key=asked.key.id if asked.key else None,
            version=asked.version,
            status=outcome.status,
            reason=outcome.reason or None,
            prompt_tokens=outcome.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
            first_s=None if outcome.first_s is None else round(outcome.first_s, 4),
            took_s=round(time.monotonic() - asked.began, 4),
        )

    def close(self) -> None:
        """Write and send what is left."""
        self.log.close()
        self._spans.close()
