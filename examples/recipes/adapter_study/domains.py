"""Two small domains of generated shapes, for who has no data at hand."""

from __future__ import annotations

from pathlib import Path

from midilite.data_prep.prepare import PrepareSettings, prepare


def make_domain(folder: Path, name: str, num_scenes: int, num_points: int) -> Path:
    """A data folder of arrangements of up to three generated shapes: "angular" or "round"."""
    from trimesh import creation

    raw, out = folder / name / "raw", folder / name / "data"
    raw.mkdir(parents=True, exist_ok=True)
    sizes = (0.4, 0.7, 1.0)
    if name == "angular":
        shapes = {f"box{i}{j}": creation.box((a, b, 1.4 - a)) for i, a in enumerate(sizes) for j, b in enumerate(sizes)}
        shapes |= {f"prism{i}": creation.cylinder(0.4, a, sections=3) for i, a in enumerate(sizes)}
    else:
        shapes = {f"ball{i}": creation.icosphere(3, a / 2) for i, a in enumerate(sizes)}
        shapes |= {f"ring{i}": creation.torus(0.5, a / 5) for i, a in enumerate(sizes)}
        shapes |= {f"pill{i}": creation.capsule(a, 0.25) for i, a in enumerate(sizes)}
    for shape, mesh in shapes.items():
        mesh.export(raw / f"{shape}.ply")
    settings = PrepareSettings(num_samples=num_points, image_size=192, compose=3, num_scenes=num_scenes, singles=False)
    prepare(raw, out, settings, num_workers=1, log=lambda text: None)
    return out
