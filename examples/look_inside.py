"""The page of an export at the size of real models: its size, how long it takes to write and a browser to load.

    python examples/look_inside.py                      # ResNet-18, ResNet-50 and a 12-layer GPT
    python examples/look_inside.py --models resnet18 --out pages --screenshots docs

Loading is measured in a headless Chromium where there is one: until the page's script has run (median of 5).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench.models import Block, ResNet, positions
from torch import Tensor, nn

import ddpn_fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class GPT(nn.Module):
    """GPT-2 with as many blocks and heads as the small one, and narrow: tokens (B, P) -> logits (B, P, V)."""

    def __init__(self, layers: int = 12, width: int = 96, heads: int = 12, vocabulary: int = 128) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(places))))


Problem = tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor, str]
MODELS: dict[str, Callable[[], Problem]] = {
    "resnet18": lambda: (
        *(ResNet(width=16), F.cross_entropy),
        *(torch.randn(4, 3, 64, 64), torch.randint(10, (4,)), "blocks.3.body.0"),
    ),
    "resnet50": lambda: (
        *(ResNet((3, 4, 6, 3), bottleneck=True, width=16), F.cross_entropy),
        *(torch.randn(4, 3, 64, 64), torch.randint(10, (4,)), "blocks.7.body.3"),
    ),
    "gpt12": lambda: (
        *(GPT(), positions),
        *(torch.randint(128, (4, 16)), torch.randint(128, (4, 16)), "blocks.5.qkv"),
    ),
}


def load_seconds(page: Path, words: str, picture: Path | None) -> float | None:
    """Median of 5 loads in a headless browser, in seconds; None where there is none. Also takes the screenshots."""
    from tests import browser

    if browser.find() is None:
        return None
    tab = browser.Browser()
    try:
        seconds = []
        for _ in range(5):
            tab.open(page)
            seconds.append(tab.run("Number(document.documentElement.dataset.ready)") / 1000)
        tab.run("document.body.focus()")
        tab.key("/", "/")
        tab.type(words)
        time.sleep(1)
        tab.key("Enter")
        assert words in tab.run("document.getElementById('details').innerText"), "the search found no node"
        if picture is not None:
            tab.run("document.querySelector('#stages details.pick').open = true")
            tab.run("document.querySelector('#stages details.pick').scrollIntoView()")
            tab.screenshot(picture.with_name(f"{picture.name}-graphs.png"))
            tab.key("Escape")
            tab.run("document.getElementById('theme').click(); document.getElementById('tab-passes').click()")
            tab.screenshot(picture.with_name(f"{picture.name}-passes.png"))
        assert not tab.errors, tab.errors
        assert all(url.startswith(("file:", "data:")) for url in tab.requests), tab.requests
        return statistics.median(seconds)
    finally:
        tab.close()


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, help="where to keep the pages (default: nowhere)")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="where to put two pictures of each page")
    options = parser.parse_args()
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        print("| model | stages | nodes of step | page, MB | written in, s | loaded in, s |\n|---|---|---|---|---|---|")
        for name in options.models:
            torch.manual_seed(0)
            model, loss, x, y, words = MODELS[name]()
            net = ddpn_fx.compile(model, loss=loss, backend="eager")
            opt = ddpn_fx.DDPNOpt(net)
            opt.train_step(x, y)
            start = time.perf_counter()
            ddpn_fx.export(opt, (options.out or Path(folder)) / name, "html")
            seconds = time.perf_counter() - start
            page = (options.out or Path(folder)) / name / "index.html"
            picture = options.screenshots / name if options.screenshots else None
            loaded = load_seconds(page, words, picture)
            nodes = len(next(iter(net._lowered.values())).module.graph.nodes)
            size = f"{page.stat().st_size / 1e6:.2f}"
            shown = "no browser here" if loaded is None else f"{loaded:.2f}"
            print(f"| {name} | {len(net.chain.stages)} | {nodes} | {size} | {seconds:.1f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
