"""The central rewrite: a linear over an expanded weight becomes the sparse linear."""

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx import GraphModule, Node

from slope_fx.kernels.engines import AUTO, limited
from slope_fx.ops.dispatch import choose_engine
from slope_fx.ops.targets import EXPAND, SPARSE_LINEAR
from slope_fx.passes.find_linears import find_linears
from slope_fx.passes.graph import replace, value_of


def sparsify_linears(gm: GraphModule, engines: str = AUTO) -> int:
    """``linear(x, expand(values, masks), b)`` to ``sparse_linear(x, values, masks, b)``.

    The engine that computes it is chosen here, among ``engines``, and named in the graph.
    Works on ``gm`` alone, nested graphs aside. Returns the number of linears rewritten.
    """
    matches = 0
    engines = limited(engines)
    for call in find_linears(gm):
        marker = call.weight
        # x @ W (without a transpose) reads the weight the other way round: its groups
        # run along d_out there, so it isn't the linear that the marker stands for.
        if marker.target is not EXPAND or call.stored_transposed:
            continue
        values, forward_mask, backward_mask, n, m = marker.args
        assert isinstance(values, Node)
        assert isinstance(n, int)
        assert isinstance(m, int)
        fused, separate = (call.bias, None) if _is_vector(call.bias) else (None, call.bias)
        with gm.graph.inserting_before(call.node):
            result = gm.graph.call_function(
                SPARSE_LINEAR,
                (call.x, values, forward_mask, backward_mask, fused, n, m),
                {**_choices(call.x, values, n, m, engines), "engines": engines},
            )
            if separate is not None:
                result = gm.graph.call_function(torch.add, (result, separate))
        replace(gm, call.node, result)
        matches += 1
    return matches


def _choices(x: Node, values: Node, n: int, m: int, engines: str) -> dict[str, str]:
    """The engines of a product and of its gradients, as arguments of the op.

    They are chosen here rather than when the op is traced, because torch.compile may take
    the traced graph from its cache, whose key is this graph. Left out is what the graph
    doesn't tell: with autocast inside of it the op chooses when it has cast.
    """
    x_value, weight = value_of(x), value_of(values)
    if not isinstance(x_value, Tensor) or not isinstance(weight, Tensor):
        return {}
    if x.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast):
        return {}
    device, dtype = x_value.device.type, x_value.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    size = (weight.shape[0], weight.shape[1])
    trains = torch.is_grad_enabled() and weight.requires_grad

    def choose(op: str) -> str:
        return choose_engine(
            op, x_value, size, n, m, engines, dtype, weight.dtype, trains or _replays()
        )

    chosen = {"engine": choose("sparse_linear")}
    if trains:
        chosen["weight_engine"] = choose("sparse_weight_grad")
    if torch.is_grad_enabled() and x_value.requires_grad:
        chosen["input_engine"] = choose("sparse_input_grad")
    return chosen


def _replays() -> bool:
    """Whether Inductor is set to make CUDA graphs, whose replays make everything anew."""
    return bool(inductor_config.triton.cudagraphs)


def _is_vector(bias: Node | None) -> bool:
    """Whether ``bias`` is (d_out,), as the op takes it, or broadcasts some other way."""
    value = None if bias is None else value_of(bias)
    return bias is None or (isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] != 1)
