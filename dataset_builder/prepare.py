"""The first step of a build: read the source once, and estimate what the build will take."""

import hashlib
import itertools
import json
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Features, List, Value
from tqdm.auto import tqdm

from dataset_builder import contrast, stages
from dataset_builder.chat import estimate_tokens, reasons, text_tokens
from dataset_builder.files import ROW_GROUP, locked, write_parquet
from dataset_builder.language_model import Limits
from dataset_builder.prices import Prices
from dataset_builder.quality import Duplicates
from dataset_builder.sources import Pair, read_corpus, read_pairs
from sentence_transformers_inf.reading import parquet_batches
from sentence_transformers_inf.recipe import write_whole

_PAIRS = Features(dict.fromkeys(("id", "query", "passage", "instruction_type", "form", "duplicate_of"), Value("string")))
_MINED_PAIRS = Features({**_PAIRS, "candidates": List(Value("string"))})
_MEASURED = 200
_TRIED = 1.4
"""Candidates that are shown to the writing model until one answers the query."""


@dataclass(frozen=True)
class Settings:
    """What shapes the outcome of a build; a folder holds one build, with one set of them.

    Args:
        pairs: Where the pairs come from; ``query_column``, ``passage_column``, ``split``, ``limit`` and ``sample`` say how
            they are read; all as :func:`~dataset_builder.sources.read_pairs` has them.
        model: Name of the model that writes instructions, twins and passages.
        judge: Name of the model that decides which tuples stand; it answers at temperature 0.
        judge_mode: ``choice`` (three requests a record: which passage?) or ``pairwise`` (nine: is this passage right?).
        seed: Of the sample, instruction types, forms, order of passages, and both models.
        temperature: Of the writing model.
        effort: Reasoning effort of reasoning models.
        type_weights: Weight of each instruction type; those left out get none. ``None``: evenly.
        max_passage_words: Words of the longest query or passage that is worked on; ``None``:
            :func:`~dataset_builder.models.longest_passage`.
        passages: ``written`` (the model writes the passages of the twins) or ``mined`` (a second passage that exists, and no
            twin query; see :mod:`dataset_builder.mining`).
        corpus: What is mined, as :func:`~dataset_builder.sources.read_corpus` reads it, beside the passages of the pairs;
            ``None``: those alone.
        base: The embedding model that mines: a Hub id or a folder; ``None``: the bundled one.

    Raises:
        ValueError: A judge mode, a kind of passages or an instruction type that there is not, or no positive weight.
    """

    pairs: str
    model: str = "gpt-4o-mini"
    judge: str = "o3-mini"
    judge_mode: str = "choice"
    query_column: str = "query"
    passage_column: str = "passage"
    split: str = "train"
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    temperature: float = 0.8
    effort: str = "medium"
    type_weights: dict[str, float] | None = None
    max_passage_words: int | None = None
    passages: str = "written"
    corpus: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if self.passages not in ("written", "mined"):
            raise ValueError(f"the passages must be 'written' or 'mined', got {self.passages!r}")
        if self.passages == "written" and (self.corpus or self.base):
            raise ValueError("a corpus and a base are for mining: leave them out, or ask for mined passages")
        if self.judge_mode not in ("choice", "pairwise"):
            raise ValueError(f"the judge mode must be 'choice' or 'pairwise', got {self.judge_mode!r}")
        stages.draw_type_and_form("", 0, self.type_weights)


