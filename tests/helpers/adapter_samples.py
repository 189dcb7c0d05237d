"""Adapters of the tiny model with settings of every kind, for the tests of adapter files."""

from dataclasses import replace

import torch
from golden_files import golden_dit

from midilite import lora
from midilite.lora import files as adapters
from midilite.lora.arithmetic import resize
from midilite.lora.files import AdapterFile

CONFIG = lora.LoRAConfig(rank=4, alpha=8)
PATTERNED = lora.LoRAConfig(
    rank=3,
    alpha=1 / 3,
    dropout=0.1,
    target_modules=("to_q", "attn2_2.to_out.0", "ff.net.2", "skip_linear", "proj_in", "time_proj.linear_1"),
    rank_pattern={"attn1.to_q": 2, "blocks.4.skip_linear": 5},
    alpha_pattern={"blocks.1.attn1.to_q": 7, "attn2.to_q": 6.5, "proj_in": 1},
)
SETTINGS = {
    "lora": CONFIG,
    "rslora": replace(CONFIG, use_rslora=True),
    "patterns": PATTERNED,
    "rslora and patterns": replace(PATTERNED, use_rslora=True),
    "dora": replace(CONFIG, use_dora=True),
    "dora, rslora and patterns": replace(PATTERNED, use_rslora=True, use_dora=True),
    "overlapping patterns": replace(  # peft takes the first that matches and sorts when it saves
        CONFIG, rank_pattern={"blocks.1.attn1.to_q": 2, "attn1.to_q": 3}, alpha_pattern={"to_v": 3, "attn1.to_v": 9}
    ),
}
WIDE = replace(PATTERNED, rank=6)  # modules of several shapes, of which two kinds have other ranks
SAMPLES = (*SETTINGS, "shared ranks", "shared ranks, dora")


def sample(kind):
    """An adapter of one of `SAMPLES`."""
    if kind in SETTINGS:
        return random_adapter(SETTINGS[kind])
    return resize(uneven_adapter(replace(WIDE, use_dora="dora" in kind)), 3, share_ranks=True).adapter


def random_adapter(config, seed=0, metadata=None):
    """An adapter as if trained: both A and B are random, and magnitudes are near the lengths that they start from."""
    model = golden_dit("midi_tiny")
    lora.inject(model, config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in lora.adapter_state(model).items():
        noise = torch.randn(value.shape, generator=generator) / 8
        state[key] = value * (1 + noise) if "magnitude" in key else noise
    return AdapterFile(config, state, metadata=metadata or {})


def uneven_adapter(config=WIDE):
    """An adapter whose modules differ in how fast their singular values fall."""
    adapter = random_adapter(config)
    state = dict(adapter.state)
    for number, (path, rank) in enumerate(adapters.ranks_of(state).items()):
        fall = (0.3, 0.6, 0.8, 0.95)[number % 4]
        state[f"{path}.lora_A.weight"] = state[f"{path}.lora_A.weight"] * (fall ** torch.arange(rank))[:, None]
    return replace(adapter, state=state)


def assert_same(found, expected):
    """Bits of every weight; rank, alpha and scale of every module."""
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[key], expected.state[key]) for key in expected.state)
    for path in adapters.ranks_of(expected.state):
        assert found.config.rank_of(path) == expected.config.rank_of(path)
        assert found.config.scale_of(path) == expected.config.scale_of(path)
