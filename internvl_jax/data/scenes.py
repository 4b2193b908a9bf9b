"""Rendered scenes: one or two coloured shapes on a textured background.

A scene is described by a small `Scene` value and turned into pixels by `render`. Record i of a
split is a pure function of (split, seed, i): the description is drawn from a Philox stream keyed
by the three, and the pixel noise from a second stream whose key is stored in the scene.

The bounding boxes of the objects always cover at least 40 % of the frame. In a scene of one
object the box side is 0.85-0.94 (large) or 0.68-0.74 (small) of the frame; two objects are
0.585-0.60 with 0.365-0.38 (large and small) or 0.485-0.492 each (two large ones), so that they fit
side by side without touching. Two small objects do not occur: they could not fill the frame.

Six of the 48 colour-shape pairs are held out: no training scene contains them in any place.
"""

import dataclasses
import math

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("large", "small")
RELATIONS = ("left", "above")
DIRECTIONS = ("left", "right", "up", "down")

# Every colour and every shape keeps at least four partners in training.
HELD_OUT_PAIRS = frozenset(
    {
        ("purple", "ring"),
        ("red", "triangle"),
        ("green", "star"),
        ("yellow", "square"),
        ("blue", "cross"),
        ("orange", "circle"),
    }
)
ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)
UNSEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair in HELD_OUT_PAIRS)

# "test" repeats the training distribution; "test_single" holds one object and goes through the
# seen pairs in turn; "unseen_pairs" does so over the held-out pairs; records 2j and 2j+1 of
# "relation_swap" show the same two objects with their places exchanged.
SPLITS = ("train", "test", "test_single", "unseen_pairs", "relation_swap")

RGB = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.97, 0.52, 0.06),
    "yellow": (0.97, 0.90, 0.14),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.28, 0.90),
    "purple": (0.56, 0.14, 0.72),
    "black": (0.05, 0.05, 0.06),
    "white": (0.97, 0.97, 0.97),
}
_SINGLE_SHARE = 0.5
_CHUNK = 32  # images rendered together: the float32 planes of a chunk stay in the CPU cache


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape. Positions and lengths are fractions of the frame, y pointing down.

    x, y: centre of the bounding box; side: its longer side; angle: radians;
    tint: RGB offset added to the named colour.
    """

    color: str
    shape: str
    size: str
    x: float
    y: float
    side: float
    angle: float
    tint: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two objects; objects[0] is left of or above objects[1], as `relation` says.

    background: key of the random stream that draws background, texture and pixel noise.
    """

    objects: tuple[Object, ...]
    relation: str | None
    background: int

    @property
    def description(self) -> tuple:
        """All that captions and questions may depend on; equal for scenes that read the same."""
        return tuple((o.color, o.shape, o.size) for o in self.objects), self.relation


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Describes record `index` of a split. Raises ValueError on an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown scene split {split!r}; choose one of {', '.join(SPLITS)}")
    swapped = split == "relation_swap" and index % 2 == 1
    stream = index - 1 if swapped else index
    rng = _stream(1 + SPLITS.index(split), seed, stream)
    if split == "relation_swap":
        return _pair_scene(rng, swap_with=_stream(100, seed, index) if swapped else None)
    if split == "test_single":
        return _single_scene(rng, SEEN_PAIRS[index % len(SEEN_PAIRS)])
    if split == "unseen_pairs":
        return _single_scene(rng, UNSEEN_PAIRS[index % len(UNSEEN_PAIRS)])
    if rng.random() < _SINGLE_SHARE:
        return _single_scene(rng, _choose(rng, SEEN_PAIRS))
    return _pair_scene(rng)


