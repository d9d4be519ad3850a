"""Configs that train the Llama models of torchtitan with sparse weights.

It is a config module of torchtitan, so with a checkout of this repository in the current folder:

    PYTHONPATH=examples torchrun --nproc-per-node 8 -m torchtitan.train \
        --module torchtitan_llama --config llama3_8b_sparse

All options of torchtitan's command line work, such as ``--training.steps 1000``.
"""

from dataclasses import fields

from torchtitan.models.llama3 import config_registry
from torchtitan.trainer import Trainer

from slope_fx.integrations.torchtitan import SlopeConverter, SlopeSchedulers


def llama3_8b_sparse() -> Trainer.Config:
    """torchtitan's config of Llama 3 8B, with 2:4 weights and adapters of rank 64."""
    return sparse(config_registry.llama3_8b(), sparsity="2:4", adapter_rank=64)


def llama3_debugmodel_sparse() -> Trainer.Config:
    """torchtitan's smallest Llama, to try out an installation."""
    return sparse(config_registry.llama3_debugmodel(), sparsity="2:4", adapter_rank=8)


def sparse(config: Trainer.Config, sparsity: str, **options: object) -> Trainer.Config:
    """Make a config of a dense run sparse, in place.

    Args:
        config: a config of torchtitan for a decoder.
        sparsity: an N:M pattern.
        options: more arguments of ``slope_fx.compile``.

    Returns:
        ``config``.
    """
    assert config.model_spec is not None
    converter = SlopeConverter.Config(sparsity=sparsity, options=options).build()
    config.model_spec.model = converter.convert(config.model_spec.model)
    plain = {f.name: getattr(config.lr_scheduler, f.name) for f in fields(config.lr_scheduler)}
    config.lr_scheduler = SlopeSchedulers.Config(**plain, backward_mask_interval=100)
    config.parallelism.spmd_backend = "partial_dtensor"
    config.training.disable_cuda_graphs = True
    config.compile.enable = False  # slope_fx compiles the blocks
    return config
