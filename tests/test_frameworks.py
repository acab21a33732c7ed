"""The loops of others, unchanged: each trains as train_step does on the same batches (`make frameworks`)."""

import copy
import importlib.util
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ddpn_fx

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are many


def needs(name):
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed: make frameworks")


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator)
    return TensorDataset(x, (x @ torch.randn(20, 3, generator=generator)).argmax(1))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def trained(net, opt, epochs, low=None, size=60):
    """By train_step, on the batches of a loader that does not shuffle."""
    for _ in range(epochs):
        for x, y in DataLoader(data(), batch_size=size):
            with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
                opt.train_step(x, y)
    return net


def equal(a, b, tolerance):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=tolerance, atol=tolerance), name


@needs("lightning")
@pytest.mark.parametrize(
    ("trainer", "low"),
    [({}, None), ({"gradient_clip_val": 1e-3}, None), ({"precision": "bf16-mixed"}, torch.bfloat16)],
    ids=["plain", "clipping", "bf16"],
)
def test_lightning(trainer, low, tmp_path):
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = ddpn_fx.compile(model(), loss=F.cross_entropy, backend="eager")

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            opt = ddpn_fx.DDPNOpt(self.net)
            return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)]

    module = Module()
    start = copy.deepcopy(module.net)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, **options, **trainer)
    fit.fit(module, DataLoader(data(), batch_size=60), DataLoader(data(), batch_size=100))
    opt = ddpn_fx.DDPNOpt(start)
    trained(start, opt, 1, low)
    opt.param_groups[0]["lr"] = 0.5
    equal(trained(start, opt, 1, low), module.net, 2e-2 if low else 1e-5)
    assert fit.callback_metrics["accuracy"] > 0.75
    halves = [kind is not None for kind in fit.optimizers[0]._usual._kinds.values()]
    assert halves == [True, True]  # the last batch is smaller


@needs("accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    net = ddpn_fx.compile(model(), loss=F.cross_entropy, backend="eager")
    want = copy.deepcopy(net)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    ours, opt, loader = accelerator.prepare(net, ddpn_fx.DDPNOpt(net), DataLoader(data(), batch_size=60))
    for _ in range(2):
        for x, y in loader:
            opt.zero_grad()
            loss = F.cross_entropy(ours(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(ours.parameters(), 1e-3)
            opt.step()
    low = torch.bfloat16 if precision == "bf16" else None
    equal(trained(want, ddpn_fx.DDPNOpt(want), 2, low), net, 2e-2 if low else 1e-5)


@needs("lightning")
@needs("accelerate")
@pytest.mark.parametrize("loop", ["lightning", "accelerate"])
def test_accumulated_gradients(loop, tmp_path):
    """Batches of 40 in parts of 20, each of its loss divided by two; the trainings take the loader of parts."""
    net = ddpn_fx.compile(model(), loss=F.cross_entropy, backend="eager")
    want = copy.deepcopy(net)
    opt = ddpn_fx.DDPNOpt(net, accumulate=2)
    (_by_lightning if loop == "lightning" else _by_accelerate)(net, opt, DataLoader(data(), batch_size=20), tmp_path)
    equal(trained(want, ddpn_fx.DDPNOpt(want, accumulate=2), 2, size=40), net, 1e-5)
    assert [kind is not None for kind in opt._usual._kinds.values()] == [True]


def _by_lightning(net, opt, loader, folder):
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return opt

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(max_epochs=2, default_root_dir=folder, accumulate_grad_batches=2, **options).fit(Module(), loader)


def _by_accelerate(net, opt, loader, folder):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    ours, opt, loader = accelerator.prepare(net, opt, loader)
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(ours):
                accelerator.backward(F.cross_entropy(ours(x), y))
                opt.step()
                opt.zero_grad()


def _language():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"use_cache": False}
    tokens = torch.arange(200 * 16).reshape(200, 16) % 50
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes, **drops)), rows


def _classifier():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokens = torch.randint(0, 50, (200, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(16, dtype=torch.long)
    rows = [{"input_ids": row, "attention_mask": mask, "labels": row[0] % 3} for row in tokens]
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)), rows


@needs("transformers")
@needs("accelerate")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("make", "low"), [(_language, False), (_language, True), (_classifier, False)])
def test_the_trainer_of_transformers(make, low, parts, tmp_path):
    """Which clips by default, and gives a language model the number of tokens to divide its loss by."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    theirs, rows = make()
    net = ddpn_fx.compile(theirs, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored", accumulate=parts)
    options = {"per_device_train_batch_size": 20 // parts, "num_train_epochs": 3, "use_cpu": True, "bf16": low}
    options |= {"gradient_accumulation_steps": parts}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10}
    constant = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    arguments = TrainingArguments(str(tmp_path), **options, **quiet)
    trainer = Trainer(model=net, args=arguments, train_dataset=rows, optimizers=(opt, constant))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.3 * float(losses[0])
    assert [kind.alone for kind in opt._usual._kinds.values()] == [None]  # by halves
