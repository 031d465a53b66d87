import gc
import os

# Nothing here loads from the Hub; set before any library reads it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread: on small models a second one costs more than it gives, above all where several processes share the cores. Set,
# and not only by default, for what tests start as well.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "200"  # tables whose cells are not broken

import datasets
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AutoTokenizer, BertConfig, BertModel

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.corpora import bundled_base
from tests.hub import Hub

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
datasets.disable_progress_bars()


def pytest_collection_finish():
    """What is imported is no garbage: to walk through it again and again took a fifth of the tests' time."""
    gc.freeze()


@pytest.fixture(scope="session")
def base() -> str:
    """The folder of all-MiniLM-L6-v2."""
    return bundled_base()


@pytest.fixture(scope="session")
def tiny(base, tmp_path_factory) -> str:
    """The folder of a random two-layer BERT of 32 dimensions: for what needs a model, but no score that means anything."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    encoder = Transformer(str(folder / "bert"), max_seq_length=256)
    modules = [encoder, Pooling(config.hidden_size, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A small Hub over HTTP."""
    hub = Hub(tmp_path_factory.mktemp("hub") / "server")
    yield hub
    hub.stop()


@pytest.fixture
def connected(hub, monkeypatch, tmp_path):
    """The small Hub, which this process takes for the Hub, its cache empty."""
    hub.connect(monkeypatch, tmp_path / "hf-cache")
    return hub


@pytest.fixture
def model(base):
    """A fresh instruction-aware all-MiniLM-L6-v2, without dropout's randomness."""
    return load_instruction_model(base).eval()


@pytest.fixture(scope="session")
def validation():
    return load_records("mini", "validation")


@pytest.fixture(scope="session")
def few_records():
    return load_records("mini", "train").select(range(4))