def distinct(split: str, count: int, seed: int = 0) -> tuple[int, ...]:
    """Record numbers of the first `count` scenes of a split whose descriptions all differ.

    The captions of such scenes differ in every language, as retrieval metrics need.
    """
    seen, indices = set(), []
    for index in range(100 * count):
        description = scene(split, index, seed).description
        if description not in seen:
            seen.add(description)
            indices.append(index)
            if len(indices) == count:
                return tuple(indices)
    raise ValueError(f"split {split!r} has only {len(indices)} distinct scenes, {count} were asked")


def _stream(purpose: int, seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[(seed << 8) + purpose, index]))


def _choose(rng, values):
    return values[int(rng.random() * len(values))]


def _between(rng, low, high):
    return low + (high - low) * float(rng.random())


def _object(rng, pair, size, x, y, side):
    return Object(
        color=pair[0],
        shape=pair[1],
        size=size,
        x=x,
        y=y,
        side=side,
        angle=_between(rng, -0.17, 0.17),
        tint=tuple(_between(rng, -0.05, 0.05) for _ in range(3)),
    )


def _single_scene(rng, pair) -> Scene:
    size = _choose(rng, SIZES)
    side = _between(rng, 0.85, 0.94) if size == "large" else _between(rng, 0.68, 0.74)
    free = (1 - side) / 2
    x = 0.5 + free * _between(rng, -0.9, 0.9)
    y = 0.5 + free * _between(rng, -0.9, 0.9)
    return Scene((_object(rng, pair, size, x, y, side),), None, int(rng.integers(2**62)))


def _pair_scene(rng, swap_with=None) -> Scene:
    """Two objects. `swap_with`: stream for the places and looks after exchanging the objects."""
    first = _choose(rng, SEEN_PAIRS)
    second = _choose(rng, [pair for pair in SEEN_PAIRS if pair != first])
    sizes = _choose(rng, (("large", "large"), ("large", "small"), ("small", "large")))
    relation = _choose(rng, RELATIONS)
    pairs = (first, second)
    if swap_with is not None:
        pairs, sizes, rng = pairs[::-1], sizes[::-1], swap_with
    if sizes == ("large", "large"):
        sides = [_between(rng, 0.485, 0.492) for _ in sizes]
    else:
        sides = [_between(rng, *((0.585, 0.60) if s == "large" else (0.365, 0.38))) for s in sizes]
    # Along the relation's axis the objects share what is left of the frame as three gaps;
    # across it they stay near the middle, so that only one relation can be read off.
    free = 1 - sum(sides)
    left = free * _between(rng, 0.05, 0.45)
    right = free * _between(rng, 0.05, 0.45)
    along = (left + sides[0] / 2, 1 - right - sides[1] / 2)
    across = [0.5 + min(0.12, (1 - side) / 2) * _between(rng, -1, 1) for side in sides]
    axes = (along, across) if relation == "left" else (across, along)
    objects = tuple(
        _object(rng, pair, size, x, y, side)
        for pair, size, x, y, side in zip(pairs, sizes, *axes, sides, strict=True)
    )
    return Scene(objects, relation, int(rng.integers(2**62)))


