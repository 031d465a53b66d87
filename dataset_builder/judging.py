"""Judgments of any model on InF-IR records, as labels that :mod:`dataset_builder.agreement` reads.

An item is a record and one of its three instructed queries; its label is the passage that the judge finds right
(``document``, ``hard_negative_document_1``, ``hard_negative_document_2``), ``several`` or ``none``.
"""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset
from filelock import FileLock
from tqdm.auto import tqdm

from dataset_builder import contrast, stages
from dataset_builder.errors import BadAnswer
from dataset_builder.language_model import LanguageModel, Limits
from dataset_builder.ledger import Ledger
from dataset_builder.live import OPENAI_URL, LiveTransport, connect
from dataset_builder.prices import Prices
from dataset_builder.run import asker, drive, run_sync
from sentence_transformers_inf.modules.broken import BrokenModelError
from sentence_transformers_inf.modules.reading import find_model, one_error
from sentence_transformers_inf.modules.weights import check_weights
from sentence_transformers_inf.reading import read_json_lines
from sentence_transformers_inf.recipe import write_whole
from sentence_transformers_inf.records import PASSAGE_COLUMNS, TWIN_QUERY_COLUMNS, triples_of

RELEVANCE_QUESTION = (
    "You are an expert Google searcher, whose job is to determine if the following document is relevant to the query "
    "(true/false). Answer using only one word, one of those two choices.\n\nQuery: {query}\nDocument: {passage}\n"
    'Relevant (only output one word, either "true" or "false"):'
)
"""The question that FollowIR-7B was tuned on (Weller et al. 2024, arXiv:2403.15246, §4)."""


def judge_with_server(
    records: Dataset,
    model: str,
    labels: Path,
    *,
    base_url: str | None = None,
    limits: Limits,
    prices: Prices,
    pairwise: bool = False,
    seed: int = 0,
    effort: str = "medium",
    log: Callable[[str], None] = lambda line: None,
) -> int:
    """Let a model behind an OpenAI-compatible server judge records; answers are kept in ``LABELS.ledger.sqlite``.

    Args:
        records: InF-IR records.
        model: The judge, with its ``prices`` and reasoning ``effort``.
        labels: JSONL file that gets the labels of this annotator, beside those of others.
        base_url: The server; ``None`` for OpenAI's.
        limits: What the run may use.
        pairwise: Nine yes/no judgments a record instead of three choices.
        seed: Of the order in which passages are shown.
        log: Called with one line when the run is interrupted.

    Returns:
        How many records have no usable answer; they get no labels.

    Raises:
        Stop: The run cannot go on; the same call goes on from there.
    """
    _labels_of_others(labels, model)
    answers: dict[int, list[str]] = {}
    rows = iter(enumerate(records))
    failed = 0

    async def work(ask: stages.Ask, language_model: LanguageModel) -> None:
        nonlocal failed
        for number, record in rows:
            if language_model.stopped is not None:
                return
            try:
                judge = stages.judge if record[TWIN_QUERY_COLUMNS[0]] is not None else contrast.judge
                judged = await judge({**record, "id": _name(record, number)}, ask, seed, pairwise)
                answers[number] = judged["judge_answers"]
            except BadAnswer:
                failed += 1
            bar.update()

    async def judge_all() -> None:
        with contextlib.closing(Ledger(labels.with_name(labels.name + ".ledger.sqlite"))) as ledger:
            client, http = connect(base_url, limits.timeout, limits.concurrency)
            async with client:
                transport = LiveTransport(http, ledger, prices)
                language_model = LanguageModel(transport, ledger, prices, limits, base_url or OPENAI_URL)
                ask = asker(language_model, model, model, 0.0, seed, effort)
                await drive(lambda: work(ask, language_model), limits.concurrency, language_model, log)

    with tqdm(total=len(records), desc="Records", disable=None) as bar:
        run_sync(judge_all)
    _add_labels(labels, model, {_name(records[number], number): answers[number] for number in sorted(answers)})
    return failed


