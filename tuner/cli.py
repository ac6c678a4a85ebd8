"""The commands. Everything heavy is imported where it is used, so that `tuner --help` answers at once."""

import json
import os
import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tuner.errors import DataError, GateError, Interrupted, TunerError, visible
from tuner.memory import COMPILED, SPIN, large_apart

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From your own data to an OpenAI-compatible endpoint that provably serves what was trained.",
)

# typer carries click inside and exports only some of its errors; a wrong option is one of this class.
USAGE_ERROR: type[Any] = typer.BadParameter.__bases__[0]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"tuner {version('tuner')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """From your own data to an OpenAI-compatible endpoint that provably serves what was trained."""


RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key: stages.0.tune.steps=50. Can be repeated; paths are relative to where you are."),
]
State = Annotated[Path | None, typer.Option(help="The folder of the endpoint's state; $TUNER_STATE or runs/serve by default.")]
Url = Annotated[str | None, typer.Option(help="An endpoint elsewhere, with its admin key in TUNER_ADMIN_KEY.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where results go; runs/RECIPE by default.")]


@app.command()
def new(
    data: Annotated[str, typer.Option(help="A file, folder, pattern or URL of rows.")],
    base: Annotated[str, typer.Option(help="The model: a hub id, a directory, a bundle, a .gguf file, or pkg://MODULE/PATH.")],
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    columns: Annotated[
        list[str] | None, typer.Option("--map", help="What your columns are called: text=review. Can be repeated.")
    ] = None,
) -> None:
    """Look at rows, a model and this machine, and write a commented recipe that passes `tuner check`."""
    from tuner.new import new as write_recipe

    pairs = [each.partition("=")[::2] for each in columns or []]
    named = dict(pairs)
    if len(named) < len(pairs):
        raise typer.BadParameter("--map names one key twice")
    if not all(named.values()):
        raise typer.BadParameter("--map is KEY=COLUMN, such as text=review")
    # Columns of CoNLL files have numbers.
    for line in write_recipe(data, base, out, {key: int(each) if each.isdecimal() else each for key, each in named.items()}):
        print(line)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, out: Out = None) -> None:
    """Say whether a recipe will work, without loading a weight."""
    from tuner.data.shapes import told as shapes_told

    plan, out_dir = _plan(recipe, overrides, out)
    if plan.facts.parameters:
        source = plan.recipe.model or "a new model"
        print(f"model:   {source} ({plan.facts.model_type}, about {plan.facts.parameters / 1e6:.0f}M parameters)")
    else:
        print("model:   none: only a tokenizer is trained")
    for name, count in plan.data.rows.items():
        skipped = plan.data.skipped[name]
        first = " (the first; the run reads all)" if name in plan.data.more else ""
        left_out = f", {skipped} are left out" if skipped else ""
        print(f"data:    {count} {name} rows can be read{left_out}{first}: {shapes_told(plan.data.shapes[name])}")
    print("         how long they are in tokens is looked at by `tuner data` and by the run")
    for remark in plan.remarks():
        print(f"note:    {remark}")
    print(f"stages:  {' -> '.join([plan.steps[0].takes, *(f'{step.name} -> {step.gives}' for step in plan.steps)])}")
    print(f"serving: {plan.serving()}")
    print(f"needs:   about {plan.disk_bytes() / 1e9:.1f} GB of disk", flush=True)
    # Last, since it takes a few seconds: torch, and the model without its weights.
    from tuner.needs import needs

    if any(step.trains for step in plan.steps):
        from tuner.memory import room

        for line in [need.told() for need in needs(plan, out_dir)] or [
            "the memory that training takes is told by the run: there is no tokenizer, or no row that can be used, yet"
        ]:
            print(f"         {line}")
        free, where = room()
        print(f"         {free / 1e9:.1f} GB are left of {where}")


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, out: Out = None) -> None:
    """Run a recipe: every stage that is not finished yet, each result measured."""
    from tuner.report import rows, table, write_report
    from tuner.run import run as run_plan

    plan, out_dir = _plan(recipe, overrides, out)
    _in_processes(plan)
    bundles = run_plan(plan, out_dir)
    report = write_report(bundles, out_dir)
    _print_table(table, rows(bundles, out_dir), plan.recipe.name)
    print(f"{bundles[-1].path}  ({report})")


@app.command()
def launch(
    recipe: RecipePath,
    on: Annotated[str, typer.Option(help="slurm, kubernetes or ray.")],
    overrides: Overrides = None,
    out: Out = None,
    gpus: Annotated[bool, typer.Option("--gpus", help="Ask for a GPU for each process.")] = False,
    cpus: Annotated[int, typer.Option(min=1, help="Cores to ask for, for each process.")] = 8,
    image: Annotated[str | None, typer.Option(help="Of the container; tuner:train-cpu, or tuner:train-cuda with --gpus.")] = None,
    to: Annotated[Path | None, typer.Option(help="The file to write; RECIPE.ENGINE.sh or .yaml here by default.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it in, too.")] = False,
) -> None:
    """Write what runs the recipe on a cluster: on `launch.nodes` machines with `launch.processes` each."""
    from tuner.launch import write

    plan, out_dir = _plan(recipe, overrides, out)
    path, command = write(plan.recipe, overrides or [], out_dir, on=on, gpus=gpus, cpus=cpus, image=image, to=to)
    print(path)
    if submit:
        from tuner.launch import hand_in

        hand_in(command)
        return
    print(f"hand it in with: {' '.join(command)}")


@app.command()
def prove(recipe: RecipePath, overrides: Overrides = None, out: Out = None) -> None:
    """Run what is not finished, serve the last bundle, ask it the held-out questions, compare, shut down."""
    from tuner.progress import say, timed
    from tuner.prove import prove as prove_served
    from tuner.report import rows, table, write_report
    from tuner.run import run as run_plan

    plan, out_dir = _plan(recipe, overrides, out)
    if why := plan.not_served():
        raise plan.recipe.error(f"nothing to serve and prove at its end: {why}", "stages")
    _in_processes(plan)
    bundles = run_plan(plan, out_dir)

    from serve.endpoint import Settings, serving
    from serve.engine import Care

    settings = Settings(port=0, care=Care(max_tokens=plan.served_tokens()))
    try:
        with ExitStack() as endpoint:
            with timed("starting the endpoint"):
                url = endpoint.enter_context(serving([bundles[-1].path], settings, say))
            prove_served(plan.recipe, bundles, url, out_dir)
    finally:
        write_report(bundles, out_dir)
    _print_table(table, rows(bundles, out_dir), plan.recipe.name)


@app.command()
def data(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a file, folder, pattern or URL of rows.")],
    overrides: Overrides = None,
    out: Out = None,
    rows: Annotated[int, typer.Option(min=0, help="Examples to show.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Write it as a page, too, with 20 examples or more.")] = None,
) -> None:
    """Show rows as the model reads them, what is learned in colour, how long they are, and what is wrong with the data."""
    from tuner.data.page import PAGE_EXAMPLES, page
    from tuner.data.quality import examine
    from tuner.data.show import pictured, show
    from tuner.plan import check_by_shape, checker
    from tuner.recipe import rows_only
    from tuner.run import tokenizer_now

    examples = max(rows, PAGE_EXAMPLES) if html else rows
    if recipe.endswith((".yaml", ".yml")):
        plan, out_dir = _plan(Path(recipe), overrides, out)
        read, check = plan.recipe, checker(plan.recipe, plan.facts)
        tokenizer, remark = tokenizer_now(plan, out_dir)
        tasks = pictured(plan, tokenizer, examples) if tokenizer else []
    else:
        # Without a recipe all that is wrong is said, and nothing stops at the first.
        read, check = rows_only(recipe, ["data.on_bad_row=skip", *(overrides or [])]), check_by_shape
        tokenizer, tasks, remark = None, [], ""
    quality = examine(read, check, tokenizer.all_special_tokens if tokenizer else ())
    show([replace(task, examples=task.examples[:rows]) for task in tasks], quality, remark)
    if html:
        try:
            html.write_text(page(recipe, tasks, quality, remark), encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"{html}: nothing can be written there: {error.strerror}") from None
        print(html)
    if not quality.rows["train"]:
        raise DataError(f"{recipe}: none of its rows can be used")


@app.command()
def tokens(
    tokenizers: Annotated[
        list[str],
        typer.Argument(metavar="TOKENIZER...", help="Models or tokenizers: a hub id, directory, bundle, .gguf, pkg://..."),
    ],
    data: Annotated[str | None, typer.Option(help="Rows to count on: a file, folder, pattern or URL.")] = None,
    by: Annotated[str | None, typer.Option(help="A key of the rows, such as language: one line for each of its values.")] = None,
    only: Annotated[str | None, typer.Option(help="With --by: these groups alone, such as eng,deu_1996,hin.")] = None,
    text: Annotated[str | None, typer.Option(help="A text to show in its tokens.")] = None,
    top: Annotated[int, typer.Option(min=1, help="With --by: so many groups, the largest first.")] = 30,
    list_to: Annotated[
        Path | None, typer.Option("--list", help="With --data: write every unused or untrained entry there, as JSON lines.")
    ] = None,
) -> None:
    """Compare tokenizers: tokens a word, bytes a token, what is lost, what is never used; or look at a text."""
    from tuner.show import show_tokens

    if text and not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise typer.BadParameter("--text is not UTF-8")
    if not data and text is None:
        raise typer.BadParameter("give --data FILE, --text TEXT, or both")
    if list_to and not data:
        raise typer.BadParameter("--list is of the entries that --data does not use")
    if only and not by:
        raise typer.BadParameter("--only names values of the key that --by names")
    show_tokens(
        tokenizers, data, text, by=by, only=[each.strip() for each in only.split(",")] if only else None, top=top, list_to=list_to
    )


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle, such as runs/demo/merge.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole manifest.")] = False,
    verify: Annotated[bool, typer.Option(help="Hash every file again.")] = False,
) -> None:
    """Show what a bundle is, what it was made from, and what was measured."""
    from tuner.bundle import open_bundle
    from tuner.bundle import verify as verify_bundle
    from tuner.show import show_bundle

    bundle = open_bundle(folder)
    if verify:
        verify_bundle(bundle)
        print(f"verified: {len(bundle.manifest.files)} files have the sha256 that {folder / 'bundle.json'} says", file=sys.stderr)
    show_bundle(bundle, as_json=as_json)


@app.command()
def schema() -> None:
    """Write the JSON Schema of recipes, for an editor to complete and check them."""
    from tuner.recipe import json_schema

    print(json_schema())


@app.command()
def serve(
    targets: Annotated[list[Path], typer.Argument(metavar="DEPLOY.yaml|DIR...", help="A deployment, or bundles by themselves.")],
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="8000 by default; 0 takes a free one.")] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on, 127.0.0.1 by default; any other wants a key.")] = None,
    state: State = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt and answer together; the recipe's by default.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients put into `model`; for a single DIR.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm or transformers; vllm where it can serve the bundle.")] = None,
    keys: Annotated[Path | None, typer.Option(help="Keys that `tuner keys create --file` made, beside those of the state.")] = None,
) -> None:
    """Serve bundles as an OpenAI-compatible endpoint, once they answer their probes as they were trained to."""
    from serve.cli import serve as serve_bundles

    serve_bundles(targets, name=name, state=state, max_tokens=max_tokens, port=port, host=host, engine=engine, keys=keys)


@app.command()
def deploy(
    name: Annotated[str, typer.Argument(help="What clients put into `model`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle that is to answer for it.")],
    weight: Annotated[int, typer.Option(min=0, max=100, help="Percent of the requests; below 100 it is tried out.")] = 100,
    shadow: Annotated[bool, typer.Option(help="Ask it, too, compare, and never return what it says.")] = False,
    state: State = None,
    url: Url = None,
) -> None:
    """Bring a bundle up in a running endpoint, prove it, and lead a name to it; nothing stops meanwhile."""
    from serve.cli import order

    path = str(folder if url else folder.resolve())
    done = order("/admin/deployments", state, url, name=name, bundle=path, weight=weight, shadow=shadow)
    print(f"{name}: {done['version']} {'is tried out' if shadow or weight < 100 else 'answers'}")


@app.command()
def promote(
    name: Annotated[str, typer.Argument()],
    weight: Annotated[int, typer.Option(min=0, max=100, help="Percent of the requests; 100 gives it the name.")] = 100,
    state: State = None,
    url: Url = None,
) -> None:
    """Give the version that is tried out more of the requests, or the name."""
    from serve.cli import order

    done = order("/admin/promote", state, url, name=name, weight=weight)
    print(f"{name}: {done['version']} answers {weight}% of the requests")


@app.command()
def rollback(name: Annotated[str, typer.Argument()], state: State = None, url: Url = None) -> None:
    """End what is tried out, or lead a name to what it led to before."""
    from serve.cli import order

    print(f"{name}: {order('/admin/rollback', state, url, name=name)['version']} answers")


@app.command()
def remove(name: Annotated[str, typer.Argument()], state: State = None, url: Url = None) -> None:
    """End a name of a running endpoint."""
    from serve.cli import order

    order("/admin/remove", state, url, name=name)
    print(f"{name}: ended")


@app.command()
def deployments(
    state: State = None, url: Url = None, as_json: Annotated[bool, typer.Option("--json", help="All that is known.")] = False
) -> None:
    """Show what a running endpoint serves, and how deployments went."""
    from serve.cli import order, show_deployments

    told = order("/admin/deployments", state, url)
    print(json.dumps(told, indent=1)) if as_json else show_deployments(told)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle that should be served.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Any server that speaks OpenAI's API.")],
    model: Annotated[str | None, typer.Option(help="Its name for the model; where it has one only, that.")] = None,
    dtype: Annotated[str, typer.Option(help="What it computes in: float32, float16 or bfloat16.")] = "bfloat16",
) -> None:
    """Ask a server the bundle's probe: exit code 1 where it serves something else. The key is taken from OPENAI_API_KEY."""
    from serve.verify import verify_served

    name, proof, lacking = verify_served(folder, url, model=model, key=os.environ.get("OPENAI_API_KEY"), dtype=dtype)
    print(
        f"{name} at {url} serves {folder}: {proof.agreement:.1%} of {proof.answers} answers the same, {proof.what} "
        f"{proof.mean_difference:.5f} apart, {proof.tolerance:.3f} allowed{f'; {lacking}' if lacking else ''}"
    )


