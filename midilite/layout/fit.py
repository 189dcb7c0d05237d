"""The layout of a scene fitted to the masks of its picture, and the camera with it.

Gauss-Newton steps (with Levenberg's damping) on the unknowns of `state.py`, first the camera's alone, then all of them.
After each the objects are drawn anew, and what each outline has to do with its mask is found anew (`terms.py`).

**Depth and size.** A mask alone does not tell a large object far away from a small one near by. Here decide, in this
order: standing on a common floor, for objects that the model put near it (`terms.floor_terms`: where an object meets
the floor in the picture says how far away it is); which of two hides the other (`contact.order_terms`); a depth map,
where one is given (`depth_map.py`); the scene's box, which the model's frame fixes (`terms.frame_terms`); and then the
model's own word (`terms.prior_terms`), by its measured errors. The same holds for the camera's angle of view and
distance, unless the angle is given.

**Where it is computed.** A fit is some twelve thousand operations on small tensors one after the other: a GPU is faster
than one core, but not by much. What differs between them is rounding.

**How much of it is taken.** Where shapes are wrong, outlines pull at wrong parts, and even the best fit leaves masks
that agree badly. So the worse they agree after the fit, the smaller the part of the step that is taken, and of depth a
smaller one still (`Problem.trusted`); an object that agrees worse than before goes back. A fit is only taken when the
masks agree better with it and no object is deeper inside another than the model had it; else half of it, else a fourth;
else the model's layout stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..common.devices import precise_device
from ..common.threads import one_thread
from ..mesh.geometry import EXTENT
from ..render.camera import Camera
from . import terms
from .camera_start import mask_sides, start_camera
from .contact import Contact, depth_order, order_terms
from .depth_map import depth_terms
from .equations import join
from .evidence import Masks, mask_iou, scaled, scaled_masks
from .prior import Prior
from .silhouettes import Objects, draw
from .state import CAMERA, OBJECT, State, Z, stands

if TYPE_CHECKING:
    import trimesh

FIT_SIZE, MEASURE_SIZE = 128, 256  # pixels on the picture's longer side where the fit is made, and where it is judged
_FINE = 192  # cells of the grid on an object's longest side that fine meshes are thinned to where a fit is judged
_STEPS = (4, 10)  # of the camera alone, of all together
_WIDTHS = (0.4, 0.2)  # of the robust weights at the first and the last step, as a share of an object's size
_LONGEST = 0.2  # step of any unknown
_GAIN = 0.01  # of the masks' IoU, from which on a fit is taken: smaller ones do as much harm as good
_LOSS = 0.02  # of an object's own IoU, from which on it is not moved
_TRUST = (0.4, 0.7)  # masks' IoU reached by the fit, from which on shapes tell anything, and all but depth
_DEPTH_TRUST = (0.6, 0.95)  # the same for depth, which hangs on the camera's elevation, and that on all shapes
_UNKNOWN = 1e30  # depths beyond are some format's word for none
_DEEPER = 0.01  # than the model had it, an object may be inside another


@dataclass(frozen=True)
class LayoutOptions:
    """What is known beside picture and masks.

    Attributes:
        fov: the picture's vertical angle of view in degrees; None estimates it.
        floor: whether all objects stand on one floor; else only those that the model put near it.
        depth: float [H, W] of the picture's size, metric or up to scale and shift, larger is further; NaN or infinite
            where nothing is known.
    """

    fov: float | None = None
    floor: bool = False
    depth: np.ndarray | None = None

    def __post_init__(self) -> None:
        fov, depth = self.fov, self.depth
        if fov is not None and (not isinstance(fov, Real) or isinstance(fov, bool) or not 1.0 <= fov <= 170.0):
            raise ValueError(f"fov is {fov!r}, expected degrees from 1 to 170")
        if depth is not None:
            if not (isinstance(depth, np.ndarray) and depth.ndim == 2 and depth.dtype.kind in "fiu"):
                raise ValueError("depth is no array [H, W] of real numbers")
            known = depth.astype(np.float64)
            known[~(np.abs(known) < _UNKNOWN)] = np.nan
            object.__setattr__(self, "depth", known)

    @property
    def focal(self) -> float | None:
        """The logarithm of the focal length in picture heights, where it is known."""
        return None if self.fov is None else math.log(0.5 / math.tan(math.radians(self.fov) / 2))


@dataclass(frozen=True)
class Layout:
    """What came of a fit.

    Attributes:
        camera: that sees the scene as the picture does, in pixels of the label map.
        matrices: float64 [n, 4, 4] that bring each mesh from where the model made it to where it is now.
        mask_iou: mean over the objects before and after, both seen by the best camera for that layout.
        changed: whether the layout was changed; else the model's stayed.
        note: what happened, in a line.
    """

    camera: Camera
    matrices: np.ndarray
    mask_iou: tuple[float, float]
    changed: bool
    note: str

    def moved(self, meshes: Sequence[trimesh.Trimesh | None]) -> list[trimesh.Trimesh | None]:
        """Copies of the meshes that the layout was fitted for, where it puts them."""
        copies = [mesh if mesh is None else mesh.copy() for mesh in meshes]
        for mesh, matrix in zip(copies, self.matrices, strict=True):
            if mesh is not None and self.changed:
                mesh.vertices = mesh.vertices @ matrix[:3, :3].T + matrix[:3, 3]
        return copies


def fit_layout(
    meshes: Sequence[trimesh.Trimesh | None],
    labels: np.ndarray,
    values: Sequence[int],
    options: LayoutOptions | None = None,
    device: torch.device | str = "cpu",
    prior: Prior | None = None,
) -> Layout:
    """Move, scale and turn each object so that what is drawn of it agrees with its mask.

    Args:
        meshes: the model's objects in its frame, None where there is no surface.
        labels: int [H, W], the masks.
        values: the label of each object.
        options: what else is known.
        device: where to compute, see above.
        prior: how far to trust the model.

    Raises:
        ValueError: no object has a surface and a mask, there is not one label for each, or the depth map has another
            size.
    """
    if len(values) != len(meshes):
        raise ValueError(f"there are {len(meshes)} meshes and {len(values)} labels, expected one for each")
    there = [i for i, mesh in enumerate(meshes) if _has_surface(mesh) and bool((labels == values[i]).any())]
    if not there:
        raise ValueError("no object has both a surface and a mask: there is nothing to fit")
    pairs = [(torch.as_tensor(np.array(meshes[i].vertices)), torch.as_tensor(np.array(meshes[i].faces))) for i in there]
    with one_thread():
        problem = Problem.of(pairs, labels, [values[i] for i in there], options, torch.device(device), prior)
        before = problem.solve(problem.start(), _STEPS[0], camera_only=True)
        after = problem.solve(before, _STEPS[1])
        state, ious, changed = problem.judged(before, after)
    linear, shift = (t.cpu().numpy() for t in state.matrices())
    matrices = np.tile(np.eye(4), (len(meshes), 1, 1))
    matrices[there, :3, :3], matrices[there, :3, 3] = linear, shift
    camera = state.resized((labels.shape[1], labels.shape[0])).camera()
    said = (
        f"mask IoU {ious[0]:.3f} -> {ious[1]:.3f}"
        if changed
        else f"no better one was found than the model's, which is kept (mask IoU {ious[0]:.3f})"
    )
    note = f"layout: {said}"
    return Layout(camera, matrices, ious, changed, note)


def _has_surface(mesh: trimesh.Trimesh | None) -> bool:
    """Whether there is something to fit: objects that have no triangle or no finite place are left where they are."""
    return mesh is not None and len(mesh.faces) > 0 and bool(np.isfinite(mesh.vertices).all())


@dataclass(frozen=True)
class Problem:
    """A scene to be fitted: what does not change from step to step.

    Attributes:
        fine_objects: what the fit is judged with; objects: the same with fewer triangles.
        masks: at the size of the fit.
        fine, fine_unknown: bool [n, H, W] and [H, W] at the size where it is judged, see `scaled_masks`.
        frame: float64 [4], middle and half the longest side of the box that the scene fills.
        depth: float64 [H, W] or None, at the size of the fit.
    """

    fine_objects: Objects
    objects: Objects
    masks: Masks
    fine: Tensor
    fine_unknown: Tensor
    frame: Tensor
    depth: Tensor | None
    options: LayoutOptions
    prior: Prior

    @classmethod
    def of(cls, meshes, labels: np.ndarray, values: Sequence[int], options=None, device=None, prior=None) -> Problem:
        """From the objects' (vertices, faces) and the label map; see `fit_layout`."""
        device = precise_device(device or torch.device("cpu"))
        options = options or LayoutOptions()
        fine_objects = Objects.of(meshes, device, _FINE)
        objects = Objects.of(fine_objects.meshes(), device)
        masks = Masks.of(*scaled_masks(labels, values, FIT_SIZE, device))
        fine, fine_unknown = scaled_masks(labels, values, MEASURE_SIZE, device)
        depth = None
        if options.depth is not None:
            if options.depth.shape != labels.shape:
                raise ValueError(f"the depth map is {options.depth.shape}, the picture {labels.shape} (rows, columns)")
            depth = torch.as_tensor(scaled(options.depth, FIT_SIZE), dtype=torch.float64, device=device)
        frame = scene_frame(objects.boxes())
        return cls(fine_objects, objects, masks, fine, fine_unknown, frame, depth, options, prior or Prior())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the fit's picture."""
        return self.masks.own.shape[2], self.masks.own.shape[1]

    @cached_property
    def contact(self) -> Contact:
        """In the model's layout."""
        return Contact.of(self.objects, State.start(stands(self.objects.boxes()), self.size, 0.0, 1.0, [0, 0, -4], 0.0))

    def start(self) -> State:
        """The model's layout as a first camera sees it."""
        front = self.objects.boxes()[:, 1, 2]
        evidence = self.masks.evidence(front[None] > front[:, None])
        focal = None if self.options.focal is None else math.exp(self.options.focal)
        return start_camera(self.objects, evidence, self.size, self.prior, focal)

    def solve(self, state: State, steps: int, camera_only: bool = False) -> State:
        """Some Gauss-Newton steps."""
        free = CAMERA if camera_only else len(state.values)
        order = evidence = sides = None
        for step in range(steps):
            drawn = draw(self.objects, state)
            now = depth_order(drawn, self.masks.own, middle_depth(state))
            if order is None or not torch.equal(now, order):
                order, evidence = now, self.masks.evidence(now)
                sides = mask_sides(evidence)
            part = step / max(steps - 1, 1)
            width = _WIDTHS[0] * (_WIDTHS[1] / _WIDTHS[0]) ** part
            parts = self._picture_terms(state, drawn, evidence, sides, width, 1.0 if part < 0.5 else self.prior.sides)
            if not camera_only:
                parts += self._scene_terms(state, drawn, order)
            state = self._stepped(state, join(parts), free)
        return state

    def _picture_terms(self, state, drawn, evidence, sides, width: float, sides_weight: float):
        prior, objects, masks = self.prior, self.objects, self.masks
        parts = [
            terms.outline_terms(objects, state, drawn, evidence, masks, prior, width),
            terms.side_terms(objects, state, evidence, *sides, masks, prior).scaled(sides_weight),
            terms.prior_terms(state, prior, self.options.focal),
            terms.floor_terms(state, prior, self.options.floor),
        ]
        if self.depth is not None:
            parts.append(depth_terms(objects, state, drawn, masks.own, self.depth, prior))
        return parts

    def _scene_terms(self, state, drawn, order):
        prior, objects = self.prior, self.objects
        return [
            terms.frame_terms(objects, state, self.frame, prior),
            order_terms(objects, state, drawn, self.masks.own, order, prior.order),
            self.contact.terms(objects, state, prior.order),
        ]

    def _stepped(self, state: State, equations, free: int) -> State:
        matrix, right = equations.normal()
        matrix, right = matrix[:free, :free], right[:free]
        damping = 1e-3 * matrix.diagonal() + 1e-6
        step = torch.linalg.solve(matrix + torch.diag(damping), right).clamp(-_LONGEST, _LONGEST)
        return state.changed(torch.cat([state.values[:free] + step, state.values[free:]]))

    def judged(self, before: State, after: State) -> tuple[State, tuple[float, float], bool]:
        """The best on the way from one to the other: (state, mask IoU before and after, whether it moved)."""
        first = self.agreement(before)
        nothing = before, (float(first.mean()),) * 2, False
        if not bool(after.values.isfinite().all()):
            return nothing
        step = self.trusted(after.values - before.values, float(self.agreement(after).mean()))
        for share in (1.0, 0.5, 0.25):
            state = before.changed(before.values + share * step)
            agreed = self.agreement(state)
            better = agreed > first - _LOSS
            if not bool(better.all()):
                # an object that agrees worse where it is now goes back to where the model put it
                state = state.kept(better)
                agreed = self.agreement(state)
            reached = float(agreed.mean())
            deeper = self.contact.depths(self.objects, state) - self.contact.allowed
            if reached > float(first.mean()) + _GAIN and float(deeper.max()) <= _DEEPER:
                return state, (float(first.mean()), reached), True
        return nothing

    def trusted(self, step: Tensor, reached: float) -> Tensor:
        """The part of a step [D] that is taken: the less, the worse the masks' IoU that it leads to."""
        share, depth = (min(max((reached - low) / (high - low), 0.0), 1.0) for low, high in (_TRUST, _DEPTH_TRUST))
        step = step * share
        if self.depth is None:
            step[CAMERA + Z :: OBJECT] *= depth
        return step

    def agreement(self, state: State) -> Tensor:
        """float64 [n]: IoU of what is seen of each object and its mask."""
        shown = draw(self.fine_objects, state.resized((self.fine.shape[2], self.fine.shape[1]))).labels()
        number = 1 + torch.arange(len(self.fine), device=shown.device)
        return mask_iou(shown == number[:, None, None], self.fine, self.fine_unknown)


def middle_depth(state: State) -> Tensor:
    """float64 [n]: depth of where the objects stand."""
    world = state.pivots + state.objects[:, :3]
    return -(world @ state.turn().T + state.offset)[:, 2]


def scene_frame(boxes: Tensor) -> Tensor:
    """float64 [4], middle and half the longest side that the scene shall fill, from the objects' boxes [n, 2, 3].

    Data preparation brings every scene into [-0.95, 0.95]^3, so a model trained on it does so, too, but for its errors.
    One whose scene is nothing like that has another frame, and keeps it.
    """
    low, high = boxes[:, 0].amin(0), boxes[:, 1].amax(0)
    own = torch.cat([(low + high) / 2, (high - low).max()[None] / 2])
    usual = own.new_tensor([0.0, 0.0, 0.0, EXTENT])
    return usual if float((own - usual).abs().max()) <= 0.1 else own
