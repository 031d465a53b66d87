"""Dropout while training: of hidden states alone, and as if nothing had been when it is over."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    T5Config,
    T5EncoderModel,
)

from sentence_transformers_inf.training.encoders import hidden_dropout
from tests.training import trainer

SIZE = {"vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}


def bert():
    return BertModel(BertConfig(**SIZE))


def mpnet():
    return MPNetModel(MPNetConfig(**SIZE))


def distilbert():
    return DistilBertModel(DistilBertConfig(vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=32))


def gated_t5():
    sizes = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


ATTENTION = {
    bert: "attention.self.dropout",
    mpnet: "attention.attn.dropout",
    distilbert: "attention.dropout",
    gated_t5: None,
}


def rates(model):
    return {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize("family", ATTENTION)
def test_hidden_states_are_dropped_and_attention_probabilities_are_not(family):
    model, of_attention = family(), ATTENTION[family]
    with hidden_dropout(model, 0.3):
        found = rates(model)
    attention = {name for name in found if of_attention and name.endswith(of_attention)}
    assert len(attention) == (2 if of_attention else 0)
    assert {name for name, rate in found.items() if rate == 0} == attention
    assert {rate for name, rate in found.items() if name not in attention} == {0.3}


@pytest.mark.parametrize("family", ATTENTION)
def test_every_rate_is_put_back(family):
    model = family()
    for number, module in enumerate(model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.001 * number
    before = rates(model)
    with hidden_dropout(model, 0.3):
        assert rates(model) != before
    assert rates(model) == before


class Fails(nn.Module):
    """A loss that notes what it is trained with, and fails."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sentence_features, labels=None):
        self.seen = {
            getattr(module, "rate", getattr(module, "p", None))
            for module in self.model.modules()
            if "Dropout" in type(module).__name__
        }
        raise RuntimeError("no memory left")


def test_everything_is_put_back_where_training_fails(tiny, few_records, tmp_path):
    running = trainer(few_records, tiny, tmp_path / "m", dropout=0.2)
    encoders = {module: module._attn_implementation for module in running.model.modules() if hasattr(module, "config")
                and hasattr(module, "_attn_implementation")}  # fmt: skip
    before = rates(running.model)
    assert set(before.values()) == {0.1}
    running.loss = Fails(running.model)
    with pytest.raises(RuntimeError, match="no memory left"):
        running.train()
    assert running.loss.seen == {0.0, 0.2}
    assert rates(running.model) == before
    assert all(module._attn_implementation == kind for module, kind in encoders.items())


def test_training_drops_what_it_was_told_to(tiny, few_records, tmp_path):
    found = []
    for rate in (0.0, 0.3):
        running = trainer(few_records, tiny, tmp_path / str(rate), dropout=rate, learning_rate=1e-3, save_strategy="no")
        running.train()
        found.append(torch.cat([weight.detach().flatten() for weight in running.model.parameters()]))
        assert running.args.dropout == rate
    assert not torch.equal(*found)
