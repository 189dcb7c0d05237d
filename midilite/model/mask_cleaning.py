"""What a mask's values mean: background, outlines that belong to nothing, blended edges, specks. numpy.

People's masks hold more values than objects. Each step here takes a label map [H, W] and returns one, and says in a
sentence what it changed; what can't be told apart is refused with what to write. `background=` (`--mask_background`)
is the way out: with it nothing is found out, and every other value is an object.

    background   a label that covers most of the picture's border, where 0 covers little of it; -1
    blended      in-between values that lie only along edges, few of them (many are refused before)
    void         outlines around objects, or 255 (65535) beside labels that are counted from 1
    specks       labels of fewer pixels than an image encoder can see
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .label_maps import Indexed, border, contacts, dilate_mask, label_values, solid_pixels, solid_values

Colours = Mapping[int, tuple[int, int, int]]

_MOST_OF_BORDER = 0.5
_BACKGROUND_TOUCHES = 0.25  # of the border: where 0 has as much of it, 0 is the background
_INVERTED_TOUCHES = 0.02
_BLEND_ERROR = 12  # how far a blended colour may lie off the line between its two
_AT_EDGES = 0.8  # of a value's pixels
_AVERAGED = 0.2  # of the edges that could show it
_ENVELOPED = 0.8  # of an object's outline
_VOIDS = (255, 65535, 0xFFFFFF, 0xE0E0C0)  # what data sets draw outlines with
_MOST_COUNTED = 200  # labels beside which 255 is no number of an object
_LOSSY_STEP = 24
_WAY_OUT = "if it is an object, pass mask_background (--mask_background) with the value of the background"


def use_background(labels: np.ndarray, background: int, name: str) -> np.ndarray:
    """The label map with `background` as 0; what was 0 then has the label that was free.

    Raises:
        ValueError: no pixel has that value.
    """
    if background == 0:
        if (labels < 0).any():
            raise ValueError(f"{name}: mask values must be labels from 0 to {2**31 - 1}; -1 is none")
        return labels
    chosen = labels == background
    if not chosen.any():
        raise ValueError(f"{name}: mask_background is {background}, but no pixel of the mask has that value")
    rest = labels + 1 if background == -1 else np.where(labels == 0, background, labels)
    return np.where(chosen, 0, rest).astype(np.int32)


def find_background(labels: np.ndarray, name: str, notes: list[str]) -> np.ndarray:
    """Make the background 0 where it is another value; see the module's docstring.

    Raises:
        ValueError: a label has most of the border, and black lies inside, beside other labels.
    """
    values, counts = np.unique(border(labels), return_counts=True)
    label, share = int(values[counts.argmax()]), float(counts.max() / counts.sum())
    zero = float(counts[values == 0].sum() / counts.sum())
    if label == -1 and share > _MOST_OF_BORDER and zero < _BACKGROUND_TOUCHES:
        notes.append(f"{name}: -1 covers {share:.0%} of the border and is the background; labels count from 0 there, "
                     "and each is one more here")  # fmt: skip
        return labels + 1
    labels = _without(labels, -1, name, notes)
    others = [value for value in label_values(labels) if value != label]
    if label <= 0 or share <= _MOST_OF_BORDER or zero >= _BACKGROUND_TOUCHES or not (others or (labels == 0).any()):
        return labels
    covers = f"{name}: label {shown(label)} covers {share:.0%} of the mask's border"
    solid = solid_values(labels)
    alone = not any(value in solid for value in others)  # but for values in between, if any, which are looked at later
    if not alone and (zero > _INVERTED_TOUCHES or 0 in solid):
        raise ValueError(
            f"{covers}, and 0 (black) lies within, beside other labels: it can't be told whether that is an object or "
            f"the background; make the background 0, or pass mask_background (--mask_background) {label} or 0"
        )
    if not alone or 0 not in solid:
        notes.append(f"{covers}: it is taken as the background; {_WAY_OUT}")
        return np.where(labels == label, 0, labels)
    notes.append(f"{covers} and 0 (black) what lies within: the mask is inverted, black is taken as the object and the "
                 "rest as the background (mask_background 0 takes it as it is)")  # fmt: skip
    return label - labels if labels.max() == label else use_background(labels, label, name)


def _without(labels: np.ndarray, value: int, name: str, notes: list[str]) -> np.ndarray:
    found = labels == value
    if not found.any():
        return labels
    notes.append(f"{name}: {int(found.sum()):,} pixels of {value} belong to no object and are taken as background")
    return np.where(found, 0, labels)


def refuse_lossy(labels: np.ndarray, colours: Colours, name: str) -> None:
    """Raise ValueError for a mask of a lossy file whose labels are as near to each other as its errors."""
    places = _places(np.array([0, *label_values(labels)]), colours)
    apart = np.abs(places[:, None] - places[None]).max(-1) + 1e9 * np.eye(len(places))
    if len(places) > 1 and apart.min() < _LOSSY_STEP:
        raise ValueError(
            f"{name}: the mask is a JPEG, whose compression has mixed its labels ({len(places) - 1} values, some of "
            "them next to each other); save it as PNG (no JPEG)"
        )


def clean_blended(labels: np.ndarray, colours: Colours, name: str, notes: list[str]) -> np.ndarray:
    """Give pixels of in-between values to the label beside them that is nearest in value (colours: in colour).

    A value counts as in between when it fills no 3 x 3 square, and most of its pixels have two others within two
    pixels of them between which it lies.
    """
    solid = solid_values(labels)
    thin = [value for value in label_values(labels) if value not in solid]
    if not thin or not solid - {0}:
        return labels
    cleaned, removed, pixels = labels, [], 0
    for value in thin:
        rows, columns = np.nonzero(labels == value)
        near = _neighbours(labels, rows, columns)
        around = np.array(sorted(solid & {int(v) for v in np.unique(near)} | ({0} & set(np.unique(near).tolist()))))
        if not len(around):
            continue
        own, places = _places(np.array([value]), colours)[0], _places(around, colours)
        present = np.stack([(near == v).any(-1) for v in around], -1)  # [pixels, values]
        between = np.zeros(len(rows), bool)
        for a, b in _pairs_around(own, places):
            between |= present[:, a] & present[:, b]
        if between.mean() < _AT_EDGES:
            continue
        distance = np.where(present, np.abs(places - own).max(-1), np.inf)
        nearest = np.where(present.any(-1), around[distance.argmin(-1)], 0)
        cleaned = cleaned.copy() if cleaned is labels else cleaned
        cleaned[rows, columns] = nearest
        removed.append(value)
        pixels += len(rows)
    if removed:
        notes.append(
            f"{name}: {_listed(removed)} only along edges ({pixels:,} pixels), in between the values beside them, as "
            "averaging makes it: given to the nearest label; save masks without interpolation"
        )
    return cleaned


def clean_rims(labels: np.ndarray, colours: Colours, name: str, notes: list[str]) -> np.ndarray:
    """Undo averaged numbers that are labels themselves: 1 and 2 along the edges of 3, where 0, 1, 2, 3 were resized.

    A pixel counts as one when no 3 x 3 square of its label is near, but squares of a lower and of a higher one are. A
    few of them are thin parts of objects; so many, beside the edges that have none, are averaging.
    """
    if colours:
        return labels
    solid = solid_pixels(labels)
    rows, columns = np.nonzero(~solid & (labels != 0))
    if not len(rows):
        return labels
    near = np.where(_neighbours(solid, rows, columns), _neighbours(labels, rows, columns), -1)
    own = labels[rows, columns][:, None]
    strays = (near != own).all(1) & ((near >= 0) & (near < own)).any(1) & (near > own).any(1)
    sharp = np.triu(contacts(Indexed.of(labels)), 2).sum()  # between labels that have another one between them
    if strays.sum() <= _AVERAGED * (strays.sum() + sharp):
        return labels
    near, own = near[strays].astype(np.int64), own[strays].astype(np.int64)
    nearest = near[np.arange(len(near)), np.where(near >= 0, np.abs(near - own), 2**31).argmin(1)]
    cleaned = labels.copy()
    cleaned[rows[strays], columns[strays]] = nearest
    notes.append(
        f"{name}: {int(strays.sum()):,} pixels along edges have a label between those beside them, as averaging makes "
        "it: given to the nearest label; save masks without interpolation"
    )
    return cleaned


def _neighbours(labels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The 25 values around each of these pixels, [n, 25]."""
    height, width = labels.shape
    steps = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    return np.stack(
        [labels[(rows + i).clip(0, height - 1), (columns + j).clip(0, width - 1)] for i, j in steps], axis=-1
    )


