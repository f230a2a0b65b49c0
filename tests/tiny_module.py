"""A LightningModule of a few hundred parameters, its data, and quiet trainers, for the tests of compositions."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat.insert import named_quantizers
from qat.lightning import QATCallback

POLICY: dict[str, Any] = {"weight": {"bits": 4}, "act": {"bits": 4}}
MINMAX: dict[str, Any] = {
    role: {"bits": 4, "quantizer": "minmax", "symmetric": role == "weight"} for role in ("weight", "act")
}


class TinyNet(nn.Module):
    """Convolution with BatchNorm, a residual (one functional site), a head."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Tiny(pl.LightningModule):
    """Classifies; knows nothing of quantization."""

    def __init__(self, lr: float = 0.05, norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = TinyNet(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loader(samples: int = 16, batch_size: int = 4) -> DataLoader:
    """Images whose class is the channel-free position of their largest mean; never shuffled."""
    x = torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.mean((1, 2)).argmax(1) % 3), batch_size=batch_size)


def images(seed: int = 2) -> Tensor:
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def trainer(folder: Any, *callbacks: Any, policy: dict[str, Any] | None = POLICY, **settings: Any) -> pl.Trainer:
    """A quiet trainer on the CPU with a `QATCallback` in front (none for `policy=None`)."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": folder}
    first = [] if policy is None else [QATCallback(policy, 16)]
    return pl.Trainer(callbacks=[*first, *callbacks], **(quiet | settings))


def quantizer_state(module: nn.Module) -> dict[str, Tensor]:
    """Everything that the quantizers' checkpoints hold, cloned."""
    return {f"{n}.{k}": v.clone() for n, q in named_quantizers(module) for k, v in q.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
