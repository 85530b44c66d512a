"""Real architectures from their configs, small and with random weights, and nets of our own where none has a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from tests.helpers import nets
from tpeft_deploy import Adapter
from tpeft_deploy.exporters.bases.kv_cache_inputs import with_cache

Inputs = dict[str, torch.Tensor]
Built = tuple[nn.Module, Inputs, dict[str, Any]]


def randomise(module: nn.Module) -> nn.Module:
    """Weights that make every layer matter: fresh ones of a large model are nearly zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.7 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 and parameter.shape[0] > 1 else 0.2
            offset = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * noise)
    return module.eval()


def images(*shape: int) -> Inputs:
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def tokens(rows: int = 2, length: int = 7) -> Inputs:
    ids = torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


SIZES = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
ROWS = {"pixel_values": {0: "batch"}}
TEXT = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}


def convnext() -> Built:
    config = transformers.ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[16, 16, 32, 32], num_labels=5)
    return randomise(transformers.ConvNextV2ForImageClassification(config)), images(2, 3, 96, 128), SIZES


def vit() -> Built:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    return randomise(transformers.ViTForImageClassification(config)), images(2, 3, 32, 32), ROWS


def dinov2() -> Built:
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    return randomise(transformers.Dinov2Model(config)), images(2, 3, 84, 70), SIZES


def bert() -> Built:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return randomise(transformers.BertForSequenceClassification(config)), tokens(), TEXT


def _deberta(**options: Any) -> Built:
    config = transformers.DebertaV2Config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        num_labels=8,
        max_position_embeddings=32,
        **options,
    )
    return randomise(transformers.DebertaV2ForSequenceClassification(config)), tokens(), TEXT


def deberta_v2() -> Built:
    return _deberta(share_att_key=False, conv_kernel_size=3, conv_act="gelu")


def deberta_v3() -> Built:
    return _deberta(share_att_key=True)


def resnet() -> Built:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=4
    )
    module = randomise(transformers.ResNetForImageClassification(config))
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return module, images(2, 3, 40, 48), SIZES


def _llama(*, tied: bool) -> Built:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    module = randomise(transformers.LlamaForCausalLM(config))
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = with_cache(module, ids, past=4)
    shapes: dict[str, Any] = {name: {0: "batch", 2: "past"} for name in inputs if name.startswith("past")}
    shapes |= {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: torch.export.Dim.DYNAMIC}}
    return module, inputs, {name: shapes[name] for name in inputs}


def llama() -> Built:
    return _llama(tied=False)


def llama_tied() -> Built:
    return _llama(tied=True)


