"""Train a small network on real digits with DDPNOpt at its defaults (the README's example).

Needs scikit-learn: ``pip install "ddpn-fx[demo]"``. Run: ``python examples/quickstart.py``
"""

import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.data import load

torch.manual_seed(0)
digits = load("digits", flat=True)  # 1,797 images of 8x8 handwritten digits, from scikit-learn
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

net = ddpn_fx.compile(model, loss=F.cross_entropy)  # an nn.Module: same outputs, same state_dict keys
opt = ddpn_fx.DDPNOpt(net)  # a torch.optim.Optimizer; step size 1
for x, y in digits.batches(batch_size=64, steps=200):
    loss = opt.train_step(x, y)  # forward, backward recursion and update, in one compiled program

accuracy = (net(digits.x_test).argmax(dim=1) == digits.y_test).float().mean()
print(f"loss {loss:.3f}, test accuracy {accuracy:.1%}")
assert accuracy > 0.9
