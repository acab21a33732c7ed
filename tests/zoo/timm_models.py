"""Image models from timm, at tiny widths. timm imports torchvision for its data transforms, which these do not need.

Where torchvision is not installed, a stand-in is put in its place while timm is imported.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

from torch import nn

from tests.zoo.family import CE, family, images


class _Stub(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        modes = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
        return type(name, (), {mode: mode for mode in modes})


def _import_timm() -> None:
    stubs: list[str] = []
    if importlib.util.find_spec("torchvision") is None:
        for name in (
            "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets",
            "torchvision.datasets.folder", "torchvision.ops", "torchvision.ops.misc", "torchvision.models",
            "torchvision.models.feature_extraction",
        ):  # fmt: skip
            stub = sys.modules[name] = _Stub(name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            stub.__version__ = "0.0"
            stubs.append(name)
            if "." in name:
                parent, child = name.rsplit(".", 1)
                setattr(sys.modules[parent], child, stub)
    try:
        importlib.import_module("timm")
        importlib.import_module("timm.models")
    finally:
        for name in stubs:
            del sys.modules[name]


_import_timm()
from timm.models import convnext, efficientnet, mlp_mixer, resnet, swin_transformer, vision_transformer  # noqa: E402


@family("timm: ResNet", images(16), CE, mixes="statistics", slow=True)
def timm_resnet() -> nn.Module:
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(4, 4, 6, 6), stem_width=4)


@family("timm: ResNet-D, squeeze-excite", images(16), CE, mixes="statistics", slow=True)
def timm_resnetd() -> nn.Module:
    return resnet.ResNet(
        resnet.Bottleneck, (1, 1, 1, 1), num_classes=3, channels=(2, 2, 2, 2), stem_width=4, stem_type="deep",
        avg_down=True, block_args={"attn_layer": "se"},
    )  # fmt: skip


@family("timm: ViT", images(8), CE, slow=True)
def timm_vit() -> nn.Module:
    return vision_transformer.VisionTransformer(8, 4, embed_dim=8, depth=2, num_heads=2, num_classes=3, mlp_ratio=2)


@family("timm: ViT, LayerScale, no class token", images(8), CE, slow=True)
def timm_deit() -> nn.Module:
    return vision_transformer.VisionTransformer(
        8, 4, embed_dim=8, depth=1, num_heads=2, num_classes=3, init_values=0.1, class_token=False, global_pool="avg",
        qkv_bias=False, qk_norm=True,
    )  # fmt: skip


@family("timm: Swin", images(16), CE, slow=True)
def timm_swin() -> nn.Module:
    return swin_transformer.SwinTransformer(
        16, 2, embed_dim=4, depths=(2, 1), num_heads=(1, 2), window_size=4, num_classes=3, drop_path_rate=0.0
    )


@family("timm: ConvNeXt", images(32), CE, slow=True)
def timm_convnext() -> nn.Module:
    return convnext.ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=(4, 4, 6, 6), patch_size=2)


@family("timm: MLP-Mixer", images(8), CE, slow=True)
def timm_mixer() -> nn.Module:
    return mlp_mixer.MlpMixer(3, img_size=8, patch_size=4, num_blocks=1, embed_dim=8)


@family("timm: ResMLP", images(8), CE, slow=True)
def timm_resmlp() -> nn.Module:
    return mlp_mixer.MlpMixer(
        3, img_size=8, patch_size=4, num_blocks=1, embed_dim=8, mlp_ratio=2.0, block_layer=mlp_mixer.ResBlock,
        norm_layer=mlp_mixer.Affine,
    )  # fmt: skip


@family("timm: EfficientNet (three stages)", images(16), CE, mixes="statistics", slow=True)
def timm_efficientnet() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def

    arch = decode_arch_def([["ds_r1_k3_s1_e1_c4_se0.25"], ["ir_r1_k3_s2_e2_c6_se0.25"], ["er_r1_k3_s1_e2_c6"]])
    return efficientnet.EfficientNet(arch, num_classes=3, num_features=8, stem_size=4, act_layer=nn.SiLU)
