"""midilite from Python, from top to bottom: load, generate, look inside, train on scenes from memory, adapt, evaluate.

    python examples/from_python.py

Written like a notebook: editors that know `# %%` run it cell by cell. It uses what ships and very few steps, so that it
takes seconds on a CPU and makes nothing good. Results go to outputs/from_python.
"""

# %% Load. "pretrained_weights/MIDI-3D" with device="cuda", dtype=torch.bfloat16 for the published weights;
# offload_parts=True for a small GPU, then quantize_base="int8", then offload_blocks=True.
from pathlib import Path

import numpy as np
import torch

import midilite

ASSETS, OUT = Path(midilite.__file__).parent / "assets", Path("outputs/from_python")
pipe = midilite.load_pipeline("tiny", device="cpu")
print(pipe)

# %% Generate. Without numbers a scene is sampled as the model says; here in few steps, of few tokens, on a coarse grid.
rgb, seg = ASSETS / "example" / "rgb.png", ASSETS / "example" / "seg.png"  # or PIL images, or arrays
few = {"num_inference_steps": 4, "guidance_scale": 2.0, "num_tokens": 64, "grid_depth": 4}
result = pipe(rgb, seg, **few, seed=42)
print(result)  # result.scene is a trimesh.Scene with one named geometry per object, result.latents is [n, T, C]
result.save(OUT / "scene.glb")  # or .obj, .ply, .stl
result.for_engines(max_faces=None, floor=True).save(OUT / "on_the_floor.glb")

# %% Inside: conditions, one call of the transformer, the VAE.
cond = pipe.encode_images(rgb, seg)  # cond.clip [n, 1, E], cond.dinov2 [n, S, E]
n, tokens, channels = result.latents.shape
noise = torch.randn(n, tokens, channels, generator=torch.Generator().manual_seed(0))
timesteps = torch.full((n,), 1000.0)  # 1000 sigma of each instance: 1000 is noise alone, 0 is a clean scene
with torch.no_grad():
    velocity = pipe.transformer(noise, timesteps, cond.clip, cond.dinov2, groups=[n])  # one scene; [2, 1] would be two
    # The network predicts x0 - eps, and x_sigma = (1 - sigma) x0 + sigma eps: at sigma = 1 this is its guess of x0.
    guess = noise + velocity
    sdf = pipe.vae.decode(guess, torch.zeros(n, 1, 3))  # signed distance at the centre of each object, negative inside
print(
    f"velocity {list(velocity.shape)}, signed distances at the centre {[round(d, 2) for d in sdf.flatten().tolist()]}"
)

# %% Scenes from memory: a list of (picture, mask, surfaces). These arrays could come from any renderer.
# All surfaces of a scene are in one frame: y up, the camera on the +z side, the joint bounding box in [-0.95, 0.95].
scenes = []
for sample in sorted((ASSETS / "demo").glob("composed_*"))[:3]:
    surfaces = np.load(sample / "surface.npy")  # [K, N, 6]: one surface per label, points and unit normals
    scenes.append((sample / "scene_rgb.png", sample / "seg.png", [surface for surface in surfaces]))

# %% Train. Every option of examples/train.py is a field of TrainOptions; the defaults are the same.
options = midilite.TrainOptions(
    pretrained_model="tiny",
    output_dir=str(OUT / "run"),
    device="cpu",
    batch_size=1,
    max_train_steps=2,
    num_tokens=64,  # the default is the model's own
    learning_rate=1e-3,
    val_fraction=0.25,
    validate_every=2,
)


def show(step: int, numbers: dict) -> None:
    """Called after every step with all that is known of it; anything may be done here."""
    print(f"step {step}: loss {numbers['loss']:.3f}, validation {numbers.get('val_loss', 'not due')}")


adapter = midilite.train_lora(options, [show], scenes)  # with data_dir=... in the options: a folder, and no scenes
print(adapter)

# %% Adapt. Adapters of any format: PEFT, diffusers, kohya, bare .pth or .safetensors.
pipe.load_adapter(adapter, scale=1.0, name="space")
pipe(rgb, seg, **few)
pipe.set_adapters({"space": 0.5})  # several at once, changed between calls
pipe(rgb, seg, adapter_scale=0.5, **few)  # or for one call alone
print(pipe.adapters)
pipe.unload_adapters()  # the base again, bit for bit. pipe.merge_adapters() and pipe.save(folder) keep it instead

# %% An adapter is a table of tensors; any format goes into any other.
file = midilite.read_adapter(adapter)
midilite.write_adapter(OUT / "space.safetensors", file, "kohya")

# %% Evaluate on the folder that the scenes were written to: base and adapter from the same noise.
found = midilite.evaluate(
    pretrained_model="tiny",
    data_dir=str(OUT / "run" / "scenes"),
    lora_path=[str(adapter)],
    output=str(OUT / "evaluation.json"),
    device="cpu",
    max_scenes=1,
    num_points=256,
    **few,
)
print({name: found[name]["mean"]["none"]["scene_f_score"]["mean"] for name in ("base", "adapter")})  # none: not moved
