"""Reads a recipe: YAML with a position for every value, checked strictly, every complaint with `file:line:`."""

import json
import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model, model_validator
from yaml.constructor import SafeConstructor

from tuner import kinds
from tuner.data.files import Source
from tuner.data.rows import OnBadRow, Policy
from tuner.errors import RecipeError, nearest
from tuner.kinds import Options

Location = tuple[str | int, ...]


def _as_sources(value: Any) -> Any:
    """`train: rows.jsonl` is `train: [{path: rows.jsonl}]`."""
    each = value if isinstance(value, list) else [value]
    return [{"path": one} if isinstance(one, str) else one for one in each]


Sources = Annotated[
    list[Source], Field(min_length=1), BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source])
]


class Data(Options):
    """Where the rows come from. Paths are relative to the recipe's own file."""

    train: Sources
    """Rows to train on: a file, folder, pattern or URL, a source with more to say about it, or several of them."""
    heldout: Sources | None = None
    """Rows that are never trained on: every stage is measured on them."""
    heldout_fraction: float | None = Field(None, gt=0, lt=1)
    """Instead of `heldout`: hold out this share of the training rows, chosen by their content, so that equal rows stay together."""
    test: Sources | None = None
    """Rows of a benchmark that must not be among the training rows: `tuner data` looks for them, and nothing else reads them."""
    map: dict[str, str | int] = Field(default_factory=dict)
    """What the rows' columns are called where they differ, {text: review, label: stars}; a source's own `map` comes first."""
    made_by: str | None = None
    """A script that writes the files; named in the error when they are not there."""
    train_rows: int | None = Field(None, gt=0)
    """Train on this many rows, drawn with the recipe's seed; all by default."""
    heldout_rows: int | None = Field(None, gt=0)
    """Measure on this many rows, the first ones of the file; all by default."""
    on_bad_row: Policy = OnBadRow()
    """`error`, or `skip`: leave out rows that cannot be used, count and list them; or one for each kind, {too_long: truncate}."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "Data":
        if self.heldout and self.heldout_fraction:
            raise ValueError("heldout and heldout_fraction both say which rows are held out; give one")
        if any(source.weight != 1.0 for source in self.heldout or []):
            raise ValueError("heldout: every held-out row is measured once; weight is for training rows")
        if any(source.weight != 1.0 for source in self.test or []):
            raise ValueError("test: nothing is drawn from it; weight is for training rows")
        return self

    @property
    def holds_out(self) -> bool:
        """There are rows to measure on."""
        return self.heldout is not None or self.heldout_fraction is not None


class Metric(Options):
    """A score between 0 and 1 for an answer against the reference. Only the parts that match `pattern` are compared."""

    kind: Literal["exact", "f1"]
    """`exact`: the first match is the same. `f1`: harmonic mean of precision and recall over the sets of matches."""
    pattern: str = r"(?s).+"
    """A regular expression; the whole text by default."""

    @model_validator(mode="after")
    def _compiles(self) -> "Metric":
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is not a regular expression: {error}") from None
        return self


class Evaluate(Options):
    """What is measured after each stage on held-out rows, beside their loss."""

    rows: int = Field(100, gt=0)
    """How many of the held-out rows are answered by generation."""
    max_new_tokens: int = Field(64, gt=0)
    """Where a generated answer is cut off."""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    """Name to score. The name is the column's title in the report."""


class Probe(Options):
    """The fixed inputs whose answers travel with each bundle."""

    rows: int = Field(8, gt=0)
    """How many held-out rows become probe inputs."""
    answer_tokens: int = Field(24, gt=0)
    """How many tokens are answered to each."""


class Serve(Options):
    """How the recipe's bundles are served, where the command line says nothing else."""

    max_tokens: int | None = Field(None, gt=1)
    """Longest prompt and answer together, in tokens; 1,024 by default, or what the model reads where that is less."""


