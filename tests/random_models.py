"""Random small models with random policies, from a seed: `draw(17)` is the same case everywhere.

A model takes rows of `WIDTH` numbers, which it reads as an image `[N, 4, 6, 6]`, a sequence `[N, 9, 16]` or a vector
`[N, 16]`, passes them through a few random blocks, and ends in a linear head. Weights are random, with the
statistics of BatchNorms and the negative gammas that training could have left.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from small_models import lived
from torch import Tensor, nn

WIDTH = 144
GROUP = 4


@dataclass(frozen=True)
class Case:
    """One drawn model with a policy for it.

    Attributes:
        seed: What `draw` was called with.
        model: Float, in evaluation mode.
        policy: For `QuantPolicy.from_dict`.
    """

    seed: int
    model: nn.Module
    policy: dict[str, Any]

    @property
    def in_place(self) -> bool:
        """Whether an operation changes its operand."""
        return any(isinstance(module, Residual) and module.in_place for module in self.model.modules())

    def example(self, batch: int, seed: int) -> Tensor:
        """Random inputs `[batch, WIDTH]`."""
        return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))


def draw(seed: int, blocks: int = 1) -> Case:
    """The case of a seed, with up to so many blocks."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = lived(rng.choice([_image, _image, _sequence, _row])(rng, rng.randint(1, blocks)), seed)
    return Case(seed, model, _policy(rng, model))


# -- models ------------------------------------------------------------------------------------------------------------


class Function(nn.Module):
    """A step without parameters."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class Residual(nn.Module):
    """`act(x + body(x))`, or the sum in place."""

    def __init__(self, body: nn.Module, act: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.body, self.act, self.in_place = body, act, in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.in_place:
            y += x
            return self.act(y)
        return self.act(x + y)


class Join(nn.Module):
    """Concatenates what two branches make of the input; without a second one, the input itself."""

    def __init__(self, a: nn.Module, b: nn.Module | None) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), x if self.b is None else self.b(x)], 1)


class Attention(nn.Module):
    """Self-attention on `[N, T, C]`: torch's function, or its parts as people write them."""

    def __init__(self, width: int, heads: int, fused: bool, causal: bool, bias: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.heads, self.fused, self.causal = heads, fused, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def _activation(rng: random.Random, none: bool = True) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, lambda: Function(F.relu), lambda: Function(F.gelu),
    ]  # fmt: skip
    return rng.choice([*kinds, nn.Identity] if none else kinds)()


