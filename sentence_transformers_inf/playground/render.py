"""The HTML of a playground. Whatever comes from a user, a corpus or a model goes through :func:`text`, and is only text."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from sentence_transformers_inf.evaluation import METRIC_NAMES
from sentence_transformers_inf.playground.corpus import Corpus, Example
from sentence_transformers_inf.playground.ranking import Ranking
from sentence_transformers_inf.playground.words import TOP, in_words, obeyed

SHOWN = 50
"""So many passages of the corpus are listed."""

_LONGEST = 4000
"""Characters of a passage that are shown."""

_LEGEND = (
    '<p class="legend">▲▼ places that the instruction moved a passage up or down. Right: its similarity to the query. '
    "Press a passage to read all of it.</p>"
)


def text(value: object) -> str:
    """A value as text in HTML."""
    return html.escape(str(value))


def message(words: str) -> str:
    """What the user should know instead of a result."""
    return f'<p class="message" role="alert">{text(words)}</p>'


def rankings(found: Sequence[Ranking], corpus: Corpus, example: Example | None, exclusions: Sequence[str] = ()) -> str:
    """The rankings side by side, under what the instruction did in words; ``exclusions`` are what the last model found."""
    told = [ranking for ranking in found if ranking.before is not None]
    lines = [f"<b>{text(_models(each))}</b>{_verdict(each, example)} {in_words(each, example)}" for each in told]
    if not told:
        lines = ["Plain search. Add an instruction, and see what moves."]
    elif exclusions:
        lines[-1] += f" It reads as left out: {', '.join(f'<q>{text(what)}</q>' for what in exclusions)}."
    columns = "".join(_column(ranking, corpus, example) for ranking in found)
    words = "".join(f"<li>{line}</li>" for line in lines)
    return f'<ul class="words" role="status">{words}</ul>{_LEGEND}<div class="columns">{columns}</div>'


def _models(ranking: Ranking) -> str:
    return " and ".join(ranking.models)


def _verdict(ranking: Ranking, example: Example | None) -> str:
    verdict = obeyed(ranking, example)
    if verdict is None:
        return ""
    return ' <span class="yes">✓ obeys</span>' if verdict else ' <span class="no">✗ does not obey</span>'


def _column(ranking: Ranking, corpus: Corpus, example: Example | None) -> str:
    marked = (*example.expected, *example.unwanted) if example else ()
    rows = [int(row) for row in ranking.order[:TOP]]
    below = sorted((row for row in marked if ranking.ranks[row] > TOP), key=lambda row: ranking.ranks[row])[:2]
    items = [_item(row, ranking, corpus.passages[row], example) for row in rows]
    if below:
        items.append('<li class="gap" aria-hidden="true">⋮</li>')
        items += [_item(row, ranking, corpus.passages[row], example) for row in below]
    kind = "no instruction" if ranking.before is None else "with the instruction"
    title = f"<h3>{text(_models(ranking))} <small>{kind}</small></h3>"
    return f'<section class="{"plain" if ranking.before is None else "told"}">{title}<ol>{"".join(items)}</ol></section>'


def _item(row: int, ranking: Ranking, passage: str, example: Example | None) -> str:
    rank = int(ranking.ranks[row])
    mark = ""
    if example and row in example.expected:
        mark = '<span class="tag expected">★ expected</span>'
    elif example and row in example.unwanted:
        mark = '<span class="tag unwanted">✕ unwanted</span>'
    moved = "" if ranking.before is None else _change(int(ranking.before[row]), rank)
    head = f'<b class="rank">{rank}</b>{moved}{mark}<span class="score">{ranking.scores[row]:.3f}</span>'
    kind = "expected" if "★" in mark else "unwanted" if mark else ""
    return f'<li class="{kind}" data-row="{row}"><div class="head">{head}</div>{_passage(passage)}</li>'


def _change(before: int, after: int) -> str:
    """How far a passage moved, readable without colour and by a screen reader."""
    if before == after:
        return '<span class="move">– <small>unmoved</small></span>'
    arrow, kind = ("▲", "up") if after < before else ("▼", "down")
    steps = abs(before - after)
    label = f"{kind} {steps}, was {before}"
    return f'<span class="move {kind}" aria-label="{label}">{arrow}{steps} <small>was {before}</small></span>'


def _passage(passage: str) -> str:
    shown = passage if len(passage) <= _LONGEST else f"{passage[:_LONGEST]}…"
    return f"<details><summary>{text(shown)}</summary></details>"


def corpus_list(corpus: Corpus, rows: Sequence[int]) -> str:
    """The first passages of a selection."""
    if not rows:
        return message("No passage fits. Take away a filter or a word.")
    more = "" if len(rows) <= SHOWN else f", the first {SHOWN} are shown; search to see others"
    items = []
    for row in rows[:SHOWN]:
        labels = "".join(
            f'<span class="tag">{text(name)}</span>' for name in (corpus.kinds[row], corpus.topics[row]) if name
        )
        items.append(
            f'<li><div class="head"><b class="rank">{row + 1}</b>{labels}</div>{_passage(corpus.passages[row])}</li>'
        )
    count = f"{len(rows):,} of {len(corpus.passages):,} passages{more}"
    return f'<p role="status">{count}</p><ol class="corpus">{"".join(items)}</ol>'


def checkpoint(recipe: Mapping[str, Any] | None, results: Mapping[str, Any]) -> str:
    """How a model was measured and trained, from the files beside it."""
    parts = [_measured(entry) for entry in results.get("records", [])]
    if benchmarks := results.get("benchmarks"):
        rows = [
            (row["task"], row["metric"], f"{row['score']:.1f}", "yes" if row["instructed"] else "left out")
            for row in benchmarks
        ]
        parts.append(_table("Benchmarks by MTEB, times 100", ("task", "measure", "score", "instructions"), rows))
    if not parts:
        parts.append(
            message(
                "There are no measurements beside this model. Run `inf-embed evaluate MODEL --json scores.json`, then "
                "`inf-embed card MODEL --results scores.json`."
            )
        )
    if recipe:
        settings = recipe.get("settings", {})
        facts = {
            key: recipe[key] for key in ("base", "data", "records", "minutes", "hardware") if recipe.get(key) is not None
        }
        if isinstance(names := facts.get("data"), list):  # of several sources
            facts["data"] = ", ".join(map(str, names))
        known = [(name, value) for name, value in (facts | settings).items() if value is not None]
        parts.append(_table("How it was trained", ("setting", "value"), known))
    return "".join(parts)


def _measured(entry: Mapping[str, Any]) -> str:
    where = f"{entry['data']}{', ' + entry['split'] if entry['split'] else ''}: {entry['records']} records, times 100"
    base = entry.get("base")
    header = ("measure", "base", "this model") if base else ("measure", "this model")
    rows = [
        (name, *([f"{base[metric]:.1f}"] if base else []), f"{entry[metric]:.1f}")
        for metric, name in METRIC_NAMES.items()
        if metric in entry
    ]
    charts = "".join(
        _chart(f"{METRIC_NAMES[metric]} by kind of instruction", {k: v[metric] for k, v in entry["per_type"].items()})
        for metric in ("pair_accuracy", "p_mrr")
        if entry.get("per_type")
    )
    return f'<div class="columns">{_table(where, header, rows)}{charts}</div>'


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _chart(title: str, values: Mapping[str, float]) -> str:
    """A horizontal bar for each value, which stands beside it; what is below 0 has no bar."""
    bars = "".join(
        f'<tr><th scope="row">{text(name)}</th><td class="bar"><i style="width:{min(max(value, 0), 100):.1f}%"></i></td>'
        f"<td>{value:.1f}</td></tr>"
        for name, value in sorted(values.items(), key=lambda item: -item[1])
    )
    return f'<table class="chart"><caption>{text(title)}</caption><tbody>{bars}</tbody></table>'
