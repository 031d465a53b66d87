"""Bad things of every kind, in one folder: files, folders, models, indexes and settings that no command can use."""

import gzip
import io
import json
import os
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from sentence_transformers_inf import load_instruction_model


def make(folder: Path, records: list[dict]) -> None:
    """Fill a folder.

    Args:
        folder: It is empty.
        records: Three good ones.
    """
    _tables(folder, records)
    _folders(folder, records)
    _others(folder, records)
    _indexes(folder)
    _models(folder, records)


def _lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _stream(table) -> bytes:
    file = io.BytesIO()
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


def _tables(folder, records):
    good = _lines(records)
    first, second, _ = records
    promptriever = {"only_instruction": "Be short.", "only_query": "why", "positive_passages": [{"text": "because"}]}
    texts = {
        "records.jsonl": good,
        "empty.jsonl": "",
        "blank.jsonl": "\n \n\n",
        "list.jsonl": "[1, 2]\n",
        "cut.jsonl": good[:-20],
        "number.jsonl": good + "7\n",
        "deep.jsonl": "[" * 50_000 + "\n",
        "digits.jsonl": json.dumps(first)[:-1] + f', "topic": {"9" * 5000}}}\n',
        "nan.jsonl": json.dumps(first)[:-1] + ', "topic": NaN}\n',
        "key-twice.jsonl": json.dumps(first)[:-1] + ', "document": "another"}\n',
        "surrogate.jsonl": _lines([{**first, "document": "half \ud83d"}]),
        "missing.jsonl": _lines([{key: value for key, value in first.items() if key != "document"}]),
        "null.jsonl": _lines([first, {**second, "document": None}]),
        "nothing.jsonl": _lines([first, {**second, "instruction_positive": " \t"}]),
        "number-in-text.jsonl": _lines([first, {**second, "document": 5}]),
        "list-in-text.jsonl": _lines([first, {**second, "topic": ["a"]}]),
        "same.jsonl": _lines([{**first, "instruction_negative": first["instruction_positive"]}]),
        "half.jsonl": _lines([first, {**second, "query_negative": None}]),
        "string.json": '"records"',
        "object-of-lists.json": json.dumps({key: [value] for key, value in first.items()}),
        "numbers.json": "[1, 2]",
        "pairs.csv": "query,passage\nwhy,because\n",
        "ragged.csv": "query,passage\nwhy,because,of,commas\n",
        "twice.csv": "query,query\na,b\n",
        "quote.csv": 'query,passage\n"why,because\n',
        "header.csv": "query,passage\n",
        "other.csv": "question,answer\nwhy,because\n",
        "blank-cell.csv": "query,passage\nwhy,because\nwhy, \n",
        "one.txt": "one passage\n",
        "two.txt": "the sky is blue\nthe sea is wide\n",
        "blank.txt": " \n\n",
        "untexted.jsonl": '{"body": "a"}\n{"body": "b"}\n',
        "empty-text.jsonl": '{"text": "a"}\n{"text": " "}\n',
        "number-text.jsonl": '{"text": "a"}\n{"text": 5}\n',
        "title.jsonl": '{"text": "a"}\n{"text": "b", "title": {"x": 1}}\n',
        "number-pairs.jsonl": '{"query": 5, "passage": "because"}\n',
        "promptriever.jsonl": _lines([promptriever, {**promptriever, "positive_passages": 5}]),
        "file": "x",
        "table.xlsx": "x",
        "[b].jsonl": "{",
        "\x1b[31m.jsonl": "{",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "utf16.jsonl").write_bytes(good.encode("utf-16"))
    (folder / "latin.jsonl").write_bytes(json.dumps({**first, "document": "é"}, ensure_ascii=False).encode("latin-1"))
    (folder / "nul.jsonl").write_bytes(good.encode() + b"\0" * 50)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(good.encode())[:-30])
    (folder / "no-gzip.jsonl.gz").write_text(good)
    (folder / "empty.jsonl.gz").write_bytes(b"")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "cut.parquet", write_page_checksum=True)
    parquet = bytearray((folder / "cut.parquet").read_bytes())
    (folder / "cut.parquet").write_bytes(parquet[:-40])
    parquet[len(parquet) // 3] ^= 0xFF
    (folder / "flip.parquet").write_bytes(parquet)
    (folder / "text.parquet").write_text(good)
    columns = pyarrow.Table.from_pylist(records)
    columns = columns.append_column("document", columns.column("document"))
    pyarrow.parquet.write_table(columns, folder / "column-twice.parquet")
    (folder / "column-twice.arrow").write_bytes(_stream(columns))
    texts = pyarrow.table({"text": ["the sky is blue", "the sea is wide"]})
    (folder / "cut.arrow").write_bytes(_stream(texts)[:-8])  # after the last batch
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "folder.jsonl").mkdir()
    os.symlink("nowhere.jsonl", folder / "dangling.jsonl")
    os.symlink("nowhere/x.json", folder / "dangling-output.json")
    os.symlink("/dev/full", folder / "full.json")


