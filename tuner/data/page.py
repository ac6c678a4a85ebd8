"""What `tuner data` shows, as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

import html

from tuner.data.quality import LISTED, Quality
from tuner.data.reading import not_read
from tuner.data.show import Pictured, bins
from tuner.errors import visible

PAGE_EXAMPLES = 20
STYLE = """
:root { color-scheme: light dark; --learned: #0a7d36; --read: #777; --bar: #4a7fb5; --line: #8884 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse } td { padding: .1rem .8rem .1rem 0; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: var(--bar); height: .8rem; min-width: 1px; display: inline-block }
.example { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .8rem; margin: .6rem 0; overflow-wrap: anywhere;
  white-space: pre-wrap; font: 13px/1.5 ui-monospace, monospace }
.learned { color: var(--learned); text-decoration: underline } .read { color: var(--read) }
.token { outline: 1px dotted var(--line) } .name { font: 600 13px system-ui, sans-serif }
.found { color: #b3261e; font-weight: 600 } li { overflow-wrap: anywhere }
"""


def escape(text: str) -> str:
    """The text for a page: neither marks of HTML nor what turns the direction of writing do anything."""
    return html.escape(visible(text))


def page(title: str, tasks: list[Pictured], quality: Quality, remark: str = "") -> str:
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1>", _counts(quality), f"<p>{escape(remark)}</p>" if remark else ""]
    for task in tasks:
        body.append(f"<h2>{escape(task.kind)}: {task.rows} rows, {task.tokens} tokens, {task.supervised:.12g} learned</h2>")
        body += [f"<p>{escape(said)}</p>" for said in task.told]
        body.append(f"<p>{task.skipped_rows} rows left out, {task.cut_rows} cut</p>{_listed(task.skipped, task.skipped_rows)}")
        body.append(f"<h3>Length of the rows in tokens</h3>{_bars(bins(task.lengths))}")
        body.append('<h3>What the model reads</h3><p>What is <span class="learned">learned</span>, and what is ')
        body.append('<span class="read">only read</span>; each token has a frame.</p>')
        body += [_example(number, parts) for number, parts in enumerate(task.examples, 1)]
    if not tasks:
        body.append(f"<h2>Length of the rows in characters</h2>{_bars(bins(quality.characters))}")
    body.append("<h2>What was found</h2>" + "".join(_findings(name, found.count, found.listed) for name, found in quality.lines()))
    for name, counts in (("Labels", quality.labels), ("Languages, of rows drawn by chance", quality.languages)):
        if counts:
            body.append(f"<h2>{name}</h2>{_bars([(each, count) for each, count in counts.most_common(40)])}")
    text = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{text}\n</body></html>\n"
    )


def _counts(quality: Quality) -> str:
    rows = [(f"{side} rows", str(count)) for side, count in quality.rows.items()]
    rows += [(f"of the shape {name or 'that no one knows'}", str(count)) for name, count in quality.shapes.items()]
    rows += [(f"{side} rows that cannot be used", str(bad["skipped_rows"])) for side, bad in quality.bad.items()]
    cells = "".join(f'<tr><td>{escape(name)}</td><td class="number">{count}</td></tr>' for name, count in rows)
    unread = "".join(f"<p>{escape(said)}</p>" for said in not_read(quality.passed_over))
    reasons = "".join(_listed(bad["skipped"], bad["skipped_rows"]) for bad in quality.bad.values())
    return f"<table>{cells}</table>{unread}{reasons}"


def _example(number: int, parts: list[tuple[str, list[tuple[str, bool]]]]) -> str:
    said = []
    for name, pieces in parts:
        said.append(f'<span class="name">{escape(name)}</span>\n' if name else "")
        said += [
            f'<span class="token {"learned" if learned else "read"}">{escape(text).replace(chr(10), "⏎" + chr(10))}</span>'
            for text, learned in pieces
        ]
        said.append("\n")
    return f'<div class="example" id="example-{number}">{"".join(said).rstrip()}</div>'


def _findings(name: str, count: int, listed: list[str]) -> str:
    shown = f'<span class="found">{count}</span>' if count else "none"
    return f"<p>{escape(name)}: {shown}</p>{_listed(listed, count)}"


def _listed(listed: list[str], count: int) -> str:
    if not listed:
        return ""
    more = f"<li>and {count - LISTED} more</li>" if count > LISTED else ""
    return (
        "<details><summary>show</summary><ul>" + "".join(f"<li>{escape(each)}</li>" for each in listed) + more + "</ul></details>"
    )


def _bars(counts: list[tuple[str, int]]) -> str:
    most = max((count for _, count in counts), default=1) or 1
    rows = (
        f'<tr><td class="number">{escape(name)}</td>'
        f'<td><span class="bar" style="width:{24 * count / most:.2f}rem"></span> {count}</td></tr>'
        for name, count in counts
    )
    return f"<table>{''.join(rows)}</table>"
