"""Several processes train as one: the same weights, whoever dies, however many go on, on one machine or on two."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import command, tuner, write_rows
from tuner.errors import RecipeError
from tuner.plan import make_plan
from tuner.recipe import read_recipe

ROOT = Path(__file__).parents[2]
LORA = {"kind": "lora", "rank": 4, "storage": "fp32"}
# Each process has several micro-batches, and its block is computed twice.
FLOAT32 = {"micro_batch_size": 2, "gradient_checkpointing": True}
BFLOAT16 = {"method": {**LORA, "storage": "bf16"}, **FLOAT32}
MIXED = {"method": {"kind": "full", "precision": "bf16"}, "learning_rate": 1e-3}
FULL, QLORA = {"method": "full", "learning_rate": 1e-3}, {"method": {**LORA, "storage": "nf4"}}


def of(**tune: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the recipe: its stage, with dropout nowhere, since that is drawn anew for each share of a step."""

    def change(tree: dict[str, Any]) -> None:
        tree["stages"][0]["tune"] |= {"method": LORA, "batch_size": 8, "steps": 6, **tune}

    return change


def run(recipe: Path, out: Path, **launch: Any) -> subprocess.CompletedProcess[str]:
    return tuner("run", recipe, "--out", out, *settings(launch))


def settings(launch: dict[str, Any]) -> list[str]:
    return [each for name, value in launch.items() for each in ("--set", f"launch.{name}={value}")]


def zero(stage: int) -> str:
    """DeepSpeed's configuration, as people have it for transformers' Trainer."""
    split = {"stage3_param_persistence_threshold": 0} if stage == 3 else {"reduce_bucket_size": "auto"}  # the small ones, too
    half = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000}
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
    rest = {"gradient_clipping": "auto", "train_batch_size": "auto", "fp16": half, "optimizer": optimizer, "steps_per_print": 2000}
    return json.dumps({"zero_optimization": {"stage": stage, **split}, **rest})


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes that a test starts."""
    folder = ROOT / ".cache/deepspeed"
    if not folder.is_dir():
        pytest.skip("there is no DeepSpeed: `make deepspeed`")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def weights(out: Path, name: str = "adapter_model") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(out / f"tune/{name}.safetensors")


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any weight."""
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def recipe(recipe_file: Callable[..., Path]) -> Path:
    return recipe_file(of())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tune", "name"),
    [
        pytest.param({}, "adapter_model", id="lora"),
        pytest.param(FULL, "model", id="full"),
        pytest.param(MIXED, "model", id="full, mixed precision"),
        pytest.param(QLORA, "adapter_model", id="qlora"),
    ],
)
def test_two_processes_end_at_the_weights_of_one(
    recipe_file: Callable[..., Path], tmp_path: Path, tune: dict[str, Any], name: str
) -> None:
    ends_alike(recipe_file(of(**tune)), tmp_path, name, {"ddp": {}, "fsdp": {"strategy": "fsdp"}})


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(
    ("tune", "name", "stages"),
    [
        (FLOAT32, "adapter_model", (3,)),
        (BFLOAT16, "adapter_model", (1, 2, 3)),
        (FULL, "model", (2, 3)),
        (QLORA, "adapter_model", (2,)),
    ],
)
def test_deepspeed_ends_at_the_weights_of_one_process(
    recipe_file: Callable[..., Path], tmp_path: Path, tune: dict[str, Any], name: str, stages: tuple[int, ...]
) -> None:
    ways = {f"zero-{stage}": {"strategy": "deepspeed", "deepspeed": zero(stage)} for stage in stages}
    ends_alike(recipe_file(of(**tune)), tmp_path, name, ways)


def ends_alike(path: Path, folder: Path, name: str, ways: dict[str, dict[str, Any]]) -> None:
    """Two processes, in all of these ways, end at the weights of one."""
    for way, launch in {"one": {}, **{way: {"processes": 2, **launch} for way, launch in ways.items()}}.items():
        done = run(path, folder / way, **launch)
        assert done.returncode == 0, done.stderr
        # What there is to say is said once.
        assert len(re.findall("parameters are trained", done.stderr)) == 1
    # Six steps of Adam at 0.01 move a weight by up to 0.06; in float32 sums in another order are off in the last digits, which Adam
    # makes larger where a gradient is almost nothing. Where products are in bfloat16 their rounding decides the sign of such a
    # gradient, and with it a whole step of the weight: a few weights are apart, and on average it is a tenth of a step at most.
    short = any(each in path.read_text() for each in ("nf4", "storage: bf16", "precision: bf16"))
    step = 1e-3 if name == "model" else 1e-2
    one, loss = weights(folder / "one", name), heldout_loss(folder / "one")
    for way in ways:
        other = weights(folder / way, name)
        if short:
            assert set(one) == set(other)
            mean = sum(float((one[each] - other[each]).abs().sum()) for each in one) / sum(each.numel() for each in one.values())
            assert mean < step / 10, way
        else:
            assert apart(one, other) < 1e-3, way
        assert heldout_loss(folder / way) == pytest.approx(loss, abs=2e-3), way


