"""One scene to its samples: bring the instances into one frame, get a picture with an id mask, sample the surfaces.

    instances --(arrange)--> turned to the camera's yaw --> normalised jointly --> picture + ids, surfaces [K, N, 6]

The frame of a sample is that of its own camera's yaw (see `prepare.py` for the whole contract). A picture is either
the user's own (`rgb.png` and `seg.png` in the scene folder) or rendered here; a camera under which an instance is
hidden or tiny is drawn again, and a composed scene is arranged again when no camera helps. Among the cameras that will
do, one that leaves no instance mostly covered is preferred. All this is decided on small pictures, because most of the
time of a sample goes into the large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.pictures import png_bytes
from ..common.seeds import name_text, numpy_generator
from ..data.sample_folder import mask_picture, npy_bytes, variant_name
from ..mesh.geometry import EXTENT, sample_surface, scene_transform
from ..model.config import MAX_LABELS
from ..model.label_maps import label_values
from ..model.masks import ambiguous_turn, load_mask, load_matching_mask
from ..model.pictures import load_rgb
from ..render.camera import Camera, orbit_camera
from ..render.photograph import Photograph
from ..render.render_mesh import RenderMesh, to_render_mesh
from ..render.renderer import Rendered, render, render_batch
from .arrange import arrange, yaw_rotation
from .finding import SceneSource
from .looks import backgrounds_in, draw_look, draw_picture, drawn_fov
from .options import PrepareSettings
from .sources import Instance, load_instances, match_labels

_VIEW_TRIES = 8  # cameras tried until every instance shows
_ARRANGEMENT_TRIES = 4  # arrangements tried in turn, each with that many cameras
_WELL_SHOWN = 0.3  # a camera is taken at once when no instance is covered to more than 70%
_SHOWN_IN_ROOM = 0.12  # the same in rooms, where things stand before each other
_PROBE_SIZE = 128  # pixels of the small picture that decides whether a camera will do


@dataclass(frozen=True, eq=False)
class Shape:
    """An instance and where it stands: vertices float64 [V, 3] = matrix [4, 4] applied to those of its file."""

    instance: Instance
    drawable: RenderMesh  # in the file's frame
    matrix: np.ndarray
    vertices: np.ndarray

    @classmethod
    def of(cls, instance: Instance, finish: bool = False) -> Shape:
        """The instance where its file puts it; `finish` draws more of its material than a colour."""
        return cls(
            instance,
            to_render_mesh(instance.mesh, finish=finish),
            np.eye(4),
            np.asarray(instance.mesh.vertices, np.float64),
        )

    @property
    def faces(self) -> np.ndarray:
        """Triangles [F, 3]."""
        return np.asarray(self.instance.mesh.faces)

    def moved(self, matrix: np.ndarray) -> Shape:
        """A copy moved by a [4, 4] matrix (rotation, uniform scale and translation)."""
        vertices = self.vertices @ matrix[:3, :3].T + matrix[:3, 3]
        return replace(self, matrix=matrix @ self.matrix, vertices=vertices)

    def in_place(self) -> RenderMesh:
        """What the renderer draws. The vertices come from float64, so that far-off coordinates lose nothing."""
        vertices = self.drawable.vertices.new_tensor(self.vertices)
        return replace(self.drawable.transformed(self.matrix), vertices=vertices)


@dataclass(frozen=True)
class Frame:
    """How the scene was brought into the sample's frame: turned by -azimuth, then (p - centre) * scale."""

    azimuth: float
    centre: tuple[float, float, float]
    scale: float


def sample_name(scene: str, view: int) -> str:
    """Folder name of a view: the scene's own name for view 0, so that more views can be added later."""
    return scene if view == 0 else f"{scene}_view{view:02d}"