class Launch(Options):
    """How many processes share each training step, and where they are."""

    processes: int = Field(1, gt=0)
    """On each machine: one for each GPU; on a CPU, the cores are divided among them."""
    nodes: int = Field(1, gt=0)
    """Machines, which have the run's directory (`--out`), the data and the model at the same paths."""
    node: int = Field(0, ge=0)
    """Which of them this is: `--set launch.node=1` on the second."""
    address: str | None = None
    """HOST:PORT of node 0, on which the others find it."""
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """`ddp`: each process has the whole model. `fsdp`: each has a part of the weights, gradients and optimizer (FSDP2). `deepspeed`
    splits what its own configuration says (ZeRO)."""
    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed's configuration, such as `{zero_optimization: {stage: 3}}`, or a JSON file with it; stage 2 without one."""

    @model_validator(mode="after")
    def _reachable(self) -> "Launch":
        if self.node >= self.nodes:
            raise ValueError(f"node {self.node} of {self.nodes}: they are counted from 0")
        if self.deepspeed is not None and self.strategy != "deepspeed":
            raise ValueError(f"`deepspeed` is for strategy: deepspeed, and this is {self.strategy}")
        if self.strategy == "deepspeed" and self.total == 1:
            raise ValueError("strategy: deepspeed splits among processes, and there is one; processes: 2, or leave it out")
        host, _, port = (self.address or "node:1").rpartition(":")
        if not (host and ":" not in host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"address {self.address} is not HOST:PORT, such as 10.0.0.1:29500")
        return self

    @property
    def total(self) -> int:
        """Processes on all machines."""
        return self.nodes * self.processes

    @property
    def splits(self) -> bool:
        """Each process keeps a part of the model or of what trains it."""
        return self.strategy != "ddp" and self.total > 1


def _no_options(entry: Any) -> Any:
    """`- merge:` is `- merge: {}`."""
    return {name: {} if options is None else options for name, options in entry.items()} if isinstance(entry, dict) else entry


def _one_stage(entry: Any) -> Any:
    if isinstance(entry, BaseModel) and len(entry.model_fields_set) != 1:
        found = ", ".join(sorted(entry.model_fields_set)) or "none"
        raise ValueError(f'a stage is one name with its options, such as "- merge: {{}}"; found {found}')
    return entry


@cache
def recipe_type() -> type[BaseModel]:
    """The recipe's schema, assembled from the files in tuner/stages; not at import, so that `--help` stays fast."""
    stage_fields: dict[str, Any] = {name: (kinds.load("stages", name).Options | None, None) for name in kinds.names("stages")}
    validators = {"one": model_validator(mode="after")(_one_stage), "none": model_validator(mode="before")(_no_options)}
    entry = create_model("Stage", __base__=Options, __validators__=cast(Any, validators), **stage_fields)
    entry.model_config["json_schema_extra"] = {"minProperties": 1, "maxProperties": 1}
    return create_model(
        "Recipe",
        __base__=Options,
        __doc__="A list of stages, each turning one bundle into the next.",
        extends=(str | None, Field(None, description="Another recipe whose keys this one changes; its lists are replaced whole.")),
        model=(str | None, Field(None, description="A hub id, a directory, a bundle, a .gguf file, or pkg://MODULE/PATH.")),
        revision=(str | None, Field(None, description="The hub commit to use; what was found is written into the manifest.")),
        data=(Data, ...),
        seed=(int, Field(0, ge=0, lt=2**32, description="Everything random follows from it.")),
        stages=(list[entry], Field(min_length=1)),
        evaluate=(Evaluate, Evaluate()),
        probe=(Probe, Probe()),
        serve=(Serve, Serve()),
        launch=(Launch, Launch()),
    )