def _pairs_around(own: np.ndarray, places: np.ndarray) -> list[tuple[int, int]]:
    """Which two of these values [n, 3] another lies between: on the line from one to the other, at neither end."""
    found = []
    for a in range(len(places)):
        for b in range(a + 1, len(places)):
            line = places[b] - places[a]
            share = float((own - places[a]) @ line / (line @ line))
            off = np.abs(places[a] + share * line - own).max()
            if 0 < share < 1 and off <= _BLEND_ERROR:
                found.append((a, b))
    return found


def _places(values: np.ndarray, colours: Colours) -> np.ndarray:
    """Values as points float64 [n, 3]: their colours, or the number itself three times."""
    if colours:
        return np.array([_colour(int(value), colours) for value in values], np.float64)
    return np.repeat(values.astype(np.float64)[:, None], 3, axis=1)


def _colour(value: int, colours: Colours) -> tuple[int, int, int]:
    try:
        return colours[value]
    except KeyError:
        return (0, 0, 0)


def clean_void(labels: np.ndarray, name: str, notes: list[str]) -> np.ndarray:
    """Make outlines that belong to no object background: the value 255 (or white) around objects, or beside counted
    labels; any value that runs around all of several objects."""
    indexed = Indexed.of(labels)
    values, touching = indexed.values, contacts(indexed)
    outline = touching.sum(-1).clip(1)
    for place, value in enumerate(values.tolist()):
        others = [i for i, v in enumerate(values.tolist()) if v not in (0, value)]
        if not value or not others:
            continue
        known = value in _VOIDS
        enveloped = sum(touching[i, place] >= _ENVELOPED * outline[i] for i in others)
        is_outline = enveloped == len(others) >= (1 if known else 2) and _is_thin(indexed.index == place)
        counted = max(values[others]) == len(others) <= _MOST_COUNTED and value in (255, 65535) and len(others) > 1
        if is_outline or counted:
            pixels = int((indexed.index == place).sum())
            why = "is drawn around the objects" if is_outline else f"stands beside labels 1 to {len(others)}"
            notes.append(f"{name}: {shown(value)} {why} ({pixels:,} pixels), as data sets mark outlines and what "
                         f"belongs to nothing: it is taken as background; {_WAY_OUT}")  # fmt: skip
            return np.where(labels == value, 0, labels)
    return labels


