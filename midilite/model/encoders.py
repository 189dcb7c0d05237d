"""The two image encoders that condition the transformer: DINOv2 and CLIP's vision encoder.

Both are plain pre-norm vision transformers (Dosovitskiy et al. 2021): cut the image into patches, embed each by one
convolution, put a class token in front, add position embeddings, run attention blocks. They differ in the details that
the classes below name. The maths and the key names are those of the `transformers` classes Dinov2Model (Oquab et al.
2023) and CLIPVisionModelWithProjection (Radford et al. 2021), which the tests use as the oracle; this file needs
neither. Left out: text encoders, masked-patch training, dropout (what trains here is adapters at most), and attention
weights.

What is fused: query, key and value are one product per block, under three names in `state_dict()` (layers.Linear).

Shape legend: B images, C channels, T tokens (1 class token + patches), D width, H heads, K = D / H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpointing import run_blocks
from .config import CLIPVisionConfig, DINOv2Config
from .layers import LayerNorm, Linear, Network, attention, split_stacked, start_normal


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with (any shape)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}

_CHUNK = 8  # pictures that go through an encoder together; a room can have dozens of objects


class MLP(nn.Module):
    """Linear, activation, Linear, under the names `fc1` and `fc2`."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nn.Module):
    """silu(gate) * up, then Linear; gate and up are the halves of one product `weights_in` (Shazeer 2020).

    The hidden width is two thirds of the plain MLP's, rounded up to a multiple of 8, so that both have the same size.
    """

    def __init__(self, width: int, mlp_hidden: int) -> None:
        super().__init__()
        hidden = (int(mlp_hidden * 2 / 3) + 7) // 8 * 8
        self.weights_in = Linear(width, 2 * hidden)
        self.weights_out = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(F.silu(gate) * up)


# ---------------------------------------------------------------------------------------------------------- DINOv2


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.lambda1


