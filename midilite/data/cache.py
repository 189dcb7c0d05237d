"""What training needs of a scene, encoded once: condition tokens and latent statistics.

The base is frozen, so the image encoders and the shape encoder would compute the same thing at every step.
`FeatureCache` stores it, or with no folder computes it anew at every request. Of the latents mean and log-variance are
kept, and the trainer draws latents anew at each step (`vae.sample_latents`).

**On disk**: `<folder>/<first two digits>/<key>.safetensors`, one per view and mask variant, with `clip` [n, 1, E]
(absent for TripoSG), `dinov2` [n, S, E], `mean` and `logvar` [n, T, C], `mask_share` [n]; the metadata holds the
scene's name and a digest of the tensors.

**It can't lie.** The key is a hash of everything that the tensors depend on: the contents of image, masks and surfaces,
weights and configs of the encoders, tokens, type, seed, mask variant, how a picture that is not square is fitted, and
`ENCODING_VERSION`. A changed input has
another key, so an old entry is not found rather than wrongly used. Contents are hashed anew by each process: a table
of file times would be faster and wrong after a copy that keeps times. (About 1 s per GB, and once per file and run:
a file that is changed while a run reads it is noticed by the next run.) An entry's digest is compared when a process
first loads it. A damaged entry is computed again, with a warning. Not in the key: the device and the torch version,
whose roundings differ by less than the type's precision.

Temporary files of killed processes are removed by whoever prepares the cache next; several runs may share one. Entries
that no scene uses any more stay. The folder can be removed at any time: what is needed is encoded again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ..common.files import file_digest, remove_leftovers
from ..model.folder import ModelFolder
from ..model.weights import write_safetensors
from .features import Features, SceneEncoder
from .scenes import Scene, read_scene

ENCODING_VERSION = 1  # raise it when the same inputs give other features
_REQUIRED = {"dinov2", "mean", "logvar", "mask_share"}
_FREE_SPACE_MARGIN = 1.05

Progress = Callable[[int, int, str], None]


class CacheWarning(UserWarning):
    """An entry of the cache was damaged or missing and is computed again."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did in this process: entries computed and found, and the bytes written."""

    computed: int
    found: int
    bytes_written: int


@dataclass
class _Shared:
    """What the views of a scene have in common: surfaces by instance, latents by the instances that are in sight."""

    scene: Scene | None
    surfaces: dict[int, np.ndarray] = field(default_factory=dict)
    latents: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)


class FeatureSource(Protocol):
    """Where training, validation and evaluation get encoded scenes from."""

    mask_variants: tuple[int, ...]

    @property
    def is_stored(self) -> bool:
        """Whether features are read from the disk, so that a thread can do it while the device works."""

    @property
    def encoder(self) -> SceneEncoder:
        """What computes the features."""

    def prepare(
        self, scenes: Sequence[Scene], rank: int = 0, world_size: int = 1, progress: Progress | None = None
    ) -> Prepared:
        """Compute ahead what can be; see `FeatureCache.prepare`."""

    def load(self, scene: Scene, view: int = 0, variant: int = 0) -> Features:
        """Features of one view. Raises ValueError naming the file when the scene can't be read."""

    def num_instances(self, scene: Scene, view: int = 0) -> int:
        """n of a view: objects out of sight are not counted."""


