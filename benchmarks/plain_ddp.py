"""A plain PyTorch training script for `benchmarks.startup`: ImageFolder, DataLoader, timm, DistributedDataParallel.

torchrun --nproc-per-node 2 benchmarks/plain_ddp.py FOLDER
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.densenet import DenseNet
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

BATCH, STEPS = 32, 10


def main() -> None:
    """Trains a model of the demo's size for some steps, and prints each step."""
    dist.init_process_group("gloo")
    transform = v2.Compose([v2.RandomResizedCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = ImageFolder(sys.argv[1], transform)
    loader = DataLoader(dataset, BATCH, sampler=DistributedSampler(dataset), num_workers=1, drop_last=True)
    densenet = DenseNet(block_config=(3, 3, 3), growth_rate=12, num_classes=len(dataset.classes))
    model = DistributedDataParallel(densenet)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step, (images_NCHW, labels_N) in zip(range(1, STEPS + 1), loader, strict=False):
        loss = F.cross_entropy(model(images_NCHW), labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}/{STEPS}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
