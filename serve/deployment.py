"""deploy.yaml: which bundles stand behind one address, under which names, and who may reach it."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.endpoint import Settings
from serve.engine import Care
from serve.errors import ServeError
from serve.gateway.app import Limits
from tuner.errors import nearest

Seconds = Annotated[float, Field(gt=0)]


class _Keys(BaseModel):
    """Unknown keys are refused, and text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RequestLimits(_Keys):
    """What a single request may take."""

    body_bytes: int = Field(16_000_000, gt=0)
    body_timeout_s: Seconds = 30.0
    request_timeout_s: Seconds = 600.0
    active: int = Field(1024, gt=0)


class Tls(_Keys):
    """Files in PEM."""

    certificate: str
    key: str


class Deployment(_Keys):
    """Keys of a deployment."""

    models: dict[str, str] = Field(min_length=1)
    """Name, as clients write it, to the folder of its bundle."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    engine: str | None = None
    """`vllm` or `transformers` for all; by default each bundle has the first that can serve it."""
    max_tokens: int | None = Field(None, gt=1)
    """Longest prompt and answer together, of all models; what each one's recipe says by default."""
    state: str | None = None
    """The folder that keeps where names point, and the keys."""
    keys: str | None = None
    """A file of keys that `tuner keys create --file` made, beside those of the state."""
    tls: Tls | None = None
    limits: RequestLimits = RequestLimits()
    drain_timeout_s: Seconds = 30.0
    start_timeout_s: Seconds = 600.0
    pulse_s: Seconds = 10.0
    """An engine of which nothing was heard for so long is asked for one token."""
    hung_after_s: Seconds = 60.0
    """One that says nothing for so long after that is started again."""


def read_deployment(path: Path) -> tuple[dict[str, Path], Settings]:
    """(name to bundle, how to serve them). Paths are seen from the file's folder.

    Raises ServeError with the line of whatever is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _require_single_keys(path, node)
        told = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ServeError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(told, dict):
        raise ServeError(f'{path}:1: expected keys such as "models: {{support: ../runs/demo/merge}}"')
    try:
        read = Deployment(**{str(key): value for key, value in told.items()})
    except ValidationError as error:
        first = error.errors()[0]
        place, line = ".".join(map(str, first["loc"])), _line(node, first["loc"])
        if first["type"] == "extra_forbidden":
            forms: dict[str, type[BaseModel]] = {"limits": RequestLimits, "tls": Tls}
            form = forms.get(str(first["loc"][0]), Deployment)
            raise ServeError(f"{path}:{line}: there is no key {place}{nearest(str(first['loc'][-1]), form.model_fields)}") from None
        raise ServeError(f"{path}:{line}: {place}: {first['msg'].lower()}, found {first['input']!r:.60}") from None
    folder = path.parent
    settings = Settings(
        host=read.host,
        port=read.port,
        engine=read.engine,
        state=folder / read.state if read.state else None,
        keys=folder / read.keys if read.keys else None,
        certificate=folder / read.tls.certificate if read.tls else None,
        certificate_key=folder / read.tls.key if read.tls else None,
        drain_timeout_s=read.drain_timeout_s,
        care=Care(read.max_tokens, read.start_timeout_s, read.pulse_s, read.hung_after_s),
        limits=Limits(**read.limits.model_dump()),
    )
    return {name: folder / bundle for name, bundle in read.models.items()}, settings


def _line(node: Any, location: tuple[Any, ...]) -> int:
    """The line of a key, as far as the file has it."""
    line = 1
    for part in location:
        found = next((pair for pair in getattr(node, "value", []) if isinstance(pair, tuple) and pair[0].value == str(part)), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _require_single_keys(path: Path, node: Any) -> None:
    """Raises ServeError for a key that stands twice, of which YAML would take the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise ServeError(f"{path}:{key.start_mark.line + 1}: {key.value} stands there twice")
        seen.add(key.value)
        _require_single_keys(path, value)