class Recipe:
    """A recipe that was read and is well-formed: its values as attributes, and the place in the file where each was written."""

    def __init__(self, path: Path, tree: Any, places: dict[Location, str]) -> None:
        self.path, self._tree, self._places = path, tree, places
        self.seen: dict[Any, Any] = {}
        """What was found of its data (tuner/data/reading.py): a run goes by what it saw first."""
        try:
            values: Any = recipe_type().model_validate(tree)
        except ValidationError as error:
            one: dict[Location, Any] = {}
            for each in error.errors():
                # Where several types may stand, each says why it does not; a word is told the words, and a number the numbers.
                place = _written(tree, each["loc"]) if each["type"] != "missing" else each["loc"]
                if place not in one or (one[place]["type"] == "literal_error" and not isinstance(each["input"], str)):
                    one[place] = each
            raise RecipeError("\n".join(map(self._explain, one.values()))) from None
        self.model: str | None = values.model
        self.revision: str | None = values.revision
        self.data: Data = values.data
        self.seed: int = values.seed
        self.evaluate: Evaluate = values.evaluate
        self.probe: Probe = values.probe
        self.serve: Serve = values.serve
        self.launch: Launch = values.launch
        self.stages: list[tuple[str, Any]] = [
            (name, getattr(entry, name)) for entry in values.stages for name in sorted(entry.model_fields_set)
        ]

    @property
    def name(self) -> str:
        """The recipe's file name without its ending."""
        return self.path.stem

    def at(self, *location: str | int) -> str:
        """`file:line` of a key, or of the nearest key above it."""
        while location and location not in self._places:
            location = location[:-1]
        return self._places.get(location, f"{self.path}:1")

    def error(self, message: str, *location: str | int) -> RecipeError:
        """A RecipeError that names the place: `recipes/x.yaml:14: stages.1.quantize: <message>`."""
        key = ".".join(map(str, location))
        return RecipeError(f"{self.at(*location)}: {key + ': ' if key else ''}{message}")

    def _nested(self, word: str, above: Location, known: set[str]) -> str:
        """`; it belongs into task: ...` where one of the `known` keys beside it has a key of this name inside."""
        tree: Any = self._tree
        for part in above:
            tree = tree[part]
        beside = [name for name in known if isinstance(tree, dict) and isinstance(tree.get(name), dict)]
        inside = next((name for name in sorted(beside) if word in _keys(recipe_type(), self._tree, (*above, name))), None)
        return f"; it belongs into {inside}: `{inside}: {{{word}: ...}}`" if inside else ""

    def _explain(self, found: Any) -> str:
        location = _written(self._tree, found["loc"])
        match found["type"]:
            case "extra_forbidden":
                word, known = str(location[-1]), _keys(recipe_type(), self._tree, location[:-1])
                advice = self._nested(word, location[:-1], known) or nearest(word, known)
                return str(self.error(f'there is no key "{word}" here{advice}', *location))
            case "union_tag_invalid":
                words = [word.strip(" '") for word in found["ctx"]["expected_tags"].split(",")]
                return str(self.error(f'there is no "{found["ctx"]["tag"]}"{nearest(found["ctx"]["tag"], words)}', *location))
            case "literal_error":
                words = [word.strip(" '") for word in found["ctx"]["expected"].replace(" or ", ",").split(",")]
                return str(
                    self.error(f'"{found["input"]}" is not one of the values{nearest(str(found["input"]), words)}', *location)
                )
            case "union_tag_not_found":
                return str(self.error('the key "kind" is missing: it says which one is meant', *location))
            case "missing":
                return str(self.error(f'the key "{found["loc"][-1]}" is missing', *location))
            case "model_type" | "model_attributes_type" | "dict_type":
                known = _keys(recipe_type(), self._tree, location)
                what = "a list" if isinstance(found["input"], list) else f"{found['input']!r}"
                return str(self.error(f"keys are expected below this one, found {what}{nearest('', known)}", *location))
            case "string_type" if isinstance(found["input"], bool):
                # YAML 1.1 reads these words as true and false.
                return str(self.error('yes, no, on, off, true and false are no text in YAML; put them in quotes: "yes"', *location))
            case "float_type" | "int_type" if isinstance(found["input"], str):
                short = re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", found["input"])
                advice = " (YAML reads 2e-4 as text: write 2.0e-4)" if short else ""
                return str(self.error(f'expected a number, found the text "{found["input"]}"{advice}', *location))
            case "value_error":
                return str(self.error(str(found["ctx"]["error"]), *location))
        value = found["input"] if isinstance(found["input"], str | int | float | bool | None) else type(found["input"]).__name__
        return str(self.error(f"{found['msg'][:1].lower()}{found['msg'][1:]}, found {value!r}", *location))


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe at `path` with `--set key.path=value` overrides applied. Raises RecipeError, one line for each complaint."""
    tree, places = _read(path, ())
    for override in overrides or []:
        _override(tree, places, override)
    return Recipe(path, tree, places)


def rows_only(source: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe that reads the rows of a file, folder, pattern or URL and does nothing with them."""
    tree: dict[str, Any] = {"data": {"train": source}, "stages": [{"tokenizer": {}}]}
    for override in overrides or []:
        _override(tree, {}, override)
    return Recipe(Path(source), tree, {})


