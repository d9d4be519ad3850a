"""The models of the paper's table: their sizes written out, and models of such sizes."""

from dataclasses import dataclass

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder.

    Attributes:
        family: "opt", "llama" or "mistral".
        hidden, ffn: widths of the residual stream and of the feed-forward layer.
        heads, kv_heads: of attention.
        layers: blocks of the whole model.
        vocabulary: tokens that it knows.
        context: positions that it embeds; 0 if it rotates them.
        tied: whether head and embedding are one weight.
    """

    family: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    context: int = 0
    tied: bool = False

    def block(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of a block's linears, by name."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = {
            "q_proj": (self.hidden, self.hidden), "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv), "o_proj": (self.hidden, self.hidden),
        }  # fmt: skip
        up, down = (self.hidden, self.ffn), (self.ffn, self.hidden)
        if self.family == "opt":
            return {**attention, "fc1": up, "fc2": down}
        return {**attention, "gate_proj": up, "up_proj": up, "down_proj": down}

    def linears(self) -> set[tuple[int, int]]:
        """The shapes among them."""
        return set(self.block().values())

    def vectors(self) -> int:
        """Elements of a block's biases and norms."""
        if self.family == "opt":
            return sum(d_out for _, d_out in self.block().values()) + 4 * self.hidden
        return 2 * self.hidden

    def embeddings(self) -> int:
        """Elements outside of the blocks: embeddings, head and last norm."""
        words = self.vocabulary * self.hidden * (1 if self.tied else 2)
        if self.family == "opt":  # two positions are padding, and its norm has a bias
            return words + (self.context + 2) * self.hidden + 2 * self.hidden
        return words + self.hidden

    def build(
        self, layers: int | None = None, vocabulary: int | None = None, context: int = 2048
    ) -> nn.Module:
        """A model with random weights and no dropout, on the default device.

        Args:
            layers, vocabulary: of their own if None.
            context: the most positions that it will be given.
        """
        sizes = {
            "num_hidden_layers": layers or self.layers, "hidden_size": self.hidden,
            "num_attention_heads": self.heads, "vocab_size": vocabulary or self.vocabulary,
            "tie_word_embeddings": self.tied,
        }  # fmt: skip
        if self.family == "opt":
            return OPTForCausalLM(OPTConfig(
                **sizes, ffn_dim=self.ffn, word_embed_proj_dim=self.hidden, dropout=0.0,
                max_position_embeddings=self.context,
            ))  # fmt: skip
        sizes |= {
            "intermediate_size": self.ffn, "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": context,
        }  # fmt: skip
        if self.family == "mistral":  # since v0.3 without a window
            return MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
        return LlamaForCausalLM(LlamaConfig(**sizes))


_OPT = {"vocabulary": 50272, "context": 2048, "tied": True}

MODELS = {
    "OPT-2.6B": Architecture("opt", 2560, 10240, 32, 32, 32, **_OPT),
    "OPT-6.6B": Architecture("opt", 4096, 16384, 32, 32, 32, **_OPT),
    "OPT-13B": Architecture("opt", 5120, 20480, 40, 40, 40, **_OPT),
    "OPT-30B": Architecture("opt", 7168, 28672, 56, 56, 48, **_OPT),
    "OPT-66B": Architecture("opt", 9216, 36864, 72, 72, 64, **_OPT),
    "LLaMA-3-8B": Architecture("llama", 4096, 14336, 32, 8, 32, vocabulary=128256),
    "Mistral-7B": Architecture("mistral", 4096, 14336, 32, 8, 32, vocabulary=32768),
}
"""Those of METHOD's table. The blocks of LLaMA-3-8B and Mistral-7B have the same linears."""

FED_BY_EMBEDDINGS = ("q_proj", "k_proj", "v_proj")
"""The linears of the first block that stay dense (METHOD, "Masks")."""

TINY = Architecture("llama", 32, 64, 2, 1, 1, vocabulary=64)
"""For runs that only show that a benchmark runs."""


def sizes_of(name: str) -> Architecture:
    """The sizes of a model of the table, or of a "tiny" one that shows that a benchmark runs."""
    return TINY if name == "tiny" else MODELS[name]


def shapes(models: list[str]) -> list[tuple[int, int]]:
    """All (d_in, d_out) of some models' linears, by size."""
    found = {shape for name in models for shape in MODELS[name].linears()}
    return sorted(found, key=lambda shape: (shape[0] * shape[1], shape))