def heldout_loss(out: Path) -> float:
    return float(json.loads((out / "tune/bundle.json").read_text())["metrics"]["heldout_loss"])


def worker_of(agent: int, rank: int) -> int:
    """The process id of one of those that an agent started."""
    import psutil

    for child in psutil.Process(agent).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return int(child.pid)
    raise LookupError(rank)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero-2", "zero-3"])
def test_a_killed_worker_ends_the_run_and_the_resume_is_exact_with_any_number_of_processes(
    recipe_file: Callable[..., Path], tmp_path: Path, strategy: str, request: pytest.FixtureRequest
) -> None:
    launch: dict[str, Any] = {"processes": 2, "strategy": strategy}
    if strategy.startswith("zero"):
        request.getfixturevalue("deepspeed")
        launch |= {"strategy": "deepspeed", "deepspeed": zero(int(strategy[-1]))}
    if strategy == "zero-3":
        launch |= {"processes": 3}  # among which no matrix is divided without a rest
    path = recipe_file(of(steps=60))
    whole = run(path, tmp_path / "whole", **launch)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    started = subprocess.Popen(
        command("run", path, "--out", out, *settings(launch)), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 120
    while not list(out.glob(".*.work/step-*")):
        assert started.poll() is None and time.monotonic() < until, started.stderr
        time.sleep(0.05)
    os.kill(worker_of(started.pid, 1), signal.SIGKILL)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 1
    assert "process 1 was ended by SIGKILL, and so were the others; the same command continues" in said
    assert "Traceback" not in said, said
    shutil.copytree(out, tmp_path / "alone", symlinks=True)
    resumed = run(path, out, **launch)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing at step" in resumed.stderr
    file = "tune/adapter_model.safetensors"
    assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    alone = run(path, tmp_path / "alone")
    assert alone.returncode == 0 and "continuing at step" in alone.stderr, alone.stderr
    assert apart(weights(tmp_path / "alone"), weights(out)) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_of_two_processes_is_gone_on_with_by_one(
    recipe_file: Callable[..., Path], tmp_path: Path, how: signal.Signals
) -> None:
    out, path = tmp_path / "out", recipe_file(of(steps=40))
    started = subprocess.Popen(
        command("run", path, "--out", out, "--set", "launch.processes=2"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(out.glob(".*.work/step-*")):
        assert started.poll() is None
        time.sleep(0.05)
    # As Ctrl-C and a scheduler do: both end their step.
    started.send_signal(how)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130 and "Traceback" not in said, said
    assert said.count("tuner: stopped at step") == 1
    alone = run(path, out)
    assert alone.returncode == 0, alone.stderr
    assert "continuing at step" in alone.stderr
    whole = run(path, tmp_path / "whole")
    assert whole.returncode == 0
    assert apart(weights(out), weights(tmp_path / "whole")) < 5e-3


def test_what_cannot_be_launched_is_said(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file(of(watch={"every_steps": 2}))
    split = {"processes": 2, "strategy": "deepspeed"}
    for launch, said in (
        ({"nodes": 2, "address": "here"}, "address here is not HOST:PORT, such as 10.0.0.1:29500"),
        ({"nodes": 2, "address": '"::1"'}, "address ::1 is not HOST:PORT"),  # what connects them knows no IPv6
        ({"nodes": 2, "node": 2, "address": "127.0.0.1:29500"}, "node 2 of 2: they are counted from 0"),
        ({"processes": 0}, "greater than 0"),
        ({"processes": 9}, "9 processes share a step of 8 rows, so some would have none"),
        ({"processes": 2, "strategy": "zero"}, "ddp"),
        ({"processes": 2, "deepspeed": "{}"}, "`deepspeed` is for strategy: deepspeed, and this is ddp"),
        ({**split, "deepspeed": "none.json"}, "none.json: No such file"),
        ({**split, "deepspeed": '{"zero_optimization": {"stage": 0}}'}, "stage is 0, and 1, 2 and 3 split something; use ddp"),
        ({**split, "deepspeed": '{"train_batch_size": 8}'}, '"train_batch_size" is for the recipe to say (tune.batch_size)'),
        (
            split,
            "tune.watch: with launch.strategy: deepspeed this does"
            if find_spec("deepspeed")
            else "deepspeed needs a package that is not there",
        ),
        ({"strategy": "deepspeed"}, "splits among processes, and there is one"),
        ({**split, "deepspeed": '{"zero_optimisation": {"stage": 3}}'}, 'did you mean "zero_optimization"?'),
        ({**split, "deepspeed": '{"fp16": {"enabled": true}}'}, '"fp16" is for the recipe to say (tune.method.storage)'),
        ({**split, "deepspeed": '{"zero_optimization": true}'}, "zero_optimization: found True, expected an object"),
        (
            {"processes": 2, "strategy": "fsdp"},
            "tune.watch: with launch.strategy: fsdp this does not work; ddp measures while it trains",
        ),
    ):
        with pytest.raises(RecipeError) as error:
            make_plan(read_recipe(recipe, settings(launch)[1::2]), tmp_path / "out")
        assert said in str(error.value)


JUDGED = [{"prompt": f"machine {at}?", "completion": "yes", "label": at % 2 == 0} for at in range(24)]
ALIKE = [{"anchor": f"machine {at}", "positive": f"vm {at}"} for at in range(24)]


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(
    ("task", "rows"), [({"kind": "preference", "loss": "kto"}, JUDGED), ({"kind": "embed", "loss": "contrastive"}, ALIKE)]
)
def test_what_has_no_whole_weights_before_a_step_is_refused(
    recipe_file: Callable[..., Path], tmp_path: Path, task: dict[str, Any], rows: list[Any]
) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)

    def change(tree: dict[str, Any]) -> None:
        of(task={**task, "max_tokens": 64})(tree)
        tree["data"] = {"train": "rows.jsonl"}

    recipe = recipe_file(change)
    for stage, code in ((3, 2), (2, 0)):
        launch = {"processes": 2, "strategy": "deepspeed", "deepspeed": zero(stage)}
        done = tuner("check", recipe, *settings(launch))
        assert done.returncode == code, done.stderr
        assert (
            "tune.task: with launch.strategy: deepspeed this does not work; it asks the model before a step" in done.stderr
        ) == (stage == 3)


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
def test_mixed_precision_is_left_to_other_strategies_than_deepspeed(recipe_file: Callable[..., Path]) -> None:
    launch = {"processes": 2, "strategy": "deepspeed", "deepspeed": zero(2)}
    done = tuner("check", recipe_file(of(**MIXED)), *settings(launch))
    assert done.returncode == 2
    assert "tune.method: with launch.strategy: deepspeed this does not work; use ddp or fsdp" in done.stderr


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them."""
    names, made = ["tuner-a", "tuner-b"], []
    steps = [["ip", "netns", "add", name] for name in names]
    steps += [["ip", "link", "add", "tuner0", "netns", names[0], "type", "veth", "peer", "name", "tuner1", "netns", names[1]]]
    for number, name in enumerate(names):
        inside = ["ip", "-n", name]
        steps += [[*inside, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"tuner{number}"]]
        steps += [[*inside, "link", "set", each, "up"] for each in (f"tuner{number}", "lo")]
    try:
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("there is no `ip` (iproute2) to make network namespaces with")
            if done.returncode:
                pytest.skip(f"no network namespaces can be made here: {done.stderr.strip()}")
        made = names
        yield names
    finally:
        for name in made or names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts_train_together(recipe: Path, tmp_path: Path, hosts: list[str]) -> None:
    out, launch = tmp_path / "out", {"nodes": 2, "address": "10.77.0.1:29500"}
    running = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *command("run", recipe, "--out", out, *settings({**launch, "node": number}))],
            stderr=subprocess.PIPE, text=True,
        )
        for number, host in enumerate(hosts)
    ]  # fmt: skip
    said = [each.communicate(timeout=200)[1] for each in running]
    assert [each.returncode for each in running] == [0, 0], said
    assert "1 processes on each of 2 machines, of which this is number 1" in said[1]
    alone = run(recipe, tmp_path / "alone")
    assert alone.returncode == 0
    assert apart(weights(out), weights(tmp_path / "alone")) < 1e-3


@pytest.mark.slow
def test_ray_trains_on_two_workers(recipe: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        script, out = tmp_path / "job.sh", tmp_path / "out"
        done = tuner("launch", recipe, "--on", "ray", "--cpus", "1", "--to", script, "--out", out, "--set", "launch.nodes=2")
        assert done.returncode == 0, done.stderr
        # What `ray job submit` would start on the cluster; that itself wants a dashboard.
        entry = shlex.split(script.read_text().splitlines()[-1])[-3:]
        environment = {"RAY_ADDRESS": cluster.address, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        run_there = subprocess.run(
            entry, capture_output=True, text=True, timeout=400, env={**os.environ, **environment}, check=False
        )
        assert run_there.returncode == 0, run_there.stdout + run_there.stderr
    finally:
        cluster.shutdown()
    alone = run(recipe, tmp_path / "alone")
    assert alone.returncode == 0
    assert apart(weights(out), weights(tmp_path / "alone")) < 1e-3


def preferring(folder: Path, **tune: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the recipe: it learns from pairs of answers."""
    pairs = [{"prompt": f"{n} the vm", "chosen": f" az vm {n}", "rejected": " network"} for n in range(55)]
    write_rows(folder / "pairs.jsonl", pairs[:47])
    write_rows(folder / "pairs-heldout.jsonl", pairs[47:])

    def change(tree: dict[str, Any]) -> None:
        of(task={"kind": "preference", "max_tokens": 64}, **tune)(tree)
        tree["data"] = {"train": "pairs.jsonl", "heldout": "pairs-heldout.jsonl"}
        tree["stages"][0]["tune"]["gate"] = {"heldout_loss_drop": -10.0}

    return change


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "name"), [({}, "adapter_model"), (FULL, "model")])
def test_dpo_shares_what_it_asks_before_training(
    recipe_file: Callable[..., Path], tmp_path: Path, tune: dict[str, Any], name: str
) -> None:
    ways = {"ddp": {}, "fsdp": {"strategy": "fsdp"}}
    ends_alike(recipe_file(preferring(tmp_path, **tune)), tmp_path, name, ways)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kto", "contrastive"])
def test_what_compares_rows_of_a_step_shares_it(recipe_file: Callable[..., Path], tmp_path: Path, what: str) -> None:
    task, rows = {
        "kto": ({"kind": "preference", "loss": "kto"}, JUDGED),
        "contrastive": ({"kind": "embed", "loss": "contrastive"}, ALIKE),
    }[what]
    write_rows(tmp_path / "rows.jsonl", rows[4:])
    write_rows(tmp_path / "held.jsonl", rows[:4])

    def change(tree: dict[str, Any]) -> None:
        of(task={**task, "max_tokens": 64})(tree)
        tree["data"] = {"train": "rows.jsonl", "heldout": "held.jsonl"}
        tree["stages"][0]["tune"]["gate"] = {"heldout_loss_drop": -10.0}
        del tree["serve"]

    ends_alike(recipe_file(change), tmp_path, "adapter_model", {"ddp": {}, "fsdp": {"strategy": "fsdp"}})


@pytest.mark.slow
def test_new_tokens_are_trained_by_two_processes(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        of()(tree)
        tree["stages"].insert(0, {"extend": {"listed": ["machine", "network"]}})
        del tree["serve"]

    ends_alike(recipe_file(change), tmp_path, "adapter_model", {"ddp": {}, "fsdp": {"strategy": "fsdp"}})


@pytest.mark.slow
def test_with_dropout_a_resume_is_exact_and_dpo_and_watching_work_in_two_processes(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe_file(preferring(tmp_path, method={**LORA, "dropout": 0.3}, steps=30, watch={"every_steps": 10}))
    whole = run(path, tmp_path / "whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.count("kept: step") == 1
    out = tmp_path / "out"
    started = subprocess.Popen(
        command("run", path, "--out", out, "--set", "launch.processes=2"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(out.glob(".*.work/step-*")):
        assert started.poll() is None
        time.sleep(0.02)
    os.kill(worker_of(started.pid, 0), signal.SIGKILL)
    started.communicate(timeout=120)
    resumed = run(path, out, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing at step" in resumed.stderr
    assert apart(weights(out), weights(tmp_path / "whole")) == 0.0
    # Of weights that are split, too: the likelihoods before training are computed by all.
    split = run(path, tmp_path / "fsdp", processes=2, strategy="fsdp")
    assert split.returncode == 2 and "watch" in split.stderr
    split = tuner(
        "run",
        path,
        "--out",
        tmp_path / "fsdp",
        *settings({"processes": 2, "strategy": "fsdp"}),
        "--set",
        "stages.0.tune.watch=null",
    )
    assert split.returncode == 0, split.stderr
