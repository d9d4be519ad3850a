"""torchtitan's trainer on a CPU: what it expects of a device, and a tiny Llama to train.

The trainer is the one of torchtitan, unchanged. torchtitan has no CPU among its devices, and
expects a newer PyTorch, so this file provides what they lack:

- the functions of a device module that torch.cpu does not have, which report memory;
- sums instead of scaled sums in FSDP's collectives, which gloo does not have;
- torch's attention, because flex attention has no gradient on a CPU.

Importing torchtitan changes torch, so only processes that end with their tests may import this.
"""

import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils
from torch.distributed.fsdp import FSDPModule

# Other modules of torchtitan copy these when they are imported.
titan_utils.device_type = "cpu"
titan_utils.device_module = types.SimpleNamespace(
    set_device=lambda device: None,
    current_device=lambda: 0,
    device_count=lambda: 1,
    synchronize=lambda *device: None,
    empty_cache=lambda: None,
    get_device_name=lambda device: "cpu",
    get_device_properties=lambda device: types.SimpleNamespace(total_memory=1),
    reset_peak_memory_stats=lambda: None,
    memory_stats=lambda device: {},
)
os.environ.setdefault("LOCAL_RANK", "0")

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.models.common import ComplexRoPE  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import (  # noqa: E402
    _EMBEDDING_INIT,
    _NORM_INIT,
    Embedding,
    Linear,
    Llama3Model,
    RMSNorm,
    _build_llama3_layers,
    _output_linear_init,
    parallelize_llama,
)
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

VOCAB, DIM, BATCH, LENGTH = 64, 32, 4, 16


class Rows(BaseDataLoader):
    """Arithmetic sequences. Together, the ranks see the rows that one process sees."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **_: Any) -> None:
        self.share, self.step = (dp_world_size, dp_rank), 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        world, rank = self.share
        while True:
            generator = torch.Generator().manual_seed(self.step)
            first, by = torch.randint(VOCAB, (2, BATCH, 1), generator=generator)
            rows = (first + (by % 7 + 1) * torch.arange(LENGTH + 1)) % VOCAB
            mine = rows.chunk(world)[rank]
            self.step += 1
            yield {"input": mine[:, :-1].contiguous()}, mine[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class NoTokenizer(BaseTokenizer):
    """The rows are numbers already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        pass

    encode = decode = get_vocab_size = None  # type: ignore[assignment]


def _parallelize(model: torch.nn.Module, **given: Any) -> torch.nn.Module:
    model = parallelize_llama(model, **given)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model


def dense_config(folder: str, steps: int) -> Trainer.Config:
    """A config of torchtitan for a Llama 3 of width 32 with two blocks."""
    model = Llama3Model.Config(
        dim=DIM,
        vocab_size=VOCAB,
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCAB, embedding_dim=DIM, param_init=_EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=_NORM_INIT),
        lm_head=Linear.Config(
            in_features=DIM, out_features=VOCAB, param_init=_output_linear_init(DIM)
        ),
        layers=_build_llama3_layers(
            n_layers=2,
            dim=DIM,
            n_heads=4,
            hidden_dim=2 * DIM,
            rope=ComplexRoPE.Config(
                dim=DIM // 4, max_seq_len=LENGTH, theta=500000, scaling="llama"
            ),
            attn_backend="flex",
        ),
    )
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config = Trainer.Config(
        model_spec=ModelSpec("llama3", "tiny", model, _parallelize, None, None, None),
        tokenizer=NoTokenizer.Config(),
        dataloader=Rows.Config(),
        optimizer=default_adamw(lr=1e-2),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=BATCH // dist.get_world_size(),
            seq_len=LENGTH,
            steps=steps,
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCAB),
        metrics=MetricsProcessor.Config(log_freq=1),
        debug=DebugConfig(seed=0, enable_structured_logging=False),
        dump_folder=folder,
    )
    config.checkpoint.enable = True
    config.checkpoint.interval = 1000
    config.checkpoint.last_save_model_only = False
    return config