def _conv(rng: random.Random, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A convolution (full, grouped or depthwise, or depthwise and pointwise) with or without BatchNorm, activation."""
    size, bias = rng.choice([1, 3, 3]), rng.random() < 0.5
    kind = rng.choice(["full", "full", "grouped", "depthwise"])
    groups = {"full": 1, "grouped": 2, "depthwise": inputs}[kind]
    layers: list[nn.Module] = [
        nn.Conv2d(
            inputs, outputs if outputs % groups == 0 else inputs, size, stride, size // 2, groups=groups, bias=bias
        )
    ]
    if rng.random() < 0.7:
        layers.append(nn.BatchNorm2d(layers[0].out_channels))  # pyright: ignore[reportArgumentType]
    layers.append(_activation(rng))
    if layers[0].out_channels != outputs or kind == "depthwise":
        layers += [nn.Conv2d(layers[0].out_channels, outputs, 1, bias=bias), _activation(rng)]  # pyright: ignore
    return nn.Sequential(*layers)


def _image(rng: random.Random, count: int) -> nn.Module:
    channels = 4
    blocks: list[nn.Module] = [nn.Unflatten(1, (4, 6, 6))]
    for _ in range(count):
        kind = rng.choice(["conv", "strided", "residual", "residual", "join", "pool"])
        if kind == "conv":
            blocks.append(_conv(rng, channels, channels := rng.choice([4, 8, 12])))
        elif kind == "strided":
            blocks.append(_conv(rng, channels, channels := rng.choice([8, 12]), 2))
        elif kind == "residual":
            blocks.append(Residual(_conv(rng, channels, channels), _activation(rng), rng.random() < 0.3))
        elif kind == "join":
            other = _conv(rng, channels, 4) if rng.random() < 0.6 else None
            blocks += [Join(_conv(rng, channels, 4), other), _activation(rng)]
            channels = 8 if other is not None else channels + 4
        else:
            pools = [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), Function(lambda x: F.avg_pool2d(x, 2, 1))]
            blocks.append(rng.choice(pools))
    if count > 1 or kind == "pool":
        blocks.append(_conv(rng, channels, channels := 8))
    if rng.random() < 0.25:  # patches to tokens, as in a vision transformer
        tokens = [
            Function(lambda x: x.flatten(2).transpose(1, 2)),
            *_tokens(rng, channels, 1),
            Function(lambda x: x.mean(1)),
        ]
        return nn.Sequential(*blocks, *tokens, nn.Linear(channels, 5))
    mean, pool = Function(lambda x: x.mean((2, 3))), Function(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1))
    end = rng.choice([[mean], [nn.AdaptiveAvgPool2d(1), nn.Flatten()], [pool]])
    return nn.Sequential(*blocks, *end, nn.Linear(channels, 5, bias=rng.random() < 0.7))


def _tokens(rng: random.Random, width: int, count: int) -> list[nn.Module]:
    """Blocks of a transformer or of an MLP, on `[N, T, width]`."""
    blocks: list[nn.Module] = []
    for _ in range(count):
        bias, hidden = rng.random() < 0.5, rng.choice([8, 16, 24])
        if rng.random() < 0.6:
            body: list[nn.Module] = [Attention(width, 2, rng.random() < 0.5, rng.random() < 0.3, bias)]
        else:
            body = [nn.Linear(width, hidden, bias=bias), _activation(rng, none=False), nn.Linear(hidden, width)]
        norm = [nn.LayerNorm(width)] if rng.random() < 0.5 else []
        blocks.append(Residual(nn.Sequential(*norm, *body), nn.Identity(), False) if rng.random() < 0.7 else body[0])
        if not isinstance(blocks[-1], Residual) and not isinstance(body[0], Attention):
            blocks += body[1:]
    return blocks


def _sequence(rng: random.Random, count: int) -> nn.Module:
    first: Callable[[Tensor], Tensor] = lambda x: x[:, 0]  # noqa: E731
    mean: Callable[[Tensor], Tensor] = lambda x: x.mean(1)  # noqa: E731
    end = Function(rng.choice([first, mean]))
    return nn.Sequential(nn.Unflatten(1, (9, 16)), *_tokens(rng, 16, count), end, nn.Linear(16, 5))


def _row(rng: random.Random, count: int) -> nn.Module:
    width, layers = 16, [Function(lambda x: x[:, :16])]
    for _ in range(count + 1):
        step: list[nn.Module] = [nn.Linear(width, 16, bias=rng.random() < 0.5)]
        step += [nn.BatchNorm1d(16)] if rng.random() < 0.5 else []
        if rng.random() < 0.4:
            layers.append(Residual(nn.Sequential(*step), _activation(rng), rng.random() < 0.3))  # pyright: ignore
        else:
            layers += [*step, _activation(rng)]  # pyright: ignore[reportArgumentType]
    return nn.Sequential(*layers, nn.Linear(16, 5))


# -- policies ----------------------------------------------------------------------------------------------------------

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "literature": {"sites": "off"},
    "integer_only": {"kinds": "all"},
    "shared": {"kinds": "all", "concat": "shared"},
    "weights_only": {"act": "off", "sites": "off"},
}


def _policy(rng: random.Random, model: nn.Module) -> dict[str, Any]:
    preset = rng.choice(["default", "default", "literature", "integer_only", "shared", "weights_only"])
    policy: dict[str, Any] = {"weight": _weight(rng), "act": _act(rng), "rules": {}}
    if rng.random() < 0.5:
        policy["sites"] = {"bits": rng.randint(4, 8)}
    policy |= PRESETS[preset]
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        rule: dict[str, Any] = {}
        if rng.random() < 0.2:
            rule["weight"] = _weight(rng)
        if rng.random() < 0.2 and policy["act"] != "off":
            rule["act"] = {"bits": rng.randint(2, 8)}
        grid = policy["weight"] | rule.get("weight", {})
        if grid["granularity"] == "group" and layer.weight.shape[1] % GROUP:
            rule["weight"] = grid | {"granularity": "channel", "group_size": None}
        if rule:
            policy["rules"][name.replace(".", "_")] = {"match": name, **rule}
    return policy


def _weight(rng: random.Random) -> dict[str, Any]:
    granularity = rng.choice(["tensor", "channel", "channel", "channel", "group"])
    grid = _act(rng) | {"granularity": granularity, "group_size": GROUP if granularity == "group" else None}
    rare = grid["symmetric"] and rng.random() < 0.1
    kind = rng.choice(["ternary", "binary", "midrise"])
    return grid | ({"format": kind, "bits": grid["bits"] % 3 + 2 if kind == "midrise" else None} if rare else {})


def _act(rng: random.Random) -> dict[str, Any]:
    symmetric = rng.random() < 0.65
    return {
        "format": "int",
        "bits": rng.choice([2, 3, 4, 4, 5, 6, 7, 8, 8]),
        "symmetric": symmetric,
        "quantizer": rng.choice(["fixed", "lsq"]) if symmetric else "fixed",
        "range": rng.choice(["minmax", "minmax", "mse"]),
        "scale": rng.choice(["float32"] * 7 + ["pow2"]),
    }
