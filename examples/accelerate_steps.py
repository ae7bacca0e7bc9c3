"""A small classifier with Accelerate; accelerate_steps.py differs by what ftkit asks for."""

import torch
from ftkit.integrations.accelerate import Accelerator
from torch import nn
from torch.utils import data


def main():
    accelerator = Accelerator()
    torch.manual_seed(0)
    points = torch.randn(1024, 2)
    dataset = data.TensorDataset(points, (points.norm(dim=1) > 1.2).long())
    loader = data.DataLoader(dataset, batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50, gamma=0.5)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    for step in accelerator.steps(loader, until=200):
        with step:
            for x, y in step.batches():
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                step.record(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    with torch.no_grad():
        right = model(points.to(accelerator.device)).argmax(dim=1).cpu() == dataset.tensors[1]
    accelerator.print(f"accuracy {right.float().mean():.3f}")


if __name__ == "__main__":
    main()