def _is_thin(mask: np.ndarray) -> bool:
    """Whether next to nothing is left of a mask that is made smaller by a hundredth of the picture's longer side."""
    step = max(1, max(mask.shape) // 400)  # squares of a large one that are full stand for its pixels
    height, width = (side // step * step for side in mask.shape)
    full = mask[:height, :width].reshape(height // step, step, width // step, step).all((1, 3))
    left = dilate_mask(full.astype(np.uint8), -max(3, round(max(full.shape) / 100)))
    return int((left > 0).sum()) * step * step < 0.05 * mask.sum()


def drop_specks(
    labels: np.ndarray, least: int, seen: tuple[int, int] | None, pixels: int, name: str, notes: list[str]
) -> np.ndarray:
    """Leave out labels of fewer than `least` pixels, counted where the image encoder sees them.

    Pixels that have none of their kind beside them are not counted: scattered ones are no object, however many.

    Args:
        least: pixels; 0 keeps all.
        seen: (height, width) of what the encoder sees; None counts the map's own pixels.
        pixels: of the map together with what it is padded by before that. Where the encoder sees more than there are,
            the map's own are counted.

    Raises:
        ValueError: nothing would be left.
    """
    scale = 1.0 if seen is None else max(1.0, pixels / (seen[0] * seen[1]))
    indexed = Indexed.of(labels)
    counts = indexed.counts
    small = (indexed.together < least * scale) & (indexed.values != 0)
    if not small.any():
        return labels
    listed = ", ".join(
        f"{shown(int(v))} ({c:,})" for v, c in zip(indexed.values[small][:8], counts[small][:8], strict=True)
    )
    more = f" and {int(small.sum()) - 8} more" if small.sum() > 8 else ""
    where = ""
    if scale > 1:
        where = f" of the {seen[1]} x {seen[0]} that the model sees, {least * scale:,.0f} of the mask's"
    scattered = " that lie together" if (counts[small] >= least * scale).any() else ""
    told = f"fewer than min_object_pixels {least}{where}{scattered}: labels (with their pixels) {listed}{more}"
    if not (~small & (indexed.values != 0)).any():
        raise ValueError(f"{name}: every object has {told}; pass a smaller --min_object_pixels, or a larger cut-out")
    notes.append(f"{name}: left out as too small to be seen, {told}")
    return np.where(small, 0, indexed.values).astype(np.int32)[indexed.index]


def shown(label: int) -> str:
    """A label in a sentence; colours as people write them."""
    return f"#{label:06x}" if 65535 < label <= 0xFFFFFF else str(label)


def _listed(values: list[int]) -> str:
    names = ", ".join(shown(value) for value in values[:8]) + (", ..." if len(values) > 8 else "")
    return f"the value {names} occurs" if len(values) == 1 else f"the values {names} occur"
