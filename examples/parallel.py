"""Train on real digits in several processes, each with its own part of the batch, and in parts of that.

Needs scikit-learn: ``pip install "ddpn-fx[demo]"``. Run:

    torchrun --nproc-per-node 2 examples/parallel.py

On GPUs a process takes the one of its own number, and the processes talk by nccl; else by gloo.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.data import load

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")

digits = load("digits", flat=True)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).to(device)
net = ddpn_fx.compile(model, loss=F.cross_entropy)
# All begin with the first process's weights. Each has half of the batch in memory at a time, in two parts.
opt = ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored", process_group=dist.group.WORLD, accumulate=2)
for x, y in digits.batches(batch_size=64 * ranks, steps=100, device=device):  # the same batches in all processes
    loss = opt.train_step(x[rank::ranks], y[rank::ranks])

hits = (net(digits.x_test.to(device)).argmax(dim=1) == digits.y_test.to(device)).float()
found = torch.stack([loss, hits.mean()])
of_all = [torch.empty_like(found) for _ in range(ranks)]
dist.all_gather(of_all, found)
if rank == 0:
    print(f"{ranks} processes: loss {loss:.3f}, test accuracy {hits.mean():.1%}")
assert all(torch.equal(found, other) for other in of_all)  # every process has the same weights
assert hits.mean() > 0.9
dist.destroy_process_group()
