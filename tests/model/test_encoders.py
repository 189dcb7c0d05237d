"""The two image encoders against the recorded tensors and against `transformers` on random configurations.

Tolerance: relative error 1e-5 in fp32, a hundred times the rounding of one product and far below what a swapped norm,
a wrong activation or a shifted position table makes (1e-3 and more).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from midilite.model.config import CLIPVisionConfig, DINOv2Config, PreprocessorConfig
from midilite.model.encoders import CLIPVision, DINOv2, legacy_keys, widen_patch_kernel
from midilite.model.images import Instance
from midilite.model.preprocess import Preprocessor, condition_pixels

GOLDEN = Path(__file__).parents[1] / "golden"
MIDI = GOLDEN / "midi_tiny"
TRIPOSG = GOLDEN / "triposg_tiny"
FOLDERS = {
    MIDI / "checkpoint/image_encoder_1": (CLIPVision, CLIPVisionConfig),
    MIDI / "checkpoint/image_encoder_2": (DINOv2, DINOv2Config),
    TRIPOSG / "checkpoint/image_encoder_dinov2": (DINOv2, DINOv2Config),
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


def load_encoder(folder: Path) -> torch.nn.Module:
    network, config = FOLDERS[folder]
    model = network(config.from_json(folder / "config.json"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_state_dict_is_the_files_key_table(folder):
    """Past bug class: fused q/k/v leaking into the keys, or the unused mask_token dropped when saving."""
    network, config = FOLDERS[folder]
    with torch.device("meta"):
        model = network(config.from_json(folder / "config.json"))
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert own == {key: tuple(value.shape) for key, value in load_file(folder / "model.safetensors").items()}
    assert all(value.is_meta for value in model.parameters())
    assert not list(model.buffers()), "a buffer would stay on the meta device after loading"


@torch.no_grad()
def test_recorded_midi_conditions():
    """From recorded instance images and masks through our preprocessors and both encoders to the recorded tokens."""
    golden = load_file(MIDI / "golden.safetensors")
    instances = [
        Instance(
            i,
            Image.fromarray(golden[f"pre.instance_rgb.{i}"].numpy()),
            golden[f"pre.instance_mask.{i}"].numpy(),
        )
        for i in range(3)
    ]
    preprocessors = [
        Preprocessor(PreprocessorConfig.from_json(MIDI / f"checkpoint/feature_extractor_{i}/preprocessor_config.json"))
        for i in (1, 2)
    ]
    pixels_1, pixels_2 = condition_pixels(instances, MIDI / "scene_rgb.png", *preprocessors)
    clip = load_encoder(MIDI / "checkpoint/image_encoder_1")
    assert relative_error(clip(golden["enc.pixels_1"])[:, None], golden["enc.embeds_1"]) < 1e-5
    assert relative_error(clip(pixels_1)[:, None], golden["enc.embeds_1"]) < 1e-5
    dinov2 = load_encoder(MIDI / "checkpoint/image_encoder_2")
    assert relative_error(dinov2(pixels_2), golden["enc.embeds_2"]) < 1e-5


@torch.no_grad()
def test_recorded_triposg_condition():
    """The 3-channel encoder at another resolution than its own: 56 px on a 70 px table, positions are interpolated."""
    folder = TRIPOSG / "checkpoint/feature_extractor_dinov2/preprocessor_config.json"
    pixels = Preprocessor(PreprocessorConfig.from_json(folder))(TRIPOSG / "object_rgb.png")[None]
    model = load_encoder(TRIPOSG / "checkpoint/image_encoder_dinov2")
    expected = load_file(TRIPOSG / "golden.safetensors")["enc.embeds"]
    assert relative_error(model(pixels), expected) < 1e-5


# ---------------------------------------------------------------------------------------------------- transformers


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every norm, bias and layer scale non-trivial, so that a missing one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and parameter.mean().abs() > 0.5
            parameter.copy_(1 + 0.2 * noise if is_scale else 0.15 * noise)
    return model.eval()


def saved_state(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The weights as that version of transformers writes them to disk, renamed as our loader does."""
    model.save_pretrained(folder)
    state = {legacy_keys(key): value for key, value in load_file(folder / "model.safetensors").items()}
    return {key: value for key, value in state.items() if key is not None}


