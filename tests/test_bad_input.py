"""What nobody should give to a command: one line that names the thing and the remedy, and nothing is changed."""

import http.server
import os
import shlex
import socket
import threading
from pathlib import Path

import pytest

from tests import bad_input
from tests.commands import call, error_line

pytestmark = pytest.mark.filterwarnings("ignore")

RECORDS = [
    ("empty.jsonl", "empty.jsonl: there are no records", "name other data"),
    ("blank.jsonl", "blank.jsonl: there are no records", "name other data"),
    ("list.jsonl", "list.jsonl, row 1", "write one a line"),
    ("cut.jsonl", "cut.jsonl, row 3", "mend it"),
    ("number.jsonl", "number.jsonl, row 4", "write one a line"),
    ("deep.jsonl", "deep.jsonl, row 1", "flatten it"),
    ("digits.jsonl", "digits.jsonl, row 1", "write it as text"),
    ("nan.jsonl", "nan.jsonl, row 1", "write null"),
    ("surrogate.jsonl", "surrogate.jsonl, row 1", "take it out"),
    ("missing.jsonl", "missing.jsonl, row 1", "'document' is missing"),
    ("null.jsonl", "null.jsonl, row 2, column 'document'", "mend the row"),
    ("nothing.jsonl", "nothing.jsonl, row 2, column 'instruction_positive'", "empty"),
    ("number-in-text.jsonl", "number-in-text.jsonl, row 2, column 'document'", "expected text"),
    ("list-in-text.jsonl", "list-in-text.jsonl, row 2, column 'topic'", "expected text"),
    ("same.jsonl", "same.jsonl, row 1, column 'instruction_negative'", "the same as"),
    ("half.jsonl", "half.jsonl, row 2, column 'query_negative'", "both or neither"),
    ("string.json", "string.json, row 1", "write one a line"),
    ("object-of-lists.json", "object-of-lists.json", "expected text"),
    ("numbers.json", "numbers.json, row 1", "write one a line"),
    ("pairs.csv", "pairs.csv", "inf-ir build --pairs pairs.csv"),
    ("ragged.csv", "ragged.csv, row 1", "in double quotes"),
    ("twice.csv", "twice.csv, header", "rename one"),
    ("quote.csv", "quote.csv, row 1", "double quotes"),
    ("header.csv", "header.csv: there are no records", "name other data"),
    ("utf16.jsonl", "utf16.jsonl, row 1", "save the file in UTF-8"),
    ("latin.jsonl", "latin.jsonl, row 1", "save the file in UTF-8"),
    ("nul.jsonl", "nul.jsonl, row 4", "save the file in UTF-8"),
    ("cut.jsonl.gz", "cut.jsonl.gz", "copy it again"),
    ("no-gzip.jsonl.gz", "no-gzip.jsonl.gz", "copy it again"),
    ("empty.jsonl.gz", "empty.jsonl.gz", "copy it again"),
    ("cut.parquet", "cut.parquet", "copy it again"),
    ("flip.parquet", "flip.parquet", "copy it again"),
    ("text.parquet", "text.parquet", "copy it again"),
    ("empty.parquet", "empty.parquet", "copy it again"),
    ("dangling.jsonl", "dangling.jsonl", "check the path"),
    ("none.jsonl", "none.jsonl", "check the path"),
    ("none/x/y", "none/x/y", "check the path"),
    ("table.xlsx", "table.xlsx", "expected a .jsonl"),
    ("file", "file", "expected a .jsonl"),
    ("''", "'': no such file", "check the path"),
    ("[b].jsonl", "[b].jsonl, row 1", "mend it"),
    ("'\x1b[31m.jsonl'", r"\x1b[31m.jsonl, row 1", "mend it"),
    ("empty-folder", "empty-folder", "no .jsonl or .parquet file"),
    ("folder.jsonl", "folder.jsonl", "no .jsonl or .parquet file"),
    ("pictures", "pictures/cat.png", "expected a .jsonl"),
    ("both-tables", "both-tables: the split 'train'", ".parquet"),
    ("saved", "saved", "save it again"),
    ("saved-dict", "saved-dict", "save it again"),
    ("snapshot", "snapshot: the folder holds no .jsonl", "load_dataset reads none"),
    ("beir", "beir", "inf-ir build --pairs beir"),
    ("key-twice.jsonl", "key-twice.jsonl, row 1", "two keys 'document'"),
    ("saved-number", "saved-number", "save it again"),
    ("column-twice.parquet", "column-twice.parquet", "two columns 'document'; rename one"),
    ("column-twice.arrow", "column-twice.arrow", "two columns 'document'; rename one"),
]
"""What is no InF-IR records: its name, what the line says of it, and of the remedy."""

READERS = [
    "inf-embed train --output out --data {}",
    "inf-embed evaluate model --json out.json --data {}",
    "inf-embed passages --output out.jsonl --data {}",
    "inf-ir analyze --output out {}",
    "inf-ir check --json out.json {}",
    "inf-ir publish --repo user/name {}",
    "inf-ir judge --model model --kind cross-encoder --labels out.jsonl {}",
]


OF_CORPORA = [
    "search model --query sky",
    "playground model --port {free}",
    "space --repo user/name",
    "verify {html} --index same.npy",
]
OF_VECTORS = ["evaluate model", "train --update queries --base model --frozen-layers 0 --output out"]


def rows_of_records():
    """Each of these with one command, so that every command meets a seventh of each kind."""
    for number, (name, *parts) in enumerate(RECORDS):
        yield (READERS[number % len(READERS)].format(name), *parts)


