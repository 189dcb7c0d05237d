"""The transformer once more, naively, with torch's own layers under the reference's names: what peft and diffusers
can put their adapters into. Nothing of midilite is used; the golden tensors decide whether it is right."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class PlainAttention(nn.Module):
    def __init__(self, width, heads, condition_width=None):
        super().__init__()
        self.heads, inner = heads, condition_width or width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(inner, width, bias=False), nn.Linear(inner, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))

    def forward(self, x, condition=None):
        source = x if condition is None else condition
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if condition is None:
            q, k, v = torch.cat([q, k, v], -1).unflatten(-1, (self.heads, 3, -1)).unbind(-2)
        else:
            q = q.unflatten(-1, (self.heads, -1))
            k, v = torch.cat([k, v], -1).unflatten(-1, (self.heads, 2, -1)).unbind(-2)
        q, k, v = self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    def __init__(self, c, skip):
        super().__init__()
        width, heads = c["width"], c["num_attention_heads"]
        if skip:
            self.skip_linear, self.skip_norm = nn.Linear(2 * width, width), nn.LayerNorm(width)
        self.norm1, self.attn1 = nn.LayerNorm(width), PlainAttention(width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), PlainAttention(width, heads, c["cross_attention_dim"])
        self.norm2_2, self.attn2_2 = nn.LayerNorm(width), PlainAttention(width, heads, c["cross_attention_2_dim"])
        up = nn.Module()
        up.proj = nn.Linear(width, 4 * width)
        self.norm3, self.ff = nn.LayerNorm(width), nn.Module()
        self.ff.net = nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x, popped, e1, e2):
        if popped is not None:
            x = self.skip_norm(self.skip_linear(torch.cat([popped, x], -1)))
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), e1) + self.attn2_2(self.norm2_2(x), e2)
        return x + self.ff.net[2](F.gelu(self.ff.net[0].proj(self.norm3(x))))


class PlainDiT(nn.Module):
    """MIDI's transformer without multi-instance attention, from the dict of its `config.json`."""

    def __init__(self, config):
        super().__init__()
        width, middle = config["width"], config["num_layers"] // 2
        self.width, self.middle = width, middle
        self.time_proj = nn.Module()
        self.time_proj.linear_1, self.time_proj.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.proj_in, self.proj_out = nn.Linear(config["in_channels"], width), nn.Linear(width, config["in_channels"])
        self.blocks = nn.ModuleList(PlainBlock(config, i > middle) for i in range(config["num_layers"]))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x, t, e1, e2):
        half = self.width // 2
        angles = t[:, None] * torch.exp(torch.arange(half) * (-math.log(10000.0) / half))
        time = torch.cat([angles.sin(), angles.cos()], -1)
        time = self.time_proj.linear_2(F.gelu(self.time_proj.linear_1(time)))
        x, stack = torch.cat([time[:, None], self.proj_in(x)], 1), []
        for i, block in enumerate(self.blocks):
            x = block(x, stack.pop() if i > self.middle else None, e1, e2)
            if i < self.middle:
                stack.append(x)
        return self.proj_out(self.norm_out(x)[:, 1:])
