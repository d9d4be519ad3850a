"""The pass ``decompose_attention``: decomposes torch's attention functions into linears.

``nn.MultiheadAttention`` calls one function with all its weights. In evaluation mode without
gradients, it and ``nn.TransformerEncoderLayer`` call one fused op each. Other passes find only
the linears of the decomposed form.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.passes.context import Context
from slope_fx.passes.graph import argument, emit, erase_unused, rank_of, replace, value_of
from slope_fx.passes.markers import is_marked

_NAMES = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias",
    "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    "training", "key_padding_mask", "need_weights", "attn_mask", "use_separate_proj_weight",
    "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
)  # fmt: skip
_NOT_OPENED = ("static_k", "static_v")
"""Precomputed keys and values. No torch module passes them."""
_DEFAULTS = {"training": True, "need_weights": True, "average_attn_weights": True}
_NATIVE_NAMES = (
    "query", "key", "value", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias",
    "out_proj_weight", "out_proj_bias", "mask", "need_weights", "average_attn_weights",
    "mask_type",
)  # fmt: skip
_LAYER_NAMES = (
    "src", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias", "out_proj_weight",
    "out_proj_bias", "use_gelu", "norm_first", "eps", "norm_weight_1", "norm_bias_1",
    "norm_weight_2", "norm_bias_2", "ffn_weight_1", "ffn_bias_1", "ffn_weight_2", "ffn_bias_2",
    "mask", "mask_type",
)  # fmt: skip
_BY_KEY = 1
"""The mask type of the fused ops for a mask (B, S). Others broadcast to (B, heads, L, S)."""


def decompose_attention(
    gm: GraphModule, context: Context, opens: Callable[[object], bool] = is_marked
) -> int:
    """Decomposes calls of torch's attention functions with compressed weights.

    The pass changes only ``gm`` itself, not its nested graphs.

    Args:
        gm: a Dynamo graph.
        context: not used.
        opens: whether a call with this operand is decomposed.

    Returns:
        The number of decomposed calls.
    """
    matches = 0
    for node in list(gm.graph.nodes):
        if not is_attention(node) or not any(map(opens, node.all_input_nodes)):
            continue
        names, parts = _KNOWN[node.target]
        if any(getattr(value_of(n), "is_nested", False) for n in node.all_input_nodes):
            continue
        given = [argument(node, i, name) for i, name in enumerate(names)]
        given = [_DEFAULTS.get(k) if v is None else v for k, v in zip(names, given, strict=True)]
        if any(dict(zip(names, given, strict=True)).get(k) is not None for k in _NOT_OPENED):
            continue
        _replace_parts(node, emit(node, _by_name(names, parts), *given))
        matches += 1
    return matches


def _by_name(names: tuple[str, ...], parts: Any) -> Any:
    return lambda *operands: parts(**dict(zip(names, operands, strict=True)))


def is_attention(node: Node) -> bool:
    """Whether ``node`` calls one of torch's attention functions."""
    return node.op == "call_function" and node.target in _KNOWN


def _replace_parts(node: Node, results: Any) -> None:
    """Replace the result of ``node``, a tensor or a tuple of tensors, by ``results``."""
    if isinstance(results, Node):
        replace(node, results)
        return
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(results[user.args[1]], Node):
            replace(user, results[user.args[1]])
        elif not user.users:
            node.graph.erase_node(user)  # attention weights that are not needed
    operands = node.all_input_nodes
    if not node._erased:  # replacing its last user may have erased it
        node.graph.erase_node(node)
    for operand in operands:
        if not operand._erased:
            erase_unused(operand)


