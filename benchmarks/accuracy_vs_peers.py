"""ResNet-20 on CIFAR-10, fine-tuned by several frameworks at equal budget: same float checkpoint, same batches in the
same order with the same augmentation, same epochs, optimizer, schedule and bits.

    python benchmarks/accuracy_vs_peers.py --root DIR --ckpt resnet20_cifar10.safetensors [--bits W8A8 W4A4 W2A2]
        [--peers ours torch brevitas] [--epochs 1] [--seeds 3] [--limit IMAGES] [--output FILE.json]

    ours       learned steps, MSE start; weights per output channel
    torch      torch's own fake-quantize modules: ranges that follow the data (moving average), weights per channel
    brevitas   learned activation scales, weight scales from each channel's maximum

All quantize the inputs and weights of convolutions and of the linear layer, the first and last at 8 bits, and nothing
else. The last epoch counts; learned scales do not decay. Each peer runs in an environment of its own below --venvs,
which this script makes; torch and this project are seen from there. --limit takes as many images for training and for
the test.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qat.calibrate import calibrate
from qat.data import HFImages
from qat.data.batches import Images
from qat.insert import apply_plan, make_plan, named_quantizers
from qat.lightning import load_weights
from qat.lightning.groups import own_groups
from qat.models import ResNet
from qat.models.classifier import cosine_factor
from qat.policy import QuantPolicy

REQUIRES = {"ours": [], "torch": [], "brevitas": ["brevitas==0.13.4"]}
FIRST, LAST = "conv1", "linear"
CALIBRATION = 512


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def bits_of(name: str, bits: int) -> int:
    return 8 if name in (FIRST, LAST) else bits


def ours(model: nn.Module, x: Tensor, weight: int, act: int) -> nn.Module:
    eight = {"weight": {"bits": 8}, "act": {"bits": 8}}
    policy = QuantPolicy.from_dict(
        {
            "weight": {"bits": weight, "granularity": "channel"},
            "act": {"bits": act},
            "sites": "off",
            "rules": {"first": {"match": FIRST, **eight}, "last": {"match": LAST, **eight}},
        }
    )
    plan, _ = make_plan(model, policy, lambda: model(x[:2]))
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    return model


def with_torch(model: nn.Module, x: Tensor, weight: int, act: int) -> nn.Module:
    import torch.ao.quantization as tq
    from torch.nn.utils import parametrize

    for name, layer in layers(model):
        w, a = bits_of(name, weight), bits_of(name, act)
        fake = tq.FakeQuantize(
            tq.MovingAveragePerChannelMinMaxObserver, quant_min=-(2 ** (w - 1)), quant_max=2 ** (w - 1) - 1,
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0,
        )  # fmt: skip
        parametrize.register_parametrization(layer, "weight", fake)
        layer.input_fake = tq.FakeQuantize(tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=2**a - 1)
        layer.register_forward_pre_hook(lambda m, args: (m.input_fake(args[0]),))
    with torch.no_grad():
        model.eval()(x)
    return model


def with_brevitas(model: nn.Module, x: Tensor, weight: int, act: int) -> nn.Module:
    from brevitas import nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    for name, layer in layers(model):
        how = {
            "weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits_of(name, weight),
            "input_quant": Int8ActPerTensorFloat if name == FIRST else Uint8ActPerTensorFloat,
            "input_bit_width": bits_of(name, act), "bias": layer.bias is not None,
        }  # fmt: skip
        if isinstance(layer, nn.Linear):
            twin = qnn.QuantLinear(layer.in_features, layer.out_features, **how)
        else:
            shape = layer.in_channels, layer.out_channels, layer.kernel_size
            twin = qnn.QuantConv2d(*shape, stride=layer.stride, padding=layer.padding, **how)
        with torch.no_grad():
            twin.weight.copy_(layer.weight)
            if layer.bias is not None:
                twin.bias.copy_(layer.bias)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, twin)
    model.eval()
    with torch.no_grad(), calibration_mode(model):  # which switches what it calibrates to training
        model(x)
    return model


def observe(model: nn.Module, observing: bool) -> None:
    """torch's fake-quantize modules follow what they see in evaluation, too, unless they are told not to."""
    for module in model.modules():
        if hasattr(module, "disable_observer"):
            module.enable_observer(observing)


PREPARE: dict[str, Callable[[nn.Module, Tensor, int, int], nn.Module]] = {
    "ours": ours, "torch": with_torch, "brevitas": with_brevitas,
}  # fmt: skip


