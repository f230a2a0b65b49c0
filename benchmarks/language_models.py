"""Perplexity of a small language model before and after quantization, preset by preset: docs/language-models.md.

    python benchmarks/language_models.py TEXT_FILE [--steps 600] [--qat-steps 60] [--write]

A two-layer Llama of `transformers` learns the bytes of a text; each preset `lm_*` then quantizes a copy of it,
calibrated on training text and nothing more (PTQ), and again after some steps of training (QAT). The perplexity is per
byte, on text that was not trained on. `tests/test_language_models.py` uses the same functions.
"""

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from pages import put
from presets import policy
from torch import Tensor, nn

from qat.calibrate import calibrate
from qat.config.configs import configs_dir
from qat.insert import apply_plan
from qat.lightning.scale_groups import own_groups
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

LENGTH, BATCH = 64, 16


def small_llama(width: int = 128, layers: int = 2) -> nn.Module:
    """Of bytes, with two query heads for each head of keys and values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4 * LENGTH, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def split(text: bytes) -> tuple[Tensor, Tensor]:
    """Bytes to learn from, and the last tenth."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]


def batches(tokens: Tensor, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """`[BATCH, LENGTH]` windows from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator).tolist()
        yield torch.stack([tokens[s : s + LENGTH] for s in starts])


def train(model: nn.Module, tokens: Tensor, steps: int, lr: float, seed: int = 0) -> None:
    """AdamW on random windows, under one cycle of learning rates for the first training (`seed` 0)."""
    with own_groups(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps) if seed == 0 else None
    model.train()
    for batch in batches(tokens, steps, seed):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, samples: int = 256) -> float:
    """Per byte, over windows that lie side by side."""
    windows = tokens[: samples * LENGTH].unfold(0, LENGTH, LENGTH).split(BATCH)
    losses = [model.eval()(input_ids=w, labels=w).loss for w in windows if len(w) == BATCH]
    return math.exp(torch.stack(losses).mean())


def presets() -> list[str]:
    return sorted(path.stem for path in (configs_dir() / "quant").glob("lm_*.yaml"))


def quantize(model: nn.Module, how: QuantPolicy, tokens: Tensor, steps: int = 4) -> None:
    """Inserts in place, and calibrates on some batches of `tokens`."""
    first = next(batches(tokens, 1))
    plan, _ = make_plan(model.eval(), how, lambda: model(input_ids=first))
    apply_plan(model, plan)
    calibrate(model, lambda: [model(input_ids=batch) for batch in batches(tokens, steps)])


def continued(model: nn.Module, prompt: Tensor, count: int, use_cache: bool) -> Tensor:
    """`generate`, greedily: `[batch, count]` new tokens."""
    settings = {"max_new_tokens": count, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, prompt.shape[1] :]  # pyright: ignore


TEXT = """Perplexity per byte on the last tenth of Tiny Shakespeare, of a Llama with 2 layers and width 128 trained for
{steps} steps (`python benchmarks/language_models.py FILE {command}`); QAT is after {qat_steps} more
steps, and so is the float model in that column. A model this small shows that the presets work and what they cost
beside each other, nothing about large ones.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--qat-steps", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="into docs/language-models.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    learn, held = split(given.text.read_bytes())
    model = small_llama()
    train(model, learn, given.steps, 3e-3)
    tuned = copy.deepcopy(model)
    train(tuned, learn, given.qat_steps, 2e-4, seed=1)
    rows = [f"| float | {perplexity(model, held):.3f} | {perplexity(tuned, held):.3f} |"]
    cases = {name: (name, ()) for name in presets()}
    cases["lm_kv8 with bits=4"] = ("lm_kv8", ("quant.rules.kv_cache.act.bits=4",))
    for name, (preset, overrides) in cases.items():
        copied = copy.deepcopy(model)
        quantize(copied, policy(preset, *overrides), learn)
        before = perplexity(copied, held)
        train(copied, learn, given.qat_steps, 2e-4, seed=1)
        rows.append(f"| {name} | {before:.3f} | {perplexity(copied, held):.3f} |")
        print(rows[-1], flush=True)
    print("\n".join(rows))
    if given.write:
        command = f"--steps {given.steps} --qat-steps {given.qat_steps}"
        text = TEXT.format(steps=given.steps, qat_steps=given.qat_steps, command=command)
        put("language-models.md", "perplexity", "\n".join([text, "| preset | PTQ | QAT |", "|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