def frames(start: Scene, count: int, direction: str, image_size: int = 48) -> np.ndarray:
    """Moves the single object of a scene across the frame, keeping it wholly visible.

    Returns uint8 [count, H, W, 3]. `direction` is one of DIRECTIONS. The background stands still.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; choose one of {', '.join(DIRECTIONS)}")
    if len(start.objects) != 1:
        raise ValueError("a frame sequence moves the object of a scene of one object")
    (moving,) = start.objects
    low, high = moving.side / 2, 1 - moving.side / 2
    ends = (low, high) if direction in ("right", "down") else (high, low)
    axis = "x" if direction in ("left", "right") else "y"
    path = np.linspace(*ends, count).tolist()
    moved = [dataclasses.replace(moving, **{axis: place}) for place in path]
    return render([dataclasses.replace(start, objects=(o,)) for o in moved], image_size)


def render(scenes, image_size: int = 48) -> np.ndarray:
    """Draws scenes: uint8 [N, H, W, 3]. A scene's pixels do not depend on its neighbours."""
    images = np.empty((len(scenes), image_size, image_size, 3), np.uint8)
    for start in range(0, len(scenes), _CHUNK):
        chunk = scenes[start : start + _CHUNK]
        canvas, noise = _backgrounds(chunk, image_size)
        for slot in range(2):
            members = [i for i, s in enumerate(chunk) if len(s.objects) > slot]
            if not members:
                continue
            objects = [chunk[i].objects[slot] for i in members]
            alpha = _coverage(objects, image_size)[:, None]
            base = np.array([RGB[o.color] for o in objects]) + [o.tint for o in objects]
            # Light from above: the top of a shape is a little brighter than its bottom.
            light = np.linspace(1.06, 0.94, image_size)[:, None]
            paint = np.clip(base[:, :, None, None] * light, 0, 1).astype(np.float32)
            canvas[members] += alpha * (paint - canvas[members])
        canvas += noise[:, None]
        pixels = np.rint(np.clip(canvas, 0, 1, out=canvas) * np.float32(255))
        images[start : start + len(chunk)] = pixels.astype(np.uint8).transpose(0, 2, 3, 1)
    return images


def masks(value: Scene, image_size: int = 48) -> np.ndarray:
    """Which object covers a pixel: uint8 [H, W], 0 background, 1 first object, 2 second."""
    result = np.zeros((image_size, image_size), np.uint8)
    for number, item in enumerate(value.objects, start=1):
        result[_coverage([item], image_size)[0] >= 0.5] = number
    return result


def bounding_box_share(value: Scene, image_size: int = 48) -> float:
    """Share of the frame that the bounding boxes of the objects cover together."""
    covered = np.zeros((image_size, image_size), bool)
    for item in value.objects:
        rows, columns = np.nonzero(_coverage([item], image_size)[0] >= 0.5)
        covered[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return float(covered.mean())


def _backgrounds(scenes, n):
    """Muted gradient with faint stripes [N, 3, H, W], and the picture's brightness noise."""
    position = (np.arange(n, dtype=np.float32) + 0.5) / n - 0.5
    # Colour planes come first: numpy is several times faster over long last axes than over RGB.
    canvas = np.empty((len(scenes), 3, n, n), np.float32)
    noise = np.empty((len(scenes), n, n), np.float32)
    for i, item in enumerate(scenes):
        rng = _stream(0, 0, item.background)
        draw = rng.random(12)
        # Greys of middle brightness with a breath of colour: no background looks like an object.
        middle, spread = 0.36 + 0.28 * draw[0], 0.20 * (draw[1] - 0.5)
        hue = 0.10 * (draw[2:5] - 0.5)
        turn = 2 * math.pi * draw[5]
        along = position[None, :] * np.float32(round(math.cos(turn), 6))
        across = position[:, None] * np.float32(round(math.sin(turn), 6))
        ramp = along + across
        bands = ramp * np.float32(3 + 9 * draw[6]) + np.float32(draw[7] + 16)
        stripes = np.abs(bands - np.floor(bands) - np.float32(0.5)) - np.float32(0.25)
        shade = ramp * np.float32(2 * spread) + stripes * np.float32(0.12 * draw[8])
        canvas[i] = shade + (middle + hue).astype(np.float32)[:, None, None]
        strength = np.float32(0.04 + 0.10 * draw[9])
        noise[i] = (rng.random((n, n), dtype=np.float32) - np.float32(0.5)) * strength
    return canvas, noise


def _coverage(objects, n):
    """Share of every pixel that each object covers: float32 [K, H, W], 2x supersampled."""
    alpha = np.empty((len(objects), n, n), np.float32)

    def column(values):
        return values.astype(np.float32)[:, None, None]

    fine = (np.arange(2 * n, dtype=np.float32) + 0.5) / (2 * n)
    for shape in {o.shape: None for o in objects}:
        members = [k for k, o in enumerate(objects) if o.shape == shape]
        group = [objects[k] for k in members]
        cos = np.array([round(math.cos(o.angle), 6) for o in group])
        sin = np.array([round(math.sin(o.angle), 6) for o in group])
        # Extent of the turned shape; either axis is scaled to it, so that the bounding box of
        # what is drawn is the square the scene asks for.
        px, py = np.array(_OUTLINE[shape]).T
        tx = cos[:, None] * px - sin[:, None] * py
        ty = sin[:, None] * px + cos[:, None] * py
        if shape in ("circle", "ring"):
            tx = ty = np.array([[-1.0, 1.0]] * len(group))
        side = np.array([o.side for o in group])
        scale_x, scale_y = side / np.ptp(tx, axis=1), side / np.ptp(ty, axis=1)
        x0 = np.array([o.x for o in group]) - scale_x * (tx.max(1) + tx.min(1)) / 2
        y0 = np.array([o.y for o in group]) - scale_y * (ty.max(1) + ty.min(1)) / 2
        x = (fine[None, None, :] - column(x0)) / column(scale_x)
        y = (fine[None, :, None] - column(y0)) / column(scale_y)
        u = column(cos) * x + column(sin) * y
        v = column(cos) * y - column(sin) * x
        distance = _DISTANCE[shape](u, v)  # [K, 2H, 2W], in units of the shape
        sharp = np.clip(np.float32(0.5) - distance * column(scale_x * (2 * n)), 0, 1)
        rows = sharp[:, 0::2] + sharp[:, 1::2]
        alpha[members] = (rows[:, :, 0::2] + rows[:, :, 1::2]) * np.float32(0.25)
    return alpha


def _circle(u, v):
    return np.sqrt(u * u + v * v) - 1


def _ring(u, v):
    radius = np.sqrt(u * u + v * v)
    return np.maximum(radius - 1, np.float32(0.54) - radius)


def _square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - 1


def _cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - np.float32(0.32), np.maximum(u, v) - 1)