def json_schema() -> str:
    """The JSON Schema of recipes, for an editor to complete and check them."""
    schema = recipe_type().model_json_schema()
    # A child takes from its parent what it does not say itself.
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return json.dumps(schema, indent=1)


def _read(path: Path, children: tuple[Path, ...]) -> tuple[Any, dict[Location, str]]:
    if path.resolve() in children:
        raise RecipeError(f"{path}: extends itself by way of {children[-1]}")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        places = {}
        tree: Any = {}
        if isinstance(node, yaml.MappingNode):
            for location, each, value in _walk(node, (), path):
                places[location] = f"{path}:{each.start_mark.line + 1}"
                tree = value if location == () else tree
    except FileNotFoundError:
        known = [str(each) for each in path.parent.glob("*.yaml")]
        raise RecipeError(f"there is no recipe {path}{nearest(str(path), known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {problem}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply, or an alias that contains itself") from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}:1: a recipe is a mapping that begins with keys such as model, data and stages")
    _anchor(tree, path.parent)
    parent = tree.get("extends")
    if isinstance(parent, str):
        if not (path.parent / parent).is_file():
            known = [each.name for each in path.parent.glob("*.yaml") if each != path]
            raise RecipeError(f'{places[("extends",)]}: extends: there is no recipe "{parent}" beside it{nearest(parent, known)}')
        base_tree, base_places = _read(path.parent / parent, (*children, path.resolve()))
        tree, places = _merge(base_tree, tree), {**_kept(base_places, tree), **places}
    return tree, places


def _walk(node: yaml.Node, location: Location, path: Path) -> Iterator[tuple[Location, yaml.Node, Any]]:
    """Every value with its place, innermost first; a mapping's keys give the place, so that a line names the key."""
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise RecipeError(f"{path}:{node.start_mark.line + 1}: {node.tag} is not plain data")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{path}:{key_node.start_mark.line + 1}: a key is a word, not a list or a mapping")
            if key in mapping:
                raise RecipeError(f'{path}:{key_node.start_mark.line + 1}: the key "{key}" is there twice')
            for inner, each, value in _walk(value_node, (*location, key), path):
                yield inner, (key_node if inner == (*location, key) else each), value
                if inner == (*location, key):
                    mapping[key] = value
        yield location, node, mapping
    elif isinstance(node, yaml.SequenceNode):
        items: list[Any] = []
        for index, item in enumerate(node.value):
            for inner, each, value in _walk(item, (*location, index), path):
                yield inner, each, value
                if inner == (*location, index):
                    items.append(value)
        yield location, node, items
    else:
        try:
            value = SafeConstructor().construct_object(node)
        except (yaml.YAMLError, ValueError):
            raise RecipeError(f'{path}:{node.start_mark.line + 1}: "{node.value}" is not a value of its kind') from None
        yield location, node, value


def _anchor(tree: dict[str, Any], folder: Path) -> None:
    """Make the paths in a recipe independent of where the command is run."""
    data: dict[str, Any] = tree["data"] if isinstance(tree.get("data"), dict) else {}
    for key in ("train", "heldout", "test", "made_by"):
        several = isinstance(data.get(key), list)
        each = [_anchored(value, folder) for value in (data[key] if several else [data.get(key)])]
        if key in data:
            data[key] = each if several else each[0]
    for stage in tree["stages"] if isinstance(tree.get("stages"), list) else []:
        for options in stage.values() if isinstance(stage, dict) else []:
            template = options.get("chat_template") if isinstance(options, dict) else None
            if isinstance(template, str) and template != "chatml":
                options["chat_template"] = str(folder / template)
    launch = tree.get("launch")
    if isinstance(launch, dict) and isinstance(launch.get("deepspeed"), str):
        launch["deepspeed"] = str(folder / launch["deepspeed"])
    model = tree.get("model")
    if isinstance(model, str) and "://" not in model and (model.startswith((".", "/")) or (folder / model).exists()):
        tree["model"] = str(folder / model)


