"""Hugging Face models with tiny random configurations; their losses are inside (labels)."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.oracle import Loss
from tests.zoo.family import family

SMALL: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 12, "num_labels": 3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def classified(mask: bool = True):
    def draw(g: torch.Generator, b: int):
        batch = {"input_ids": torch.randint(3, 11, (b, 5), generator=g), "labels": torch.randint(3, (b,), generator=g)}
        if mask:
            lengths = torch.randint(2, 6, (b,), generator=g)
            batch["attention_mask"] = (torch.arange(5)[None] < lengths[:, None]).long()
        return batch, None

    return draw


def causal(g: torch.Generator, b: int):
    t = torch.randint(3, 11, (b, 5), generator=g)
    return {"input_ids": t, "labels": t}, None


def class_logits(model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor, Loss]:
    return model(**inputs).logits, inputs["labels"], Loss("cross_entropy", nn.functional.cross_entropy)


def token_logits(model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor, Loss]:
    loss = Loss("cross_entropy", lambda o, y: nn.functional.cross_entropy(o.flatten(0, 1), y.flatten()))
    return model(**inputs).logits, inputs["labels"], loss


def next_token_logits(model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor, Loss]:
    logits, labels, loss = token_logits(model, inputs)
    return logits, nn.functional.pad(labels, (0, 1), value=-100)[:, 1:], loss


def shifted(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """`ForCausalLMLoss` without its cast to float32, which would hide everything below 1e-7."""
    labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))


def double_loss(model: nn.Module) -> nn.Module:
    model.loss_function = shifted
    return model


@family("transformers: BERT classifier", classified(), None, logits=class_logits)
def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL))


@family("transformers: BERT masked language model", causal, None, logits=token_logits, slow=True)
def bert_mlm() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL))


@family("transformers: RoBERTa", classified(), None, logits=class_logits, slow=True)
def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL))


@family("transformers: DistilBERT", classified(), None, logits=class_logits, slow=True)
def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=11, dim=8, n_layers=1, n_heads=2, hidden_dim=12, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0, max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    return hf.DistilBertForSequenceClassification(config)


@family("transformers: ELECTRA", classified(), None, logits=class_logits, slow=True)
def electra() -> nn.Module:
    return hf.ElectraForSequenceClassification(hf.ElectraConfig(embedding_size=6, **SMALL))


@family("transformers: ALBERT (a shared layer)", classified(), None, logits=class_logits, slow=True)
def albert() -> nn.Module:
    small = {**SMALL, "num_hidden_layers": 2}
    return hf.AlbertForSequenceClassification(hf.AlbertConfig(embedding_size=6, classifier_dropout_prob=0.0, **small))


@family("transformers: DeBERTa-v2", classified(), None, logits=class_logits, slow=True)
def deberta() -> nn.Module:
    config = hf.DebertaV2Config(relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=8, **SMALL)
    config.problem_type = "single_label_classification"  # otherwise it branches on the labels
    return hf.DebertaV2ForSequenceClassification(config)


@family("transformers: GPT-2", causal, None, logits=next_token_logits)
def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return double_loss(hf.GPT2LMHeadModel(config))


@family("transformers: Llama", causal, None, logits=next_token_logits, tolerance=1e-5)  # its norms are in float32
def llama() -> nn.Module:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return double_loss(
        hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=1, use_cache=False, **{k: SMALL[k] for k in keys}))
    )


@family("transformers: Llama, its loss in float32", causal, None, logits=next_token_logits, tolerance=1e-5, slow=True)
def llama_float() -> nn.Module:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=1, use_cache=False, **{k: SMALL[k] for k in keys}))


@family(
    "transformers: Qwen2", causal, None, logits=next_token_logits, tolerance=1e-5, slow=True
)  # its norms are in float32
def qwen() -> nn.Module:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return double_loss(
        hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=1, use_cache=False, **{k: SMALL[k] for k in keys}))
    )


@family(
    "transformers: Mixtral (mixture of experts)", causal, None, logits=next_token_logits, tolerance=1e-5, slow=True
)  # its norms are in float32
def mixtral() -> nn.Module:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    small = {k: SMALL[k] for k in keys}
    config = hf.MixtralConfig(num_key_value_heads=1, num_local_experts=2, use_cache=False, **small)
    config._experts_implementation = "batched_mm"
    return double_loss(hf.MixtralForCausalLM(config))


@family("transformers: OPT", causal, None, logits=next_token_logits, slow=True)
def opt() -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, ffn_dim=12, num_attention_heads=2, dropout=0.0,
        max_position_embeddings=12, word_embed_proj_dim=8, use_cache=False, layerdrop=0.0,
    )  # fmt: skip
    return double_loss(hf.OPTForCausalLM(config))


@family("transformers: T5", causal, None, logits=token_logits, tolerance=1e-5)  # its norms are in float32
def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


@family("transformers: BART", causal, None, logits=token_logits, slow=True)
def bart() -> nn.Module:
    config = hf.BartConfig(
        vocab_size=11, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, use_cache=False,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, dropout=0.0, max_position_embeddings=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def pictures(g: torch.Generator, b: int):
    pixels, labels = torch.randn(b, 3, 8, 8, generator=g), torch.randint(3, (b,), generator=g)
    return {"pixel_values": pixels, "labels": labels}, None


@family("transformers: ViT", pictures, None, logits=class_logits, slow=True)
def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


@family("transformers: ConvNeXt V2", pictures, None, logits=class_logits, slow=True)
def convnext() -> nn.Module:
    config = hf.ConvNextV2Config(
        hidden_sizes=[4, 6], depths=[1, 1], patch_size=2, image_size=8, num_labels=3, num_stages=2
    )
    return hf.ConvNextV2ForImageClassification(config)


@family("transformers: ResNet", pictures, None, mixes="statistics", terminal="residual", slow=True)
def hf_resnet() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3)
    return hf.ResNetForImageClassification(config)


@family(
    "transformers: Whisper encoder",
    lambda g, b: (torch.randn(b, 6, 16, generator=g), torch.randint(3, (b,), generator=g)),
    nn.functional.cross_entropy,
)
class WhisperEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        config = hf.WhisperConfig(
            d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=12, num_mel_bins=6,
            max_source_positions=8, dropout=0.0, vocab_size=11, pad_token_id=0, decoder_layers=1,
            decoder_attention_heads=2, decoder_ffn_dim=12, encoder_layerdrop=0.0,
        )  # fmt: skip
        self.encoder = hf.WhisperModel(config).encoder
        self.head = nn.Linear(8, 3)

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(self.encoder(mel).last_hidden_state.mean(1))
