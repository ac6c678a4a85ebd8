"""What stands behind a name: a bundle, opened and checked, with an id that follows from its bytes.

The same bundle is the same version wherever it lies.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from serve import engines
from serve.engine import Engine
from serve.errors import ServeError
from serve.state import NAME, Placed
from tuner.bundle import MANIFEST, Bundle, fingerprint, open_bundle, sha256, verify
from tuner.errors import BundleError


@dataclass
class Version:
    """A bundle under a name."""

    id: str
    name: str
    bundle: Bundle
    digest: str
    manifest: str
    """sha256 of its bundle.json."""
    kind: str
    """The engine that serves it."""
    served: str = ""
    """What that engine calls it."""
    engine: Engine | None = None
    failure: str | None = None
    """Why it gets no request, once that is known."""
    tools: bool = True
    """Its chat template shows them, and its answers can be read for calls."""
    active: int = 0
    """Requests under way."""

    @property
    def head(self) -> str:
        """What it answers with."""
        return str(self.bundle.manifest.head)

    @property
    def ready(self) -> bool:
        """It has answered its probe on an engine that runs."""
        return self.why_not is None

    @property
    def why_not(self) -> str | None:
        """Why it cannot be asked now, or None."""
        if self.failure:
            return self.failure
        if self.engine is None:
            return "it is not started"
        if why := self.engine.failure or self.engine.refused.get(self.served):
            return why
        return None if self.engine.ready and self.served in self.engine.served else "its engine is starting or being restarted"

    @property
    def status(self) -> str:
        """One word of it."""
        down = self.failure or (self.engine and (self.engine.failure or self.engine.refused.get(self.served)))
        return "failed" if down else "ready" if self.ready else "starting" if self.engine else "stopped"

    @property
    def placed(self) -> Placed:
        """As it is written down."""
        return Placed(self.id, self.name, str(self.bundle.path.resolve()), self.digest)


def open_version(
    name: str, path: Path, say: Callable[[str], None], *, engine: str | None = None, expected: str | None = None
) -> Version:
    """Open and check a bundle. Raises ServeError or BundleError for what cannot be served, or is not the expected version."""
    if not NAME.fullmatch(name):
        raise ServeError(f"{name!r} cannot be a name: letters, digits, . _ and -, 64 at most, a letter or digit first")
    bundle = as_served(open_bundle(path), say)
    verify(bundle)  # its answers are proven, and so is all else in it, such as the names of labels
    if bundle.manifest.kind == "adapter":
        verify(bundle.base())
    kind, why = engines.choose(bundle, engine)
    if why:
        say(f"{path}: served by {kind}; {why}")
    if not bundle.manifest.probe:
        raise ServeError(f"{path}: has no probe to be proven with; run its recipe to the end")
    digest = digest_of(bundle)
    version = Version(f"{name}@{digest[:8]}", name, bundle, digest, sha256(bundle.path / MANIFEST), kind)
    # A model is the same under all its names; of adapters each has its own.
    version.served = version.id if bundle.manifest.kind == "adapter" else model_id(bundle)
    version.tools = engines.tool_parser(bundle.base() if bundle.manifest.kind == "adapter" else bundle) is not None
    if expected and version.id != expected:
        raise ServeError(f"{path}: is {version.id} now, and {expected} was deployed")
    return version


def as_served(bundle: Bundle, say: Callable[[str], None]) -> Bundle:
    """The bundle, or, of an adapter that no engine takes while it runs, the model that its run merged it into."""
    why = engines.unservable(bundle)
    if bundle.manifest.kind != "adapter" or not why:
        return bundle
    for path in sorted(bundle.path.resolve().parent.glob(f"[!.]*/{MANIFEST}")):
        with suppress(BundleError):
            merged = open_bundle(path.parent)
            made_of = [each["fingerprint"] for each in merged.manifest.parents[-1:]]
            if merged.manifest.stage == "merge" and made_of == [bundle.manifest.fingerprint]:
                say(f"{bundle.path}: {why.split(';')[0]}, so it is served merged, as {merged.name}")
                return merged
    return bundle


def digest_of(bundle: Bundle) -> str:
    """Hex digest of what a bundle answers by: its files, and of an adapter its base's."""
    base = bundle.base().manifest.files if bundle.manifest.kind == "adapter" else None
    return hashlib.sha256(fingerprint(bundle.manifest.files, base, bundle.manifest.probe).encode()).hexdigest()


def model_id(model: Bundle) -> str:
    """What an engine calls a model, such as `demo-merge:3f2a91c0`; clients see the version's id instead."""
    return f"{default_name(model)}:{hashlib.sha256(fingerprint(model.manifest.files).encode()).hexdigest()[:8]}"


def default_name(bundle: Bundle) -> str:
    """The run's and the stage's name: `runs/demo/merge` is served as `demo-merge`."""
    return f"{bundle.path.resolve().parent.name}-{bundle.name}"
