"""``compress_``: ends a method that stores dense weights."""

import dataclasses
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from slope_fx.errors import StateError, UnsupportedError
from slope_fx.methods import Slope, method_of
from slope_fx.record import RECORD, sparse_weights, trainable_record_of
from slope_fx.sparse.blank import check_filled
from slope_fx.sparse.install import plain_modes
from slope_fx.sparse.optimizers import watch

Model = TypeVar("Model", bound=nn.Module)


def compress_(model: Model) -> Model:
    """Store only the kept values of a model that was trained with dense weights.

    The outputs stay the same. The model is then one of ``method="slope"``: it trains on with sparse
    gradients and fixed forward masks, is saved, frozen and exported as any other. The parameters
    are replaced, so make a new optimizer.

    Args:
        model: the object that ``compile`` returned, with ``method`` "sr-ste", "s-ste" or
            "gradual". It is changed in place.

    Returns:
        ``model``.

    Raises:
        StateError: ``model`` stores only the kept values already, is not initialized, is not the
            object that ``compile`` returned, or its pruned part still takes part.
        UnsupportedError: the model is sharded.
    """
    record = trainable_record_of(model)
    method, weights = method_of(record.config.method), list(sparse_weights(model).values())
    if method.compressed:
        raise StateError(
            f'the model was compiled with method="{method.name}", which has no dense weights of '
            "sparse layers. Leave compress_ out."
        )
    for weight in weights:
        check_filled(weight)
        weight.check_faded()
        if isinstance(weight.values, DTensor):
            raise UnsupportedError(
                f"{weight.name} is sharded. Save the model with slope_fx.save_pretrained, load it "
                "on one process with load_pretrained, and compress it there."
            )
    replaced = []
    with torch.no_grad(), plain_modes():
        for weight in weights:
            old = weight.values
            values = nn.Parameter(weight.kept_values(), requires_grad=old.requires_grad)
            weight.become(Slope(), values)
            replaced.append((old, values))
    config = dataclasses.replace(record.config, method=Slope())
    model.__dict__[RECORD] = dataclasses.replace(record, config=config)
    watch(replaced, by="slope_fx.compress_")
    return model
