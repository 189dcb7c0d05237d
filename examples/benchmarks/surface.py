"""How long surface extraction takes: our marching cubes on a grid, and coarse-to-fine against dense evaluation.

    python examples/benchmarks/surface.py [--device cuda] [--depths 6 7 8] [--repeats 7] [--decoder]

The shapes are a ball and a chair with thin legs. The first table times the triangulation alone (next to scikit-image's,
where that is installed; it is no dependency of midilite). The second counts the points at which the function is
evaluated, both passes together, and shows what all the rest costs, since the function itself is cheap here. The last
line is JSON. With --decoder a third table has latents to mesh with a VAE of the published size in bf16: random weights
have no surface, so its decoder is computed at every point, and the chair takes the place of what it says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # run from a checkout without installing

import torch  # noqa: E402

from midilite.mesh.isosurface import SDF, Surface, extract_surface, marching  # noqa: E402
from midilite.model.config import VAEConfig  # noqa: E402
from midilite.model.vae import VAE  # noqa: E402


def ball(points: torch.Tensor) -> torch.Tensor:
    """Signed distance of a ball. [N, 3] -> [N]."""
    return points.norm(dim=1) - 0.8


def chair(points: torch.Tensor) -> torch.Tensor:
    """Signed distance of six boxes, outside of them exact. [N, 3] -> [N]."""
    boxes = [((0, -0.1, 0), (0.5, 0.03, 0.5)), ((0, 0.4, -0.48), (0.5, 0.5, 0.01))]
    boxes += [((x, -0.5, z), (0.015, 0.4, 0.015)) for x in (-0.45, 0.45) for z in (-0.45, 0.45)]
    distances = []
    for centre, half in boxes:
        q = (points - points.new_tensor(centre)).abs() - points.new_tensor(half)
        distances.append(q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0))
    return torch.stack(distances).amin(0)


def grid_values(sdf: SDF, nodes: int, device: str) -> torch.Tensor:
    """[nodes, nodes, nodes] over [-1, 1]^3, slab by slab."""
    axis = torch.linspace(-1, 1, nodes, device=device)
    plane = torch.cartesian_prod(axis, axis)
    slabs = [sdf(torch.cat([x.expand(len(plane), 1), plane], 1)).view(nodes, nodes) for x in axis]
    return torch.stack(slabs)


def milliseconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median time after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def time_triangulation(name: str, sdf: SDF, depth: int, repeats: int, device: str) -> dict:
    """One row of the first table."""
    values = grid_values(sdf, 2**depth + 1, device)
    surface = marching(values, -1.0, 2 / 2**depth)
    row = {"shape": name, "nodes": 2**depth + 1, "triangles": len(surface.faces)}
    row["marching_ms"] = milliseconds(lambda: marching(values, -1.0, 2 / 2**depth), repeats, device)
    if importlib.util.find_spec("skimage"):
        marching_cubes = importlib.import_module("skimage.measure").marching_cubes
        array = values.cpu().numpy()
        row["skimage_triangles"] = len(marching_cubes(array, 0.0)[1])
        row["skimage_ms"] = milliseconds(lambda: marching_cubes(array, 0.0), repeats, "cpu")
    return row


def time_extraction(name: str, sdf: SDF, depth: int, repeats: int, device: str) -> dict:
    """One row of the second table."""
    row: dict = {"shape": name, "nodes": 2**depth + 1}
    for kind in ("fine", "dense"):
        points = 0

        def counted(p: torch.Tensor) -> torch.Tensor:
            nonlocal points
            points += len(p)
            return sdf(p)

        options = {"depth": depth, "device": device, "dense": kind == "dense"}
        row["triangles"] = len(extract_surface(counted, **options).faces)
        row[f"{kind}_points"] = points
        row[f"{kind}_ms"] = milliseconds(lambda options=options: extract_surface(sdf, **options), repeats, device)
    return row


class MeshCase:
    """Latents to the surface of a chair with a VAE of random weights, which is computed at every queried point.

    Attributes:
        points: at which the decoder was asked in the last call, both passes together.
        dense_points: what two passes over whole grids would ask.
    """

    def __init__(self, vae: VAE, tokens: int, depth: int, zero: float = 0.0) -> None:
        device, self.vae, self.depth = vae.quant.weight.device, vae, depth
        generator = torch.Generator(device).manual_seed(0)
        shape = (tokens, vae.config.latent_channels)
        self.latents = torch.randn(shape, generator=generator, device=device).to(vae.dtype)
        self.zero = torch.tensor(zero, device=device)  # the device can't know, so nothing is optimised away
        self.points, self.dense_points = 0, 2 * (2**depth + 1) ** 3

    @torch.inference_mode()
    def __call__(self) -> Surface:
        """Both passes and the surface, on the VAE's device."""
        field, self.points = self.vae.field(self.latents), 0

        def sdf(points: torch.Tensor) -> torch.Tensor:
            self.points += len(points)
            return chair(points) + self.zero * field(points)

        return extract_surface(sdf, depth=self.depth, device=self.latents.device)


def full_size_mesh_case(
    device: torch.device | str, dtype: torch.dtype, depth: int = 8, config: VAEConfig | None = None, tokens: int = 2048
) -> tuple[MeshCase, dict[str, int]]:
    """What latents to mesh costs at the published size (or that of `config`): the work, run once, and its counts."""
    with torch.device(device):
        vae = VAE(config or VAEConfig()).to(dtype).eval().requires_grad_(False)
    case = MeshCase(vae, tokens, depth)
    triangles = len(case().faces)
    return case, {"points": case.points, "dense_points": case.dense_points, "triangles": triangles}


def time_decoder(depth: int, repeats: int, device: str) -> dict:
    """One row of the third table; TFLOP/s counts the queries alone."""
    case, counts = full_size_mesh_case(device, torch.bfloat16, depth)
    width, inner = case.vae.config.width_decoder, 3 + 6 * case.vae.config.embed_frequency
    flops = 2 * width * (inner + 10 * width + 2 * len(case.latents) + 1)
    row: dict = {"nodes": 2**depth + 1, **counts}
    context = torch.inference_mode()(lambda: case.vae.decode_context(case.latents[None]))
    row["context_ms"] = milliseconds(context, repeats, device)
    row["mesh_ms"] = milliseconds(case, repeats, device)
    row["tflops"] = 1e-9 * case.points * flops / row["mesh_ms"]
    return row


def print_table(rows: list[dict]) -> None:
    """Columns as wide as their heads."""
    print("  ".join(f"{key:>18}" for key in rows[0]))
    for row in rows:
        cells = (f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values())
        print("  ".join(f"{cell:>18}" for cell in cells))
    print()


def main() -> None:
    """Print both tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 7, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--decoder", action="store_true", help="also a VAE of the published size (a GPU, please)")
    args = parser.parse_args()
    shapes = {"ball": ball, "chair": chair}
    tables = {}
    for title, measure in (("marching", time_triangulation), ("extraction", time_extraction)):
        tables[title] = [
            measure(name, sdf, depth, args.repeats, args.device)
            for name, sdf in shapes.items()
            for depth in args.depths
        ]
        print_table(tables[title])
    if args.decoder:
        tables["decoder"] = [time_decoder(depth, args.repeats, args.device) for depth in args.depths]
        print_table(tables["decoder"])
    machine = torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"machine": machine, "torch": torch.__version__, **tables}))


if __name__ == "__main__":
    main()
