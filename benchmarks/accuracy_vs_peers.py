"""ResNet-20 on CIFAR-10, fine-tuned by several frameworks at equal budget: docs/peers.json and docs/results.md.

    python benchmarks/accuracy_vs_peers.py --root DIR --ckpt resnet20_cifar10.safetensors [--bits W8A8 W4A4 W2A2]
        [--peers ours torch pt2e brevitas ...] [--epochs 1] [--seeds 3] [--train-limit IMAGES] [--write]

Same float checkpoint, same batches in the same order with the same augmentation, same epochs, optimizer, learning rate,
schedule and bits; in bfloat16 autocast and channels last, tested in float32 on all test images. The last epoch counts
(--epochs 0: as calibrated); learned scales do not decay. benchmarks/accuracy_prepare.py says what each framework does.

Each peer runs in an environment of its own below --venvs, which this script makes; torch and this project are seen from
there. What --output holds is not run again. --write puts its tables into docs/results.md.
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
from typing import Any

import torch
import torch.nn.functional as F
from accuracy_prepare import PEERS, observe
from pages import DOCS, put
from torch import Tensor, nn

from qat.data import HFImages
from qat.data.batches import Images
from qat.files import atomic
from qat.lightning import load_weights
from qat.lightning.scale_groups import own_groups
from qat.models import ResNet
from qat.models.classifier import cosine_factor

CALIBRATION = 512
SETTINGS = ("bits", "epochs", "train_limit", "lr", "batch_size")
"""What rows of one table have in common."""


# -- one run, in the peer's environment --------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, float]:
    """Prepares, trains and tests one model; in percent."""
    torch.set_num_threads(1)
    peer = PEERS[args.peers[0]]
    data = HFImages(
        root=args.root, image_column="img", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_padding=4,
        flip=True, val_fraction=0.02, train_limit=args.train_limit,
    )  # fmt: skip
    data.setup()
    train, test = data.splits["train"], data.splits["test"]
    weight, act = bits_in(args.bits[0])
    model = ResNet(20).to(memory_format=torch.channels_last)
    load_weights(model, args.ckpt)
    x, _ = data.plain(train.take(torch.arange(min(CALIBRATION, len(train.labels)))))
    model = peer.prepare(model.eval(), x, weight, act)
    if args.epochs:
        fit(model, train, data.augmented, peer.settle, args)
    return {"accuracy": accuracy(model, test, data.plain)}


def bits_in(text: str) -> tuple[int, int]:
    """Bits of weights and of activations of "W4A4"."""
    found = re.fullmatch(r"W(\d+)A(\d+)", text)
    if not found:
        raise SystemExit(f"--bits {text}: not of the form W4A4")
    return int(found[1]), int(found[2])


def fit(
    model: nn.Module, train: Images, collate: Callable[..., tuple[Tensor, Tensor]],
    settle: Callable[[nn.Module, float], None], args: argparse.Namespace,
) -> None:  # fmt: skip
    """SGD with Nesterov momentum under a cosine. Batches and augmentation are functions of the seed and the step alone,
    whatever random numbers a peer draws.
    """
    count = len(train.labels)
    total = args.epochs * -(-count // args.batch_size)
    with own_groups(model):
        optimizer = torch.optim.SGD(groups(model), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_factor(step, total=total, warmup=total // 20)
    )
    model.train()
    step = 0
    for epoch in range(args.epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(10_000 * args.seed + epoch))
        for indices in order.split(args.batch_size):
            settle(model, step / total)
            torch.manual_seed(1_000_000 * (args.seed + 1) + step)
            x, y = collate(train.take(indices))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x.to(memory_format=torch.channels_last))
            F.cross_entropy(logits.float(), y).backward()
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
    """The interpreter of an environment with what the peer requires, made if it is not there."""
    requires = PEERS[peer].requires
    if not requires:
        return sys.executable
    home = folder / requires[0]
    python, done = home / "bin" / "python", home / "complete"
    if not done.is_file():
        venv.create(home, with_pip=True, clear=True)
        site = next((home / "lib").glob("python*/site-packages"))
        paths = [p for p in sys.path if p.endswith("site-packages")] + [str(Path(__file__).resolve().parents[1])]
        (site / "shared.pth").write_text("\n".join(paths) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requires], check=True)
        done.touch()
    return str(python)


def apart(args: argparse.Namespace, row: dict[str, Any]) -> dict[str, float]:
    """`run` in the peer's environment."""
    command = [python_of(row["peer"], args.venvs), __file__, f"--root={args.root}", f"--ckpt={args.ckpt}"]
    command += [f"--{k.replace('_', '-')}={row[k]}" for k in (*SETTINGS, "seed") if row[k] is not None]
    done = subprocess.run([*command, "--peers", row["peer"]], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{row['peer']}, {row['bits']}, seed {row['seed']}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def planned(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked for: settings, peer and seed of every run. All of one seed come before the next."""
    fixed = {k: getattr(args, k) for k in SETTINGS if k != "bits"}
    return [
        {"bits": bits, **fixed, "peer": peer, "seed": seed}
        for seed in range(args.seeds)
        for bits in args.bits
        for peer in args.peers
        if PEERS[peer].only in (None, bits)
    ]


def table(runs: list[dict[str, Any]]) -> str:
    """One row per peer, and the command."""
    lines = ["| bits | rate | framework | accuracy, mean (range) | seeds |", "|---" * 5 + "|"]
    commands = []
    for setting in dict.fromkeys(tuple(run[k] for k in SETTINGS) for run in runs):
        alike = [run for run in runs if tuple(run[k] for k in SETTINGS) == setting]
        for peer in dict.fromkeys(run["peer"] for run in alike):
            same = [run for run in alike if run["peer"] == peer]
            found = [run["accuracy"] for run in same]
            spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
            cells = f"{alike[0]['bits']} | {alike[0]['lr'] if alike[0]['epochs'] else 'calibrated'}"
            lines.append(f"| {cells} | {peer} | {statistics.mean(found):.2f}{spread} | {len(same)} |")
        options = [f"--{k.replace('_', '-')} {alike[0][k]}" for k in SETTINGS if alike[0][k] is not None]
        commands.append(" ".join(["    python benchmarks/accuracy_vs_peers.py --root DIR --ckpt FILE", *options]))
    return "\n".join([*lines, "", "with", "", *commands])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W4A4", "W2A2"])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-limit", type=int, help="train on so many images, always the same")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--venvs", type=Path, default=Path(".peers"))
    parser.add_argument("--output", type=Path, default=DOCS / "peers.json")
    parser.add_argument("--write", action="store_true", help="the tables of all that --output holds")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # one run, in the environment of its peer
    args = parser.parse_args()
    if args.seed is not None:
        print(json.dumps(run(args)))
        return
    runs = json.loads(args.output.read_text()) if args.output.is_file() else []
    for row in planned(args):
        if any(row.items() <= known.items() for known in runs):
            continue
        runs.append({**row, **apart(args, row)})
        print(json.dumps(runs[-1]), flush=True)
        with atomic(args.output) as temporary:
            temporary.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
    print(table(runs))
    if args.write:
        put("results.md", "peers", table(runs))


if __name__ == "__main__":
    main()
