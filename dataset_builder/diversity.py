"""How varied the texts of a corpus are: similarity of embeddings, n-grams, and a map of them.

After Figure 3 of Zhuang et al. 2025 (arXiv:2505.21439). Most measures depend on the number of texts: compare samples of one
size.
"""

import base64
import importlib.resources
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from dataset_builder.quality import words
from sentence_transformers_inf.escaping import visible
from sentence_transformers_inf.recipe import replacing, write_whole

KINDS = {"instructions": ("instruction",), "queries": ("query",), "passages": ("passage", "negative")}
"""The kinds of text of a corpus, and their columns in its rows."""

Embeddings = dict[str, dict[str, NDArray[np.floating]]]
"""By kind of text and corpus: N×d."""


@dataclass(frozen=True)
class NGrams:
    """Counts of the n-grams of words in a corpus."""

    texts: int
    total: int
    """N, the n-grams of all texts."""
    distinct: int
    """D, the different ones among them."""
    deviation: float
    """σ, the population standard deviation of the D counts."""
    entropy: float
    """−Σ (c/N) log2(c/N) over the D counts c, in bits."""

    @property
    def inter_sample_frequency(self) -> float:
        """Inter-sample n-gram frequency (INGF), D / σ: higher is more diverse. After component 2 of the data quality index
        of Mishra et al. 2020 (arXiv:2005.00816); infinite where all n-grams are equally frequent."""
        return self.distinct / self.deviation if self.deviation else math.inf

    @property
    def distinct_share(self) -> float:
        """Distinct-n, D / N (Li et al. 2016, arXiv:1510.03055, §5.2); 0 where no text has n words."""
        return self.distinct / self.total if self.total else 0.0


def count_ngrams(texts: Iterable[str], n: int) -> NGrams:
    """Count the n-grams of words within texts, all of them in memory."""
    grams: Counter[tuple[str, ...]] = Counter()
    number = 0
    for text in texts:
        number += 1
        found = words(text)
        grams.update(zip(*(found[start:] for start in range(n))))
    if not grams:
        return NGrams(number, 0, 0, 0.0, 0.0)
    counts = np.fromiter(grams.values(), dtype=np.float64)
    total = int(counts.sum())
    entropy = math.log2(total) - float(counts @ np.log2(counts)) / total
    return NGrams(number, total, len(counts), float(counts.std()), entropy)