def build_samples(
    source: SceneSource, input_dir: str | Path, views: list[int], settings: PrepareSettings
) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]] | tuple[str, str]]:
    """Make views of one scene: yields (sample, files, manifest), or (sample, reason) for one that can't be made.

    Raises:
        ValueError: the scene as a whole can't be prepared (no usable mesh, labels that don't match, ...).
    """
    finish = settings.look != "plain"
    loaded = load_instances(source, input_dir, settings.up_axis, finish)
    instances, broken = loaded.instances, loaded.broken
    notes = {"warnings": loaded.notes} if loaded.notes else {}
    reasons = "; ".join(entry["reason"] for entry in broken)
    if broken and (source.rgb or source.seg or source.mapping):
        raise ValueError(f"a mesh cannot be used, but the picture or mapping.json needs every one: {reasons}")
    if not instances or (broken and source.kind != "scene"):
        raise ValueError(reasons)
    if len(instances) > MAX_LABELS:
        raise ValueError(
            f"{len(instances)} instances, at most {MAX_LABELS} are allowed in one scene. A folder of single objects "
            "is no scene: pass it as --input_dir itself"
        )
    if source.rgb or source.seg:
        files, manifest = _given_sample(source, Path(input_dir), instances, settings)
        told = [*loaded.notes, *manifest.pop("warnings", [])]
        yield sample_name(source.name, 0), files, {**manifest, **({"warnings": told} if told else {})}
        return
    mapping = Path(input_dir) / source.mapping if source.mapping else None
    shapes = [Shape.of(instance, finish) for instance in match_labels(None, instances, mapping).values()]
    for view in views:
        name = sample_name(source.name, view)
        try:
            files, manifest = _rendered_sample(source, shapes, view, settings)
        except ValueError as error:
            yield name, str(error)
        else:
            yield name, files, {**manifest, "skipped_meshes": broken, **notes}