class DINOv2Attention(nn.Module):
    """Self-attention under the names `attention.query/key/value` and `output.dense`."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        parts = {"query": width, "key": width, "value": width}
        self.attention = nn.ModuleDict({"qkv": Linear(width, 3 * width, bias=qkv_bias, parts=parts)})
        self.output = nn.ModuleDict({"dense": Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = split_stacked(self.attention["qkv"](x), self.heads, 3)
        return self.output["dense"](attention(q, k, v))


class DINOv2Block(nn.Module):
    """x += scale1(attention(norm1 x)); x += scale2(mlp(norm2 x))."""

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.norm1 = LayerNorm(width, config.layer_norm_eps)
        self.attention = DINOv2Attention(width, config.num_attention_heads, config.qkv_bias)
        self.layer_scale1 = LayerScale(width)
        self.norm2 = LayerNorm(width, config.layer_norm_eps)
        self.mlp = SwiGLU(width, hidden) if config.use_swiglu_ffn else MLP(width, hidden, "gelu")
        self.layer_scale2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class DINOv2Embeddings(nn.Module):
    """Patches, class token and position embeddings. `mask_token` is in the files but only training ever used it."""

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_size = patch
        self.grid = config.image_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if config.use_mask_token else None
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)}
        )
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))
        start_normal(self.position_embeddings, std=0.02)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings [1, 1 + rows*columns, D] for a grid of patches, by bicubic interpolation in fp32.

        The class token's stays as it is. No antialiasing: the published conditions were made without.
        """
        if rows == columns == self.grid:
            return self.position_embeddings
        table = self.position_embeddings[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(table.float(), size=(rows, columns), mode="bicubic", align_corners=False)
        patches = resized.to(table.dtype).flatten(2).transpose(1, 2)
        return torch.cat([self.position_embeddings[:, :1], patches], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 1 + (H // patch)(W // patch), D]; what is left of a patch at the border is unused."""
        projection = self.patch_embeddings["projection"]
        _check_pixels("DINOv2", pixels, projection.in_channels, self.patch_size)
        patches = projection(pixels.to(projection.weight.dtype))
        rows, columns = patches.shape[-2:]
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.positions(rows, columns)


class DINOv2(Network):
    """DINOv2 (Dinov2Model) at any resolution, with any number of input channels.

    MIDI feeds 7 channels: instance image, scene image, instance mask. TripoSG feeds 3.

    Attributes:
        gradient_checkpointing: recompute blocks in the backward pass.
    """

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = DINOv2Embeddings(config)
        blocks = [DINOv2Block(config) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """All tokens of the last layer, normalised.

        Args:
            pixels: [B, C, H, W] from a preprocessor; H and W at least one patch, and not necessarily equal.

        Returns:
            [B, 1 + (H // patch_size) * (W // patch_size), D], class token first.

        Raises:
            ValueError: another number of channels than the patch kernel has, or an image smaller than a patch.
        """
        x = run_blocks(self.encoder["layer"], self.embeddings(pixels), self.gradient_checkpointing)
        return self.layernorm(x)


# ------------------------------------------------------------------------------------------------------------ CLIP


class CLIPAttention(nn.Module):
    """Self-attention under the names `q_proj`, `k_proj`, `v_proj` and `out_proj`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, parts={"q_proj": width, "k_proj": width, "v_proj": width})
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = split_stacked(self.qkv(x), self.heads, 3)
        return self.out_proj(attention(q, k, v))


class CLIPBlock(nn.Module):
    """x += attention(layer_norm1 x); x += mlp(layer_norm2 x)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = LayerNorm(width, config.layer_norm_eps)
        self.self_attn = CLIPAttention(width, config.num_attention_heads)
        self.layer_norm2 = LayerNorm(width, config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """Patches (no bias), class token and learned positions for one fixed image size."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        positions = nn.Parameter(torch.empty(1 + (config.image_size // patch) ** 2, width))
        self.position_embedding = nn.ParameterDict({"weight": positions})
        start_normal(self.class_embedding, std=width**-0.5)
        start_normal(positions, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, 1 + (S // patch)^2, D]."""
        _check_pixels("CLIP", pixels, self.patch_embedding.in_channels)
        if tuple(pixels.shape[-2:]) != (self.image_size, self.image_size):
            height, width = pixels.shape[-2:]
            raise ValueError(
                f"CLIP: the pixels are {height} x {width} (height x width), the encoder was trained for "
                f"{self.image_size} x {self.image_size}; set crop_size in its preprocessor_config.json to that"
            )
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        return tokens + self.position_embedding["weight"]


class CLIPVisionTransformer(nn.Module):
    """The encoder without its projection. `pre_layrnorm` is spelt as in every published file."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        blocks = [CLIPBlock(config) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor, checkpointed: bool = False) -> Tensor:
        """[B, C, S, S] -> the normalised class token [B, D]; the other tokens are not normalised by CLIP."""
        x = run_blocks(self.encoder["layers"], self.pre_layrnorm(self.embeddings(pixels)), checkpointed)
        return self.post_layernorm(x[:, 0])


class CLIPVision(Network):
    """CLIP's vision encoder with projection (CLIPVisionModelWithProjection): one vector per image.

    Attributes:
        gradient_checkpointing: recompute blocks in the backward pass.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.vision_model = CLIPVisionTransformer(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """The image embedding, not normalised to unit length.

        Args:
            pixels: [B, C, S, S] with S = config.image_size.

        Returns:
            [B, projection_dim].

        Raises:
            ValueError: another number of channels or another size than the encoder's (both are given).
        """
        return self.visual_projection(self.vision_model(pixels, self.gradient_checkpointing))


def encode_pixels(encoder: DINOv2 | CLIPVision, pixels: Tensor) -> Tensor:
    """The condition tokens of preprocessed pictures, computed where the encoder is and in its type.

    Args:
        pixels: [n, C, H, W]; a few at a time go through, so that a room with dozens of objects needs no more memory.

    Returns:
        [n, S, E]: DINOv2's tokens, or CLIP's embedding as a single one. On the encoder's device.
    """
    weight = next(encoder.parameters())
    tokens = torch.cat([encoder(part.to(weight.device, weight.dtype)) for part in pixels.split(_CHUNK)])
    return tokens[:, None] if tokens.ndim == 2 else tokens


def _check_pixels(owner: str, pixels: Tensor, channels: int, smallest: int = 1) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != channels:
        raise ValueError(f"{owner}: the pixels have shape {tuple(pixels.shape)}, expected [B, {channels}, H, W]")
    if min(pixels.shape[-2:]) < smallest:
        height, width = pixels.shape[-2:]
        raise ValueError(f"{owner}: an image of {height} x {width} pixels is smaller than one patch of {smallest}")


# ----------------------------------------------------------------------------------------- files of other versions

_DROPPED_PREFIXES = ("text_model.", "text_projection.", "classifier.")
_DROPPED_KEYS = ("logit_scale", "vision_model.embeddings.position_ids")
_CLIP_BARE = (
    "embeddings.class_",
    "embeddings.patch_embedding.",
    "embeddings.position_embedding.",
    "embeddings.position_ids",
)
_CLIP_BARE += ("encoder.layers.", "pre_layrnorm.", "post_layernorm.")
_DINOV2_RENAMED = {  # names inside a block: transformers 5's modules -> the names every file was written with
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.down_proj.": ".mlp.weights_out.",
}


def legacy_keys(key: str) -> str | None:
    """The name in this file's networks of a key as some version of `transformers` wrote it, or None to leave it out.

    Left out: the `position_ids` buffer that CLIP files held before 4.31, and what belongs to other heads (text encoder,
    classifier). Renamed: a doubled, missing or extra prefix (`vision_model.vision_model.`, bare CLIPVisionModel files
    of version 5, `dinov2.` of a classifier, `clip.`), and the module names of version 5's DINOv2. Any other key comes
    back as it is, so that a strict comparison still reports it.
    """
    for prefix in ("dinov2.", "clip."):
        key = key.removeprefix(prefix)
    if key.startswith("vision_model.vision_model."):
        key = key.removeprefix("vision_model.")
    if key.startswith(_CLIP_BARE):
        key = f"vision_model.{key}"
    if key in _DROPPED_KEYS or key.startswith(_DROPPED_PREFIXES):
        return None
    for new, old in _DINOV2_RENAMED.items():
        key = key.replace(new, old)
    return key


def widen_patch_kernel(weight: Tensor, channels: int) -> Tensor:
    """Give the patch kernel of a 3-channel DINOv2 more input channels, as MIDI did before its training.

    Args:
        weight: [D, C, P, P], the file's `embeddings.patch_embeddings.projection.weight`.
        channels: the number of input channels wanted, at least C; channel c gets the kernel of c mod C.

    Raises:
        ValueError: fewer channels are wanted than the kernel has.
    """
    given = weight.shape[1]
    if channels < given:
        raise ValueError(f"a patch kernel of {given} channels can't be narrowed to {channels}")
    return weight[:, [c % given for c in range(channels)]]
