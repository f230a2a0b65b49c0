"""`MultiheadAttention`: projections `q_proj`, `k_proj`, `v_proj`, `out_proj`, and the products `matmul_0` (scores) and
`matmul_1` (mixing values by probabilities).

The three projections are parts even where torch keeps their weights in one parameter; `out_proj` is the layer's own
child, which the float layer never calls. Softmax stays float; its probabilities are never negative and get an unsigned
grid.

torch's fused kernels for inference take weights straight from `TransformerEncoderLayer` and would skip every quantized
layer. `SlowPath` turns them off for that module, and nobody else's.

Shapes: N sequences, L queries, S keys, E features, H heads of D features.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.parts import BoundPart, Composite, Part, Watch, part_call, product_call
from qat.layers.site import Site
from qat.layers.twin import Inserted, ours
from qat.planning.functions import FUNCTIONS
from qat.planning.recording import Call

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class QuantMultiheadAttention(Composite):
    serves = nn.MultiheadAttention

    num_heads: int
    dropout: float
    batch_first: bool
    out_proj: nn.Module

    @classmethod
    def parts(cls, layer: Any) -> dict[str, Part]:
        width, bias = layer.embed_dim, "in_proj_bias" if layer.in_proj_bias is not None else None
        return {
            name: BoundPart(
                layer,
                "in_proj_weight" if layer._qkv_same_embed_dim else f"{name}_weight",
                bias,
                (index * width, width),
            )
            for index, name in enumerate(PROJECTIONS)
        }

    @classmethod
    def calls(cls, layer: Any, name: str, watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
        inputs = _operands(*args, **kwargs)
        (n, length), (_, source) = (_batch_and_length(layer, x) for x in inputs[:2])
        heads, width = layer.num_heads, layer.embed_dim
        extra = (layer.bias_k is not None) + layer.add_zero_attn
        calls = [
            part_call(f"{name}.{part}", projection, watch.key(x), (*_batch_and_length(layer, x), width))
            for x, (part, projection) in zip(inputs, cls.parts(layer).items(), strict=True)
        ]
        scores = (n, heads, length, source + extra)
        per_head = (n, heads, length, width // heads)
        q, k, p, v = watch.fresh(), watch.fresh(), watch.fresh(nonnegative=True), watch.fresh()
        calls.append(product_call(name, 0, [q, k], scores, width // heads))
        calls.append(product_call(name, 1, [p, v], per_head, source + extra))
        calls.append(part_call(f"{name}.out_proj", layer.out_proj, watch.fresh(), (n, length, width)))
        return calls

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        with ours():
            batched = query.dim() == 3
            inputs = [self._batch_first(x) for x in (query, key, value)]
            q, k, v = (self.part(n)(x) for n, x in zip(PROJECTIONS, inputs, strict=True))
            k, v, more = self._extended(k, v)
            q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
            mask = self._mask(q, attn_mask, key_padding_mask, more)
            mixed, probabilities = self._attend(q, k, v, mask, need_weights)
            y = self.out_proj(mixed.transpose(1, 2).flatten(2))
            y = y if self.batch_first and batched else y.transpose(0, 1)
            if probabilities is not None and average_attn_weights:
                probabilities = probabilities.mean(1)
            if batched:
                return y, probabilities
            return y.squeeze(1), None if probabilities is None else probabilities.squeeze(0)

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with the learned and the zero one behind them, and how many these are."""
        this: Any = self
        more = 0
        if this.bias_k is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, this.bias_k), (v, this.bias_v)))
            more += 1
        if this.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            more += 1
        return k, v, more

    def _mask(self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None, more: int) -> Tensor | None:
        """Both masks as one to be added to the scores, `[1 or N, 1 or H, L or 1, S]`."""
        total = None
        if attn_mask is not None:
            shape = (-1, self.num_heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else (1, 1, *attn_mask.shape)
            total = _additive(attn_mask, q).view(shape)
        if padding is not None:
            padding = _additive(padding, q).view(-1, 1, 1, padding.shape[-1])
            total = padding if total is None else total + padding
        return total if total is None else F.pad(total, (0, more))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`q [N, H, L, D]`, `k` and `v` `[N, H, S, D]` to what the heads mix, and the probabilities if needed."""
        sites = [self._modules.get(f"matmul_{i}") for i in (0, 1)]
        dropout = self.dropout if self.training else 0.0
        if sites == [None, None] and not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = _product(sites[0], q, k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
        probabilities = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        return _product(sites[1], probabilities, v), probabilities if need_weights else None


def _product(site: nn.Module | None, a: Tensor, b: Tensor) -> Tensor:
    if not isinstance(site, Site):
        return a @ b
    return site(torch.matmul, FUNCTIONS[torch.matmul], (a, b), {}, [a, b])


def _operands(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


def _batch_and_length(layer: Any, x: Tensor) -> tuple[int, int]:
    if x.dim() == 2:
        return 1, len(x)
    return (x.shape[0], x.shape[1]) if layer.batch_first else (x.shape[1], x.shape[0])


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as torch takes it: of booleans, `True` hides."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(mask, float("-inf"))


class SlowPath(Inserted):
    """On top of `TransformerEncoder` and `TransformerEncoderLayer`: runs their layers rather than one fused kernel.

    Both take that path only if an attribute of theirs says that they may, and read it for nothing else. Properties of
    the class go before what the instance holds, which is left alone.
    """

    use_nested_tensor = property(lambda self: False)
    activation_relu_or_gelu = property(lambda self: 0)


FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules whose forward may skip their children's."""