class Encoder(nn.Module):
    """torch's own encoder of nn.MultiheadAttention layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.encoder(x).mean(1))
        return scores


def attention_encoder() -> Built:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    return randomise(Encoder()), {"x": x}, {"x": {0: "batch", 1: "sequence"}}


class Waves(nn.Module):
    """1-D: strided, dilated and grouped convs and a transposed one back to the signal's rate."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 8, 5, stride=2, padding=2)
        self.wide = nn.Conv1d(8, 8, 3, dilation=2, padding=2, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 2, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(torch.relu(self.norm(self.wide(torch.relu(self.down(x))))))
        return y


def waves() -> Built:
    x = torch.randn(2, 2, 22, generator=torch.Generator().manual_seed(1))
    return randomise(Waves()), {"x": x}, {"x": {0: "batch", 2: "length"}}


class Volumes(nn.Module):
    """3-D: convs with and without bias, and a head over the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 6, 3, padding=1, bias=False)
        self.second = nn.Conv3d(6, 8, (1, 3, 3), stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.second(torch.relu(self.first(x))))
        scores: torch.Tensor = self.head(y.mean((2, 3, 4)))
        return scores


def volumes() -> Built:
    x = torch.randn(2, 1, 6, 8, 7, generator=torch.Generator().manual_seed(1))
    return randomise(Volumes()), {"x": x}, {"x": {0: "batch", 2: "depth", 3: "height", 4: "width"}}


class CrossAttention(nn.Module):
    """Pixels ask a text."""

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        rows, channels, height, width = x.shape
        flat = x.flatten(2).transpose(1, 2)
        q, k, v = self.to_q(self.norm(flat)), self.to_k(context), self.to_v(context)
        mixed = torch.softmax(q @ k.transpose(1, 2) / channels**0.5, -1) @ v
        y: torch.Tensor = x + self.to_out(mixed).transpose(1, 2).reshape(rows, channels, height, width)
        return y


class ResBlock(nn.Module):
    """Norm, conv, a shift from the time's embedding, norm, conv, and a 1x1 conv past them."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, inputs), nn.GroupNorm(2, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        y = y + self.time(nn.functional.silu(time))[:, :, None, None]
        whole: torch.Tensor = self.skip(x) + self.conv2(nn.functional.silu(self.norm2(y)))
        return whole


class UNet(nn.Module):
    """Down, a middle that attends to a text, and up again with a skip connection, as in latent diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.middle, self.up = ResBlock(8, 8, 8), ResBlock(8, 12, 8), ResBlock(20, 8, 8)
        self.shrink = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.attention = CrossAttention(12, 6)
        self.grow = nn.ConvTranspose2d(12, 12, 2, stride=2)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        moment = self.time(time[:, None])
        fine = self.down(self.stem(x), moment)
        coarse = self.attention(self.middle(self.shrink(fine), moment), context)
        y: torch.Tensor = self.last(self.up(torch.cat([self.grow(coarse), fine], 1), moment))
        return y


def unet() -> Built:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(2, 3, 8, 12, generator=generator),
        "time": torch.rand(2, generator=generator),
        "context": torch.randn(2, 5, 6, generator=generator),
    }
    sizes = torch.export.Dim("height2", min=2, max=64), torch.export.Dim("width2", min=2, max=64)
    free = {0: "batch", 2: 2 * sizes[0], 3: 2 * sizes[1]}
    return randomise(UNet()), inputs, {"x": free, "time": {0: "batch"}, "context": {0: "batch", 1: "words"}}


MODELS: dict[str, Callable[[], Built]] = {
    "ConvNeXt-V2": convnext,
    "ViT": vit,
    "DINOv2": dinov2,
    "BERT": bert,
    "DeBERTa-V2": deberta_v2,
    "DeBERTa-V3": deberta_v3,
    "Llama with KV cache": llama,
    "Llama, tied": llama_tied,
    "ResNet with BatchNorm": resnet,
    "MultiheadAttention encoder": attention_encoder,
    "Conv1d net": waves,
    "Conv3d net": volumes,
    "U-Net with cross-attention": unet,
}
HALF = ("ConvNeXt-V2", "ViT", "BERT", "ResNet with BatchNorm")  # exported in 16 bits by each dry run
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def adapters_for(module: nn.Module) -> dict[str, Adapter]:
    """Two adapters of every linear and conv, of other ranks."""
    names = [f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, LAYERS)]
    names = [name for name in names if name in dict(module.named_parameters())]  # a tied head has another name too
    names += ["model.embed_tokens.weight"] if "model.embed_tokens.weight" in dict(module.named_parameters()) else []
    names += [f"{name}.in_proj_weight" for name, m in module.named_modules() if isinstance(m, nn.MultiheadAttention)]
    weights = dict(module.named_parameters())
    made = {}
    for seed, rank in enumerate((3, 2), 1):
        ranks = {name: tuple(min(rank, size) for size in weights[name].shape) for name in names}
        made[f"rank{rank}"] = nets.adapter_for(module.float(), ranks, seed=seed)
    return made


def merged(module: nn.Module, adapter: Adapter | None, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    weights = dict(module.named_parameters(remove_duplicate=False))
    changed = {}
    for name, delta in adapter.deltas.items() if adapter is not None else ():
        changed[name] = (weights[name].detach().double() + torch.from_numpy(delta.dense())).to(weights[name].dtype)
    with torch.no_grad():
        outputs = functional_call(module, changed, (), inputs, tie_weights=False)
    return [leaf.float().numpy() for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
