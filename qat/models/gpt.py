"""A small decoder-only transformer over characters, in the manner of nanoGPT (Radford et al., "Language Models are
Unsupervised Multitask Learners", 2019): pre-norm blocks without biases, learned positions, and the token embedding
again as the output layer.

Shapes: N windows, T characters in each, C channels, H heads, V characters in the vocabulary.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import UserError, require
from qat.models.classifier import Training
from qat.models.language import LanguageModel


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); `l1`, `l2` are the norms, `o` and `f2` write to the residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.l1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.l2 = nn.LayerNorm(width, bias=False)
        self.f1 = nn.Linear(width, 4 * width, bias=False)
        self.f2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C] to [N, T, C]; position t sees positions up to t."""
        n, t, c = x.shape
        q, k, v = self.qkv(self.l1(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # [N, H, T, -]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, c))
        return x + self.f2(F.gelu(self.f1(self.l2(x))))


class GPT(LanguageModel):
    """A character-level language model.

    Args:
        num_classes: characters in the vocabulary.
        block: longest window it can see.
        layers: blocks.
        heads: attention heads; they divide `width`.
        width: channels of the residual stream.
        training: see `Classifier`.

    Raises:
        UserError: a size is out of its range.
    """

    def __init__(
        self,
        num_classes: int = 65,
        block: int = 64,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        **training: Unpack[Training],
    ) -> None:
        super().__init__(num_classes, **training)
        for name, value in (("block", block), ("layers", layers), ("heads", heads)):
            require(name, value, value >= 1, "at least 1")
        require("width", width, width >= heads and width % heads == 0, f"a multiple of model.heads={heads}")
        self.te = nn.Embedding(num_classes, width)
        self.pe = nn.Embedding(block, width)
        self.b = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.lf = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:  # what writes to the residual starts smaller, the deeper the network (GPT-2, 2.3)
                deep = (2 * layers) ** -0.5 if name.endswith(("o.weight", "f2.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * deep)

    def forward(self, tokens: Tensor) -> Tensor:
        """Codes of characters [N, T], int64, to logits [N, T, V]."""
        x = self.te(tokens) + self.pe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.b:
            x = block(x)
        return F.linear(self.lf(x), self.te.weight)

    def check_input(self, x: Tensor) -> None:
        """Raises a UserError unless x [N, T] fits vocabulary and window."""
        if x.ndim != 2 or x.is_floating_point():
            raise UserError(f"expected windows of character codes [N, T], got {x.dtype} of shape {list(x.shape)}")
        if x.shape[1] > self.pe.num_embeddings:
            raise UserError(
                f"model.block={self.pe.num_embeddings}, but the data's windows have {x.shape[1]} characters; "
                f"set model.block={x.shape[1]}"
            )
        if x.numel() and int(x.max()) >= self.te.num_embeddings:
            raise UserError(
                f"model.num_classes={self.te.num_embeddings}, but the data has character code {int(x.max())}"
            )