def average_pairwise_similarity(embeddings: NDArray[np.floating]) -> float:
    """The mean cosine similarity of all pairs of different rows (APS): lower is more diverse.

    Exact in O(N·d), never N²: for unit vectors, the sum of e_i·e_j over i ≠ j is ‖Σ e_i‖² − N, so the mean is
    (‖Σ e_i‖² − N) / (N(N − 1)).

    Args:
        embeddings: N×d, of any length but 0.

    Raises:
        ValueError: Fewer than two rows, or a row without direction (zeros, or not finite).
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError(f"the similarity of pairs needs at least two embeddings, got {count}")
    rows = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1)
    if (bad := np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))).size:
        raise ValueError(f"row {bad[0]} of the embeddings has no direction: it is zero or not finite")
    summed = (1 / norms) @ rows
    return float((summed @ summed - count) / (count * (count - 1)))


@dataclass(frozen=True)
class Diversity:
    """How varied the texts of one kind are in one corpus."""

    distinct_texts: int
    """Different texts of this kind in the corpus."""
    sampled: int
    """How many of them were measured: the same number in all corpora that are compared."""
    similarity: float
    """:func:`average_pairwise_similarity`."""
    ngrams: dict[int, NGrams]
    """By n."""


def analyse(
    corpora: dict[str, Dataset], encode: Callable[[list[str]], NDArray[np.floating]], sample: int = 10_000, seed: int = 0
) -> tuple[dict[str, dict[str, Diversity]], Embeddings]:
    """Measure the instructions, queries and passages of corpora on samples of one size.

    Args:
        corpora: By name: rows as :func:`~sentence_transformers_inf.corpora.load_rows` returns them.
        encode: Texts to an N×d array.
        sample: At most so many distinct texts of a kind; fewer where a corpus has fewer, and then of the others as well.
        seed: Of the samples.

    Returns:
        What was found and the embeddings it was found of, both by kind of text and corpus.

    Raises:
        ValueError: A corpus has fewer than two distinct texts of a kind.
    """
    found: dict[str, dict[str, Diversity]] = {}
    embeddings: Embeddings = {}
    for kind, columns in KINDS.items():
        texts = {
            name: list(dict.fromkeys(text for column in columns for text in rows[column] if text))
            for name, rows in corpora.items()
        }
        size = min(sample, *(len(of_corpus) for of_corpus in texts.values()))
        if size < 2:
            name = min(texts, key=lambda corpus: len(texts[corpus]))
            raise ValueError(f"{name}: diversity needs at least two different {kind}, it has {len(texts[name])}")
        found[kind], embeddings[kind] = {}, {}
        for name, of_corpus in texts.items():
            rows = np.sort(np.random.default_rng(seed).choice(len(of_corpus), size, replace=False))
            chosen = [of_corpus[row] for row in rows]
            embeddings[kind][name] = encode(chosen)
            similarity = average_pairwise_similarity(embeddings[kind][name])
            found[kind][name] = Diversity(len(of_corpus), size, similarity, {n: count_ngrams(chosen, n) for n in (1, 2, 3)})
    return found, embeddings


def draw_map(embeddings: Embeddings, paths: Sequence[Path], seed: int = 0) -> None:
    """A t-SNE map for each kind of text, with all corpora in it, so that overlap can be seen; PNG, SVG or PDF by the names
    of ``paths``."""
    import matplotlib
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(4.6 * len(embeddings), 4.8), layout="constrained")
    for axes, (kind, corpora) in zip(np.atleast_1d(figure.subplots(1, len(embeddings))), embeddings.items()):
        points = np.concatenate(list(corpora.values()))
        perplexity, init = min(30.0, max(1.0, (len(points) - 1) / 3)), "pca" if len(points) > 2 else "random"
        placed = TSNE(init=init, perplexity=perplexity, random_state=seed, metric="cosine").fit_transform(points)
        sizes = np.cumsum([len(of_corpus) for of_corpus in corpora.values()])
        for name, of_corpus in zip(corpora, np.split(placed, sizes[:-1])):
            axes.scatter(
                *of_corpus.T, s=max(1.0, min(12.0, 6000 / len(points))), alpha=0.5, linewidths=0, label=visible(name)
            )
        axes.set(title=kind, xticks=[], yticks=[])
    handles, names = axes.get_legend_handles_labels()
    with matplotlib.rc_context({"text.parse_math": False}):  # names are no formulas
        if len(names) > 1:
            figure.legend(handles, names, loc="outside lower center", ncols=len(names), markerscale=3, frameon=False)
        for path in paths:
            with replacing(path) as part:
                figure.savefig(part, dpi=150, format=path.suffix[1:])


def write_report(
    found: dict[str, dict[str, Diversity]], embeddings: Embeddings, folder: Path, model: str, seed: int = 0
) -> None:
    """Write what :func:`analyse` found: ``report.json``, ``map.png`` and ``map.svg``, and ``report.html``, which holds both.

    Args:
        folder: Made if it is not there.
        model: Name of the embedding model.
        seed: Of the map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict[str, Any]] = {kind: {} for kind in found}
    for kind, of_kind in found.items():
        for name, entry in of_kind.items():
            measures = asdict(entry)
            measures["average_pairwise_similarity"] = measures.pop("similarity")
            for n, counts in entry.ngrams.items():
                frequency = counts.inter_sample_frequency if counts.deviation else None  # JSON has no infinity
                measures["ngrams"][n] |= {"distinct_n": counts.distinct_share, "ingf": frequency}
            report[kind][name] = measures
    text = json.dumps({"model": model, "diversity": report}, indent=2, allow_nan=False) + "\n"
    write_whole(folder / "report.json", text)
    draw_map(embeddings, [folder / "map.png", folder / "map.svg"], seed)
    template = importlib.resources.files("dataset_builder") / "diversity.html"
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template.read_text(encoding="utf-8"))
    picture = base64.b64encode((folder / "map.png").read_bytes()).decode()
    write_whole(folder / "report.html", page.render(model=model, found=found, picture=picture))