keys = typer.Typer(no_args_is_help=True, help="Who may ask an endpoint what.")
app.add_typer(keys, name="keys")


@keys.command("create")
def create_key(
    models: Annotated[str, typer.Option(help="The names it may ask, such as support,intent; '*' for all.")] = "",
    label: Annotated[str, typer.Option(help="Whose it is.")] = "",
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens a minute, read and written.")] = None,
    expires: Annotated[str | None, typer.Option(help="A time from now, such as 30d or 12h.")] = None,
    admin: Annotated[bool, typer.Option(help="It may deploy, promote and roll back.")] = False,
    metrics: Annotated[bool, typer.Option(help="It may read /metrics.")] = False,
    state: State = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Add its hash to this file instead, for `serve --keys FILE`; without its line it ends."),
    ] = None,
) -> None:
    """Make a key and show it, once. As soon as there is one, nobody without one is answered."""
    from serve.cli import create_key as create

    names = [each.strip() for each in models.split(",") if each.strip()] + ["/metrics"] * metrics
    print(create(state, file, models=names, label=label, rpm=rpm, tpm=tpm, expires=expires, admin=admin))


@keys.command("list")
def list_keys(state: State = None) -> None:
    """Show every key but for its secret."""
    from serve.cli import list_keys as show_keys

    show_keys(state)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `tuner keys list` shows it.")], state: State = None
) -> None:
    """End a key."""
    from serve.cli import revoke_key as revoke

    revoke(state, key_id)
    print(f"{key_id}: revoked")


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="DIR|URL", help="A bundle to serve and talk to, or a running endpoint.")],
    system: Annotated[str | None, typer.Option(help="The system message to begin with.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of an endpoint's models; its first by default.")] = None,
) -> None:
    """Talk to a bundle or an endpoint."""
    from serve.cli import chat as chat_with

    chat_with(target, system, model)


