"""A module tree with the names of the reference for peft, and the same with a fused product for us."""

import pytest
import torch

from midilite import lora
from midilite.lora.config import LoRAConfig
from midilite.model.layers import Linear


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

    def forward(self, x):
        return self.to_out[0](torch.tanh(self.to_q(x)) * self.to_k(x) + self.to_v(x))


class Fused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = Linear(8, 24, bias=False, parts={"to_q": 8, "to_k": 8, "to_v": 8})
        self.to_out = torch.nn.ModuleList([Linear(8, 8)])

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.to_out[0](torch.tanh(q) * k + v)


def copy_base(theirs, ours):
    """Give our tree the weights of peft's."""
    own = ours.state_dict()
    for key, value in theirs.state_dict().items():
        own[key].copy_(value)


def peft_pair(**settings):
    """(peft's model, ours) with the same random base and adapter; peft's B is not zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs, ours = Plain(), Fused()
    copy_base(theirs, ours)
    targets = ["to_q", "to_v", "to_out.0"]
    options = {"r": 3, "lora_alpha": 6, "target_modules": targets, "lora_dropout": settings.pop("dropout", 0.0)}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(init_lora_weights=False, **options, **settings))
    config = LoRAConfig(3, 6, options["lora_dropout"], tuple(targets), **settings)
    lora.inject(ours, config)
    state = {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(theirs).items()}
    lora.load_adapter_state(ours, state)
    return theirs, ours
