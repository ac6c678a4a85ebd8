"""Where a model comes from: a hub id, a directory, a bundle, a GGUF file, or a file inside an installed package.

`find` looks without reading weights; `base_bundle` turns what was found into the first bundle of a run. Weights are read
from safetensors and GGUF only, which hold numbers and cannot run code.
"""

import difflib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import struct
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tuner import gguf, kinds
from tuner.bundle import MANIFEST, Bundle, Manifest, checked_name, fingerprint, open_bundle, sha256, verify, write_bundle
from tuner.checkpoint import dateless, say_of_date
from tuner.errors import BundleError, SourceError, nearest
from tuner.families import family_of, head_of

VERSION = 4
# What a checkpoint is made of. Anything else in a directory or on the hub stays where it is.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*_Pooling/config.json")
# As sentence-transformers names them.
POOLINGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


@dataclass(frozen=True)
class Source:
    """A model that exists. `path` is a directory, or a .gguf file."""

    reference: str
    path: Path
    identity: dict[str, Any]
    """What tells this version of the model from another: goes into the fingerprint and the manifest."""

    @property
    def is_gguf(self) -> bool:
        """The weights have to be unpacked into an ordinary checkpoint first."""
        return self.path.suffix == ".gguf"

    @property
    def is_bundle(self) -> bool:
        """Made by an earlier run."""
        return (self.path / MANIFEST).is_file()

    @property
    def checkpoint(self) -> Path:
        """The directory that has config.json: of an adapter, its base's."""
        if self.is_bundle and (bundle := open_bundle(self.path)).manifest.kind == "adapter":
            return bundle.base().path
        return self.path


@dataclass(frozen=True)
class Facts:
    """What can be known of a model without loading it."""

    model_type: str
    parameters: int
    max_tokens: int
    bundle_kind: str = "model"
    chat_template: bool = True
    """It says how a conversation is written down."""
    matrices: dict[str, list[int]] = field(default_factory=dict)
    """Module name to the shape of its two-dimensional weight: (outputs, inputs) of a linear. Empty where headers do not say."""
    widths: frozenset[int] = frozenset()
    """Inputs of the linears of a model that has yet to be made."""
    head: str = "causal"
    """What it answers with: a file in tuner/heads."""
    labels: tuple[str, ...] = ()
    """What its head tells apart, in the order of its scores, where it names them."""
    pooling: str | None = None
    """How it makes vectors, where it says so: `mean`, `cls` or `last`."""
    output_bias: bool = False
    """Its output layer has a bias: a vector with a number for each token."""
    new_tokens: bool = False
    """It was given tokens that it has yet to learn."""