class FeatureCache:
    """Encoded scenes, kept on disk; see the module's docstring.

    Args:
        folder: where they are kept; None keeps nothing: features are computed at every request, and the encoders stay
            loaded.
        model: the checkpoint folder with the encoders.
        num_tokens: T, latent tokens per instance.
        seed: draws the points that the shape encoder starts from, together with the scene's name.
        dtype: type of the image encoders and of the stored tokens; the shape encoder works in fp32.
        device: where the encoders run. Features are returned on the CPU.
        mask_variants: mask sizes in pixels more (or less) than drawn; `load` takes their index.
        picture_fit: how pictures that are not square come to the model's square, see `preprocess.fits_by_padding`.

    Raises:
        ValueError: no mask variant, or two equal ones.
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: ModelFolder,
        num_tokens: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        mask_variants: Sequence[int] = (0,),
        picture_fit: str | None = None,
    ) -> None:
        if not mask_variants or len(set(mask_variants)) != len(mask_variants):
            raise ValueError(
                f"mask_variants is {list(mask_variants)}; expected different numbers of pixels, such as 0 2 -2"
            )
        self.folder = None if folder is None else Path(folder)
        self.encoder = SceneEncoder(model, num_tokens, seed, dtype, device, picture_fit)
        self.mask_variants = tuple(mask_variants)
        self._hashes: dict[Path, str] = {}
        self._keys: dict[tuple[Scene, int, int], str] = {}
        self._verified: set[Path] = set()

    @property
    def is_stored(self) -> bool:
        """Whether features are read from the disk, so that a thread can do it while the device works."""
        return self.folder is not None

    # ------------------------------------------------------------------------------------------------------- filling

    def prepare(
        self, scenes: Sequence[Scene], rank: int = 0, world_size: int = 1, progress: Progress | None = None
    ) -> Prepared:
        """Compute the entries that are missing, this process those of every `world_size`-th view.

        Entries appear whole or not at all, so an interrupted call is continued by the next one. The encoders are loaded
        when something is missing and freed at the end. The views are dealt out by their number alone: processes
        need not agree on what is missing.

        Args:
            progress: called with (done, total, message): first with (0, total, what will be done and how many bytes
                it takes), then after every view.

        Raises:
            ValueError: a scene can't be read, or the disk has too little space (both numbers are given).
            OSError: the cache can't be written.
        """
        if self.folder is None:
            if progress is not None:
                progress(0, 0, f"no cache: {sum(len(s.views) for s in scenes)} view(s) are encoded anew at every step")
            return Prepared(0, 0, 0)
        for part in self.folder.glob("[0-9a-f][0-9a-f]"):
            remove_leftovers(part)
        jobs = [(scene, view) for scene in scenes for view in range(len(scene.views))][rank::world_size]
        todo = [(scene, view, missing) for scene, view in jobs if (missing := self._missing(scene, view))]
        found = len(jobs) * len(self.mask_variants) - sum(len(missing) for _, _, missing in todo)
        needed = sum(self.encoder.feature_bytes(len(scene.instances)) * len(missing) for scene, _, missing in todo)
        if progress is not None:
            text = f"{needed / 2**30:.2f} GiB" if needed >= 2**28 else f"{needed / 2**20:.1f} MiB"
            share = f" (process {rank + 1} of {world_size})" if world_size > 1 else ""
            progress(
                0, len(todo), f"cache {self.folder}: {found} entries found, {len(todo)} views to encode, {text}{share}"
            )
        self._check_space(needed * world_size)
        written = 0
        shared = _Shared(None)
        try:
            for done, (scene, view, missing) in enumerate(todo, start=1):
                shared = shared if scene is shared.scene else _Shared(scene)
                for path in self._compute(scene, view, missing, shared):
                    written += path.stat().st_size
                if progress is not None:
                    progress(done, len(todo), f"encoded {scene.name}")
        finally:
            self.encoder.free()
        return Prepared(sum(len(missing) for _, _, missing in todo), found, written)

    def _missing(self, scene: Scene, view: int) -> list[int]:
        return [v for v in range(len(self.mask_variants)) if not self._is_whole(self.path(scene, view, v), scene.name)]

    def _check_space(self, needed: int) -> None:
        """Raise ValueError where the entries that are missing can't be written."""
        if not needed:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"{self.folder}: the cache can't be written ({reason}); choose another --cache_dir"
            ) from error
        free = shutil.disk_usage(self.folder).free
        if needed * _FREE_SPACE_MARGIN > free:
            raise ValueError(
                f"{self.folder}: the cache needs {needed / 2**30:.2f} GiB more, {free / 2**30:.2f} GiB are free; "
                "choose another --cache_dir, fewer views or mask variants, or --no_cache"
            )

    def _compute(
        self, scene: Scene, view: int, variants: Sequence[int], shared: _Shared | None = None
    ) -> Iterator[Path]:
        """Encode and write variants of one view. Latents depend on the instances only, not on view or variant."""
        shared = shared or _Shared(scene)
        data = read_scene(scene, view, known=shared.surfaces)
        if data.indices not in shared.latents:
            shared.latents[data.indices] = self.encoder.latents(data)
        latents = shared.latents[data.indices]
        for variant in variants:
            features = self.encoder.features(data, latents, self.mask_variants[variant])
            yield self._write(self.path(scene, view, variant), scene.name, features)

    def _write(self, path: Path, name: str, features: Features) -> Path:
        tensors = features.tensors()
        metadata = {"scene": name, "digest": _digest(tensors)}
        try:
            try:
                write_safetensors(path, tensors, metadata)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                write_safetensors(path, tensors, metadata)  # tidied up by a machine that our locks don't reach
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path}: the cache can't be written ({error}); free space, or use --no_cache") from error
        return path

    # ------------------------------------------------------------------------------------------------------- reading

    def load(self, scene: Scene, view: int = 0, variant: int = 0) -> Features:
        """Features of one view; an entry that is missing or damaged is computed again, with a `CacheWarning`.

        Raises:
            ValueError: the entry had to be computed and the scene can't be read.
        """
        if self.folder is None:
            data = read_scene(scene, view)
            return self.encoder.features(data, self.encoder.latents(data), self.mask_variants[variant])
        path = self.path(scene, view, variant)
        features = self._read(path, scene.name)
        if features is not None:
            return features
        if not path.exists():
            _warn(f"{scene.name}: view {view} is not in the cache {self.folder}; it is encoded now")
        try:
            for _ in self._compute(scene, view, [variant]):
                pass
        finally:
            self.encoder.free()
        features = self._read(path, scene.name)
        if features is None:
            raise OSError(f"{path}: the cache entry can't be read back after it was written; is the disk failing?")
        return features

    def num_instances(self, scene: Scene, view: int = 0) -> int:
        """n of a view: objects out of sight are not counted."""
        if scene.views[view].mask is None:
            return len(scene.instances)
        if self.folder is None:
            return len(read_scene(scene, view).indices)
        try:
            with safe_open(self.path(scene, view), framework="pt") as file:
                return file.get_slice("mask_share").get_shape()[0]
        except (OSError, SafetensorError):
            return self.load(scene, view).dinov2.shape[0]

    def path(self, scene: Scene, view: int = 0, variant: int = 0) -> Path:
        """Where the entry of a view lies. Raises ValueError when a file of the scene can't be read."""
        where = (scene, view, variant)
        if where not in self._keys:
            self._keys[where] = self._key(*where)
        key = self._keys[where]
        return self.folder / key[:2] / f"{key}.safetensors"

    def _key(self, scene: Scene, view: int, variant: int) -> str:
        chosen = scene.views[view]
        parts = {
            "version": ENCODING_VERSION,
            "scene": scene.name,
            "image": self.digest(chosen.image),
            "instances": [
                [self.digest(chosen.mask or s.mask), s.label, s.surface and self.digest(s.surface), s.row]
                for s in scene.instances
            ],
            "mask_pixels": self.mask_variants[variant],
            **self.encoder.identity,
            **self.encoder.fit_of(chosen.image),
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest()

    def digest(self, path: Path) -> str:
        """The hash of a file's content, read once. Raises ValueError naming a file that can't be read."""
        if path not in self._hashes:
            self._hashes[path] = file_digest(path).hex()
        return self._hashes[path]

    def _is_whole(self, path: Path, name: str) -> bool:
        """Whether an entry exists and has its full length (its bytes are compared when it is loaded)."""
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                return _REQUIRED <= set(file.keys()) and "digest" in (file.metadata() or {})
        except (OSError, SafetensorError) as error:
            _warn(f"{name}: the cache entry {path} is damaged ({error}); it is computed again")
            return False

    def _read(self, path: Path, name: str) -> Features | None:
        """The entry; None when it is missing or (with a warning) damaged."""
        try:
            content = path.read_bytes()  # not mapped: a file that shrinks under a map kills the process (SIGBUS)
            tensors = load(content)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            _warn(f"{name}: the cache entry {path} is damaged ({error}); it is computed again")
            return None
        whole = _REQUIRED <= set(tensors)
        if whole and path not in self._verified:
            whole = _metadata(content).get("digest") == _digest(tensors)
        if not whole:
            _warn(f"{name}: the cache entry {path} is damaged (its contents changed); it is computed again")
            return None
        self._verified.add(path)
        return Features(**{"clip": None, **tensors})


def _warn(text: str) -> None:
    warnings.warn(text, CacheWarning, stacklevel=3)


def _metadata(content: bytes) -> dict[str, str]:
    """Of a safetensors file that was read: its header is JSON, after its length in 8 bytes."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})


def _digest(tensors: dict[str, Tensor]) -> str:
    """BLAKE2b over names, types, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()
