"""The models of the paper's table, and the shapes of their linears."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder that decide its linears.

    Attributes:
        family: "opt" or "llama".
        hidden, ffn: widths of the residual stream and of the feed-forward layer.
        heads, kv_heads: of attention.
        layers: blocks of the whole model.
    """

    family: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int

    def linears(self) -> set[tuple[int, int]]:
        """(d_in, d_out) of a block's linears."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            (self.hidden, self.hidden), (self.hidden, kv),
            (self.hidden, self.ffn), (self.ffn, self.hidden),
        }  # fmt: skip


MODELS = {
    "OPT-2.6B": Architecture("opt", 2560, 10240, 32, 32, 32),
    "OPT-6.6B": Architecture("opt", 4096, 16384, 32, 32, 32),
    "OPT-13B": Architecture("opt", 5120, 20480, 40, 40, 40),
    "OPT-30B": Architecture("opt", 7168, 28672, 56, 56, 48),
    "OPT-66B": Architecture("opt", 9216, 36864, 72, 72, 64),
    "LLaMA-3-8B": Architecture("llama", 4096, 14336, 32, 8, 32),
    "Mistral-7B": Architecture("llama", 4096, 14336, 32, 8, 32),
}
"""Those of METHOD's table. LLaMA-3-8B and Mistral-7B differ in their vocabularies alone."""


def shapes(models: list[str]) -> list[tuple[int, int]]:
    """All (d_in, d_out) of some models' linears, by size."""
    found = {shape for name in models for shape in MODELS[name].linears()}
    return sorted(found, key=lambda shape: (shape[0] * shape[1], shape))