def _given_sample(
    source: SceneSource, root: Path, instances: list[Instance], settings: PrepareSettings
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A sample from the user's own picture and mask; the meshes stand as the camera sees them."""
    if not (source.rgb and source.seg):
        missing, present = ("seg.png", source.rgb) if source.rgb else ("rgb.png", source.seg)
        raise ValueError(
            f"{missing} is missing beside {present}; add it, or remove {present} to have the scene rendered"
        )
    rgb = load_rgb(root / source.rgb)
    turned = ambiguous_turn(root / source.rgb, root / source.seg, rgb.size)
    notes = [turned] if turned else []
    if source.mapping:  # names the labels, as they stand there
        labels = load_mask(root / source.seg, size=rgb.size, background=0, notes=notes)
    else:
        labels = load_matching_mask(root / source.seg, len(instances), rgb.size, notes)
    pairs = match_labels(label_values(labels), instances, root / source.mapping if source.mapping else None)
    if not pairs:
        raise ValueError(f"{source.mapping}: leaves out every label")
    ids = np.zeros(labels.shape, np.uint8)
    for index, label in enumerate(pairs, start=1):
        ids[labels == label] = index
    shapes = [Shape.of(instance) for instance in pairs.values()]
    shapes, frame = into_frame(shapes, azimuth=0.0)
    files = _files(np.asarray(rgb), ids, _surfaces(source, 0, shapes, settings))
    manifest = _manifest(source, 0, shapes, ids, frame, settings)
    for entry, label in zip(manifest["instances"], pairs, strict=True):
        entry["label_in_seg"] = label
    notes = [note.replace(f"{root}/", "") for note in notes]  # reports name files relative to the input folder
    return files, {**manifest, "image": "given", "skipped_meshes": [], **({"warnings": notes} if notes else {})}


@dataclass(frozen=True, eq=False)
class _View:
    """A scene in the frame of one camera, and how well that camera shows it."""

    shapes: list[Shape]
    frame: Frame
    elevation: float
    fov: float
    placements: list[dict[str, Any] | None]
    share: float  # of the picture that the least visible instance covers,
    hidden: int  # its place in shapes,
    uncovered: float  # and the least share of an instance that no other one covers


def _rendered_sample(
    source: SceneSource, shapes: list[Shape], view: int, settings: PrepareSettings
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Try arrangements (of composed scenes) and cameras until every instance shows; then draw and sample."""
    worst: tuple[float, str] = (-1.0, "")
    for attempt in range(_ARRANGEMENT_TRIES if source.kind == "composed" else 1):
        shown_well = _SHOWN_IN_ROOM if settings.look == "room" else _WELL_SHOWN
        chosen = _best_view(_views(source, shapes, view, attempt, settings), settings.min_visible, shown_well)
        share, hidden = chosen.share, chosen.hidden
        if share >= settings.min_visible:
            taken, ids, camera, look = _pictures(source, view, chosen, settings)
            ids = ids.astype(np.uint8)
            share, hidden = _least_visible(ids, chosen.shapes)
            if share > 0:
                noisy = settings.look == "room"
                files = _files(taken[0], ids, _surfaces(source, view, chosen.shapes, settings), noisy)
                files |= {variant_name(i): png_bytes(Image.fromarray(rgb), noisy) for i, rgb in enumerate(taken[1:], 1)}
                manifest = _manifest(source, view, chosen.shapes, ids, chosen.frame, settings)
                for entry, placement in zip(manifest["instances"], chosen.placements, strict=True):
                    entry["placement"] = placement
                where = {"eye": camera.eye, "target": camera.target, "elevation": chosen.elevation, "fov": chosen.fov}
                return files, {**manifest, "image": "rendered", "camera": where, **look}
        if share > worst[0]:
            worst = share, _why_unseen(chosen, hidden, share, settings)
    no_scene = "; if its files are separate objects and no scene, pass the folder itself as --input_dir"
    raise ValueError(f"{worst[1]}{no_scene if source.kind == 'scene' and len(shapes) > 1 else ''}")


def _why_unseen(view: _View, index: int, share: float, settings: PrepareSettings) -> str:
    """Why an instance shows too little: others hide it, or it is small beside the scene; it alone tells which."""
    shape = view.shapes[index]
    size, whole = (float(np.ptp(_bounds(shapes), axis=0).max()) for shapes in ([shape], view.shapes))
    camera = _camera(view.shapes, view.elevation, view.fov, _PROBE_SIZE)
    own = float(render([shape.in_place()], camera, supersample=1).ids.count_nonzero()) / _PROBE_SIZE**2
    found = (
        f"'{shape.instance.name}' covers {share:.3%} of the picture in the best of the views tried, less than "
        f"min_visible {settings.min_visible:.3%}"
    )
    lower = "lower --min_visible, " if share > 0 else ""
    if own > share and own >= settings.min_visible:
        hidden = f"other objects hide it (alone it would cover {own:.3%})"
        return f"{found}: {hidden}; {lower}widen the ranges or change the scene"
    if len(view.shapes) == 1:
        return f"{found}: it is too thin to be seen; {lower}widen the ranges, enlarge --image_size or change the mesh"
    return (
        f"{found}: it is tiny, its longest side {size / whole:.3%} of the scene's (a file in another unit, or one that "
        f"lies far off?); {lower}enlarge --image_size or change the scene"
    )


def _pictures(
    source: SceneSource, view: int, chosen: _View, settings: PrepareSettings
) -> tuple[list[np.ndarray], np.ndarray, Camera, dict[str, Any]]:
    """The pictures of a view, ids of their pixels, its camera, and what scene.json says of its look."""
    if settings.look == "plain":
        shown, camera = _draw(chosen.shapes, chosen.elevation, chosen.fov, settings.image_size)
        return [shown.color.numpy()], shown.ids.numpy(), camera, {}
    rng = numpy_generator(settings.seed, "look", source.name, view)
    camera = _camera(chosen.shapes, chosen.elevation, chosen.fov, settings.image_size)
    pictures = backgrounds_in(settings.backgrounds) if settings.backgrounds else ()
    look = draw_look(settings.look, rng, _bounds(chosen.shapes), camera, pictures)
    shown = draw_picture([shape.in_place() for shape in chosen.shapes], camera, look)
    taken, facts = [look.photograph(shown.color.numpy(), rng)], {"look": look.facts()}
    if settings.variants > 1:
        others = []
        for number in range(1, settings.variants):
            rng = numpy_generator(settings.seed, "variant", source.name, view, number)
            others.append(Photograph.draw(rng, settings.image_size))
            taken.append(others[-1](shown.color.numpy(), rng))
        facts["look"]["variants"] = [asdict(other) for other in others]
        facts["variants"] = [variant_name(number) for number in range(1, settings.variants)]
    return taken, shown.ids.numpy(), camera, facts


def _best_view(views: Iterator[_View], min_visible: float, shown_well: float) -> _View:
    """The first view that shows everything well, else the one that shows the most covered instance best."""
    seen = []
    for view in views:
        seen.append(view)
        if view.share >= min_visible and view.uncovered >= shown_well:
            break
    return max(seen, key=lambda v: (v.share >= min_visible, v.uncovered if v.share >= min_visible else v.share))


def _views(
    source: SceneSource, shapes: list[Shape], view: int, attempt: int, settings: PrepareSettings
) -> Iterator[_View]:
    """One arrangement of the scene as one camera after the other sees it, judged on a small picture."""
    placed, placements = shapes, [None] * len(shapes)
    if source.kind == "composed":
        rng = numpy_generator(settings.seed, "arrange", source.name, attempt)
        found = arrange([_bounds([s]) for s in shapes], rng, settings.scale_range, settings.size_ratio)
        placed = [shape.moved(p.matrix()) for shape, p in zip(shapes, found, strict=True)]
        placements = [asdict(p) for p in found]
    for trial in range(_VIEW_TRIES):
        rng = numpy_generator(settings.seed, "view", source.name, view, attempt, trial)
        azimuth, elevation = (float(rng.uniform(*r)) for r in (settings.azimuth_range, settings.elevation_range))
        fov = settings.fov
        if settings.look != "plain":
            fov = drawn_fov(fov, numpy_generator(settings.seed, "fov", source.name, view, attempt, trial))
        framed, frame = into_frame(placed, azimuth)
        probe, camera = _draw(framed, elevation, fov, _PROBE_SIZE, supersample=1)
        share, hidden = _least_visible(probe.ids.numpy(), framed)
        uncovered = _uncovered(probe, framed, camera) if share >= settings.min_visible else 0.0
        yield _View(framed, frame, elevation, fov, placements, share, hidden, uncovered)


def _uncovered(probe: Rendered, shapes: list[Shape], camera: Camera) -> float:
    """The least share of an instance's own outline that is seen in the scene."""
    if len(shapes) == 1:
        return 1.0
    seen = np.bincount(probe.ids.numpy().ravel(), minlength=len(shapes) + 1)[1:]
    alone = render_batch([[shape.in_place()] for shape in shapes], [camera] * len(shapes), supersample=1).ids
    return float((seen / alone.count_nonzero(dim=(1, 2)).numpy().clip(1)).min())


def into_frame(shapes: list[Shape], azimuth: float) -> tuple[list[Shape], Frame]:
    """Turn a scene so that the camera at `azimuth` degrees stands on the +z side, and normalise all of it jointly.

    Raises:
        ValueError: the scene is a single point.
    """
    turn = np.eye(4)
    turn[:3, :3] = yaw_rotation(-np.deg2rad(azimuth))
    turned = [shape.moved(turn) for shape in shapes]
    centre, scale = scene_transform(_bounds(turned), EXTENT)
    matrix = np.diag([scale, scale, scale, 1.0])
    matrix[:3, 3] = -centre * scale
    return [shape.moved(matrix) for shape in turned], Frame(azimuth, tuple(centre.tolist()), float(scale))


def _bounds(shapes: list[Shape]) -> np.ndarray:
    """float64 [2, 3] around the vertices of all shapes (the loader keeps only those that faces use)."""
    points = np.concatenate([np.stack([s.vertices.min(axis=0), s.vertices.max(axis=0)]) for s in shapes])
    return np.stack([points.min(axis=0), points.max(axis=0)])


def _camera(shapes: list[Shape], elevation: float, fov: float, size: int) -> Camera:
    """Sees the scene in its own frame, so from azimuth 0, as large as it fits the picture."""
    points = np.concatenate([shape.vertices for shape in shapes])
    return orbit_camera(0.0, elevation, points, fov_deg=fov, size=size)


def _draw(
    shapes: list[Shape], elevation: float, fov: float, size: int, supersample: int = 2
) -> tuple[Rendered, Camera]:
    """The scene in flat light, and its camera."""
    camera = _camera(shapes, elevation, fov, size)
    return render([shape.in_place() for shape in shapes], camera, supersample=supersample), camera


def _least_visible(ids: np.ndarray, shapes: list[Shape]) -> tuple[float, int]:
    """The instance with the fewest pixels: its share of the picture, and its place in `shapes`."""
    pixels = np.bincount(ids.ravel(), minlength=len(shapes) + 1)[1:]
    worst = int(pixels.argmin())
    return float(pixels[worst] / ids.size), worst


def _surfaces(source: SceneSource, view: int, shapes: list[Shape], settings: PrepareSettings) -> np.ndarray:
    """float32 [K, N, 6]: points and unit normals of every instance."""
    import trimesh

    rows = []
    for index, shape in enumerate(shapes):
        rng = numpy_generator(settings.seed, "surface", source.name, view, index)
        mesh = trimesh.Trimesh(shape.vertices, shape.faces, process=False, metadata={"name": shape.instance.name})
        rows.append(sample_surface(mesh, settings.num_samples, rng))
    return np.stack(rows)


def _files(rgb: np.ndarray, ids: np.ndarray, surfaces: np.ndarray, noisy: bool = False) -> dict[str, bytes]:
    """The contents of a sample's files. rgb uint8 [H, W, 3]; ids uint8 [H, W], 0 = background; surfaces [K, N, 6].

    Args:
        noisy: as photographs are; packing such pictures well takes long and saves little.
    """
    instances_on_white = np.where(ids[..., None] > 0, rgb, np.uint8(255))
    return {
        "scene_rgb.png": png_bytes(Image.fromarray(rgb), noisy),
        "rgb.png": png_bytes(Image.fromarray(instances_on_white), noisy),
        "seg.png": png_bytes(mask_picture(ids)),
        "surface.npy": npy_bytes(surfaces),
    }


def _manifest(
    source: SceneSource, view: int, shapes: list[Shape], ids: np.ndarray, frame: Frame, settings: PrepareSettings
) -> dict[str, Any]:
    """What scene.json tells about a sample, but for its picture. Equal names are told apart by a number."""
    names: list[str] = []
    for shape in shapes:
        copies = sum(name == shape.instance.name for name in [s.instance.name for s in shapes[: len(names)]])
        names.append(f"{shape.instance.name}_{copies + 1}" if copies else shape.instance.name)
    pixels = np.bincount(ids.ravel(), minlength=len(shapes) + 1)
    instances = [
        {
            "label": label,
            "name": names[label - 1],
            "source": shape.instance.source,
            "faces": len(shape.faces),
            "pixels": int(pixels[label]),
        }
        for label, shape in enumerate(shapes, start=1)
    ]
    return {
        "scene": name_text(source.name),
        "view": view,
        "kind": source.kind,
        "image_size": [ids.shape[1], ids.shape[0]],
        "instances": instances,
        "frame": {"azimuth": frame.azimuth, "centre": list(frame.centre), "scale": frame.scale, "extent": EXTENT},
        "settings": settings.of_sample(source.kind),
    }
