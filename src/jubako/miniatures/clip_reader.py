"""The checker of clips: reads every frame by its pixels and compares the clip with the picture it began with.

It knows nothing of models, so it judges rendered and generated clips alike. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import stats

from jubako.miniatures.reader import Reading, Seen, read

SAME_PLACE = 0.03  # two pixels of 64
SAME_PIXELS = 8.0  # mean difference in levels of 255; another place or colour differs by far more
STRAIGHT = 0.05


@dataclass(frozen=True)
class ClipVerdict:
    """What a clip does with the object of its picture; distance in fractions of the side.

    `kept`: one object of the same colour and shape, on the same background, in every frame. `first`: the
    first frame is the picture. `straight`: no frame is off the even, straight way from first to last.
    """

    kept: bool
    first: bool
    straight: bool
    distance: float
    misses: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.misses


def judge_clip(frames: Sequence[Image.Image], picture: Image.Image) -> ClipVerdict:
    """Judge the frames made of a picture of one object.

    Its way is that of the largest object of each frame: specks beside it count against `kept`, not against
    how far it has gone. A clip in which it is lost has gone no way at all.
    """
    given = read(picture)
    if len(given.objects) != 1:
        raise ValueError(f"a picture of one object is needed, not of {len(given.objects)}")
    readings = [read(frame) for frame in frames]
    changes = [
        f"frame {number}: {change}"
        for number, reading in enumerate(readings)
        for change in _changes(reading, given)
    ]
    first = _first_misses(frames[0], readings[0], picture, given)
    way = [max(reading.objects, key=lambda seen: seen.radius, default=None) for reading in readings]
    distance, bends = 0.0, ["the object's way cannot be followed"]
    if all(seen is not None for seen in way):
        centres = np.array([(seen.x, seen.y) for seen in way if seen is not None])
        distance = math.dist(centres[0], centres[-1])
        off = np.linalg.norm(centres - np.linspace(centres[0], centres[-1], len(centres)), axis=1).max()
        bends = [f"strays by {off:.3f} from the straight way"] if off > STRAIGHT else []
    return ClipVerdict(not changes, not first, not bends, distance, (*changes, *first, *bends))


def clip_figures(verdicts: Sequence[ClipVerdict], buckets: Sequence[int]) -> dict[str, float]:
    """Shares of clips right in each part, and how closely the distance follows the motion asked for."""
    parts = ("ok", "kept", "first", "straight")
    shares = {part: round(float(np.mean([getattr(v, part) for v in verdicts])), 4) for part in parts}
    distances = [verdict.distance for verdict in verdicts]
    # Where nothing moves there is no order to compare.
    moving = len(set(distances)) > 1
    follows = float(stats.spearmanr(buckets, distances).statistic) if moving else 0.0
    return shares | {"spearman": round(follows, 4)}


def _object(reading: Reading) -> Seen | None:
    return reading.objects[0] if len(reading.objects) == 1 else None


def _changes(reading: Reading, given: Reading) -> list[str]:
    changes = []
    if reading.background != given.background:
        changes.append(f"the background is {reading.background} instead of {given.background}")
    seen, wanted = _object(reading), given.objects[0]
    if seen is None:
        return [*changes, f"{len(reading.objects)} objects"]
    if seen.colour != wanted.colour:
        changes.append(f"the {wanted.colour} {wanted.shape} is {seen.colour}")
    if seen.shape != wanted.shape:
        changes.append(f"the {wanted.colour} {wanted.shape} is a {seen.shape}")
    return changes


def _first_misses(frame: Image.Image, reading: Reading, picture: Image.Image, given: Reading) -> list[str]:
    misses = []
    seen, wanted = _object(reading), given.objects[0]
    if seen is None or math.dist((seen.x, seen.y), (wanted.x, wanted.y)) > SAME_PLACE:
        misses.append("the first frame has the object elsewhere")
    resized = picture.convert("RGB").resize(frame.size, Image.Resampling.BOX)
    difference = float(np.abs(np.asarray(frame.convert("RGB"), float) - np.asarray(resized, float)).mean())
    if difference > SAME_PIXELS:
        misses.append(f"the first frame differs from the picture by {difference:.1f} levels")
    return misses