def prepare(folder: Path, settings: Settings, tasks: int = 1) -> int:
    """Read the source of a build into ``work/pairs.parquet``, unless an earlier run did: how many pairs there are.

    ``work/build.json``, which is written last, holds the settings, the hash of the pairs, and a name by which the ledgers of
    this build are known.

    Raises:
        BlockingIOError: Another process is at work in the folder.
        FileExistsError: It holds something else, or a build with other settings.
        ValueError, FileNotFoundError: The source cannot be read, or has other pairs than it had.
    """
    wanted = asdict(settings) | {"tasks": tasks, "prompts": stages.prompt_hashes()}
    with locked(folder):
        path = folder / "work" / "pairs.parquet"
        earlier = read_build(folder) if (folder / "work" / "build.json").exists() else None
        if earlier is not None and (changed := sorted(key for key in wanted if earlier.get(key) != wanted[key])):
            raise FileExistsError(
                f"{folder} holds a build with another {changed[0]} ({earlier.get(changed[0])!r}, now "
                f"{wanted[changed[0]]!r}): name another output folder"
            )
        if earlier is None or not path.is_file() or _hash(path) != earlier["pairs_sha256"]:
            pairs = read_pairs(
                settings.pairs, query_column=settings.query_column, passage_column=settings.passage_column,
                split=settings.split, limit=settings.limit, sample=settings.sample, seed=settings.seed,
            )  # fmt: skip
            fresh = path.with_name("pairs.new.parquet")
            if settings.passages == "mined":
                write_parquet(fresh, _MINED_PAIRS, _mined(folder / "work", pairs, settings))
            else:
                write_parquet(fresh, _PAIRS, _prepared(pairs, settings))
            if earlier is not None and _hash(fresh) != earlier["pairs_sha256"]:
                raise ValueError(
                    f"{path} is not as it was written, and {settings.pairs} has other pairs than when this build began: "
                    "give the source back as it was, or name another output folder"
                )
            fresh.replace(path)
            shutil.rmtree(folder / "work" / "mined", ignore_errors=True)
        if earlier is None:
            build = wanted | {"pairs_sha256": _hash(path), "build": uuid.uuid4().hex}
            write_whole(folder / "work" / "build.json", json.dumps(build, indent=2) + "\n")
        return int(pq.ParquetFile(path).metadata.num_rows)


def read_build(folder: Path) -> dict[str, Any]:
    """What ``build.json`` of a prepared build says: its settings, ``tasks``, ``pairs_sha256`` and the name ``build``.

    Raises:
        FileNotFoundError: No build was prepared in the folder.
        ValueError: The file is damaged, or of an earlier version.
    """
    path = folder / "work" / "build.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: there is no build in this folder: name the --output of inf-ir build")
    try:
        build = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        remedy = f"delete it and give the command of the build again, then `inf-ir repair {folder}` hands its answers over"
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(build, dict) or not {"pairs_sha256", "build", "tasks"} <= build.keys():
        raise ValueError(f"{path} is of an earlier version: name another output folder")
    return build


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _prepared(pairs: Iterator[Pair], settings: Settings) -> Iterator[dict[str, Any]]:
    duplicates = Duplicates()
    forms = contrast.FORMS if settings.passages == "mined" else stages.FORMS
    seen: Counter[str] = Counter()
    for pair in tqdm(pairs, desc="Pairs", unit="pair", disable=None):
        seen[pair.id] += 1
        identifier = pair.id if seen[pair.id] == 1 else f"{pair.id}#{seen[pair.id]}"
        found = duplicates.add(identifier, f"{pair.query}\n{pair.passage}")
        instruction_type, form = stages.draw_type_and_form(identifier, settings.seed, settings.type_weights, forms)
        yield {
            "id": identifier,
            "query": pair.query,
            "passage": pair.passage,
            "instruction_type": instruction_type,
            "form": form,
            "duplicate_of": f"{found[0]} of {found[1]}" if found else None,
        }
    if not seen:
        raise ValueError(f"{settings.pairs}: there are no pairs in it; name other --pairs")


def _mined(work: Path, pairs: Iterator[Pair], settings: Settings) -> Iterator[dict[str, Any]]:
    """The prepared pairs with their candidates for a second passage. What an interrupted call has found is not searched
    again."""
    from dataset_builder import mining  # whose packages come with an extra
    from sentence_transformers_inf.corpora import bundled_base
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.modules.fingerprint import fingerprint
    from sentence_transformers_inf.passages import encode_passages

    folder = work / "mined"
    folder.mkdir(exist_ok=True)
    source = folder / "source.parquet"
    write_parquet(source, _PAIRS, _prepared(pairs, settings))

    def rows() -> Iterator[dict[str, Any]]:
        return (row for batch in parquet_batches(source, rows=ROW_GROUP) for row in batch.to_pylist())

    corpus = () if settings.corpus is None else read_corpus(settings.corpus, settings.split)
    passages = list(dict.fromkeys(itertools.chain(corpus, (row["passage"] for row in rows()))))
    model = load_instruction_model(settings.base or bundled_base())
    mining.bind(folder, passages, f"{fingerprint(model)} {_hash(source)}")
    found = mining.mine(
        folder,
        ((row["query"], row["passage"]) for row in rows()),
        pq.ParquetFile(source).metadata.num_rows,
        passages,
        lambda texts: encode_passages(model, texts, show_progress=sys.stderr.isatty()),
        lambda texts: model.encode_query(texts, show_progress_bar=False),
    )
    for row, candidates in zip(rows(), found):
        yield row | {"candidates": candidates}