ROWS = [
    *rows_of_records(),
    # a split
    ("inf-embed evaluate model --data splits", "splits: name a split", "dev, train"),
    ("inf-embed evaluate model --data splits --split nope", "'nope'", "it has"),
    ("inf-embed evaluate model --split nope", "'nope'", "test, train, validation"),
    ("inf-ir judge mini --model m --kind reranker --labels out --split nope", "'nope'", "it has"),
    ("inf-ir analyze mini --output out --split nope", "'nope'", "it has"),
    ("inf-ir judge mini --model model --kind reranker --labels out.jsonl", "name a split", "train"),
    # a model
    ("inf-embed evaluate m-cut", "m-cut/model.safetensors", "save or download the model again"),
    ("inf-embed evaluate m-lost", "m-lost/model.safetensors", "save or download the model again"),
    ("inf-embed card m-empty", "m-empty/model.safetensors", "save or download the model again"),
    ("inf-embed push m-header --repo user/name", "m-header/model.safetensors", "save or download the model again"),
    ("inf-embed search m-weightless --corpus two.txt --query sky", "m-weightless", "model.safetensors"),
    (
        "inf-embed export m-pickle --format merged --output out",
        "m-pickle/pytorch_model.bin", "save the model in safetensors",
    ),
    ("inf-embed evaluate m-tokenless", "m-tokenless", "save or download the model again"),
    ("inf-embed serve m-tokens --port 0", "m-tokens/tokenizer.json", "save or download the model again"),
    ("inf-embed evaluate m-config", "m-config", "config.json"),
    ("inf-embed evaluate m-configless", "m-configless", "config.json"),
    ("inf-embed evaluate m-kind", "m-kind", "no such thing"),
    ("inf-embed evaluate m-code", "m-code", "--trust-remote-code"),
    ("inf-embed evaluate m-modules", "m-modules/modules.json", "restore the file"),
    ("inf-embed card m-dict", "m-dict/modules.json", "restore the file"),
    ("inf-embed push m-none --repo user/name", "m-none/modules.json", "restore the file"),
    ("inf-embed evaluate m-numbers", "m-numbers/modules.json", "restore the file"),
    ("inf-embed export m-pathless --format merged --output out", "m-pathless/modules.json", "restore the file"),
    ("inf-embed evaluate m-number", "m-number", "again"),
    ("inf-embed evaluate m-class", "m-class", "--trust-remote-code"),
    ("inf-embed evaluate m-deep", "m-deep/modules.json", "restore the file"),
    ("inf-embed evaluate m-settings", "m-settings", "again"),
    ("inf-embed evaluate m-prompts", "m-prompts", "again"),
    ("inf-embed evaluate m-pooling", "m-pooling", "again"),
    ("inf-embed evaluate m-poolingless", "m-poolingless", "again"),
    ("inf-embed evaluate m-instruction", "m-instruction/instruction_config.json", "restore the file"),
    ("inf-embed evaluate m-template", "m-template/instruction_config.json", "for example"),
    ("inf-embed evaluate m-length", "m-length/instruction_config.json", "again"),
    ("inf-embed evaluate m-lengths", "m-lengths/instruction_config.json", "again"),
    ("inf-embed evaluate m-true", "m-true/instruction_config.json", "again"),
    ("inf-embed evaluate m-weight", "m-weight/instruction_config.json", "again"),
    ("inf-embed evaluate m-limit-zero", "m-limit-zero", "max_seq_length must be"),
    ("inf-embed search m-limit-negative --corpus two.txt --query sky", "m-limit-negative", "max_seq_length must be"),
    ("inf-embed train --base m-limit-more --data records.jsonl --output out", "m-limit-more", "64 positions"),
    ("inf-embed evaluate m-limit-huge", "m-limit-huge", "max_seq_length must be"),
    ("inf-embed serve m-limit-text --port 0", "m-limit-text", "again"),
    ("inf-embed evaluate m-words", "m-words", "'unheard-of'"),
    ("inf-embed evaluate m-sources", "m-sources/recipe.json", "restore the file"),
    ("inf-embed card m-count", "m-count/recipe.json", "restore the file"),
    ("inf-embed push m-bases --repo user/name", "m-bases/recipe.json", "restore the file"),
    ("inf-embed push m-latin --repo user/name", "m-latin/README.md", "UTF-8"),
    ("inf-embed push m-inside --repo user/name", "m-inside/NOTICE", "put the file itself there"),
    ("inf-embed search m-lacks --corpus two.txt --query sky", "model.safetensors lacks weights", "again"),
    ("inf-embed export m-layers --format merged --output out", "model.safetensors lacks weights", "again"),
    ("inf-embed evaluate m-recipe", "m-recipe/recipe.json", "restore the file"),
    ("inf-embed card m-recipe", "m-recipe/recipe.json", "restore the file"),
    ("inf-embed push m-recipe --repo user/name", "m-recipe/recipe.json", "restore the file"),
    ("inf-embed push m-unfinished --repo user/name", "m-unfinished", "give the same train command again"),
    ("inf-embed space m-unfinished --repo user/name", "m-unfinished", "give the same train command again"),
    ("inf-embed card m-results", "m-results/results.json", "write it again, or delete it"),
    ("inf-embed push m-results-cut --repo user/name", "m-results-cut/results.json", "restore the file"),
    ("inf-embed push m-link --repo user/name", "m-link/vocab.txt", "put the file itself there"),
    ("inf-embed space m-pickle --repo user/name", "m-pickle/pytorch_model.bin", "save the model in safetensors"),
    ("inf-embed evaluate m-nan --json out.json", "not finite", "train it again, or take another"),
    ("inf-embed evaluate m-zero --json out.json", "same embedding", "train it again, or take another"),
    ("inf-embed search m-nan --corpus two.txt --query sky", "not finite", "train it again, or take another"),
    ("inf-embed export m-nan --format merged --output out", "not finite", "train it again"),
    ("inf-embed train --base m-nan --data records.jsonl --frozen-layers 0 --output out", "not finite", "train it again"),
    ("inf-embed evaluate m-shape", "m-shape", "again"),
    ("inf-embed evaluate a-base --data records.jsonl", "nowhere/", "check the name"),
    ("inf-embed serve a-base --port 0", "nowhere/", "check the name"),
    ("inf-embed search a-number --corpus two.txt --query sky", "a-number/instruction_adapter.json", "restore the file"),
    ("inf-embed evaluate a-lacks", "a-lacks/instruction_adapter.json", "restore the file"),
    ("inf-embed evaluate a-list", "a-list/instruction_adapter.json", "restore the file"),
    ("inf-embed export a-cut --format merged --output out", "a-cut/instruction_adapter.json", "restore the file"),
    ("inf-embed evaluate a-wide", "9 dimensions", "this base model's have 8"),
    ("inf-embed evaluate a-lora", "other weights", "take that revision"),
    ("inf-embed evaluate r-lacks", "r-lacks", "router_config.json"),
    ("inf-embed evaluate r-none", "r-none", "router_config.json"),
    ("inf-embed evaluate r-list", "r-list", "router_config.json"),
    ("inf-embed evaluate none", "none: ", "check the name"),
    ("inf-embed evaluate ./none", "./none", "check the name"),
    ("inf-embed evaluate ''", "''", "check the name"),
    ("inf-embed evaluate ' '", "' '", "check the name"),
    ("inf-embed evaluate file", "file is a file", "name the folder of a model"),
    ("inf-embed evaluate empty-folder", "empty-folder", "download the model again"),
    ("inf-embed evaluate a/b/c", "a/b/c", "check the name"),
    ("inf-embed evaluate '[/b]'", "[/b]", "check the name"),
    ("inf-embed evaluate '\x1b[31m'", r"\x1b[31m", "check the name"),
    ("inf-embed card empty-folder", "empty-folder: there is no saved model", "name a model's folder"),
    ("inf-embed card file", "file", "name a model's folder"),
    ("inf-embed push empty-folder --repo user/name", "empty-folder: there is no saved model", "name a model's folder"),
    ("inf-embed push file --repo user/name", "file", "name a model's folder"),
    ("inf-embed space file --repo user/name", "file", "name a model's folder"),
    ("inf-embed space none --repo user/name", "none", "name a model's folder"),
    ("inf-embed playground none --port {free}", "none", "check the name"),
    ("inf-embed playground model --compare none --port {free}", "none", "check the name"),
    ("inf-embed serve none --port 0", "none", "check the name"),
    ("inf-embed export none --format merged --output out", "none", "check the name"),
    ("inf-embed train --base none --data records.jsonl --output out", "none", "check the name"),
    ("inf-embed demo --base none --output out", "none", "check the name"),
    ("inf-embed verify {html}/v1 --model none", "{html}", "OpenAI-compatible server?"),
    ("inf-ir analyze records.jsonl --output out --model none", "none", "check the name"),
    ("inf-ir analyze records.jsonl --output out --model m-cut", "m-cut/model.safetensors", "again"),
    ("inf-ir judge records.jsonl --model none --kind cross-encoder --labels out.jsonl", "none", "check the name"),
    ("inf-ir judge records.jsonl --model none --kind reranker --labels out.jsonl", "none", "check the name"),
    ("inf-ir judge records.jsonl --model m-cut --kind cross-encoder --labels out.jsonl", "m-cut", "again"),
    ("inf-ir judge records.jsonl --model m-config --kind reranker --labels out.jsonl", "m-config", "again"),
    (
        "inf-ir judge records.jsonl --model model --kind reranker --labels out.jsonl",
        "lacks weights", "again",
    ),
    # a corpus
    *(
        (f"inf-embed {command} --corpus {corpus}", corpus, remedy)
        for number, (corpus, remedy) in enumerate(
            (
                ("one.txt", "at least two"),
                ("blank.txt", "at least two"),
                ("empty.jsonl", "at least two"),
                ("untexted.jsonl", "expected a column text"),
                ("empty-text.jsonl", "take the row out"),
                ("number-text.jsonl", "row 2, column 'text': expected text, got int"),
                ("title.jsonl", "row 2, column 'title': expected text, got dict"),
                ("none.txt", "check the path"),
                ("empty-folder", "check the path"),
                ("file", "expected a .jsonl"),
                ("cut.jsonl.gz", "copy it again"),
                ("utf16.jsonl", "UTF-8"),
                ("flip.parquet", "again"),
                ("cut.arrow", "again"),
                ("deep.jsonl", "flatten it"),
                ("folder.jsonl", "check the path"),
            )
        )
        for command in (OF_CORPORA[number % 4],)
    ),
    # an index
    *(
        (f"inf-embed search model --corpus two.txt --query sky --index {index}", index, remedy)
        for index, remedy in (
            ("short.npy", "2 passages in 8 dimensions"),
            ("wide.npy", "2 passages in 8 dimensions"),
            ("flat.npy", "2 passages in 8 dimensions"),
            ("text.npy", "make it again"),
            ("complex.npy", "make it again"),
            ("object.npy", "make it again"),
            ("empty.npy", "make it again"),
            ("cut.npy", "make it again"),
            ("header.npy", "make it again"),
            ("cut.npz", "make it again"),
            ("none.npz", "make it again"),
            ("empty.npz", "make it again"),
            ("junk.faiss", "expected a .npy or .npz file or a FAISS index"),
            ("none.npy", "does not exist"),
            ("folder.npy", "is a directory"),
        )
    ),
    ("inf-embed search model --corpus two.txt --query sky --index nan.npy", "2 of 2 passages", "not finite"),
    ("inf-embed search model --corpus two.txt --query sky --index same.npy", "the same embedding", "train it again"),
    ("inf-embed search model --corpus two.txt --query sky --index huge.npy", "2 of 2 passages", "not finite"),
    ("inf-embed search model --corpus two.txt --query sky --index nan.faiss", "2 of 2 passages", "not finite"),
    ("inf-embed search model --corpus two.txt --query sky --index same.faiss", "the same embedding", "train it again"),
    ("inf-embed verify {html} --model model --index none.npy --corpus two.txt", "none.npy", "check the path"),
    ("inf-embed verify {html} --model model --index file --corpus two.txt", "file: expected vectors", ".npy"),
    ("inf-embed verify {html} --model model --index same.npy", "--corpus", "give both"),
    ("inf-embed verify {html} --model model --corpus two.txt", "--index", "give both"),
    # vectors from elsewhere
    *(
        (f"inf-embed {command} --data records.jsonl --passage-embeddings {source}", source.partition(".")[0], remedy)
        for number, (source, remedy) in enumerate(
            (
                ("e-column.parquet", "'embedding' is missing"),
                ("e-lacks.parquet", "no embedding of the passage"),
                ("e-nan.parquet", "not finite"),
                ("e-text.parquet", "expected as many numbers"),
                ("e-uneven.parquet", "expected as many numbers"),
                ("e-empty.parquet", "embed it again"),
                ("e-narrow.parquet", "2 dimensions"),
                ("e-lacks.parquet", "no embedding of the passage"),
                ("flip.parquet", "again"),
                ("short.npy", "expected a row for each"),
                ("text.npy", "make it again"),
                ("empty.npy", "make it again"),
                ("none.npy", "check the path"),
                ("none.parquet", "check the path"),
                ("file", "expected a"),
                ("e-list.parquet", "column 'text': expected text, got list"),
            )
        )
        for command in (OF_VECTORS[number % 2],)
    ),
    # where something is written
    ("inf-embed train --output file --data records.jsonl", "file is a file", "name another folder"),
    ("inf-embed train --output file/x --data records.jsonl", "file is a file", "name another folder"),
    ("inf-embed train --output occupied {train}", "occupied is not empty", "name another"),
    ("inf-embed train --output run-damaged {train}", "run-damaged/recipe.json", "restore the file"),
    ("inf-embed train --output run-list {train}", "run-list/recipe.json", "restore the file"),
    ("inf-embed train --output run-foreign {train}", "run-foreign", "name another"),
    ("inf-embed train --output run-finished {train}", "run-finished", "--overwrite"),
    ("inf-embed train --output run-finished --overwrite --base run-finished", "is in run-finished", "name another"),
    ("inf-embed train --output splits --overwrite --data splits/train.jsonl", "train.jsonl is in splits", "name another"),
    ("inf-embed train --output run-damaged --overwrite {train}", "run-damaged", "restore"),
    ("inf-embed train --output occupied --overwrite {train}", "occupied", "name another"),
    ("inf-embed train --output '' --data records.jsonl", "output_dir", "name a folder"),
    ("inf-embed demo --output occupied", "occupied is not empty", "name another"),
    ("inf-embed demo --output run-finished", "run-finished", "--overwrite"),
    ("inf-embed demo --output run-damaged", "run-damaged/recipe.json", "restore the file"),
    ("inf-embed demo --output file", "file is a file", "name another"),
    ("inf-embed export model --format merged --output occupied", "occupied exists", "--overwrite"),
    ("inf-embed export model --format merged --output occupied --overwrite", "occupied", "name another"),
    ("inf-embed export model --format merged --output file", "file is a file", "name another"),
    ("inf-embed export model --format merged --output model --overwrite", "model holds", "name another"),
    ("inf-embed evaluate model --json empty-folder", "empty-folder is a folder", "name a file"),
    ("inf-embed evaluate model --json file/x.json", "no folder file", "make it, or name another"),
    ("inf-embed evaluate model --json /proc/x.json", "/proc", "name another place"),
    ("inf-embed evaluate model --benchmark narratives --output file", "file is a file", "name another"),
    ("inf-embed evaluate model --json dangling-output.json", "there is no folder", "make it, or name another"),
    ("inf-embed evaluate model --json full.json", "/dev/full is a device", "name a file"),
    ("inf-embed passages --output full.json", "/dev/full is a device", "name a file"),
    ("inf-ir check records.jsonl --json full.json", "/dev/full is a device", "name a file"),
    ("inf-embed evaluate model --data 'b\udcff.jsonl'", r"'b\udcff.jsonl' is not UTF-8", "rename a file"),
    ("inf-ir check 'b\udcff.jsonl'", r"'b\udcff.jsonl' is not UTF-8", "rename a file"),
    ("inf-embed search model --corpus two.txt --query 'a\udcff'", r"'a\udcff' is not UTF-8", "write it in UTF-8"),
    ("inf-embed passages --output empty-folder", "empty-folder is a folder", "name a file"),
    ("inf-embed ablate a-argument.yaml --output file", "file is a file", "name another"),
    ("inf-ir build --pairs pairs.csv --output file {build}", "file is a file", "name another"),
    ("inf-ir build --pairs pairs.csv --output occupied {build}", "occupied is not empty", "name another"),
    ("inf-ir analyze records.jsonl --output file", "file is a file", "name another"),
    ("inf-ir check records.jsonl --json empty-folder", "empty-folder is a folder", "name a file"),
    ("inf-ir judge records.jsonl --model m --labels empty-folder", "empty-folder is a folder", "name a file"),
    ("inf-ir agreement l-apart.jsonl --human ann --chart x.txt", "x.txt is no picture", ".png"),
    ("inf-ir agreement l-apart.jsonl --human ann --chart empty-folder/n/x.png", "no folder", "make it"),
    # pairs and the rest of a build
    *(
        (f"inf-ir build --output out {{build}} --pairs {name}", thing, remedy)
        for name, thing, remedy in (
            ("empty.jsonl", "empty.jsonl: there are no pairs", "name other --pairs"),
            ("header.csv", "header.csv: there are no pairs", "name other --pairs"),
            ("other.csv", "'query'", "--query-column"),
            ("ragged.csv", "ragged.csv, row 1", "double quotes"),
            ("number-pairs.jsonl", "number-pairs.jsonl, row 1, column 'query'", "expected text, got int"),
            ("blank-cell.csv", "blank-cell.csv, row 2, column 'passage'", "empty"),
            ("surrogate.jsonl", "surrogate.jsonl, row 1", "take it out"),
            ("deep.jsonl", "deep.jsonl, row 1", "flatten"),
            ("cut.parquet", "cut.parquet", "again"),
            ("flip.parquet", "flip.parquet", "again"),
            ("utf16.jsonl", "utf16.jsonl, row 1", "UTF-8"),
            ("cut.jsonl.gz", "cut.jsonl.gz", "again"),
            ("none.csv", "none.csv: no such file", "check the path"),
            ("none", "none: no such file", "check the path"),
            ("file", "file", "expected a .jsonl"),
            ("empty-folder", "empty-folder", "BEIR"),
            ("beir", "beir", "qrels"),
            ("beir-score", "beir-score/qrels.tsv, row 2", "no number"),
            ("beir-nan", "beir-nan/qrels.tsv, row 1", "finite"),
            ("beir-cells", "beir-cells/qrels.tsv, row 1", "expected"),
            ("beir-unknown", "beir-unknown/qrels.tsv, row 1", "no text for 'z'"),
            ("beir-zero", "there are no pairs", "name other --pairs"),
            ("user/none", "user/none", "no such"),
        )
    ),
    ("inf-ir build --pairs pairs.csv --output out", "no key", "OPENAI_API_KEY"),
    ("inf-ir build --pairs pairs.csv --output out {build} --query-column text", "'text'", "--query-column"),
    ("inf-ir build --pairs pairs.csv --output out --base-url {html} --model own", "'own'", "--price own="),
    ("inf-ir build --pairs pairs.csv --output out {build} --judge-mode often", "often", "choice"),
    ("inf-ir build --pairs pairs.csv --output out {build} --effort enormous", "enormous", "medium"),
    ("inf-ir build --pairs pairs.csv --output out {build} --types nope=1", "'nope'", "audience"),
    ("inf-ir build --pairs pairs.csv --output out {build} --types audience=-1", "audience=-1", "expected"),
    ("inf-ir build --pairs pairs.csv --output out {build} --types audience=0", "weights", "positive"),
    ("inf-ir build --pairs pairs.csv --output out {build} --types ''", "instruction type ''", "audience"),
    ("inf-ir build --pairs pairs.csv --output out {build} --price cheap", "--price cheap", "as gpt-4o=2.5,10"),
    ("inf-ir build --pairs pairs.csv --output out {build} --price m=nan,1", "--price m=nan,1", "as gpt-4o=2.5,10"),
    ("inf-ir build --pairs pairs.csv --output out {build} --price =1,1", "--price =1,1", "as gpt-4o=2.5,10"),
    *(
        (f"inf-ir build --pairs pairs.csv --output out {{build}} --prices {name}", name, remedy)
        for name, remedy in (
            ("p-list.json", "'models'"),
            ("p-none.json", "'models'"),
            ("p-text.json", "'models'"),
            ("p-names.json", "'models'"),
            ("p-one.json", "expected [input, output]"),
            ("p-negative.json", "expected [input, output]"),
            ("p-cut.json", "not valid JSON"),
            ("utf16.jsonl", "UTF-8"),
            ("deep.jsonl", "flatten"),
            ("empty-folder", "is a directory"),
        )
    ),
    ("inf-ir build --pairs pairs.csv --output out --local none.gguf", "none.gguf", "USER/REPO/FILE.gguf"),
    ("inf-ir build --pairs pairs.csv --output out --local user/none/x.gguf", "user/none/x.gguf", "check your connection"),
    ("inf-ir build --pairs pairs.csv --output out --local model.gguf --batch", "--local", "leave out"),
    ("inf-ir build --pairs pairs.csv --output out {build} --batch --executor local", "--batch", "no executor"),
    ("inf-ir build --pairs pairs.csv --output out {build} --tasks 3", "--tasks", "--executor"),
    ("inf-ir build --pairs pairs.csv --output out {build} --executor boat", "boat", "slurm"),
    ("inf-ir build --pairs pairs.csv --output out {build} --executor slurm", "slurm", "--slurm-partition"),
    ("inf-ir build --pairs pairs.csv --output out --base-url nowhere", "nowhere", "http://localhost:8000/v1"),
    ("inf-ir build --pairs pairs.csv --output damaged-build {build}", "damaged-build/work/build.json", "delete it"),
    ("inf-ir build --pairs pairs.csv --output old-build {build}", "old-build/work/build.json", "name another"),
    ("inf-ir repair none", "none", "name the --output of inf-ir build"),
    ("inf-ir repair empty-folder", "empty-folder", "name the --output of inf-ir build"),
    ("inf-ir repair no-build", "no-build", "name the --output of inf-ir build"),
    ("inf-ir repair damaged-build", "damaged-build/work/build.json", "delete it"),
    ("inf-ir repair old-build", "old-build/work/build.json", "name another"),
    ("inf-ir repair file", "file", "ledger"),
    # servers
    ("inf-embed verify {closed} --model model", "{closed}", "check the address"),
    ("inf-embed verify {html} --model model", "{html}", "OpenAI-compatible server?"),
    ("inf-embed verify {error} --model model", "{error}", "401"),
    ("inf-embed verify {list} --model model", "{list}", "no embeddings"),
    ("inf-embed verify {deep} --model model", "{deep}", "OpenAI-compatible server?"),
    ("inf-embed verify {short} --model model", "{short}", "1 texts were sent"),
    ("inf-embed verify {cut} --model model", "{cut}", "check the address"),
    ("inf-embed verify {latin} --model model", "{latin}", "OpenAI-compatible server?"),
    ("inf-embed verify nowhere --model model", "nowhere", "http://localhost:8000/v1"),
    ("inf-embed verify http://[::1/v1 --model model", "http://[::1/v1", "no address"),
    ("inf-embed verify ftp://host --model model", "ftp://host", "no address"),
    ("inf-embed verify {html} --only both", "both", "instructed"),
    ("inf-embed serve model --port {busy}", "port {busy}", "name another --host or --port"),
    ("inf-embed serve model --port -1", "--port", "--help"),
    ("inf-embed serve model --port many", "--port", "integer"),
    ("inf-embed serve model --host 300.1.1.1", "300.1.1.1", "name another --host"),
    ("inf-embed serve model --host ' '", "--host", "empty"),
    ("inf-embed serve model --host 'a b'", "a b", "name another --host"),
    ("inf-embed serve model --host ::zz", "::zz", "name another --host"),
    (f"inf-embed serve model --host {'a' * 70}", "aaa", "name another --host"),
    ("inf-embed serve model --host ü..ü", "ü..ü", "name another --host"),
    ("inf-embed playground model --port {busy}", "port {busy}", "choose another with --port"),
    ("inf-embed playground model --port 0", "--port", "greater than or equal to 1"),
    (
        "inf-ir judge records.jsonl --model m --price m=0,0 --labels out.jsonl --base-url http://a:99999",
        "99999", "no address",
    ),
    ("inf-ir publish records.jsonl --repo user/name", "records.jsonl", "as inf-ir build writes it"),
    # labels, topics, results
    ("inf-ir agreement none.jsonl --human ann", "none.jsonl", "check the path"),
    ("inf-ir agreement empty-folder --human ann", "empty-folder", "check the path"),
    ("inf-ir agreement l-none.jsonl --human ann", "l-none.jsonl", "name another file"),
    ("inf-ir agreement l-column.jsonl --human ann", "l-column.jsonl, row 1", "'annotator' is missing"),
    ("inf-ir agreement l-blank.csv --human ann", "l-blank.csv, row 1", "'label' is missing or empty"),
    ("inf-ir agreement l-twice.jsonl --human ann", "l-twice.jsonl, row 2", "take one out"),
    ("inf-ir agreement l-one.jsonl --human ann", "no annotator shares", "another --human"),
    ("inf-ir agreement l-apart.jsonl --human ann", "no annotator shares", "another --human"),
    ("inf-ir agreement l-one.jsonl --human '[/b]'", "'[/b]'", "there are ann"),
    ("inf-ir agreement l-one.jsonl", "--human", "--help"),
    ("inf-ir agreement file --human ann", "file", "expected a .jsonl"),
    ("inf-ir agreement digits.jsonl --human ann", "digits.jsonl, row 1", "JSON"),
    ("inf-embed evaluate model --benchmark narratives --data none.jsonl", "none.jsonl", "no such file of topics"),
    ("inf-embed evaluate model --benchmark narratives --data t-list.jsonl", "t-list.jsonl, row 1", "write one a line"),
    ("inf-embed evaluate model --benchmark narratives --data t-key.jsonl", "t-key.jsonl, row 1", "is missing"),
    ("inf-embed evaluate model --benchmark narratives --data t-docs.jsonl", "t-docs.jsonl, row 1", "list of documents"),
    ("inf-embed evaluate model --benchmark narratives --data empty.jsonl", "empty.jsonl", "no topics"),
    ("inf-embed evaluate model --benchmark narratives --data empty-folder", "empty-folder", "no such file of topics"),
    ("inf-embed evaluate model --benchmark nope", "'nope'", "narratives"),
    ("inf-embed evaluate model --benchmark narratives --tasks nope", "'nope'", "it has"),
    ("inf-embed evaluate model --benchmark FollowIR --data records.jsonl", "FollowIR", "only 'narratives'"),
    *(
        (f"inf-embed card model --results {name}", name, remedy)
        for name, remedy in (
            ("r-list.json", "write it again"),
            ("r-none.json", "write it again"),
            ("r-rows.json", "write it again"),
            ("r-numbers.json", "write it again"),
            ("r-model.json", "write it again"),
            ("r-cut.json", "write it again"),
            ("r-lacks.json", "write it again"),
            ("r-other.json", "no results of model"),
            ("utf16.jsonl", "write it again"),
            ("deep.jsonl", "write it again"),
            ("empty-folder", "no results of model"),
            ("none.json", "check the path"),
            ("file", "write it again"),
        )
    ),
    # settings of a training and an ablation
    ("inf-embed train --output out --speed 5", "--speed", "--help"),
    ("inf-embed train --output out --learnign-rate 5", "--learnign-rate", "did you mean --learning-rate"),
    ("inf-embed train --output out --learning-rate fast", "--learning-rate", "--help"),
    ("inf-embed train --output out --learning-rate nan", "learning_rate", "finite"),
    ("inf-embed train --output out --learning-rate -1", "learning_rate", "positive"),
    ("inf-embed train --output out --num-train-epochs inf", "num_train_epochs", "finite"),
    ("inf-embed train --output out --num-train-epochs -1", "num_train_epochs", "must"),
    ("inf-embed train --output out --seed -1", "seed", "2**32"),
    ("inf-embed train --output out --seed 99999999999999999999", "seed", "2**32"),
    ("inf-embed train --output out --seed 1.5", "--seed", "--help"),
    (f"inf-embed train --output out --seed {'9' * 5000}", "--seed", "--help"),
    ("inf-embed train --output out --objective best", "'best'", "multi_P_I"),
    ("inf-embed train --output out --update all-of-it", "'all-of-it'", "there are"),
    (f"inf-embed train --output out --max-steps {'9' * 400}", "max_steps", ""),
    ("inf-embed train --output out --max-steps 0", "max_steps", "positive"),
    ("inf-embed train --output out --max-records 0", "max_records", "positive"),
    ("inf-embed train --output out --per-device-train-batch-size 0", "per_device_train_batch_size", "positive"),
    ("inf-embed train --output out --dropout 1", "dropout", "less than 1"),
    ("inf-embed train --output out --dropout nan", "dropout", "finite"),
    ("inf-embed train --output out --scale 0", "scale", "positive"),
    ("inf-embed train --output out --template '{query}'", "{query}", "{instruction}"),
    ("inf-embed train --output out --template '{query.__class__} {instruction}'", "template", "for example"),
    ("inf-embed train --output out --lr-scheduler-type none", "none", "linear"),
    ("inf-embed train --output out --optim none", "none", "adamw"),
    ("inf-embed train --output out --lr-scheduler-kwargs {", "'{'", "JSON"),
    ("inf-embed train --output out --update queries --frozen-layers 1", "frozen_layers", "leave"),
    ("inf-embed train --output out --update queries --encoders separate", "encoders", "leave"),
    ("inf-embed train --output out --push-to-hub", "--push-to-hub", "--hub-model-id"),
    ("inf-embed train --output out --push-to-hub --hub-model-id name", "name", "user/name"),
    ("inf-embed train --output out --report-to nobody", "nobody", "pip install"),
    ("inf-embed train --output out --frozen-layers 9 --base model --data records.jsonl", "frozen_layers", "1 layers"),
    ("inf-embed average none --output out", "none", "check the path"),
    ("inf-embed average model --output out", "model", "name folders that inf-embed train wrote"),
    ("inf-embed average model --output occupied", "model", "name folders"),
    ("inf-embed average model --output out --step 0", "--step", "greater than"),
    ("inf-embed average model --output out --step nan", "--step", "greater than"),
    ("inf-embed train --output out --config none.yaml", "none.yaml", "check the path"),
    ("inf-embed train --output out --config empty-folder", "empty-folder", "check the path"),
    ("inf-embed train --output out --config empty.yaml", "empty.yaml", "expected names and their values"),
    ("inf-embed train --output out --config list.yaml", "list.yaml", "expected names and their values"),
    ("inf-embed train --output out --config tab.yaml", "tab.yaml", "mend it"),
    ("inf-embed train --output out --config tag.yaml", "tag.yaml", "mend it"),
    ("inf-embed train --output out --config unknown.yaml", "unknown.yaml", "--help-all"),
    ("inf-embed train --output out --config wrong.yaml", "num_train_epochs", "--help"),
    ("inf-embed train --output out --config flip.parquet", "flip.parquet", ""),
    ("inf-embed train --output out --config deep.jsonl", "deep.jsonl", ""),
    ("inf-embed train --output out --config", "--config", "--help"),
    ("inf-embed train --output", "--output", "--help"),
    *(
        (f"inf-embed ablate {name} --output out", thing or name, remedy)
        for name, thing, remedy in (
            ("none.yaml", "", "check the path"),
            ("empty-folder", "", "check the path"),
            ("empty.yaml", "", "expected names and their values"),
            ("list.yaml", "", "expected names and their values"),
            ("tab.yaml", "", "mend it"),
            ("tag.yaml", "", "mend it"),
            ("utf16.jsonl", "", ""),
            ("a-none.yaml", "", "neither a grid nor a cell"),
            ("a-key.yaml", "'gird'", "there are data"),
            ("a-grid.yaml", "", "must be a"),
            ("a-value.yaml", "", "must be a list"),
            ("a-empty.yaml", "", "must be a list"),
            ("a-cell.yaml", "", "must be a mapping"),
            ("a-argument.yaml", "'speed'", "--help"),
            ("a-number.yaml", "", "--help"),
            ("a-type.yaml", "learning_rate", "finite number"),
            ("a-list.yaml", "learning_rate", "finite number"),
            ("a-nan.yaml", "learning_rate", "finite number"),
            ("a-seeds.yaml", "", "different whole numbers"),
            ("a-seed.yaml", "", "different whole numbers"),
            ("a-evaluate.yaml", "'date'", "there are data"),
            ("a-split.yaml", "'nope'", "it has"),
            ("a-data.yaml", "none.jsonl", "check the path"),
            ("a-data-type.yaml", "evaluate", "data must be one source"),
            ("a-data-number.yaml", "", "must be"),
            ("a-plain.yaml", "", "must be"),
            ("a-base.yaml", "none/", "no such"),
        )
    ),
    # arguments
    ("inf-embed fly", "'fly'", "--help"),
    ("inf-ir fly", "'fly'", "--help"),
    ("inf-embed evaluate", "'model'", "--help"),
    ("inf-embed evaluate model other", "other", "--help"),
    ("inf-embed evaluate model --speed 5", "--speed", "--help"),
    ("inf-embed evaluate model --batch-size 0", "--batch-size", "greater than or equal to 1"),
    ("inf-embed evaluate model --batch-size 1e3", "--batch-size", "integer"),
    (f"inf-embed evaluate model --batch-size {'9' * 5000}", "--batch-size", ""),
    ("inf-embed search model --corpus two.txt", "--query", "--help"),
    ("inf-embed search model --corpus two.txt --query ' '", "--query", "empty"),
    ("inf-embed search model --corpus two.txt --query sky --top 0", "--top", "greater than or equal to 1"),
    ("inf-embed search model --corpus two.txt --query sky --top nan", "--top", "integer"),
    ("inf-embed export model --format pdf --output out", "'pdf'", "merged"),
    ("inf-embed export model --format merged --quantize --output out", "--quantize", "leave it out"),
    ("inf-embed demo --records -1", "--records", "greater than or equal to 1"),
    ("inf-embed push model --repo name", "name", "user/name"),
    ("inf-embed push model --repo a/b/c", "a/b/c", "user/name"),
    ("inf-embed push model --repo 'a b/c'", "a b/c", "user/name"),
    ("inf-embed push model --repo '[/x]/y'", "[/x]/y", "user/name"),
    ("inf-embed push model --repo user/name", "user/name", "the Hub cannot be reached"),
    ("inf-embed space --repo name", "name", "user/name"),
    ("inf-embed space --repo user/name --compare model", "model", "on the Hub"),
    ("inf-embed space user/none --repo user/name", "user/none", "the Hub cannot be reached"),
    ("inf-ir publish records.jsonl --repo name", "--repo name", "user/name"),
    pytest.param("inf-ir publish mini --repo user/name", "user/name", "cannot be reached", marks=pytest.mark.slow),
    ("inf-embed push model --repo ../..", "../..", "user/name"),
    ("inf-ir publish build --repo user/name", "build", ""),
    ("inf-ir check build", "build", ""),
    ("inf-ir check records.jsonl --against none.jsonl", "none.jsonl", "check the path"),
    ("inf-ir check records.jsonl --against none.txt", "none.txt", "check the path"),
    ("inf-ir check records.jsonl --against nope", "nope", "no such MTEB task"),
    ("inf-ir check records.jsonl --against deep.jsonl", "deep.jsonl, row 1", "flatten"),
    ("inf-ir analyze records.jsonl --output out --compare none.jsonl", "none.jsonl", "check the path"),
    ("inf-ir analyze same.jsonl --output out", "same.jsonl, row 1", "the same as"),
    ("inf-ir analyze header.csv --output out", "header.csv: there are no records", "name other data"),
    ("inf-ir analyze promptriever.jsonl --output out", "promptriever.jsonl, row 2", "expected a list of passages"),
    (f"inf-ir analyze records.jsonl --output out --limit {10**30}", "--limit", "less than or equal to"),
    (f"inf-ir judge records.jsonl --model m --labels out.jsonl --limit {10**30}", "--limit", "less than or equal to"),
    ("inf-ir analyze records.jsonl --output out --sample 1", "--sample", "greater than or equal to 2"),
    ("inf-ir analyze records.jsonl --output out --limit 0", "--limit", "greater than or equal to 1"),
    ("inf-ir analyze records.jsonl --output out --seed 4294967296", "--seed", "less than or equal"),
    ("inf-ir judge records.jsonl --model m --labels out.jsonl", "'m'", "--price m="),
    ("inf-ir judge records.jsonl --model m --labels out.jsonl --kind human", "human", "cross-encoder"),
    ("inf-ir judge records.jsonl --model m --labels out.jsonl --judge-mode often", "often", "pairwise"),
    (
        "inf-ir judge records.jsonl --model m --labels out.jsonl --price m=0,0 --effort enormous --base-url {html}",
        "enormous", "medium",
    ),
    ("inf-ir judge records.jsonl --model m --labels out.jsonl --limit 0", "--limit", "greater than or equal to 1"),
    ("inf-ir judge records.jsonl --model m --labels l-column.jsonl --kind cross-encoder", "", ""),
    *(
        (f"inf-ir build --pairs pairs.csv --output out {{build}} --{option} {value}", f"--{option}", "")
        for option, values in (
            ("limit", ("0", "-5", "x", 10**30)),
            ("sample", ("0", "1.5", 10**30)),
            ("seed", ("-1", "x")),
            ("temperature", ("nan", "-1", "3", "inf")),
            ("max-passage-words", ("0",)),
            ("concurrency", ("0", "99999")),
            ("rpm", ("0",)),
            ("tpm", ("-1",)),
            ("timeout", ("0", "nan", "inf")),
            ("max-cost", ("-1", "nan", "inf")),
            ("max-requests", ("0",)),
            ("max-failed", ("1.1", "nan")),
            ("batch-poll", ("-1", "nan")),
            ("batch-tokens", ("0",)),
            ("tasks", ("0",)),
            ("workers", ("0",)),
        )
        for value in values
    ),
]  # fmt: skip


