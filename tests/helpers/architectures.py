"""Small models of many architectures: of transformers, diffusers and torch."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCABULARY = 64
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0, "attention_dropout": 0.0,
}  # fmt: skip
_ENCODER = {
    **_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "num_labels": 8, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_EXPERTS = {
    **_TEXT, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32,
}  # fmt: skip


def _causal(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: _made(f"{name}Config", f"{name}ForCausalLM", {**_TEXT, **more})


def _made(config: str, model: str, arguments: dict[str, Any]) -> nn.Module:
    return getattr(tf, model)(getattr(tf, config)(**arguments))


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` between an embedding and a head."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(
            32, 2, 64, 0.0, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(input_ids)))


class TorchTransformer(nn.Module):
    """``nn.Transformer``: encoder and decoder, torch's own attention in all three places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(32, 2, 2, 2, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1], dtype=h.dtype)
        return self.head(self.transformer(h, h.flip(1), tgt_mask=mask, tgt_is_causal=True))


class OwnWeights(nn.Module):
    """Parameters of its own, in ``F.linear`` and ``@``, for inputs of any number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)
        self.w_in, self.b_in = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(64))
        self.w_out, self.b_out = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        up = nn.functional.gelu(nn.functional.linear(self.norm(h), self.w_in, self.b_in))
        return self.head(h + (up @ self.w_out + self.b_out))


class Convolutional(nn.Module):
    """Convolutions of one pixel between one of three and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up, self.down = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1, stride=2, bias=False)
        self.head = nn.Linear(16, 8)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        h = self.depthwise(self.stem(pixel_values))
        return self.head(self.down(self.up(h).relu()).mean((2, 3)))