def read_prepared(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, pair) of all prepared pairs, a few hundred in memory at a time."""
    batches = parquet_batches(folder / "work" / "pairs.parquet", rows=ROW_GROUP)
    yield from enumerate(pair for batch in batches for pair in batch.to_pylist())


def start_record(pair: dict[str, Any]) -> dict[str, Any]:
    """What a row of ``pairs.parquet`` is before the first stage."""
    record = {name: pair[name] for name in ("id", "instruction_type", "form")}
    return {**record, "query_positive": pair["query"], "document": pair["passage"]}


@dataclass(frozen=True)
class Estimate:
    """What a build will take; answers are of the usual lengths."""

    records: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    """US dollars."""
    minutes: float


def estimate(folder: Path, settings: Settings, limits: Limits, prices: Prices) -> Estimate:
    """Requests, tokens, price and time of a prepared build, as if every record reached the judge.

    The first 200 pairs are measured. Assumed: a token for four ASCII characters or three bytes of others, instructions of 40
    tokens, passages as long as the source's, 1.4 mined passages tried for a pair, 12 tokens for an answer of the judge, 600
    more where it is known to reason, 2 s for an answer and 6 s for a reasoned one.

    Raises:
        ValueError: The price of a model is not known.
    """
    is_mined = settings.passages == "mined"
    pairs = (
        pair for _, pair in read_prepared(folder) if pair["duplicate_of"] is None and (not is_mined or pair["candidates"])
    )
    pairwise = settings.judge_mode == "pairwise"
    judged = (4 if is_mined else 9) if pairwise else (1 if is_mined else 3)
    used = {settings.model: [0, 0], settings.judge: [0, 0]}
    measured = list(islice(pairs, _MEASURED))
    words = " ".join(["word"] * 30)
    constants = {"type_meaning": words, "form_meaning": words, "low": 0, "high": 0, "instruction": words}
    constants |= {"instruction_positive": words, "instruction_negative": words}
    for pair in measured:
        document, query = pair["passage"], pair["query"]
        values = start_record(pair) | constants | {"query_negative": query, "query": query}
        values |= {"hard_negative_document_1": document, "hard_negative_document_2": document}
        values["passages"] = [document] * 3
        writing: list[tuple[str, int, float]] = [
            ("instruct", 50, 1), ("poison", 70, 1), ("write", 20 + 2 * text_tokens(document), 1)
        ]  # fmt: skip
        judging = "judge_pairwise" if pairwise else "judge"
        if is_mined:
            values |= {"kinds": words, "instructions": [words] * 2}
            values["passages"] = [contrast.shorten(text, query) for text in (document, pair["candidates"][0])]
            writing, judging = [("contrast", 110, _TRIED)], judging if pairwise else "judge_both"
        for prompt, answer, times in [*writing, (judging, 12 + (600 if reasons(settings.judge) else 0), judged)]:
            tokens = used[settings.judge if prompt.startswith("judge") else settings.model]
            tokens[0] += round(times * estimate_tokens(stages.render(prompt, values)))
            tokens[1] += round(times * answer)
    total = len(measured) + sum(1 for _ in pairs)
    scale = total / max(len(measured), 1)
    requests = round(total * ((_TRIED if is_mined else 3) + judged))
    prompt_tokens = round(scale * sum(tokens[0] for tokens in used.values()))
    completion_tokens = round(scale * sum(tokens[1] for tokens in used.values()))
    seconds = total * ((_TRIED if is_mined else 3) * 2 + judged * (6 if reasons(settings.judge) else 2)) / limits.concurrency
    if limits.rpm:
        seconds = max(seconds, 60 * requests / limits.rpm)
    if limits.tpm:
        seconds = max(seconds, 60 * (prompt_tokens + completion_tokens) / limits.tpm)
    cost = scale * sum(prices.cost(model, *tokens) for model, tokens in used.items())
    return Estimate(total, requests, prompt_tokens, completion_tokens, cost, seconds / 60)