DINOV2_CASES = {
    "native size": (dict(), (56, 56)),
    "larger": (dict(num_channels=7), (98, 98)),
    "smaller": (dict(), (28, 28)),
    "wide": (dict(num_channels=7), (56, 112)),
    "tall, same token count": (dict(), (28, 112)),
    "not a multiple of the patch": (dict(), (75, 61)),
    "one row": (dict(), (14, 70)),
    "swiglu": (dict(use_swiglu_ffn=True, num_channels=7), (70, 56)),
    "swiglu, other ratio": (dict(use_swiglu_ffn=True, mlp_ratio=3, hidden_size=40, num_attention_heads=5), (56, 56)),
    "no qkv bias": (dict(qkv_bias=False), (56, 56)),
    "no mask token, one head": (dict(use_mask_token=False, num_attention_heads=1), (42, 56)),
    "small patch, coarse eps": (dict(patch_size=8, image_size=64, layer_norm_eps=1e-3, mlp_ratio=2), (40, 72)),
}


@pytest.mark.parametrize("case", DINOV2_CASES)
@torch.no_grad()
def test_dinov2_equals_transformers(case, tmp_path):
    """Sizes, both MLPs, all switches of the config, square and non-square inputs; the config file is read too."""
    transformers = pytest.importorskip("transformers")
    overrides, size = DINOV2_CASES[case]
    base = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14)
    oracle = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**(base | overrides))), seed=1)
    state = saved_state(oracle, tmp_path)
    config = DINOv2Config.from_json(tmp_path / "config.json")
    model = DINOv2(config).eval()
    model.load_state_dict(state)
    pixels = torch.randn(2, config.num_channels, *size, generator=torch.Generator().manual_seed(2))
    assert relative_error(model(pixels), oracle(pixels).last_hidden_state) < 1e-5


CLIP_CASES = {
    "quick_gelu": dict(),
    "gelu": dict(hidden_act="gelu"),
    "laion-like": dict(hidden_act="gelu", hidden_size=60, num_attention_heads=5, intermediate_size=77, patch_size=8),
    "one patch": dict(image_size=14, num_hidden_layers=1, projection_dim=3),
    "other eps": dict(layer_norm_eps=1e-3, num_attention_heads=1),
}


@pytest.mark.parametrize("case", CLIP_CASES)
@torch.no_grad()
def test_clip_equals_transformers(case, tmp_path):
    """Both activations, several sizes; the pooled token is normalised before the projection."""
    transformers = pytest.importorskip("transformers")
    base = dict(hidden_size=48, intermediate_size=96, projection_dim=20, num_hidden_layers=3, num_attention_heads=4)
    base |= dict(image_size=56, patch_size=14)
    oracle = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**(base | CLIP_CASES[case])))
    state = saved_state(randomise(oracle, seed=3), tmp_path)
    config = CLIPVisionConfig.from_json(tmp_path / "config.json")
    model = CLIPVision(config).eval()
    model.load_state_dict(state)
    pixels = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(4))
    assert relative_error(model(pixels), oracle(pixels).image_embeds) < 1e-5


@torch.no_grad()
def test_bf16_stays_close_and_interpolates_positions_in_fp32(tmp_path):
    """bf16 keeps 8 bits, so 3% over two blocks; bicubic weights in bf16 would move the positions by more than that."""
    folder = MIDI / "checkpoint/image_encoder_2"
    exact, half = load_encoder(folder), load_encoder(folder).to(torch.bfloat16)
    pixels = torch.randn(2, 7, 98, 70, generator=torch.Generator().manual_seed(5))
    found = half(pixels)  # fp32 pixels are brought to the network's type
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), exact(pixels)) < 0.03
    table = half.embeddings.position_embeddings.float()
    exact.embeddings.position_embeddings.copy_(table)
    assert torch.equal(half.embeddings.positions(7, 5), exact.embeddings.positions(7, 5).bfloat16())
    clip = load_encoder(MIDI / "checkpoint/image_encoder_1")
    square = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(6))
    expected = clip(square)
    assert relative_error(clip.to(torch.bfloat16)(square).float(), expected) < 0.03


