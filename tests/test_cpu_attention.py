"""Attention for training on a CPU: the values of PyTorch's own, without padding where a model allows it."""

import itertools

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
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sentence_transformers_inf import cpu_attention, load_instruction_model, load_records
from sentence_transformers_inf.cpu_attention import attend_on_cpu, use_cpu_attention, use_sdpa_again
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import encoder_of
from sentence_transformers_inf.training import train
from tests.test_losses import columns, loss_and_gradients

TEXTS = ["why is the sky blue", "tax", "a passage of some more words than the others have, so that they are padded", "tax"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "pad_token_id": 0}


@pytest.mark.parametrize("tokens", [5, 600])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changes", [{}, {"scaling": 0.3}, {"position_bias": True}, {"key_heads": 1}])
def test_attention_in_bfloat16_is_attention(tokens, masked, changes):
    torch.manual_seed(0)
    key_heads = changes.get("key_heads", 3)
    module = torch.nn.Module()
    module.num_key_value_groups = 3 // key_heads
    heads = (3, key_heads, key_heads)
    query, key, value = (torch.randn(2, count, tokens, 4).bfloat16().requires_grad_(True) for count in heads)
    mask = torch.zeros(2, 1, tokens, tokens).masked_fill(torch.rand(2, 1, 1, tokens) > 0.6, torch.finfo(torch.float32).min)
    mask = mask if masked else None
    in_float32 = tokens > cpu_attention.PRODUCTS_UP_TO or not {"position_bias", "key_heads"}.isdisjoint(changes)
    if "position_bias" in changes:
        changes = {"position_bias": torch.randn(1, 3, tokens, tokens)}
    changes = {name: given for name, given in changes.items() if name != "key_heads"}
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attend_on_cpu(module, query, key, value, mask, is_causal=False, **changes)
    given = (query.float(), key.float(), value.float())
    exact, _ = sdpa_attention_forward(module, *given, mask, is_causal=False, **changes)
    assert output.dtype == (torch.float32 if in_float32 else torch.bfloat16)
    assert torch.allclose(output.float(), exact, atol=1e-6 if in_float32 else 0.02)
    along = torch.randn_like(exact)
    gradients = torch.autograd.grad((output.float() * along).sum(), [query, key, value])
    for gradient, other in zip(gradients, torch.autograd.grad((exact * along).sum(), [query, key, value])):
        assert F.cosine_similarity(gradient.flatten().float(), other.flatten().float(), dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[7], [3, 3, 3], [9, 1, 40, 2, 600, 41, 5, 1], [300] * 5 + [17] * 40])