def _plan(recipe: Path, overrides: list[str] | None, out: Path | None) -> tuple[Any, Path]:
    """The plan, and the directory for its results."""
    from tuner.plan import make_plan
    from tuner.recipe import read_recipe

    read = read_recipe(recipe, overrides)
    out_dir = out or Path("runs") / read.name
    return make_plan(read, out_dir), out_dir


def _in_processes(plan: Any) -> None:
    """Return in the process that is the run: the only one, or the first of those that the recipe's `launch` asks for."""
    from tuner import processes

    if processes.started() and processes.number() != plan.recipe.launch.total:
        message = f"WORLD_SIZE is {processes.number()}, and the recipe's `launch` makes it {plan.recipe.launch.total}"
        raise plan.recipe.error(f"{message}: let `tuner run` start its processes itself", "launch")
    if plan.recipe.launch.total > 1 and not processes.started():
        if plan.recipe.launch.nodes > 1 and not plan.recipe.launch.address:
            message = "several nodes need the address of node 0, such as 10.0.0.1:29500; on a cluster `tuner launch` finds it"
            raise plan.recipe.error(message, "launch")
        sys.exit(processes.start(plan.recipe.launch, sys.argv[1:]))
    if processes.started():
        processes.join()
    if not processes.first():
        processes.follow(plan)
        sys.exit(0)


