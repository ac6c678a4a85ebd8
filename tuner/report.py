"""The table that a run ends with: one row for each hand-over, from the figures in the manifests."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tuner import kinds
from tuner.bundle import Bundle, write_json
from tuner.data.shapes import told as shapes_told
from tuner.errors import BundleError, disk_errors

SERVED = "served.json"
# Scores that are no fraction of something: correlations, and differences in nats.
NUMBERS = ("MCC", "Spearman", "margin")


def result_name(bundle: Bundle) -> str:
    """What a bundle is called in the table: base, tuned, merged, quantized."""
    stage = bundle.manifest.stage
    return stage if stage == "base" else str(kinds.load("stages", stage).RESULT)


def rows(bundles: list[Bundle], out_dir: Path) -> list[dict[str, str]]:
    """One row for each measured bundle, and one for the endpoint where it was asked and serves the last of them."""
    measured = [bundle for bundle in bundles if "probe" in bundle.manifest.metrics]
    # A token of one tokenizer is not a token of another.
    several = (
        len({bundle.manifest.metrics["heldout_tokens"] for bundle in measured if "bits_per_byte" in bundle.manifest.metrics}) > 1
    )
    found = []
    for bundle, following in zip(measured, [*measured, None][1:], strict=True):
        # The model before tuning is asked the tuned model's questions only once those exist.
        asked = following.manifest.metrics.get("base") if following else None
        found.append(
            _row(result_name(bundle), {**bundle.manifest.metrics, **({"probe": asked} if asked else {})}, per_byte=several)
        )
    served = read_served(out_dir)
    if served and bundles and all(served.get(name) == value for name, value in _identity(bundles[-1]).items()):
        found.append(_row("served", served["metrics"], per_byte=several))
    return found


def write_report(bundles: list[Bundle], out_dir: Path) -> Path:
    """Write report.md: the table, and the rows of data that were left out."""
    found = rows(bundles, out_dir)
    lines = []
    if found:
        columns = _columns(found)
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in found]
    for bundle in bundles:
        stage, data = bundle.manifest.stage, bundle.manifest.data
        if said := stage in kinds.names("stages") and getattr(kinds.load("stages", stage), "told", None):
            lines += ["", *said(bundle.manifest.metrics[stage])]
        if data.get("shapes"):
            usable = sum(data["shapes"].values())
            drawn = f", {data['rows']} of them drawn" if data["rows"] != usable else ""
            lines += ["", f"{stage}: {usable} rows of {data['path']}{drawn}: {shapes_told(data['shapes'])}."]
        if data.get("cut_rows"):
            lines += ["", f"{stage}: {data['cut_rows']} of {data['rows']} rows were cut to the longest allowed."]
        if data.get("skipped_rows"):
            lines += ["", f"{stage}: {data['skipped_rows']} rows of {data['path']} were left out, such as:", ""]
            lines += [f"- {reason}" for reason in data["skipped"]]
    heldout = bundles[-1].manifest.metrics.get("heldout_skipped", {"count": 0})
    if heldout.get("cut"):
        lines += ["", f"{heldout['cut']} held-out rows were cut to the longest allowed; an endpoint reads them whole."]
    if heldout["count"]:
        lines += ["", f"{heldout['count']} held-out rows were left out, such as:", "", *(f"- {each}" for each in heldout["listed"])]
    path = out_dir / "report.md"
    with disk_errors(path):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table(found: list[dict[str, str]], title: str) -> Table:
    """The rows for a terminal."""
    columns = _columns(found)
    result = Table(title=Text(title))
    for column in columns:
        result.add_column(Text(column), justify="left" if column == columns[0] else "right")
    for row in found:
        result.add_row(*(Text(row.get(column, "")) for column in columns))
    return result


def write_served(out_dir: Path, bundle: Bundle, metrics: dict[str, Any]) -> None:
    """Keep what the endpoint answered; it is no part of the bundle, which may be served in many places."""
    with disk_errors(out_dir):
        write_json(out_dir / SERVED, {**_identity(bundle), "metrics": metrics})


def _identity(bundle: Bundle) -> dict[str, Any]:
    """What was served, and what it was asked: figures of other questions do not belong into its table."""
    return {"fingerprint": bundle.manifest.fingerprint, "key": bundle.manifest.metrics.get("key")}


def read_served(out_dir: Path) -> dict[str, Any] | None:
    """The figures of the last time the endpoint was asked."""
    path = out_dir / SERVED
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}); remove it") from None
    return found


def _columns(found: list[dict[str, str]]) -> list[str]:
    """The titles of the row that has most."""
    return list(max(found, key=lambda row: len(list(row)), default={}))


def _row(name: str, metrics: dict[str, Any], *, per_byte: bool) -> dict[str, str]:
    shown = {key: _score(key, value) for key, value in metrics.get("scores", {}).items()}
    scores = {key: value for key, value in shown.items() if key != "rows"}
    loss = {"held-out loss": f"{metrics['heldout_loss']:.3f}"} if "heldout_loss" in metrics else {}
    if per_byte:
        loss["bits per byte"] = f"{metrics['bits_per_byte']:.3f}" if "bits_per_byte" in metrics else ""
    probe = metrics["probe"]
    agreement = {"probe agreement": f"{probe['agreement']:.1%}", "largest difference": f"{probe['max_difference']:.5f}"}
    return {"": name, **loss, **scores, **agreement}


def _score(name: str, value: float) -> str:
    """A count, a number of its own kind, or a fraction in percent."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if name in NUMBERS else f"{value:.1%}"