def _anchored(source: Any, folder: Path) -> Any:
    """A path, or a source with one in it, from the recipe's folder on."""
    if isinstance(source, str):
        return source if "://" in source else str(folder / source)
    if isinstance(source, dict):
        here = {key: _anchored(source[key], folder) for key in ("path", "function") if isinstance(source.get(key), str)}
        if isinstance(source.get("hub"), str) and source["hub"].startswith("."):
            here["hub"] = str(folder / source["hub"])
        return {**source, **here}
    return source


def _merge(parent: Any, child: Any) -> Any:
    if isinstance(parent, dict) and isinstance(child, dict):
        return {
            key: _merge(parent[key], child[key]) if key in parent and key in child else child.get(key, parent.get(key))
            for key in {**parent, **child}
        }
    return child


def _kept(places: dict[Location, str], child: Any) -> dict[Location, str]:
    """The parent's places without those inside a list or value that the child replaces whole."""

    def replaced(location: Location) -> bool:
        tree = child
        for part in location:
            if not isinstance(tree, dict):
                return True
            if part not in tree:
                return False
            tree = tree[part]
        return False

    return {location: place for location, place in places.items() if not replaced(location)}


def _override(root: Any, places: dict[Location, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f'--set {override}: expected KEY=VALUE, such as "stages.0.tune.steps=50"')
    if key.split(".")[0] == "extends":
        raise RecipeError("--set extends: has no effect here; write it into the recipe")
    location = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"--set {override[:80]}: the value is not YAML") from None
    tree: Any = root
    part: Any
    for depth, part in enumerate(location):
        last = depth == len(location) - 1
        if isinstance(tree, list) and (not isinstance(part, int) or part >= len(tree)):
            raise RecipeError(f'--set {override}: "{part}" is not one of the {len(tree)} entries, counted from 0')
        if not isinstance(tree, dict | list):
            raise RecipeError(f'--set {override}: "{location[depth - 1]}" holds a single value, so it has no "{part}" in it')
        if last:
            tree[part] = value
        else:
            if isinstance(tree, dict) and tree.get(part) is None:
                tree[part] = {}
            elif isinstance(tree, dict) and isinstance(tree[part], str):
                tree[part] = {"kind": tree[part]}  # the short form, `task: sft`
            tree = tree[part]
    for inside in [place for place in places if place[: len(location)] == location]:
        del places[inside]
    places[location] = f"--set {key}"


def _written(tree: Any, location: Location) -> Location:
    """The location as the user wrote it: pydantic adds the chosen `kind` to it, which is no key."""
    kept: Location = ()
    for part in location:
        inside = (isinstance(tree, dict) and part in tree) or (
            isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        )
        if inside:
            tree, kept = tree[part], (*kept, part)
    return kept


def _keys(kind: Any, tree: Any, location: Location) -> set[str]:
    """The keys that may stand at `location`, found by walking down the types."""
    for part in (*location, None):
        kind = _member(kind, tree)
        if part is None:
            break
        tree = tree[part]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        else:
            kind = typing.get_args(kind)[-1]
    return set(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else set()


def _member(kind: Any, tree: Any) -> Any:
    """Of a union, the type that the value at hand is meant to be: the one whose `kind` it has, else the first that is no None."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is list and isinstance(tree, dict):
        return _member(typing.get_args(kind)[0], tree)  # one source where several may stand
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    members = [_member(each, tree) for each in typing.get_args(kind) if each is not type(None)]
    named = tree.get("kind") if isinstance(tree, dict) else None
    for each in members:
        if isinstance(each, type) and issubclass(each, BaseModel) and "kind" in each.model_fields:
            default = each.model_fields["kind"].default
            if default == named:
                return each
    return members[0]