@pytest.mark.parametrize("key_heads", [3, 1])
def test_texts_in_one_row_attend_to_themselves(dtype, lengths, key_heads):
    torch.manual_seed(0)
    heads = (3, key_heads, key_heads)
    query, key, value = (torch.randn(1, count, sum(lengths), 4, dtype=dtype).requires_grad_(True) for count in heads)
    begins = torch.tensor([0, *lengths]).cumsum(dim=0).int()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output, _ = attend_on_cpu(torch.nn.Module(), query, key, value, None, scaling=0.4, cu_seq_lens_q=begins)
    assert output.dtype == dtype
    alone = [
        states.double().repeat_interleave(3 // states.shape[1], dim=1).split(lengths, dim=2)
        for states in (query, key, value)
    ]
    exact = torch.cat([F.scaled_dot_product_attention(*text, scale=0.4) for text in zip(*alone)], dim=2).transpose(1, 2)
    close = 1e-12 if dtype == torch.float64 else 0.03
    assert torch.allclose(output.double(), exact, rtol=0, atol=close)
    along = torch.randn_like(exact)
    gradients = torch.autograd.grad((output.double() * along).sum(), [query, key, value])
    for gradient, other in zip(gradients, torch.autograd.grad((exact * along).sum(), [query, key, value])):
        if dtype == torch.float64:
            assert torch.allclose(gradient, other, rtol=0, atol=close)
        assert F.cosine_similarity(gradient.flatten().double(), other.flatten().double(), dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_in_one_row_have_dropout_where_it_is_wanted(dtype):
    torch.manual_seed(0)
    states = torch.randn(1, 2, 60, 4, dtype=dtype)
    begins = torch.tensor([0, 20, 60], dtype=torch.int32)
    kept, dropped = (
        attend_on_cpu(torch.nn.Module(), states, states, states, None, dropout=rate, cu_seq_lens_q=begins)[0]
        for rate in (0.0, 0.5)
    )
    assert not torch.allclose(kept, dropped, atol=0.1)


def test_what_changes_scores_is_not_left_out():
    states, begins = torch.randn(1, 2, 6, 4), torch.tensor([0, 2, 6], dtype=torch.int32)
    for changes in ({"softcap": 30.0}, {"position_bias": torch.zeros(1, 2, 6, 6)}):
        with pytest.raises(NotImplementedError, match="must be padded"):
            attend_on_cpu(torch.nn.Module(), states, states, states, None, cu_seq_lens_q=begins, **changes)


@pytest.mark.parametrize(
    ("config", "unpadded"),
    [
        (BertConfig(**SIZE), True),
        (RobertaConfig(**SIZE | {"pad_token_id": 1}), True),  # counts positions from behind the padding's id
        (DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64), True),
        (ElectraConfig(**SIZE, embedding_size=32), True),
        (ModernBertConfig(**SIZE, local_attention=8), False),  # tokens see their neighbours only
        (MPNetConfig(**SIZE | {"pad_token_id": 1}), False),  # positions are a bias of the scores
        (Qwen2Config(**SIZE, num_key_value_heads=2), False),  # tokens see what is before them only
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_allows_it_goes_without_padding_and_encodes_the_same(config, unpadded, base, tmp_path):
    torch.manual_seed(0)
    config.vocab_size = 30_522
    AutoModel.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    model = load_instruction_model(SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32, "mean")]))
    encoder = encoder_of(model)[0]
    ordinary, before = encoder.model.config._attn_implementation, model.encode(TEXTS, convert_to_tensor=True)
    changed = use_cpu_attention(model, bf16=False)
    assert changed == ([encoder] if unpadded else [])
    assert ("cu_seq_lens_q" in model.preprocess(TEXTS)) == unpadded
    assert torch.allclose(model.encode(TEXTS, convert_to_tensor=True), before, atol=1e-6)
    use_sdpa_again(changed)
    assert encoder.model.config._attn_implementation == ordinary
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), before)
    lowered = use_cpu_attention(model, bf16=True)
    assert lowered == ([encoder] if ordinary == "sdpa" else [])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model.encode(TEXTS, convert_to_tensor=True).float(), before, atol=0.05)


def test_who_wants_padding_keeps_it(model):
    encoder_of(model)[0].unpad_inputs = False
    assert use_cpu_attention(model, bf16=False) == []
    assert "attention_mask" in model.preprocess(TEXTS)


def test_many_texts_are_encoded_a_few_at_a_time(model, few_records):
    model.double()
    use_cpu_attention(model, bf16=False)
    given = []
    model.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    whole = loss_and_gradients(InstructionContrastiveLoss(model), model, columns(model, few_records))
    assert len(given) == 1
    parts = InstructionContrastiveLoss(model, max_tokens_per_chunk=200)
    value, gradient = loss_and_gradients(parts, model, columns(model, few_records))
    assert value == pytest.approx(whole[0], abs=1e-12)
    assert torch.allclose(gradient, whole[1], rtol=0, atol=1e-12)
    lengths = [chunk["cu_seq_lens_q"].diff() for chunk in given[1:]]
    assert sum(map(len, lengths)) == len(given[0]["cu_seq_lens_q"]) - 1
    assert all(part.sum() <= 200 and part.max() == chunk["max_length_q"] for part, chunk in zip(lengths, given[1:]))
    assert all(int(one.sum() + other.sum()) > 200 for one, other in itertools.pairwise(lengths))  # no fewer would do
    assert parts.last_step_stats["padded_tokens"] == parts.last_step_stats["real_tokens"] == sum(map(int, map(sum, lengths)))


def test_fused_attention_never_gets_bfloat16(tmp_path, monkeypatch):
    """PyTorch's is slow in bfloat16 on a CPU; it takes long texts, in float32, and products take the others."""
    load_records("mini", "train").select(range(3)).to_json(tmp_path / "train.jsonl")
    fused, products = F.scaled_dot_product_attention, cpu_attention._products
    of_fused, of_products = set(), set()

    def look(query, *args, **kwargs):
        of_fused.add((query.dtype, query.shape[2] > 30))
        return fused(query, *args, **kwargs)

    def look_too(query, *args):
        of_products.add((query.dtype, query.shape[2] > 30))
        return products(query, *args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    monkeypatch.setattr(cpu_attention, "_products", look_too)
    monkeypatch.setattr(cpu_attention, "PRODUCTS_UP_TO", 30)
    train(tmp_path, output=tmp_path / "model", epochs=1, batch_size=2, bf16=True, show_progress=False)
    assert of_fused - {(torch.float32, False)} == {(torch.float32, True)}  # in float32: short ones while it was looked at
    assert of_products == {(torch.bfloat16, False)}