def _attend(
    query: Any, key: Any, value: Any, num_heads: int, in_proj_weight: Any, in_proj_bias: Any,
    bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float, out_proj_weight: Any,
    out_proj_bias: Any, training: bool, key_padding_mask: Any, need_weights: bool, attn_mask: Any,
    use_separate_proj_weight: bool, q_proj_weight: Any, k_proj_weight: Any, v_proj_weight: Any,
    average_attn_weights: bool, is_causal: bool, **_: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """``F.multi_head_attention_forward``: maps (L, B, E) or (L, E) to that and the weights."""
    same = query.node is key.node, key.node is value.node
    batched = _rank(query) == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        projections = q_proj_weight, k_proj_weight, v_proj_weight
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        inputs = query, key, value
        q, k, v = (F.linear(inputs[i], projections[i], biases[i]) for i in range(3))
    else:
        q, k, v = _project(query, key, value, same, in_proj_weight, in_proj_bias)
    if bias_k is not None:
        k = torch.cat([k, bias_k.expand(1, k.size(1), -1)])
        v = torch.cat([v, bias_v.expand(1, v.size(1), -1)])
    # (L, B, E) to (B, heads, L, E / heads)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    more = (bias_k is not None) + bool(add_zero_attn)
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None
    else:
        is_causal = False
    mask = _merged(attn_mask, key_padding_mask, num_heads, more, q)
    dropout_p = dropout_p if training else 0.0
    heads, weights = _attention(q, k, v, mask, dropout_p, is_causal, need_weights)
    out = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if not batched:
        out, weights = out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out, weights


def _attend_batch_first(
    query: Any, key: Any, value: Any, num_heads: int, in_proj_weight: Any, in_proj_bias: Any,
    out_proj_weight: Any, out_proj_bias: Any, mask: Any, need_weights: bool,
    average_attn_weights: bool, mask_type: int | None, **_: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """``torch._native_multi_head_attention``: maps (B, L, E) to (B, L, E) and the weights."""
    same = query.node is key.node, key.node is value.node
    q, k, v = _project(query, key, value, same, in_proj_weight, in_proj_bias)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = _added(mask, q)
        if mask_type == _BY_KEY:
            mask = mask[:, None, None, :]
    heads, weights = _attention(q, k, v, mask, 0.0, False, need_weights)
    out = F.linear(heads.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    return out, weights


def _encode(
    src: Any, embed_dim: int, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Any,
    norm_bias_1: Any, norm_weight_2: Any, norm_bias_2: Any, ffn_weight_1: Any, ffn_bias_1: Any,
    ffn_weight_2: Any, ffn_bias_2: Any, **attention: Any,
) -> Any:  # fmt: skip
    """``torch._transformer_encoder_layer_fwd``: maps (B, L, E) to (B, L, E)."""

    def attend(x: Any) -> Any:
        return _attend_batch_first(
            x, x, x, need_weights=False, average_attn_weights=False, **attention
        )[0]

    def feed(x: Any) -> Any:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    def norm_1(x: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attend(norm_1(src))
        return src + feed(norm_2(src))
    src = norm_1(src + attend(src))
    return norm_2(src + feed(src))


def _project(
    query: Any, key: Any, value: Any, same: tuple[bool, bool], weight: Any, bias: Any
) -> tuple[Any, ...]:
    """The three projections with a packed weight: one product if all have the same input."""
    if all(same):
        parts: tuple[Any, ...] = F.linear(query, weight, bias).chunk(3, dim=-1)
        return parts[0], parts[1], parts[2]
    weights = weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(F.linear(x, weights[i], biases[i]) for i, x in enumerate((query, key, value)))


def _attention(
    q: Any, k: Any, v: Any, mask: Any, dropout_p: float, is_causal: bool, need_weights: bool
) -> tuple[Any, Any]:
    """The heads (B, heads, L, D), and the attention weights (B, heads, L, S) or None."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal), None
    size = value_of(q.node)
    assert isinstance(size, Tensor)
    scores = (q * math.sqrt(1.0 / size.shape[-1])) @ k.mT
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)  # torch returns them after dropout, too
    return weights @ v, weights


def _merged(attn_mask: Any, key_padding_mask: Any, heads: int, more: int, like: Any) -> Any:
    """Both masks as one mask that is added to scores (B, heads, L, S), or None.

    The masks are padded by ``more`` columns, because S includes the bias and the zero keys.
    """
    total = None
    if attn_mask is not None:
        total = _added(attn_mask, like)
        total = F.pad(total, (0, more)) if more else total
        if _rank(attn_mask) == 3:
            total = total.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        keys = _added(key_padding_mask, like)
        keys = (F.pad(keys, (0, more)) if more else keys)[:, None, None, :]
        total = keys if total is None else total + keys
    return total


def _added(mask: Any, like: Any) -> Any:
    """A mask in the form that is added to scores. A bool mask becomes -inf where it is True."""
    value, of = value_of(mask.node), value_of(like.node)
    assert isinstance(value, Tensor)
    assert isinstance(of, Tensor)
    if value.dtype.is_floating_point:
        return mask
    return torch.zeros_like(mask, dtype=of.dtype).masked_fill(mask, float("-inf"))


def _rank(proxy: Any) -> int | None:
    return rank_of(proxy.node)


_KNOWN: dict[Any, tuple[tuple[str, ...], Any]] = {
    F.multi_head_attention_forward: (_NAMES, _attend),
    torch._native_multi_head_attention: (_NATIVE_NAMES, _attend_batch_first),
    torch._transformer_encoder_layer_fwd: (_LAYER_NAMES, _encode),
}