def _print_table(table: Any, found: list[dict[str, str]], title: str) -> None:
    from rich.console import Console

    if found:
        console = Console()
        Console(width=max(console.width, 120)).print(table(found, title)) if not console.is_terminal else console.print(
            table(found, title)
        )


def _interrupt(number: int, frame: Any) -> None:  # noqa: ARG001 - the signature is Python's
    raise KeyboardInterrupt


def _uninterrupted() -> None:
    """A process that was forked, such as of a pool of the user's own, ends by SIGTERM as others do."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2, a bug keeps its traceback and exit code 1."""
    # Threads that spin as long as they wait make a busy machine several times slower. torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Large tensors in pages of 2 MB instead of 4 KB: a training step of Mamba-2 spent two thirds of its time on the small ones.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    chosen = COMPILED if os.environ["OMP_WAIT_POLICY"].lower() != "passive" else COMPILED | SPIN  # somebody else's choice stays
    for name, count in chosen.items():
        os.environ.setdefault(name, count)
    with suppress(AttributeError):
        large_apart()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars, which would fill a log; read when tqdm is imported
    signal.signal(signal.SIGTERM, _interrupt)
    os.register_at_fork(after_in_child=_uninterrupted)
    try:
        sys.exit(app(standalone_mode=False))
    except TunerError as error:
        # What all of several processes meet the first of them says.
        if not (isinstance(error, Interrupted | GateError | DataError) and int(os.environ.get("RANK", "0"))):
            print(f"tuner: {visible(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (MemoryError, OSError, RuntimeError) as error:
        from tuner.memory import ran_out, room
        from tuner.processes import lost

        if lost(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which is on its way from whoever started both
            print("tuner: another process of this run is gone", file=sys.stderr)
            sys.exit(1)
        if not ran_out(error):
            raise
        free, where = room()
        print(
            f"tuner: memory ran out, {max(free, 0) / 1e9:.2f} GB are left of {where}; what is finished is kept, and the same "
            "command continues where there is more (`tuner check` tells how much)",
            file=sys.stderr,
        )
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        continues = sys.argv[1:2] in (["run"], ["prove"])
        print(
            f"tuner: interrupted{'; finished stages are kept, and the same command continues' if continues else ''}",
            file=sys.stderr,
        )
        sys.exit(130)
    except USAGE_ERROR as error:
        error.show()
        sys.exit(2)
