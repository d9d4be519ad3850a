"""The tile sizes of each kernel. Each list is small enough to measure every entry.

The lists leave out what is known to be slow. A tile whose masks are stored holds whole bytes of
masks. With a weight that is expanded in registers, tiles of 128 outputs need eight warps to avoid
spills (four warps make the Triton compiler fail for sm_100), and fp32 operands need tiles of half
the size. Tensor cores process 16 tokens or more, and a tile with more tokens than the input wastes
them.
"""

from dataclasses import dataclass

FEW = 64
"""The most tokens with which a product is bound by the reads of the weight."""


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        blocks: tile sizes by the name of the argument of the kernel.
        warps, stages: ``num_warps`` and ``num_stages`` of Triton.
        waves: programs per multiprocessor below which sums are split; 0: never.
    """

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int = 1
    waves: int = 0

    @property
    def name(self) -> str:
        """For example "128x64x64 w4 s3"."""
        tile = "x".join(str(size) for _, size in self.blocks)
        waves = f" v{self.waves}" if self.waves else ""
        return f"{tile} w{self.warps} s{self.stages}{waves}"

    def arguments(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": self.stages}

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]


def mask_configs(m: int) -> list[Config]:
    """For ``magnitude_mask``: rows, and columns in groups of 8 groups."""
    return _weight_configs(m, 1, (4, 512, 4), (8, 512, 8), (2, 1024, 4), (1, 2048, 4))


def backward_mask_configs(m: int) -> list[Config]:
    """For ``backward_mask``: whole groups of M rows, and columns in groups of 8 groups."""
    return _weight_configs(m, m, (16, 128, 4), (16, 256, 8), (32, 64, 4))


def copy_configs(m: int) -> list[Config]:
    """For ``expand`` and ``compress``."""
    return _weight_configs(m, 1, (4, 512, 4), (8, 512, 8), (2, 1024, 4), (1, 2048, 4))


def _weight_configs(m: int, fewest_rows: int, *sizes: tuple[int, int, int]) -> list[Config]:
    """Configurations for tiles of a weight, of at least 8 groups.

    Args:
        m: of the pattern.
        fewest_rows: lower bound of a tile.
        sizes: rows, columns and warps of each configuration.
    """
    return [
        Config((("BLOCK_OUT", max(rows, fewest_rows)), ("GROUPS", max(columns // m, 8))), warps)
        for rows, columns, warps in sizes
    ]


def linear_configs(m: int, tokens: int, itemsize: int) -> list[Config]:
    """For ``linear``: outputs, tokens, columns, warps, stages, and the split of the sums."""
    if tokens <= FEW:
        few = ((64, 128, 4, 3, 2), (64, 64, 4, 4, 4), (32, 128, 4, 3, 4), (128, 64, 8, 4, 2))
        return [
            _product(out, _few(tokens), columns, m, warps, stages, waves)
            for out, columns, warps, stages, waves in (
                few if itemsize == 2 else [(64, 32, 4, 3, 2)]
            )
        ]
    many = ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3), (128, 128, 32, 8, 4))
    return [
        _product(out, block, columns, m, warps, stages, 0)
        for out, block, columns, warps, stages in (many if itemsize == 2 else [(64, 64, 32, 4, 3)])
    ]


def input_grad_configs(m: int, tokens: int, itemsize: int) -> list[Config]:
    """For ``input_grad``: outputs, tokens, columns, warps, stages, and the split of the sums."""
    if tokens <= FEW:
        few = ((64, 64, 4, 3, 2), (64, 128, 8, 3, 4)) if itemsize == 2 else ((32, 64, 4, 3, 2),)
        return [
            _product(out, _few(tokens), columns, m, warps, stages, waves)
            for out, columns, warps, stages, waves in few
        ]
    many = ((64, 128, 128, 8, 3), (64, 64, 128, 4, 3), (64, 128, 64, 4, 3), (32, 128, 128, 8, 4))
    return [
        _product(out, block, columns, m, warps, stages, 0)
        for out, block, columns, warps, stages in (many if itemsize == 2 else [(32, 64, 64, 4, 3)])
    ]


def weight_grad_configs(m: int, itemsize: int) -> list[Config]:
    """For ``weight_grad``: outputs, tokens, columns, warps, stages, and the split of the sums."""
    sizes = (
        (128, 64, 128, 8, 3, 1),
        (128, 64, 256, 8, 3, 1),
        (64, 64, 128, 4, 4, 2),
        (128, 32, 128, 8, 4, 1),
    )
    return [
        _product(out, tokens, columns, m, warps, stages, waves)
        for out, tokens, columns, warps, stages, waves in (
            sizes if itemsize == 2 else [(64, 32, 64, 4, 3, 1)]
        )
    ]


def _few(tokens: int) -> int:
    """The tokens of a tile for at most :data:`FEW` tokens."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


REDUCE = Config((("BLOCK", 1024),), 4)
"""For ``add_up``, whose time is too short to be worth tuning."""


def _product(
    out: int, tokens: int, columns: int, m: int, warps: int, stages: int, waves: int
) -> Config:
    blocks = (("BLOCK_OUT", out), ("BLOCK_TOKENS", tokens), ("GROUPS", max(columns // m, 1)))
    return Config(blocks, warps, stages, waves)