def _triangle(u, v):
    slope = (2 * np.abs(u) - v - 1) * np.float32(1 / math.sqrt(5))
    return np.maximum(v - 1, slope)


_S36, _C36 = np.float32(math.sin(math.pi / 5)), np.float32(math.cos(math.pi / 5))
_INNER = 0.46  # radius of the inner corners: a plump star stays a star at 20 pixels
_STAR_WIDTH, _STAR_HEIGHT = math.sin(0.4 * math.pi), (1 + math.cos(0.2 * math.pi)) / 2
_STAR_SHIFT = (1 - math.cos(0.2 * math.pi)) / 2


def _star(u, v):
    """Folds the plane into one tenth of the star, where the outline is a single line."""
    x = np.abs(u) * np.float32(_STAR_WIDTH)
    y = np.float32(_STAR_SHIFT) - v * np.float32(_STAR_HEIGHT)
    for _ in range(2):
        over = 2 * np.maximum(x * _C36 - y * _S36, 0)
        x = np.abs(x - over * _C36)
        y = y + over * _S36
    nx, ny = 1 - _INNER * float(_C36), _INNER * float(_S36)
    length = math.hypot(nx, ny)
    return x * np.float32(nx / length) + (y - 1) * np.float32(ny / length)


_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
_BOX = ((-1, -1), (1, -1), (1, 1), (-1, 1))
_OUTLINE = {
    "circle": _BOX,
    "ring": _BOX,
    "square": _BOX,
    "triangle": ((0, -1), (-1, 1), (1, 1)),
    "cross": tuple((a * x, b * y) for x, y in ((1, 0.32), (0.32, 1)) for a, b in _BOX),
    "star": tuple(
        (
            math.sin(0.4 * math.pi * k) / _STAR_WIDTH,
            (_STAR_SHIFT - math.cos(0.4 * math.pi * k)) / _STAR_HEIGHT,
        )
        for k in range(5)
    ),
}