def find(reference: str, revision: str | None = None) -> Source:
    """The model that a recipe names. Raises SourceError, with the nearest name that exists, where there is none."""
    path = Path(reference)
    here = path.exists() or reference.startswith((".", "/")) or ".." in path.parts
    if revision and (here or reference.startswith("pkg://")):
        raise SourceError(f"revision {revision}: only a model on the hub has revisions, and {reference} is not there")
    if reference.startswith("pkg://"):
        return _in_package(reference)
    if here:
        return _local(reference, path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", reference):
        return _on_hub(reference, revision)
    raise SourceError(f"{reference}: neither a path that exists nor a hub id (owner/name), a .gguf file or pkg://MODULE/PATH")


def facts(source: Source) -> Facts:
    """Model type, number of parameters and longest context, from headers alone."""
    if source.is_gguf:
        values, parameters, shapes = gguf.read_header(source.path)
        gguf.splits_of(values, source.path)
        kind = values.get("general.architecture")
        length = _whole(values.get(f"{kind}.context_length", 0), f"{source.path}: {kind}.context_length")
        return Facts(str(kind), parameters, length, chat_template="tokenizer.chat_template" in values, matrices=shapes)
    folder = source.checkpoint
    made = open_bundle(source.path).manifest if source.is_bundle else None
    config = read_config(folder)
    remote = "hub" in source.identity and not _weights_are_here(folder)
    shapes = {} if remote else {name: shape for file in weight_files(folder) for name, shape in _shapes(file).items()}
    return Facts(
        str(config["model_type"]),
        _hub_parameters(source) if remote else sum(math.prod(shape) for shape in shapes.values()),
        _context(config, folder),
        made.kind if made else "model",
        _has_chat_template(folder),
        {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2},
        head=head_of(config),
        labels=tuple(label_names(config)),
        pooling=pooling_of(folder),
        output_bias=[config.get("vocab_size")] in shapes.values(),
        new_tokens=made is not None and "new_tokens" in made.serving,
    )


def base_folder(source: Source, out_dir: Path) -> tuple[str, Path]:
    """(the fingerprint of the model as a bundle, where it lies in a run's directory)."""
    key = fingerprint("base", VERSION, source.identity)
    return key, out_dir / f"0-base-{key[:8]}"


def base_bundle(source: Source, out_dir: Path) -> Bundle:
    """The model as a bundle in `out_dir`: its files linked, or its GGUF tensors unpacked."""
    key, path = base_folder(source, out_dir)
    with suppress(BundleError):  # what is not there or not whole is made again
        if (found := open_bundle(path)).manifest.fingerprint == key:
            return found

    if source.is_bundle:
        verify(open_bundle(source.path))

    def fill(folder: Path) -> Manifest:
        if source.is_gguf:
            gguf.unpack(source.path, folder)
        else:
            if "hub" in source.identity and not _weights_are_here(source.path):
                _snapshot(source.reference, source.identity["revision"], list(WANTED))
            _link(source.path, folder)
            _without_date(folder)
        if source.is_bundle:
            return _adopted(open_bundle(source.path), path, source.reference, key)
        manifest = describe_model(folder, stage="base", fingerprint=key, source=source)
        # Linked files are hashed as the bundle's own; an unpacked one is hashed here.
        origin = {"sha256": sha256(source.path)} if source.is_gguf else {}
        return replace(manifest, recipe={**manifest.recipe, **origin})

    return write_bundle(path, out_dir / f".0-base-{key[:8]}.part", fill)


def _adopted(made: Bundle, path: Path, reference: str, key: str) -> Manifest:
    """The manifest of an earlier run's bundle for `path`: its lineage kept, seen from there, and itself the last of it."""

    def from_here(way: str) -> str:
        return os.path.relpath((made.path.resolve() / way).resolve(), path.resolve())

    old = made.manifest
    parents = [{**each, "path": from_here(each["path"])} for each in old.parents]
    parents.append({"path": from_here("."), "stage": old.stage, "fingerprint": old.fingerprint})
    return replace(
        old,
        stage="base",
        fingerprint=key,
        base=old.base and from_here(old.base),
        parents=parents,
        recipe={"model": reference, "bundle": old.fingerprint},
        probe=[],
        metrics={},
        files={},
    )


def describe_model(folder: Path, *, stage: str, fingerprint: str, source: Source | None = None, **rest: Any) -> Manifest:
    """A manifest for an ordinary checkpoint directory, its family looked up from config.json."""
    config = read_config(folder)
    family, architecture = family_of(str(config["model_type"]))
    return Manifest(
        kind=rest.pop("kind", "model"),
        stage=stage,
        fingerprint=fingerprint,
        family=family.name,
        head=head_of(config),
        model_type=str(config["model_type"]),
        serving={
            "dtype": str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            "max_tokens": _context(config, folder),
            "heads": sorted(architecture.served),
            **({"labels": label_names(config)} if getattr(kinds.load("heads", head_of(config)), "LABELLED", False) else {}),
            **rest.pop("serving", {}),
        },
        recipe=rest.pop("recipe", {}) if source is None else {"model": source.reference, **source.identity},
        versions=versions(),
        **rest,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; raises SourceError where it is missing or is not what transformers writes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{folder}: no config.json, so this is no checkpoint that transformers can open") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{folder / 'config.json'}: not JSON ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise SourceError(f"{folder / 'config.json'}: has no model_type")
    return config


def label_names(config: dict[str, Any]) -> list[str]:
    """The labels of a model's head, in the order of its scores; empty where its configuration names none."""
    named = config.get("id2label")
    return [str(name) for _, name in sorted(named.items(), key=lambda each: int(each[0]))] if isinstance(named, dict) else []


def _has_chat_template(folder: Path) -> bool:
    """A file of its own, as transformers writes it now, or a key of the tokenizer's configuration, as it did before."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _context(config: dict[str, Any], folder: Path) -> int:
    """Longest input in tokens, 0 where the configuration does not say."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    longest = _whole(
        text.get("max_position_embeddings") or text.get("n_positions") or 0, f"{folder / 'config.json'}: the longest input"
    )
    with suppress(SourceError):  # of an unknown architecture it is said elsewhere
        _, architecture = family_of(str(text.get("model_type")))
        if longest and architecture.positions_from_padding:
            return longest - 1 - int(text.get("pad_token_id") or 0)
    return longest


def pooling_of(folder: Path) -> str | None:
    """What sentence-transformers reads beside a checkpoint: which hidden states become a vector."""
    try:
        modes = json.loads((folder / "1_Pooling/config.json").read_text(encoding="utf-8"))
        return next((name for name, key in POOLINGS.items() if modes.get(key)), None)
    except (OSError, ValueError, AttributeError):
        return None


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SourceError(f"{what} is {value!r:.40}, expected a number of tokens")
    return value


@cache
def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions of the libraries that a result depends on."""
    names = ("tuner", "torch", "transformers", "peft", "accelerate", "tokenizers", "llmcompressor", "compressed-tensors")
    return {name: found for name in names if (found := _installed(name))}


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors: those in its index, else model.safetensors, else all (some checkpoints lie there twice)."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [folder / checked_name(str(name)) for name in names]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SourceError(f"{index}: not the index of a checkpoint") from None
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _shapes(file: Path) -> dict[str, list[int]]:
    """Tensor name to shape in a safetensors file, from its header: an 8-byte length, then JSON."""
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        return {name: [int(size) for size in entry["shape"]] for name, entry in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise SourceError(f"{file}: there is no such file, but the checkpoint's index names it") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError(
            f"{file}: not a safetensors file; a download by git without LFS leaves a few lines of text instead"
        ) from None


def _in_package(reference: str) -> Source:
    module, _, inside = reference.removeprefix("pkg://").partition("/")
    # Of a name with dots the parents would be imported, which runs their code; a top-level one is only looked for.
    try:
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
    except ValueError:  # a module like __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        close = difflib.get_close_matches(module, importlib.metadata.packages_distributions())
        advice = f'; did you mean "{close[0]}"?' if close else f"; `pip install --no-deps {module.replace('_', '-')}` may bring it"
        raise SourceError(f'{reference}: no package "{module}" is installed{advice}')
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / inside
    if not path.resolve().is_relative_to(folder.resolve()) or not path.exists():
        there = [file.relative_to(folder).as_posix() for ending in ("*.gguf", "*.safetensors") for file in folder.rglob(ending)]
        raise SourceError(f'{reference}: the package "{module}" has no "{inside}"{nearest(inside, there)}')
    return _local(reference, path, package=module, version=_package_version(module))


def _package_version(module: str) -> str | None:
    names = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(names[0]) if names else None


def _local(reference: str, path: Path, **identity: Any) -> Source:
    if not path.exists():
        siblings = [str(path.parent / each.name) for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SourceError(f"{reference}: there is no such file or directory{nearest(str(path), siblings)}")
    if path.is_dir():
        if (path / MANIFEST).is_file():
            if open_bundle(path).manifest.kind != "tokenizer" and not list(path.glob("*.safetensors")):
                raise SourceError(f"{path}: a bundle without safetensors; other weights can run code when they are read")
            return Source(reference, path, {"bundle": open_bundle(path).manifest.fingerprint})
        read_config(path)
        if not list(path.glob("*.safetensors")):
            pickles = sorted(each.name for each in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
            found = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else "no weights"
            raise SourceError(f"{path}: {found}; save the model as safetensors (model.save_pretrained does)")
        files = [file for pattern in WANTED for file in sorted(path.glob(pattern))]
        stats = {str(file.relative_to(path)): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        return Source(reference, path, {**identity, "files": stats})
    if path.suffix != ".gguf":
        raise SourceError(f"{path}: a model is a directory with config.json and safetensors, or a .gguf file")
    if path.stat().st_size < 24:
        raise SourceError(f"{path}: the GGUF header is damaged or cut off")
    # A package's files change with its version; any other file may be replaced by another of the same size.
    moment = {} if "package" in identity else {"mtime_ns": path.stat().st_mtime_ns}
    return Source(reference, path, {**identity, "file": path.name, "size_bytes": path.stat().st_size, **moment})


def _on_hub(reference: str, revision: str | None) -> Source:
    """Configuration and tokenizer only; `base_bundle` fetches the weights."""
    path = _snapshot(reference, revision, [pattern for pattern in WANTED if "safetensors" not in pattern])
    read_config(path)
    return Source(reference, path, {"hub": reference, "revision": path.name})


def _snapshot(reference: str, revision: str | None, patterns: list[str]) -> Path:
    """The hub's own cache directory for one commit; raises SourceError where it is not to be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise SourceError(f"{reference}: its owner wants you to accept terms on the hub first, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise SourceError(f"{reference}: neither a directory here nor a model on the hub that you may read") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        siblings = [str(each) for each in Path(reference).parent.glob("*")]
        close = nearest(reference, siblings) if difflib.get_close_matches(reference, siblings, n=1) else ""
        raise SourceError(
            f"{reference}: no such directory here, and the hub could not be asked for it ({str(error).splitlines()[0]}); "
            f"a model is also a directory, a .gguf file or pkg://MODULE/PATH{close}"
        ) from None


def _weights_are_here(folder: Path) -> bool:
    """Every file of weights that the checkpoint consists of was downloaded before."""
    files = weight_files(folder)
    return bool(files) and all(file.is_file() for file in files)


def _hub_parameters(source: Source) -> int:
    """Parameters of a model whose weights are still on the hub, from the headers there."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        metadata = get_safetensors_metadata(source.reference, revision=source.identity["revision"])
    except NotASafetensorsRepoError:
        raise SourceError(f"{source.reference}: has no safetensors, and other weights can run code when they are read") from None
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(f"{source.reference}: the hub could not be asked for its size ({str(error).splitlines()[0]})") from None
    return int(sum(metadata.parameter_count.values()))


def _without_date(folder: Path) -> None:
    """Write a chat template that names one date for all days beside one that names today's, in whose place it is read."""
    given = folder / "chat_template.jinja"
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = given.read_text(encoding="utf-8") if given.is_file() else config.get("chat_template")
    except (OSError, ValueError, AttributeError):
        return  # whoever opens the tokenizer says what is wrong with it
    if isinstance(template, list):  # several by name, in the tokenizer's own file
        given, config = folder / "tokenizer_config.json", {**config, "chat_template": template}
        written = "\n".join(str(each.get("template")) for each in template)
        text = json.dumps(
            {**config, "chat_template": [{**each, "template": dateless(str(each.get("template")))} for each in template]}
        )
    else:
        written = template or ""
        text = dateless(written)
    if dateless(written) != written:
        given.unlink(missing_ok=True)  # a link to the model's own
        given.write_text(text, encoding="utf-8")
    say_of_date(written)


def _link(source: Path, folder: Path) -> None:
    """Put the checkpoint's files into `folder`: the same bytes on the disk where that is one file system, else links to them."""
    for pattern in WANTED:
        for file in sorted(source.glob(pattern)):
            if file.name == MANIFEST:
                continue
            there = folder / file.relative_to(source)
            there.parent.mkdir(exist_ok=True)
            try:
                there.hardlink_to(file.resolve())
            except OSError:  # another file system, or a file of someone else's
                there.symlink_to(file.resolve())
