"""Scaled dot product attention in plain operations, for whoever has to reach the probabilities in between.

The fused kernels never form them; a grid for them, and the two integer products of an exported file, need the form that
the documentation of `F.scaled_dot_product_attention` gives. Shapes: query `[..., L, E]`, key `[..., S, E]`, value
`[..., S, Ev]`, mask broadcastable to `[..., L, S]`; with grouped heads, axis -3 of key and value (G) divides the
query's (H).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    probabilities: Callable[[Tensor], Tensor],
) -> Tensor:
    """`F.scaled_dot_product_attention`, with `probabilities` applied to the softmax's output.

    As there, a query that may look at nothing gets zeros, and dropout acts whenever `dropout_p` is not 0.

    Returns:
        `[..., L, Ev]`.

    Raises:
        RuntimeError: if a mask comes with `is_causal`, or groups do not divide the heads; the original refuses both.
    """
    if attn_mask is not None and is_causal:
        raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    products = _product(query, key.transpose(-2, -1), enable_gqa)
    if is_causal:  # every query sees the first key
        hidden = torch.full(products.shape[-2:], -math.inf, dtype=products.dtype, device=products.device).triu(1)
        weights = torch.softmax(torch.add(hidden, products, alpha=factor), -1)
    elif attn_mask is None:
        weights = torch.softmax(products * factor, -1)
    else:
        scores = products * factor
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        blind = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return _product(F.dropout(probabilities(weights), dropout_p), value, enable_gqa)


def _product(a: Tensor, b: Tensor, grouped: bool) -> Tensor:
    """`a @ b`, `[..., H, L, E]` by `[..., G, E, S]`: the heads of a group are rows of one matrix, so that nothing is
    repeated, which runtimes would do in float, between the codes of `b` and the product.
    """
    if not grouped:
        return a @ b
    heads, groups = a.size(-3), b.size(-3)
    if heads % groups:
        raise RuntimeError("Number of heads in key and value must divide the number of heads in query")
    each = heads // groups
    rows = a.unflatten(-3, (groups, each)).flatten(-3, -2)
    return (rows @ b).unflatten(-2, (each, a.size(-2))).flatten(-4, -3)
