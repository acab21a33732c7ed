"""Fig. 5: what the feedback of the convolution layers responds to, as pictures of the input, on MNIST.

A stage's feedback matrix maps a change of its state to a change of its weights. For one sample, in sample space,

    K_t = -eta Gamma_t C_t Z_t^T        (Gamma_t: controls x r, C_t: r x r, Z_t: state x r; the identity metric)

with the recursion of the default's last row, ``C_t^-1 = C_{t+1}^-1 + eta Gamma_t^T Gamma_t``. Its leading right
singular vector, the change of state that moves the weights most, is pulled back to the input by the network's own VJP:
``ddpn_fx.policies``. The terminal factor is the whole bound (r = 9): with one column, as in the paper's factorisation,
every layer would show one and the same picture.

    python examples/paper/policies.py --data FOLDER      a minute: trains the network of table3.py, writes policies.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arena import Arenas, Task
from common import adjusted, facts, parser, write_page
from methods import DEFAULT
from record import Record
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.data import require
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import one_thread

TASK = Task("mnist-cnn", "mnist", (), "relu", "identity", 128, 500, 80, 1)
LR = 3.0
PAIRS = ((8, 3), (3, 8), (7, 1), (1, 7), (4, 9), (5, 3))


def main() -> int:
    """Train, decompose, draw."""
    options = parser(__doc__).parse_args()
    (task,) = adjusted([TASK], options)
    record = Record(options.out / "policies.json", facts([task], step_size=LR, pairs=PAIRS))
    with one_thread():
        arena = Arenas(options.data).of(task)()
        trained = arena.train(DEFAULT, LR, 0, steps=task.steps)
        net = ddpn_fx.compile(arena.model, loss=F.cross_entropy, backend="eager")
        opt = ddpn_fx.DDPNOpt(net, LR, rank=None)
        chain = net.capture(arena.data.x_test[:2], arena.data.y_test[:2], with_target=True)
        layers = {f"{name}.weight" for name, module in arena.model.named_modules() if isinstance(module, nn.Conv2d)}
        stages = [stage.index for stage in chain.stages if layers & set(stage.controls)]
        found = []
        for of, like in PAIRS:
            image = nearest(arena.model, arena.data.x_test, arena.data.y_test, of, like)
            policies = [leading(opt, stage, image[None], of) for stage in stages]
            turn = towards(arena.model, image[None], of, like)
            for policy in policies:
                policy["image"] *= 1.0 if float((policy["image"] * turn).sum()) >= 0 else -1.0
            found.append((of, like, image, policies))
    for of, like, _, policies in found:
        cell = {"strength": [p["strength"] for p in policies], "share": [p["share"] for p in policies]}
        record.cells[f"{of} that is most like {like}"] = cell
    record.facts["trained"] = trained
    record.write()
    picture(options.out / "policies.png", found)
    rows = [
        (f"{of} most like {like}", *(f"{p['strength']:.3g} ({100 * p['share']:.0f} %)" for p in policies))
        for of, like, _, policies in found
    ]
    write_page(
        options.out / "policies.md",
        "# Fig. 5: the feedback policies on MNIST",
        f"The network of Table 3's `mnist-cnn` after {trained['steps']} steps of DDPNOpt at its defaults, step size "
        f"{LR:g} (test accuracy {trained['accuracy']:.2f} %). For the test image of a class that the network takes "
        "most nearly for another: the leading right singular vector of each convolution's feedback matrix, pulled back "
        "to the image. Red and blue are its signs; the sign of a singular vector is free, and is chosen so that it has "
        "a positive product with the direction in which the logit of the other class grows over its own.",
        "![policies](policies.png)",
        "Leading singular value of K_t, and its share of the squared sum of all:",
        report.markdown(("image", *(f"convolution {t + 1}" for t in range(len(layers)))), rows),
    )
    return 0


def nearest(model: nn.Module, x: Tensor, y: Tensor, of: int, like: int) -> Tensor:
    """The image of class `of`, rightly classified, that has the largest probability of class `like`."""
    with torch.no_grad():
        p = torch.cat([model(part).softmax(1) for part in x.split(1000)])
    right = (y == of) & (p.argmax(1) == of)
    return x[torch.where(right, p[:, like], -1.0).argmax()]


def towards(model: nn.Module, image: Tensor, of: int, like: int) -> Tensor:
    """The direction in the image in which the logit of `like` grows over that of `of`."""
    x = image.clone().requires_grad_()
    logits = model(x)[0]
    return torch.autograd.grad(logits[like] - logits[of], x)[0][0]


def leading(opt: ddpn_fx.DDPNOpt, stage: int, image: Tensor, label: int) -> dict[str, Any]:
    """The leading right singular vector of a stage's feedback matrix for one image, pulled back to it."""
    found = ddpn_fx.policies(opt, stage, image, torch.tensor([label]), count=1)
    return {"image": found.inputs[0][0, 0], "strength": float(found.values[0, 0]), "share": float(found.share[0, 0])}


def picture(path: Path, found: list[Any]) -> None:
    """A row an image: the image itself and a panel for each convolution."""
    columns = 1 + len(found[0][3])
    figure = require("matplotlib.figure").Figure(figsize=(1.6 * columns, 1.7 * len(found)), layout="constrained")
    for row, (of, like, image, policies) in zip(figure.subplots(len(found), columns), found, strict=True):
        row[0].imshow(image[0], cmap="gray_r")
        row[0].set_ylabel(f"{of} most like {like}", fontsize=8)
        for t, (axes, policy) in enumerate(zip(row[1:], policies, strict=True)):
            shown = policy["image"][0]
            most = float(shown.abs().max())
            axes.imshow(shown, cmap="RdBu_r", vmin=-most, vmax=most)
            if of == found[0][0] and like == found[0][1]:
                axes.set_title(f"convolution {t + 1}", fontsize=8)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    sys.exit(main())
