"""Small models: those of transformers that users train, and plain PyTorch ones."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import slope_fx

VOCABULARY = 64


def gpt2(layers: int = 2, **more) -> nn.Module:
    config = GPT2Config(
        n_layer=layers, n_head=2, n_embd=32, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **more,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def llama(layers: int = 2, key_heads: int = 2, width: int = 32) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=64,
            num_attention_heads=4, num_key_value_heads=key_heads, vocab_size=VOCABULARY,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def llama_four_heads(layers: int = 2) -> nn.Module:
    """Four ranks of tensor parallelism have a head of keys each, and whole bytes of masks."""
    return llama(layers, key_heads=4, width=64)


def awake(
    model: nn.Module, rank: int | None = 4, scale: float | None = None, **options: Any
) -> nn.Module:
    """The model compiled, with adapters that are active and large.

    ``scale`` replaces the scale of the adapters, so that a lost one shows.
    """
    model = slope_fx.compile(model.eval(), adapter_rank=rank, **options)
    if rank is None:
        return model
    slope_fx.Schedule(model, 10, adapter_start=0.0)
    with torch.no_grad():
        for weight in slope_fx.sparse_weights(model).values():
            weight.lora_B.normal_(0, 0.1)
            weight.scale = weight.scale if scale is None else scale
    return model


def answer(queue: Any, model: nn.Module, ids: torch.Tensor) -> None:
    """Put the logits of a model into a queue. A spawned process can import this module."""
    with torch.inference_mode():
        queue.put(model(ids).logits.tolist())


def bert(layers: int = 2) -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=layers, hidden_size=32, intermediate_size=64, num_attention_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def opt(layers: int = 2) -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            num_hidden_layers=layers, hidden_size=32, ffn_dim=64, num_attention_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0,
        )
    )  # fmt: skip


TRANSFORMERS = {"gpt2": gpt2, "llama": llama, "bert": bert, "opt": opt}


class Plain(nn.Module):
    """Weights of its own, as ``F.linear(x, w)`` and as ``x @ w``, among modules."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.w_in = nn.Parameter(torch.randn(2 * width, width) / width**0.5)
        self.b_in = nn.Parameter(torch.zeros(2 * width))
        self.w_out = nn.Parameter(torch.randn(2 * width, width) / width**0.5)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        h = self.embed(x)
        h = h + F.gelu(F.linear(self.norm(h), self.w_in, self.b_in)) @ self.w_out
        return self.head(h)


def batch(seed: int = 0, rows: int = 2, length: int = 16) -> torch.Tensor:
    """Token ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=batch(3)).logits
