"""Small random configurations of published architectures, each with its own loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[[], Tensor]]

SMALL = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    vocab_size=99,
    max_position_embeddings=64,
)
GPT = dict(n_embd=32, n_layer=2, n_head=4)
PATCHES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, patch_size=8)
STAGES = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])

MASKED_TEXT: dict[str, dict[str, Any]] = {
    "Albert": dict(embedding_size=16),
    "Bert": {},
    "ConvBert": dict(embedding_size=32),
    "DebertaV2": {},
    "DistilBert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=37),
    "Electra": {},
    "FNet": {},
    "Roberta": {},
}
CAUSAL_TEXT: dict[str, dict[str, Any]] = {
    "Bloom": {},
    "Falcon": {},
    "GPT2": GPT,
    "GPTJ": dict(GPT, rotary_dim=4),
    "GPTNeoX": {},
    "Llama": {},
    "Mamba": dict(state_size=4),
    "OPT": dict(ffn_dim=37, word_embed_proj_dim=32),
    "Olmo2": {},
    "Phi": {},
    "Rwkv": dict(attention_hidden_size=32),
}
IMAGE: dict[str, dict[str, Any]] = {
    "Beit": PATCHES,
    "ConvNext": STAGES,
    "DeiT": PATCHES,
    "EfficientNet": dict(depth_coefficient=0.5),
    "Levit": dict(hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    "MobileNetV2": {},
    "PoolFormer": {},
    "RegNet": dict(STAGES, embedding_size=8),
    "ResNet": dict(STAGES, embedding_size=8),
    "Swin": dict(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, patch_size=4),
    "ViT": PATCHES,
}
WAV2VEC2 = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    conv_dim=(8, 8),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
    num_labels=4,
)
TRANSFORMERS = sorted([*MASKED_TEXT, *CAUSAL_TEXT, *IMAGE, "Wav2Vec2"])


def transformer(name: str) -> Built:
    """A Hugging Face model with random weights and a closure of its loss."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torchvision()
    import transformers

    labels = torch.tensor([0, 1, 2, 3])  # batch norm of two samples is a sign
    if name in MASKED_TEXT or name in CAUSAL_TEXT:
        options = {**SMALL, **MASKED_TEXT.get(name, {}), **CAUSAL_TEXT.get(name, {})}
        head = "ForMaskedLM" if name in MASKED_TEXT else "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        labels = torch.randint(1, 90, (3, 7))
        inputs = {"input_ids": labels}
    elif name in IMAGE:
        options, head = dict(image_size=32, num_labels=5, **IMAGE[name]), "ForImageClassification"
        inputs = {"pixel_values": torch.randn(4, 3, 32, 32)}
    else:
        options, head, inputs = WAV2VEC2, "ForSequenceClassification", {"input_values": torch.randn(4, 800)}
    model = getattr(transformers, name + head)(getattr(transformers, name + "Config")(**options))
    return model, lambda: model(labels=labels, **inputs).loss


def torchvision() -> Any:
    """The package, which transformers imports as well where it is installed; ``None`` where it is not.

    If its compiled operations are not for this build of torch, they are declared, so that its models can be used.
    """
    try:
        return import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)
        return import_module("torchvision")


DECLARED: list[torch.library.Library] = []
VISION = {
    "resnet18": lambda models: models.resnet18(num_classes=5),
    "vgg11": lambda models: _light(models.vgg11(num_classes=5, init_weights=False)),
    "densenet121": lambda models: models.densenet121(num_classes=5),
    "mobilenet_v2": lambda models: models.mobilenet_v2(num_classes=5),
    "mobilenet_v3": lambda models: models.mobilenet_v3_small(num_classes=5),
    "efficientnet_b0": lambda models: models.efficientnet_b0(num_classes=5),
    "convnext_tiny": lambda models: models.convnext_tiny(num_classes=5),
    "swin_t": lambda models: models.swin_t(num_classes=5),
    "vit": lambda models: _with_head(models.VisionTransformer(64, 16, 2, 2, 16, 24, num_classes=5)),
}


def vision_model(name: str) -> Built:
    """A torchvision model with random weights and a closure of its cross entropy."""
    model = VISION[name](torchvision().models)
    x, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    return model, lambda: F.cross_entropy(model(x), labels)


def _with_head(vit: Any) -> nn.Module:
    """A ViT whose last weight is not zero, as it is at first."""
    nn.init.normal_(vit.heads.head.weight)
    return vit


def _light(vgg: nn.Module) -> nn.Module:
    """VGG's features with a head of 32 units, as its own has 120 million parameters."""
    vgg.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))
    return vgg
