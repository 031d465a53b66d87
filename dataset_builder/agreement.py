"""How far judges agree: average pairwise Cohen's kappa of each model with the human annotators (Zhuang et al. 2025,
arXiv:2505.21439, Figure 4), with bootstrap intervals over items. The check behind the choice of a judge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from sentence_transformers_inf.escaping import visible
from sentence_transformers_inf.reading import read_table
from sentence_transformers_inf.recipe import replacing

_RESAMPLES = 1000


@dataclass(frozen=True)
class Agreement:
    """Agreement of one annotator with the humans (a human: with the other humans)."""

    annotator: str
    kappa: float
    """Mean of Cohen's kappa (1960) over the pairs with each human: 1 is full agreement, 0 is chance. 1 also where both gave
    one and the same label throughout."""
    low: float
    high: float
    """95% bootstrap interval, items drawn with replacement."""
    items: int
    """Items that the annotator and at least one human labelled."""


def read_labels(path: Path) -> dict[str, dict[str, str]]:
    """Labels by annotator and item, from a table with the columns item, annotator and label.

    Args:
        path: As for :func:`~sentence_transformers_inf.reading.read_table`.

    Raises:
        ValueError: A column or value is missing, or an annotator labelled an item twice, differently.
        FileNotFoundError: No such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    labels: dict[str, dict[str, str]] = {}
    for where, row in read_table(path):
        values = []
        for column in ("item", "annotator", "label"):
            value = row.get(column)
            if value is None or not str(value).strip():
                raise ValueError(
                    f"{where}: the column {column!r} is missing or empty; a label has item, annotator and label"
                )
            values.append(str(value).strip())
        item, annotator, label = values
        if labels.setdefault(annotator, {}).setdefault(item, label) != label:
            raise ValueError(f"{where}: {annotator!r} labelled {item!r} twice, differently; take one out")
    if not labels:
        raise ValueError(f"{path}: there are no labels in it; name another file")
    return labels


def agreement(labels: dict[str, dict[str, str]], humans: Sequence[str], seed: int = 0) -> list[Agreement]:
    """The agreement of every annotator that shares items with a human, models first, best first.

    Args:
        labels: By annotator and item.
        humans: Which annotators are human.
        seed: Of the bootstrap.

    Raises:
        ValueError: No human is among the annotators, or nobody shares items with one.
    """
    if missing := [name for name in humans if name not in labels]:
        raise ValueError(f"there is no annotator {missing[0]!r}; there are {', '.join(sorted(labels))}")
    if not humans:
        raise ValueError(f"name at least one human annotator; there are {', '.join(sorted(labels))}")
    found_labels = sorted({label for of_one in labels.values() for label in of_one.values()})
    number = {label: row for row, label in enumerate(found_labels)} | {None: -1}
    items = sorted({item for of_one in labels.values() for item in of_one})
    codes = {name: np.array([number[of_one.get(item)] for item in items]) for name, of_one in labels.items()}
    resamples = np.random.default_rng(seed).integers(len(items), size=(_RESAMPLES, len(items)))
    draws = [np.arange(len(items)), *resamples]
    found = []
    for name, first in codes.items():
        pairs = [(first, codes[human], (first >= 0) & (codes[human] >= 0)) for human in humans if human != name]
        pairs = [pair for pair in pairs if pair[2].any()]
        if not pairs:
            continue
        kappas = [
            [_kappa(first[draw[both[draw]]], second[draw[both[draw]]]) for draw in draws] for first, second, both in pairs
        ]
        kappa, *resampled = np.nanmean(kappas, axis=0)
        low, high = np.nanpercentile(resampled, [2.5, 97.5])
        common = np.any([both for _, _, both in pairs], axis=0)
        found.append(Agreement(name, float(kappa), float(low), float(high), int(common.sum())))
    if not found:
        raise ValueError("no annotator shares items with a human: let two label the same items, or name another --human")
    return sorted(found, key=lambda entry: (entry.annotator in humans, -entry.kappa))


def _kappa(first: NDArray[np.intp], second: NDArray[np.intp]) -> float:
    if not len(first):
        return math.nan
    return 1.0 if np.array_equal(first, second) else float(cohen_kappa_score(first, second))


def draw_chart(entries: Sequence[Agreement], humans: Sequence[str], path: Path) -> None:
    """A bar chart of :func:`agreement` as a PNG or SVG, humans in grey."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.5 * len(entries) + 1.4), layout="constrained")
    axes = figure.subplots()
    names = [visible(entry.annotator) for entry in reversed(entries)]
    low, values, high = np.array([[entry.low, entry.kappa, entry.high] for entry in reversed(entries)]).T
    colours = ["0.6" if entry.annotator in humans else "tab:blue" for entry in reversed(entries)]
    with matplotlib.rc_context({"text.parse_math": False}):  # names are no formulas
        axes.barh(range(len(names)), values, color=colours, xerr=np.abs([low - values, high - values]), capsize=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("average pairwise Cohen's κ with the human annotators, 95% interval")
        axes.set_xlim(min(0.0, float(values.min()) - 0.1), 1)
        with replacing(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix[1:])
