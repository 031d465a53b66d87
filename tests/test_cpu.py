"""Training on a CPU without padding: the same values, and nothing is left behind."""

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen2Config,
    RobertaConfig,
)

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.compat import attention_of
from sentence_transformers_inf.losses import CachedInstructionContrastiveLoss, InstructionContrastiveLoss
from sentence_transformers_inf.modules import encoders_of, two_towers
from sentence_transformers_inf.training.cpu import attend_apart, without_padding
from sentence_transformers_inf.training.encoders import hidden_dropout
from tests.test_losses import columns, loss_and_gradients

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
SIZE |= {"num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[7], [3, 3, 3], [9, 1, 40, 2, 600, 41, 5, 1]])
@pytest.mark.parametrize("key_heads", [3, 1])
def test_texts_in_one_row_attend_to_themselves(dtype, lengths, key_heads):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3 // key_heads, False
    heads = (3, key_heads, key_heads)
    query, key, value = (torch.randn(1, count, sum(lengths), 4, dtype=dtype).requires_grad_(True) for count in heads)
    begins = torch.tensor([0, *lengths]).cumsum(dim=0).int()
    output, _ = attend_apart(module, query, key, value, None, scaling=0.4, cu_seq_lens_q=begins)
    assert output.dtype == dtype
    alone = [
        states.double().repeat_interleave(3 // states.shape[1], dim=1).split(lengths, dim=2)
        for states in (query, key, value)
    ]
    exact = torch.cat([F.scaled_dot_product_attention(*text, scale=0.4) for text in zip(*alone)], dim=2).transpose(1, 2)
    assert torch.allclose(output.double(), exact, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.03)


@pytest.mark.parametrize("changes", [{"position_bias": 1}, {"softcap": 1.0}])
def test_what_would_be_left_out_is_refused(changes):
    states = torch.randn(1, 1, 4, 2)
    with pytest.raises(NotImplementedError, match="must be padded"):
        attend_apart(torch.nn.Module(), states, states, states, None, cu_seq_lens_q=torch.tensor([0, 4]), **changes)


def small(config, base, folder):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    AutoModel.from_config(config(vocab_size=len(tokenizer), **SIZE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_instruction_model(SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32)], device="cpu"))


@pytest.mark.parametrize(
    ("config", "goes_without"),
    [
        (BertConfig, True),
        (ElectraConfig, True),
        (Qwen2Config, True),  # each text is causal by itself
        (ModernBertConfig, False),  # has windows
        (RobertaConfig, False),  # counts positions from 2
        (MPNetConfig, False),  # has a position bias, and an attention of its own
        (DistilBertConfig, None),  # as the host has it
    ],
)
def test_an_encoder_goes_without_padding_where_that_changes_nothing(config, goes_without, base, tmp_path):
    model = small(config, base, tmp_path / "model").train()
    inputs = ["why is the sky blue", "tax", "a passage of some more words than the others have, so that they are padded"]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    attention = attention_of(model[0].model)

    def embed():
        return model(model.preprocess(inputs))["sentence_embedding"]

    expected = embed()
    with without_padding(model) as unpadded:
        assert goes_without is None or bool(unpadded) == goes_without
        assert torch.allclose(embed(), expected, atol=1e-5)
    assert attention_of(model[0].model) == attention
    assert torch.equal(embed(), expected)


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_neither_loss_nor_gradients_change(tiny, few_records, kind, towers):
    model = load_instruction_model(tiny).double()
    model = two_towers(model) if towers == 2 else model
    loss = kind(model.train(), sampled_instructions=1, plain_weight=0.5)
    with hidden_dropout(model, 0.0):
        value, gradient = loss_and_gradients(loss, model, columns(model, few_records))
        seen = []
        handles = [
            encoder.model.embeddings.register_forward_hook(lambda module, args, output: seen.append(len(output)))
            for encoder in encoders_of(model)
        ]
        with without_padding(model) as is_unpadded:
            assert is_unpadded
            seen.clear()
            other_value, other_gradient = loss_and_gradients(loss, model, columns(model, few_records))
        for handle in handles:
            handle.remove()
    assert set(seen) == {1}, "the texts of a call are one row"
    assert other_value == pytest.approx(value, abs=1e-9)
    assert torch.allclose(other_gradient, gradient, rtol=0, atol=1e-9)


def test_everything_is_put_back_when_training_fails(tiny):
    model = load_instruction_model(tiny).train()
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates = [module.p for module in dropouts]

    def fail():
        with hidden_dropout(model, 0.3), without_padding(model):
            assert {module.p for module in dropouts} == {0.0, 0.3}
            assert attention_of(model[0].model) != "sdpa"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [module for module in model.modules() if isinstance(module, torch.nn.Dropout)] == dropouts
    assert [module.p for module in dropouts] == rates
    assert attention_of(model[0].model) == "sdpa"
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_attention_s_own_dropout_is_off_and_that_of_hidden_states_is_on(tiny):
    model = load_instruction_model(tiny)
    layer = model[0].model.encoder.layer[0]
    with hidden_dropout(model, 0.2):
        assert layer.attention.self.dropout.p == 0.0
        assert layer.attention.output.dropout.p == layer.output.dropout.p == 0.2
    assert layer.attention.self.dropout.p == 0.1