def judge_with_cross_encoder(records: Dataset, model: str, labels: Path) -> None:
    """Let a Sentence Transformers cross-encoder (Hub id or folder) judge records, as :func:`judge_with_server` does: its
    answer is the passage that scores highest for query and instruction."""
    from sentence_transformers import CrossEncoder

    place, options = find_model(model)
    with one_error(model):
        encoder = CrossEncoder(place, **options)
    check_weights(encoder, place, "", options)

    def judge(query: str, passages: list[str]) -> str:
        pairs = [(query, passage) for passage in passages]
        scores = encoder.predict([break_control_tokens(pair, encoder.tokenizer) for pair in pairs], show_progress_bar=False)
        check_scores(model, bool(np.isfinite(scores).all()))
        return PASSAGE_COLUMNS[int(scores.argmax())]

    _judge_each(records, model, labels, judge)


def judge_with_reranker(records: Dataset, model: str, labels: Path) -> None:
    """Let a causal language model of the FollowIR-7B kind (Hub id or folder) judge records, as :func:`judge_with_server`
    does: a passage is right where "true" is more probable than "false" as the next token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, options = find_model(model)
    with one_error(model):
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        language_model = AutoModelForCausalLM.from_pretrained(place, **options).eval()
    check_weights(SimpleNamespace(model=language_model), place, "", options)
    limit = getattr(language_model.config, "max_position_embeddings", math.inf)
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[-1] for word in ("true", "false"))

    def is_relevant(query: str, passage: str) -> bool:
        query, passage = break_control_tokens((query, passage), tokenizer)
        question = RELEVANCE_QUESTION.format(query=query, passage=passage)
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": question}]
            question = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(question, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        if (length := inputs["input_ids"].shape[1]) > limit:
            raise ValueError(f"{model}: it takes {limit} tokens, and a question has {length}: name a model that takes more")
        with torch.inference_mode():
            logits = language_model(**inputs).logits[0, -1]
        check_scores(model, bool(logits.isfinite().all()))
        return bool(logits[yes] > logits[no])

    def judge(query: str, passages: list[str]) -> str:
        return stages.combine([name for name, text in zip(PASSAGE_COLUMNS, passages) if is_relevant(query, text)])

    _judge_each(records, model, labels, judge)


def break_control_tokens(texts: tuple[str, ...], tokenizer: Any) -> tuple[str, ...]:
    """Texts in which a tokenizer of transformers finds no control token: each is broken by a blank after its first sign."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in control:
        texts = tuple(text.replace(token, f"{token[0]} {token[1:]}") for text in texts)
    return texts


def _judge_each(records: Dataset, model: str, labels: Path, judge: Callable[[str, list[str]], str]) -> None:
    """Judge the three instructed queries of each record, with its three passages."""
    _labels_of_others(labels, model)
    answers = {}
    for number, record in enumerate(tqdm(records, desc="Records", disable=None)):
        triples = triples_of(record)
        passages = [record[passage] for *_, passage in triples]
        queries = [f"{record[query]} {record[instruction]}" for query, instruction, _ in triples]
        answers[_name(record, number)] = [judge(query, passages) for query in queries]
    _add_labels(labels, model, answers)


def _name(record: dict[str, Any], number: int) -> str:
    return str(record.get("id") or number + 1)


def check_scores(model: str, finite: bool) -> None:
    """Refuse a judge whose scores are NaN or infinite: it would label everything alike.

    Raises:
        BrokenModelError: It names the judge.
    """
    if not finite:
        raise BrokenModelError(f"{model}: its scores are not finite, so it is broken: name another judge")


def _labels_of_others(path: Path, annotator: str) -> list[dict[str, Any]]:
    """The labels in a file that are not an annotator's; a damaged file is refused before anything is judged."""
    if not path.is_file():
        return []
    return [row for _, row in read_json_lines(path) if row.get("annotator") != annotator]


def _add_labels(path: Path, annotator: str, answers: dict[str, list[str]]) -> None:
    """Write an annotator's labels into a file, in the place of earlier ones of the same annotator."""
    with FileLock(f"{path}.lock"):  # against another judge, whose labels would be lost
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _labels_of_others(path, annotator)]
        items = [(f"{name}/{row}", label) for name, found in answers.items() for row, label in enumerate(found)]
        lines += [json.dumps({"item": item, "annotator": annotator, "label": label}) + "\n" for item, label in items]
        write_whole(path, "".join(lines))
