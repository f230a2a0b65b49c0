"""Llama as llama.cpp and `transformers` expect it in a GGUF file: their names of tensors, the sizes of the model, and
the rows of queries and keys in the order of their rotary embedding (pairs beside each other, where `transformers` has
halves). Rows are whole sequences of blocks, so moving them changes no code and no scale.

A tokenizer is not in the file.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from qat.layers import original_class

LLAMA = "llama"
MODULE_KEY = "qat.module"
"""Metadata: what the names of the `transformers` model begin with in the trained module."""
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""Names of layers, in a block and outside of one, and what they are in a file."""


@dataclass(frozen=True)
class Llama:
    """One model.

    Attributes:
        prefix: Beginning of its names in the trained module (`model.`).
        heads: Attention heads of queries and of keys.
        blocks: Number of them.
    """

    prefix: str
    heads: tuple[int, int]
    blocks: int

    @classmethod
    def of_model(cls, module: nn.Module) -> tuple["Llama", Any] | None:
        """The Llama in a module, and its config; `None` if there is none that the format can hold whole."""
        found = [(n, m) for n, m in module.named_modules() if original_class(m).__name__ == "LlamaForCausalLM"]
        if len(found) != 1:
            return None
        name, model = found[0]
        config: Any = model.config
        plain = config.rope_parameters.get("rope_type", "default") == "default" and config.hidden_act == "silu"
        if not plain or config.attention_bias or config.mlp_bias:
            return None
        heads = config.num_attention_heads, config.num_key_value_heads
        llama = cls(f"{name}." if name else "", heads, config.num_hidden_layers)
        own = {f"{llama.prefix}{n}.weight" for n, m in model.named_modules() if _has_weight(m)}
        return (llama, config) if own == set(llama.names()) else None

    @classmethod
    def of_file(cls, fields: dict[str, Any]) -> "Llama | None":
        """The one whose metadata a reader of the `gguf` package found."""
        if MODULE_KEY not in fields:
            return None
        keys = ("attention.head_count", "attention.head_count_kv", "block_count")
        heads, kv_heads, blocks = (int(fields[f"{LLAMA}.{key}"].contents()) for key in keys)
        return cls(str(fields[MODULE_KEY].contents())[1:], (heads, kv_heads), blocks)

    def describe(self, writer: Any, config: Any) -> None:
        """Adds the metadata to a writer of the `gguf` package."""
        writer.add_string(MODULE_KEY, f".{self.prefix}")  # the package leaves out what is empty
        writer.add_context_length(config.max_position_embeddings)
        writer.add_block_count(self.blocks)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads[0])
        writer.add_head_count_kv(self.heads[1])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)

    def names(self) -> dict[str, str]:
        """The name in a file of every parameter."""
        inside = {
            f"model.layers.{block}.{ours}": f"blk.{block}.{theirs}"
            for block in range(self.blocks)
            for ours, theirs in INSIDE.items()
        }
        return {f"{self.prefix}{ours}.weight": f"{theirs}.weight" for ours, theirs in {**OUTSIDE, **inside}.items()}

    def reordered(self, name: str, rows: np.ndarray, *, back: bool = False) -> np.ndarray:
        """The rows of the tensor `name` of a file in its order, or `back` in that of `transformers`."""
        kind = name.split(".")[-2]
        if kind not in ("attn_q", "attn_k"):
            return rows
        heads = self.heads[kind == "attn_k"]
        half = len(rows) // heads // 2
        pairs = (half, 2) if back else (2, half)
        return np.ascontiguousarray(rows.reshape(heads, *pairs, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None or hasattr(module, "integer_weight")