def _folders(folder, records):
    trees = {
        "empty-folder": {},
        "splits": {"train.jsonl": _lines(records), "dev.jsonl": _lines(records)},
        "both": {"train.jsonl": _lines(records), "train.csv": "a\n", "test.parquet": ""},
        "both-tables": {"train.jsonl": _lines(records), "train.parquet": "x"},
        "pictures": {"cat.png": "x"},
        "saved": {"state.json": "{}", "dataset_info.json": "{}"},
        "saved-number": {"state.json": "5", "dataset_info.json": "5"},
        "saved-dict": {"dataset_dict.json": '{"splits": ["train"]}'},
        "snapshot": {"README.md": "---\nconfigs: [\n---\n", "a.jsonl": _lines(records)},
        "beir": {"queries.jsonl": '{"_id": "q", "text": "why"}\n', "corpus.jsonl": '{"_id": "p", "text": "sky"}\n'},
        "beir-score": {"qrels.tsv": "q\tp\t1\nq\tp\tmuch\n"},
        "beir-nan": {"qrels.tsv": "q\tp\tnan\n"},
        "beir-cells": {"qrels.tsv": "q\n"},
        "beir-unknown": {"qrels.tsv": "q\tz\t1\n"},
        "beir-zero": {"qrels.tsv": "q\tp\t0\n"},
        "build": {"report.json": "{", "train.parquet": "x"},
        "no-build": {"notes.txt": "mine"},
        "damaged-build": {"work/build.json": "{"},
        "old-build": {"work/build.json": "{}"},
        "run-damaged": {"recipe.json": ""},
        "run-list": {"recipe.json": "[1]"},
        "run-foreign": {"recipe.json": '{"base": 5}'},
        "run-finished": {"recipe.json": '{"base": "b", "finished": true}'},
        "occupied": {"letter.txt": "dear"},
        "results-foreign": {"results/m/r/Task.json": '{"compilerOptions": {}}'},
        "export-foreign": {"letter.txt": "dear"},
    }
    for name, files in trees.items():
        (folder / name).mkdir()
        if name.startswith("beir-"):
            shutil.copytree(folder / "beir", folder / name, dirs_exist_ok=True)
        for file, text in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(text)