def _transformer_2d() -> nn.Module:
    """What a UNet has of linears: blocks of self- and cross-attention between 1x1 convolutions."""
    from diffusers import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2,
        norm_num_groups=8, cross_attention_dim=32,
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: _made(
        "GPT2Config", "GPT2LMHeadModel",
        {**_TEXT, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "OPT": _causal("OPT", ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "GPT-NeoX": _causal("GPTNeoX", hidden_dropout=0.0),
    "BLOOM": _causal("Bloom", n_layer=2, n_head=2, hidden_dropout=0.0),
    "Llama": _causal("Llama", num_key_value_heads=1),
    "Mistral": _causal("Mistral", num_key_value_heads=1),
    "Qwen3": _causal("Qwen3", num_key_value_heads=1, head_dim=16),
    "Gemma 2": _causal("Gemma2", num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16),
    "Phi": _causal("Phi", resid_pdrop=0.0, embd_pdrop=0.0),
    "Phi-3": _causal("Phi3", num_key_value_heads=1, resid_pdrop=0.0, embd_pdrop=0.0),
    "Mixtral": lambda: _made("MixtralConfig", "MixtralForCausalLM", _EXPERTS),
    "Qwen3-MoE": lambda: _made("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _EXPERTS),
    "GraniteMoe": lambda: _made("GraniteMoeConfig", "GraniteMoeForCausalLM", _EXPERTS),
    "gpt-oss": lambda: _made("GptOssConfig", "GptOssForCausalLM", _EXPERTS),
    "BERT": lambda: _made("BertConfig", "BertForMaskedLM", _ENCODER),
    "RoBERTa": lambda: _made("RobertaConfig", "RobertaForMaskedLM", _ENCODER),
    "DistilBERT": lambda: _made(
        "DistilBertConfig", "DistilBertForMaskedLM",
        {**_TEXT, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "dropout": 0.0},
    ),
    "ALBERT": lambda: _made(
        "AlbertConfig", "AlbertForMaskedLM", {**_ENCODER, "embedding_size": 32}
    ),
    "T5": lambda: _made(
        "T5Config", "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2,
         "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
    "BART": lambda: _made(
        "BartConfig", "BartForConditionalGeneration",
        {**_TEXT, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "dropout": 0.0, "decoder_start_token_id": 0},
    ),
    "ViT": lambda: _made("ViTConfig", "ViTForImageClassification", _IMAGE),
    "DeiT": lambda: _made("DeiTConfig", "DeiTForImageClassification", _IMAGE),
    "ConvNeXt": lambda: _made(
        "ConvNextConfig", "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 16,
         "num_labels": 8, "patch_size": 4},
    ),
    "torch: TransformerEncoder": TorchEncoder,
    "torch: TransformerEncoder, norm first": lambda: TorchEncoder(norm_first=True),
    "torch: Transformer": TorchTransformer,
    "torch: 1x1 convolutions": Convolutional,
    "torch: weights of its own": OwnWeights,
    "diffusers: Transformer2D": _transformer_2d,
}  # fmt: skip


MORE: dict[str, Callable[[], nn.Module]] = {
    "Mamba": _causal("Mamba", state_size=4, time_step_rank=4),
}
"""With matrices that are no linear's, and don't look it: consistency.py compares them."""


def made(name: str) -> nn.Module:
    """A new model of that architecture."""
    return {**ARCHITECTURES, **MORE}[name]()


def inputs_of(model: nn.Module, rows: int = 2) -> dict[str, torch.Tensor]:
    """What to call a model with: token ids, or images."""
    ids = torch.randint(1, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(0))
    if isinstance(model, OwnWeights):
        return {"x": torch.randn(rows, 8, 16, generator=torch.Generator().manual_seed(0))}
    if type(model).__name__ == "Transformer2DModel":
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(rows, 32, 4, 4, generator=generator),
            "encoder_hidden_states": torch.randn(rows, 3, 32, generator=generator),
        }
    if isinstance(model, Convolutional) or getattr(model, "main_input_name", "") == "pixel_values":
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def first_token(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row of one token; of features, one vector; of images, one."""
    if list(inputs) == ["x"]:
        return {"x": inputs["x"][0, :1]}
    return {name: v[:1, :1] if v.dim() == 2 else v[:1] for name, v in inputs.items()}


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def to(value: Any) -> Any:
        return (
            value.to(dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
        )

    return {name: to(value) for name, value in inputs.items()}


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """What a model makes of inputs, without a cache."""
    own = getattr(model, "model", model)  # of the formulas, which wrap one
    if any("use_cache" in inspect.signature(m.forward).parameters for m in (model, own)):
        inputs = {**inputs, "use_cache": False}
    out = model(**inputs)
    return getattr(out, "sample", getattr(out, "logits", out))


def loss_and_logits(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A training loss, the model's own if it has one, and what it was made of."""
    own = getattr(model, "model", model) if hasattr(model, "twice_pruned") else model
    first = next(iter(inputs.values()))
    labels = torch.arange(len(first)) if first.is_floating_point() else first
    # Of a single token nothing follows that could be predicted.
    if "labels" in inspect.signature(own.forward).parameters and labels.shape[-1] > 1:
        out = model(**inputs, labels=labels)
        return out.loss, out.logits
    out = logits_of(model, inputs)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    wide = torch.promote_types(out.dtype, torch.float32)
    return nn.functional.mse_loss(out.to(wide), target.to(wide)), out


def shaken(model: nn.Module) -> nn.Module:
    """With matrices large enough that each counts, and vectors that are neither zero nor one."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("A_log"):
            fan_in = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
            parameter.data.normal_(std=0.5 * fan_in**-0.5)
        elif parameter.dim() == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def choose_all_experts(model: nn.Module) -> None:
    """Let a router choose all experts: rounding to bf16 could have it choose others."""
    for module in [*model.modules(), getattr(model, "config", None)]:
        for name in ("top_k", "num_experts_per_tok"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, 4)


def plain_experts(model: nn.Module) -> nn.Module:
    """With mixtures as loops over their experts, which run in any dtype."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model