# -- one run, in the peer's environment --------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, float]:
    """Prepares, trains and tests one model; accuracies in percent."""
    torch.set_num_threads(args.threads)
    data = HFImages(
        root=args.root, image_column="img", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_padding=4,
        flip=True, val_fraction=0.02, train_limit=args.limit, test_limit=args.limit,
    )  # fmt: skip
    data.setup()
    train, test = data.splits["train"], data.splits["test"]
    weight, act = map(int, re.fullmatch(r"W(\d+)A(\d+)", args.bits[0]).groups())  # pyright: ignore
    model = ResNet(20)
    load_weights(model, args.ckpt)
    x, _ = data.plain(train.take(torch.arange(min(CALIBRATION, len(train.labels)))))
    float_accuracy = accuracy(model, test, data.plain)
    model = PREPARE[args.peers[0]](model.eval(), x, weight, act)
    start = accuracy(model, test, data.plain)
    fit(model, train, data.augmented, args)
    return {"float": float_accuracy, "ptq": start, "qat": accuracy(model, test, data.plain)}


def fit(
    model: nn.Module, train: Images, collate: Callable[..., tuple[Tensor, Tensor]], args: argparse.Namespace
) -> None:
    """SGD with Nesterov momentum under a cosine. Batches and augmentation are functions of the seed and the step alone,
    whatever random numbers a peer draws.
    """
    count = len(train.labels)
    total = args.epochs * -(-count // args.batch_size)
    with own_groups([(q.scale, None) for _, q in named_quantizers(model) if isinstance(q.scale, nn.Parameter)]):
        optimizer = torch.optim.SGD(groups(model), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_factor(step, total=total, warmup=total // 20)
    )
    model.train()
    observe(model, True)
    step = 0
    for epoch in range(args.epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(10_000 * args.seed + epoch))
        for indices in order.split(args.batch_size):
            torch.manual_seed(1_000_000 * (args.seed + 1) + step)
            x, y = collate(train.take(indices))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            step += 1


def groups(model: nn.Module) -> list[dict[str, object]]:
    """A peer's learned scales are no weights: they do not decay."""
    scales = [p for n, p in model.named_parameters() if "scaling_impl" in n]
    known = {id(p) for p in scales}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": rest}, *([{"params": scales, "weight_decay": 0.0}] if scales else [])]


@torch.no_grad()
def accuracy(model: nn.Module, test: Images, collate: Callable[..., tuple[Tensor, Tensor]]) -> float:
    model.eval()
    observe(model, False)
    right = 0
    for indices in torch.arange(len(test.labels)).split(500):
        x, y = collate(test.take(indices))
        right += int((model(x).argmax(1) == y).sum())
    return 100 * right / len(test.labels)


# -- all of them -------------------------------------------------------------------------------------------------------


def python_of(peer: str, folder: Path) -> str:
    """The interpreter of the peer's environment, made if it is not there."""
    if not REQUIRES[peer]:
        return sys.executable
    python = folder / peer / "bin" / "python"
    done = folder / peer / "complete"
    if not done.is_file():
        venv.create(folder / peer, with_pip=True, clear=True)
        site = next((folder / peer / "lib").glob("python*/site-packages"))
        paths = [p for p in sys.path if p.endswith("site-packages")] + [str(Path(__file__).resolve().parents[1])]
        (site / "shared.pth").write_text("\n".join(paths) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIRES[peer]], check=True)
        done.touch()
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--peers", nargs="+", choices=list(PREPARE), default=list(PREPARE))
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W4A4", "W2A2"])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--venvs", type=Path, default=Path(".peers"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # one run, in the environment of its peer
    args = parser.parse_args()
    if args.seed is not None:
        print(json.dumps(run(args)))
        return
    rows = []
    for bits in args.bits:
        for peer in args.peers:
            rows += [
                {"bits": bits, "peer": peer, "seed": seed, **apart(args, peer, bits, seed)}
                for seed in range(args.seeds)
            ]
            if args.output:
                args.output.write_text(json.dumps({"settings": settings(args), "runs": rows}, indent=1) + "\n")
    show(rows, args)


def apart(args: argparse.Namespace, peer: str, bits: str, seed: int) -> dict[str, float]:
    """`run` in the peer's environment."""
    options = [f"--{k.replace('_', '-')}={v}" for k, v in settings(args).items() if v is not None]
    command = [python_of(peer, args.venvs), __file__, f"--root={args.root}", f"--ckpt={args.ckpt}", *options]
    command += ["--peers", peer, "--bits", bits, f"--seed={seed}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{peer}, {bits}, seed {seed}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def settings(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in ("epochs", "limit", "lr", "batch_size", "threads")}


def show(rows: list[dict[str, float]], args: argparse.Namespace) -> None:
    table = Table(title=f"ResNet-20, CIFAR-10, {args.epochs} epoch(s), {args.seeds} seed(s), limit {args.limit}")
    for column in ("bits", "peer", "float", "calibrated", "trained, mean (range)"):
        table.add_column(column)
    for bits, peer in dict.fromkeys((row["bits"], row["peer"]) for row in rows):
        same = [row for row in rows if (row["bits"], row["peer"]) == (bits, peer)]
        trained = [row["qat"] for row in same]
        spread = f"{statistics.mean(trained):.2f} ({min(trained):.2f} to {max(trained):.2f})"
        start = statistics.mean(row["ptq"] for row in same)
        table.add_row(str(bits), str(peer), f"{same[0]['float']:.2f}", f"{start:.2f}", spread)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