def _others(folder, records):
    label = {"item": "1", "annotator": "ann", "label": "yes"}
    topic = {"id": "t", "query": "q", "og_instruction": "all", "changed_instruction": "few"}
    texts = {
        "empty.yaml": "",
        "list.yaml": "- 1\n",
        "tab.yaml": "a:\n\t- b\n",
        "tag.yaml": "data: !!python/object/apply:os.system [true]\n",
        "unknown.yaml": "num_train_epochs: 1\nlearnign_rate: 1\n",
        "wrong.yaml": "num_train_epochs: many\n",
        "a-none.yaml": "data: mini\n",
        "a-key.yaml": "gird: {objective: [uni_P]}\n",
        "a-grid.yaml": "grid: [objective]\n",
        "a-value.yaml": "grid: {objective: uni_P}\n",
        "a-empty.yaml": "grid: {objective: []}\n",
        "a-cell.yaml": "cells: {one: 5}\n",
        "a-argument.yaml": "cells: {one: {speed: 5}}\n",
        "a-number.yaml": "cells: {one: {5: 5, speed: 1}}\n",
        "a-type.yaml": "cells: {one: {learning_rate: fast}}\n",
        "a-list.yaml": "cells: {one: {learning_rate: [1]}}\n",
        "a-nan.yaml": "cells: {one: {learning_rate: .nan}}\n",
        "a-seeds.yaml": "seeds: [1, 1]\ncells: {one: {}}\n",
        "a-seed.yaml": "seeds: [true]\ncells: {one: {}}\n",
        "a-evaluate.yaml": "evaluate: {date: mini}\ncells: {one: {}}\n",
        "a-split.yaml": "evaluate: {split: nope}\ncells: {one: {}}\n",
        "a-data.yaml": "evaluate: {data: none.jsonl}\ncells: {one: {}}\n",
        "a-data-type.yaml": "data: [mini]\ncells: {one: {}}\n",
        "a-data-number.yaml": "evaluate: {data: 5}\ncells: {one: {}}\n",
        "a-plain.yaml": "evaluate: {plain: 5}\ncells: {one: {}}\n",
        "a-base.yaml": "settings: {base: none/}\ncells: {one: {}}\n",
        "p-list.json": "[]",
        "p-none.json": "{}",
        "p-text.json": '{"models": "cheap"}',
        "p-names.json": '{"models": ["gpt"]}',
        "p-one.json": '{"models": {"gpt": [1]}}',
        "p-negative.json": '{"models": {"gpt": [-1, 1]}}',
        "p-cut.json": '{"models": ',
        "l-none.jsonl": "",
        "l-column.jsonl": _lines([{"item": 1, "label": "yes"}]),
        "l-blank.csv": "item,annotator,label\n1,ann,\n",
        "l-twice.jsonl": _lines([label, {**label, "label": "no"}]),
        "l-one.jsonl": _lines([label]),
        "l-apart.jsonl": _lines([label, {"item": "2", "annotator": "bob", "label": "yes"}]),
        "r-list.json": "[]",
        "r-none.json": "{}",
        "r-rows.json": '{"rows": 5}',
        "r-numbers.json": '{"rows": [1]}',
        "r-model.json": '{"model": 5}',
        "r-other.json": '{"model": "elsewhere", "data": "mini"}',
        "r-lacks.json": '{"model": "model"}',
        "r-cut.json": '{"model": ',
        "t-list.jsonl": "[1]\n",
        "t-key.jsonl": _lines([topic]),
        "t-docs.jsonl": _lines([{**topic, "docs": {}}]),
        "t-same.jsonl": "",
        "model.gguf": "no model",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    vector = [0.5, 0.5]
    distinct = list(dict.fromkeys(record[name] for record in records for name in record if "document" in name))
    tables = {
        "e-column": [{"text": text} for text in distinct],
        "e-lacks": [{"text": distinct[0], "embedding": vector}],
        "e-nan": [{"text": text, "embedding": [0.5, float("nan")]} for text in distinct],
        "e-text": [{"text": text, "embedding": ["a", "b"]} for text in distinct],
        "e-uneven": [{"text": text, "embedding": [0.5] * row} for row, text in enumerate(distinct, start=1)],
        "e-narrow": [{"text": text, "embedding": [row, 1.0]} for row, text in enumerate(distinct)],
        "e-list": [{"text": [text], "embedding": vector} for text in distinct],
        "e-empty": [{"text": text, "embedding": [0.5][:0]} for text in distinct],
    }
    for name, rows in tables.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")


def _indexes(folder):
    arrays = {
        "short.npy": np.ones((1, 8), np.float32),
        "wide.npy": np.ones((2, 9), np.float32),
        "flat.npy": np.ones(16, np.float32),
        "text.npy": np.array([["a"] * 8] * 2),
        "nan.npy": np.full((2, 8), np.nan, np.float32),
        "same.npy": np.ones((2, 8), np.float32),
        "huge.npy": np.eye(2, 8) * 1e300,
        "complex.npy": np.ones((2, 8), np.complex64),
        "object.npy": np.array([[{}] * 8] * 2, dtype=object),
    }
    for name in ("nan", "same"):
        index = faiss.IndexFlatIP(8)
        index.add(arrays[f"{name}.npy"])
        faiss.write_index(index, str(folder / f"{name}.faiss"))
    for name, array in arrays.items():
        np.save(folder / name, array, allow_pickle=name == "object.npy")
    (folder / "empty.npy").write_bytes(b"")
    (folder / "cut.npy").write_bytes((folder / "same.npy").read_bytes()[:-9])
    (folder / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff{")
    archive = io.BytesIO()
    np.savez(archive, vectors=arrays["same.npy"])
    (folder / "cut.npz").write_bytes(archive.getvalue()[:-30])
    np.savez(folder / "none.npz")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "junk.faiss").write_bytes(b"IxF2" + b"\xff" * 40)
    (folder / "folder.npy").mkdir()


def _models(folder, records):
    words = {
        word
        for text in ("the sky is blue", *(text for record in records for text in record.values()))
        for word in str(text).split()
    }
    save_model(folder / "model", sorted(words))
    weights = load_file(folder / "model" / "model.safetensors")

    def copy(name, **files):
        """The model once more; a file with other content, or without it where that is None."""
        shutil.copytree(folder / "model", folder / name)
        for file, content in files.items():
            path = folder / name / file
            if content is None:
                path.unlink()
            else:
                path.write_text(content)

    copy("m-cut")
    os.truncate(folder / "m-cut" / "model.safetensors", 900)
    copy("m-lost")
    os.truncate(folder / "m-lost" / "model.safetensors", 4)
    copy("m-empty", **{"model.safetensors": ""})
    copy("m-header")
    (folder / "m-header" / "model.safetensors").write_bytes(b"\xff" * 64)
    copy("m-weightless", **{"model.safetensors": None})
    copy("m-pickle", **{"model.safetensors": None, "pytorch_model.bin": "x"})
    copy("m-tokenless", **{"tokenizer.json": None})
    copy("m-tokens", **{"tokenizer.json": "{"})
    copy("m-config", **{"config.json": "[]"})
    copy("m-configless", **{"config.json": None})
    copy("m-kind", **{"config.json": '{"model_type": "no such thing"}'})
    copy("m-code", **{"config.json": '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}'})
    copy("m-modules", **{"modules.json": ""})
    copy("m-dict", **{"modules.json": "{}"})
    copy("m-none", **{"modules.json": "[]"})
    copy("m-numbers", **{"modules.json": "[1]"})
    copy("m-pathless", **{"modules.json": '[{"idx": 0}]'})
    copy("m-number", **{"modules.json": '[{"idx": 0, "name": "0", "path": 5, "type": "x.Y"}]'})
    copy("m-class", **{"modules.json": '[{"idx": 0, "name": "0", "path": "", "type": "os.system"}]'})
    copy("m-deep", **{"modules.json": "[" * 50_000})
    copy("m-settings", **{"config_sentence_transformers.json": "[]"})
    copy("m-prompts", **{"config_sentence_transformers.json": '{"prompts": 5}'})
    copy("m-pooling", **{"1_Pooling/config.json": "{}"})
    copy("m-poolingless", **{"1_Pooling/config.json": None})
    copy("m-instruction", **{"instruction_config.json": "{}"})
    copy("m-template", **{"instruction_config.json": '{"template": "{x.__class__}", "max_query_length": null}'})
    copy("m-length", **{"instruction_config.json": '{"template": "{query} {instruction}", "max_query_length": "long"}'})
    template = '{"template": "{query} {instruction}", "max_query_length": '
    copy("m-lengths", **{"instruction_config.json": template + f"1{'0' * 30}}}"})
    copy("m-true", **{"instruction_config.json": template + "true}"})
    copy("m-weight", **{"instruction_config.json": template + f'null, "exclusion_weight": 1{"0" * 400}}}'})
    settings = json.loads((folder / "model" / "sentence_bert_config.json").read_text())
    for name, limit in (("zero", 0), ("negative", -1), ("more", 65), ("huge", 10**31), ("text", "x")):
        copy(f"m-limit-{name}", **{"sentence_bert_config.json": json.dumps(settings | {"max_seq_length": limit})})
    tokens = json.loads((folder / "model" / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["unheard-of"] = len(tokens["model"]["vocab"])
    copy("m-words", **{"tokenizer.json": json.dumps(tokens)})
    copy("m-sources", **{"recipe.json": '{"base": "b", "finished": true, "sources": [1]}'})
    copy("m-count", **{"recipe.json": '{"base": "b", "finished": true, "records": "many"}'})
    copy("m-bases", **{"recipe.json": '{"base": ["b"], "finished": true}'})
    copy("m-latin")
    (folder / "m-latin" / "README.md").write_bytes("é".encode("latin-1"))
    copy("m-inside")
    (folder / "m-inside" / "secret.env").write_text("KEY")
    (folder / "m-inside" / "NOTICE").symlink_to("secret.env")
    copy("m-recipe", **{"recipe.json": ""})
    copy("m-unfinished", **{"recipe.json": '{"base": "b", "finished": false}'})
    copy("m-results", **{"results.json": '{"records": 5}'})
    copy("m-results-cut", **{"results.json": "{"})
    copy("m-link")
    (folder / "m-link" / "vocab.txt").symlink_to(folder / "file")
    copy("m-nan")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, folder / "m-nan" / "model.safetensors")
    copy("m-zero")
    save_file({name: weight * 0 for name, weight in weights.items()}, folder / "m-zero" / "model.safetensors")
    copy("m-lacks")
    lacking = {name: weight for name, weight in weights.items() if "word_embeddings" not in name}
    save_file(lacking, folder / "m-lacks" / "model.safetensors", {"format": "pt"})
    copy(
        "m-layers",
        **{"config.json": json.dumps(json.loads((folder / "model" / "config.json").read_text()) | {"num_hidden_layers": 2})},
    )
    copy("m-shape")
    first = next(iter(weights))
    save_file({**weights, first: weights[first][:3]}, folder / "m-shape" / "model.safetensors", {"format": "pt"})
    adapter = {"base": "nowhere/", "revision": None, "dimension": 8, "lora": False, "fingerprints": {}}
    copy("a-base", **{"instruction_adapter.json": json.dumps(adapter)})
    copy("a-number", **{"instruction_adapter.json": json.dumps({**adapter, "base": 5})})
    copy("a-lacks", **{"instruction_adapter.json": '{"base": "model"}'})
    copy("a-list", **{"instruction_adapter.json": "[]"})
    copy("a-cut", **{"instruction_adapter.json": "{"})
    copy("a-wide", **{"instruction_adapter.json": json.dumps({**adapter, "base": str(folder / "model"), "dimension": 9})})
    copy("a-lora", **{"instruction_adapter.json": json.dumps({**adapter, "base": str(folder / "model"), "lora": True})})
    router = json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.router.Router"}])
    copy("r-lacks", **{"modules.json": router, "router_config.json": "{}"})
    copy("r-none", **{"modules.json": router})
    copy("r-list", **{"modules.json": router, "router_config.json": "[]"})


def save_model(folder: Path, words: list[str]) -> None:
    """A model of eight dimensions and few words."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = folder.with_name("backbone")
    BertModel(config).save_pretrained(backbone)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(backbone)
    modules = [Transformer(str(backbone), max_seq_length=64), Pooling(8, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    load_instruction_model(folder).save_pretrained(str(folder))
    shutil.rmtree(backbone)
    (folder / "README.md").unlink()
