"""A small classifier under Lightning; lightning_strategy.py differs by what ftkit asks for."""

import lightning
import torch
from ftkit.integrations.lightning import FtkitStrategy
from torch import nn
from torch.utils import data


class Circle(lightning.LightningModule):
    """Inside or outside of a circle."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(dim=1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main():
    torch.manual_seed(0)
    points = torch.randn(1024, 2)
    dataset = data.TensorDataset(points, (points.norm(dim=1) > 1.2).long())
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy=FtkitStrategy(),
        max_epochs=2,
        accumulate_grad_batches=2,
        default_root_dir="runs/lightning",
        enable_progress_bar=False,
    )
    trainer.fit(
        Circle(),
        data.DataLoader(dataset, batch_size=4, shuffle=True),
        data.DataLoader(dataset, batch_size=64),
    )


if __name__ == "__main__":
    main()