# ------------------------------------------------------------------------------------------- keys of other versions


def test_files_of_other_transformers_versions_load():
    """Old CLIP files hold position_ids; whole-CLIP, classifier and bare files differ in prefixes; v5 renames DINOv2."""
    assert legacy_keys("vision_model.embeddings.position_ids") is None
    assert legacy_keys("embeddings.position_ids") is None
    assert legacy_keys("text_model.encoder.layers.0.mlp.fc1.weight") is None
    assert legacy_keys("logit_scale") is None
    assert legacy_keys("classifier.weight") is None
    class_embedding = "vision_model.embeddings.class_embedding"
    assert legacy_keys("vision_model.vision_model.embeddings.class_embedding") == class_embedding
    assert legacy_keys("embeddings.class_embedding") == class_embedding
    assert legacy_keys("pre_layrnorm.weight") == "vision_model.pre_layrnorm.weight"
    assert legacy_keys("dinov2.embeddings.cls_token") == "embeddings.cls_token"
    block = "encoder.layer.3.attention"
    assert legacy_keys(f"{block}.q_proj.bias") == f"{block}.attention.query.bias"
    assert legacy_keys(f"{block}.o_proj.weight") == f"{block}.output.dense.weight"
    assert legacy_keys("something.else") == "something.else"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_current_names_stay(folder):
    """Renaming must be the identity on the names our networks use, or saving and loading would disagree."""
    for key in load_file(folder / "model.safetensors"):
        assert legacy_keys(key) == key


@torch.no_grad()
def test_widened_kernel():
    """With zeros for the rest it computes what the narrow one did; widened, it sees its picture in every channel."""
    narrow = load_encoder(TRIPOSG / "checkpoint/image_encoder_dinov2")
    key = "embeddings.patch_embeddings.projection.weight"
    weight = narrow.state_dict()[key]
    wide = DINOv2(DINOv2Config.from_dict({**narrow.config.to_dict(), "num_channels": 7})).eval()
    widened = widen_patch_kernel(weight, 7) * (torch.arange(7) < 3)[:, None, None]
    wide.load_state_dict(narrow.state_dict() | {key: widened})
    pixels = torch.randn(1, 7, 70, 70, generator=torch.Generator().manual_seed(7))
    assert relative_error(wide(pixels), narrow(pixels[:, :3])) < 1e-5
    cloned = widen_patch_kernel(weight, 7)
    assert [torch.equal(cloned[:, c], weight[:, c % 3]) for c in range(7)] == [True] * 7
    assert torch.equal(widen_patch_kernel(weight.bfloat16(), 3), weight.bfloat16())


def test_errors_give_both_sizes():
    """What a user can mend is a ValueError with what was found and what was expected."""
    clip = load_encoder(MIDI / "checkpoint/image_encoder_1")
    dinov2 = load_encoder(MIDI / "checkpoint/image_encoder_2")
    with pytest.raises(ValueError, match=r"56 x 70 .* 56 x 56"):
        clip(torch.zeros(1, 3, 56, 70))
    with pytest.raises(ValueError, match=r"\(1, 3, 56, 56\), expected \[B, 7"):
        dinov2(torch.zeros(1, 3, 56, 56))
    with pytest.raises(ValueError, match="smaller than one patch of 14"):
        dinov2(torch.zeros(1, 7, 13, 56))
    with pytest.raises(ValueError, match="narrowed to 2"):
        widen_patch_kernel(torch.zeros(4, 3, 2, 2), 2)
    with pytest.raises(ValueError, match="wrong shape embeddings.position_embeddings"):
        state = dict(dinov2.state_dict())
        dinov2.load_state_dict(state | {"embeddings.position_embeddings": torch.zeros(1, np.prod([3, 3]) + 1, 40)})
