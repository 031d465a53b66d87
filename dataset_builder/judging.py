"""Judgments of any model on InF-IR records, as labels that :mod:`dataset_builder.agreement` reads.

An item is a record and one of its three instructed queries; its label is the passage that the judge finds right
(``document``, ``hard_negative_document_1``, ``hard_negative_document_2``), ``several`` or ``none``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from dataset_builder import stages
from dataset_builder.client import OPENAI_URL, BadAnswer, LanguageModel, Limits, LiveTransport, Prices, Request, connect
from dataset_builder.ledger import Ledger
from sentence_transformers_inf.records import PASSAGE_COLUMNS, TRIPLES

Step = Callable[[int, int], None]
"""Told how many of how many records are judged."""

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
    step: Step | None = None,
) -> int:
    """Let a model behind an OpenAI-compatible server judge records; answers are kept in ``LABELS.ledger.sqlite``.

    Args:
        records: InF-IR records.
        model: The judge.
        labels: JSONL file that gets the labels of this annotator, beside those of others.
        base_url: The server; ``None`` for OpenAI's.
        limits: What the run may use.
        prices: What requests cost.
        pairwise: Nine yes/no judgments a record instead of three choices.
        seed: Of the order in which passages are shown.
        effort: Reasoning effort.
        step: Told of progress.

    Returns:
        How many records have no usable answer; they get no labels.

    Raises:
        Stop: The run cannot go on; the same call goes on from there.
    """
    return asyncio.run(_judge_all(records, model, labels, base_url, limits, prices, pairwise, seed, effort, step))


async def _judge_all(
    records: Dataset,
    model: str,
    labels: Path,
    base_url: str | None,
    limits: Limits,
    prices: Prices,
    pairwise: bool,
    seed: int,
    effort: str,
    step: Step | None,
) -> int:
    answers: dict[int, list[str]] = {}
    failed = 0
    ledger = Ledger(labels.with_name(labels.name + ".ledger.sqlite"))
    try:
        async with connect(base_url, limits.timeout) as client:
            language_model = LanguageModel(
                LiveTransport(client, ledger, prices), ledger, prices, limits, base_url or OPENAI_URL
            )

            async def ask(prompt: str, answer: type[Any], max_tokens: int, values: dict[str, Any]) -> Any:
                messages = stages.render(prompt, values)
                request = Request(prompt, model, messages, answer, max_tokens, temperature=0.0, seed=seed, effort=effort)
                return await language_model.ask(request)

            rows = iter(enumerate(records))

            async def work() -> None:
                nonlocal failed
                for number, record in rows:
                    named = {**record, "id": _name(record, number)}
                    try:
                        answers[number] = (await stages.judge(named, ask, seed, pairwise))["judge_answers"]
                    except BadAnswer:
                        failed += 1
                    if step is not None:
                        step(len(answers) + failed, len(records))

            results = await asyncio.gather(*(work() for _ in range(limits.concurrency)), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
    finally:
        await ledger.close()
    _add_labels(labels, model, {_name(records[number], number): answers[number] for number in sorted(answers)})
    return failed


def judge_with_cross_encoder(records: Dataset, model: str, labels: Path, step: Step | None = None) -> None:
    """Let a cross-encoder judge records: the passage that scores highest for query and instruction is its answer.

    Args:
        records: InF-IR records.
        model: Hub id or folder, for Sentence Transformers' ``CrossEncoder``.
        labels: JSONL file that gets the labels.
        step: Told of progress.
    """
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(model)
    answers = {}
    for number, record in enumerate(records):
        pairs = [(f"{record[query]} {record[instruction]}", record[name]) for query, instruction, name in _combinations()]
        scores = encoder.predict(pairs, show_progress_bar=False).reshape(3, 3)
        answers[_name(record, number)] = [PASSAGE_COLUMNS[best] for best in scores.argmax(axis=1).tolist()]
        if step is not None:
            step(number + 1, len(records))
    _add_labels(labels, model, answers)


def judge_with_reranker(records: Dataset, model: str, labels: Path, step: Step | None = None) -> None:
    """Let a causal language model of the FollowIR-7B kind judge records: true or false for each passage.

    A passage counts as right where the model gives "true" a higher probability than "false" as its next token.

    Args:
        records: InF-IR records.
        model: Hub id or folder of a causal language model.
        labels: JSONL file that gets the labels.
        step: Told of progress.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    language_model = AutoModelForCausalLM.from_pretrained(model).eval()
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[-1] for word in ("true", "false"))
    answers = {}
    for number, record in enumerate(records):
        found: list[list[str]] = [[], [], []]
        for place, (query, instruction, name) in enumerate(_combinations()):
            question = RELEVANCE_QUESTION.format(query=f"{record[query]} {record[instruction]}", passage=record[name])
            if tokenizer.chat_template:
                question = tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
                )
            inputs = tokenizer(question, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
            with torch.inference_mode():
                logits = language_model(**inputs).logits[0, -1]
            if logits[yes] > logits[no]:
                found[place // 3].append(name)
        answers[_name(record, number)] = [names[0] if len(names) == 1 else "several" if names else "none" for names in found]
        if step is not None:
            step(number + 1, len(records))
    _add_labels(labels, model, answers)


def _combinations() -> Iterator[tuple[str, str, str]]:
    """The three instructed queries with the three passages each, as columns."""
    for query, instruction, _ in TRIPLES:
        for passage in PASSAGE_COLUMNS:
            yield query, instruction, passage


def _name(record: dict[str, Any], number: int) -> str:
    return str(record.get("id") or number + 1)


def _add_labels(path: Path, annotator: str, answers: dict[str, list[str]]) -> None:
    """Write an annotator's labels into a file, in the place of earlier ones of the same annotator."""
    lines = []
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            lines = [line for line in file if line.strip() and json.loads(line).get("annotator") != annotator]
    for name, found in answers.items():
        for row, label in enumerate(found):
            lines.append(json.dumps({"item": f"{name}/{row}", "annotator": annotator, "label": label}) + "\n")
    part = path.with_name(path.name + ".part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, path)