class Answers(http.server.BaseHTTPRequestHandler):
    """What servers say that serve no embeddings, by the first part of the path."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        body = {
            "html": b"<html>Welcome</html>",
            "error": b"no \x1b[31m key",
            "list": b"[1]",
            "deep": b"[" * 50_000,
            "short": b'{"data": []}',
            "cut": b"{",
            "latin": b'"\xe9"',
        }[kind]
        self.send_response(401 if kind == "error" else 200)
        self.send_header("Content-Length", str(len(body) + 10 * (kind == "cut")))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory, few_records):
    """The folder of bad things, and what stands for braces in the table."""
    folder = tmp_path_factory.mktemp("bad")
    bad_input.make(folder, few_records.to_list()[:3])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with socket.socket() as busy, socket.socket() as free:
        for one in (busy, free):
            one.bind(("127.0.0.1", 0))
        busy.listen()
        names = {kind: f"{url}/{kind}" for kind in ("html", "error", "list", "deep", "short", "cut", "latin")}
        names |= {"busy": str(busy.getsockname()[1]), "free": str(free.getsockname()[1])}
        free.close()
        names |= {"closed": f"http://127.0.0.1:{names['free']}", "build": f"--base-url {url}/html/v1"}
        names["train"] = "--base model --data records.jsonl --frozen-layers 0"
        yield folder, names
    server.shutdown()
    server.server_close()


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """What is in a folder: the bytes of files, where links lead, and folders."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = kind
    return found


@pytest.mark.parametrize(("words", "thing", "remedy"), ROWS, ids=str)
def test_what_cannot_be_done_is_said_in_one_line(place, monkeypatch, words, thing, remedy):
    folder, names = place
    monkeypatch.chdir(folder)
    for name, value in names.items():
        words, thing = (text.replace(f"{{{name}}}", value) for text in (words, thing))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    before = tree(folder)
    status, out, err = call(*shlex.split(words))
    after = tree(folder)
    new = sorted(after.keys() - before.keys(), reverse=True)
    for name in new:
        (folder / name).rmdir() if after[name] is None else (folder / name).unlink()
    assert status == 2, (status, out[-2000:], err[-2000:])
    line = error_line(err)
    print(line)
    assert thing in line
    assert remedy in line
    assert {name: after.get(name) for name in before} == before
    assert {Path(name).name for name in new if after[name] is not None} <= {"lock", ".lock"}
