"""Planted near-duplicates are found, others are not, and the order of the work does not matter."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from internvl_jax.data.curate import hashing, matching


def photos(count):
    """Different parts of real photographs."""
    rng = np.random.default_rng(0)
    whole = [Image.fromarray(picture) for picture in load_sample_images().images]
    found = []
    for n in range(count):
        picture = whole[n % len(whole)]
        w, h = rng.integers(120, 320, 2)
        x, y = rng.integers(0, picture.width - w), rng.integers(0, picture.height - h)
        found.append(picture.crop((x, y, x + w, y + h)).rotate(90 * int(rng.integers(4)), expand=1))
    return found


def jpeg(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


def crop(picture, left, top, right, bottom):
    w, h = picture.size
    return picture.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))


COPIES = {
    "re-encoded": lambda p: jpeg(p, 40),
    "smaller": lambda p: jpeg(p.resize((p.width // 2, p.height // 2)), 75),
    "larger": lambda p: jpeg(p.resize((p.width * 2, p.height * 2)), 75),
    "border cropped": lambda p: jpeg(crop(p, 0.025, 0.025, 0.975, 0.975), 75),
    "5 % cropped all round": lambda p: jpeg(crop(p, 0.05, 0.05, 0.95, 0.95), 75),
    "corner cropped": lambda p: jpeg(crop(p, 0.05, 0.05, 1, 1), 75),
    "side cropped": lambda p: jpeg(crop(p, 0.05, 0, 1, 1), 75),
}


def removed(folder, hashes, kind="images", cuts=(), parts=3, excluded=0):
    """Records that go, of hashes cut into shards."""
    folder.mkdir(exist_ok=True)
    starts = (0, *cuts, len(hashes))
    work = matching.Work(str(folder), kind, parts, starts, excluded)
    for shard in reversed(range(len(starts) - 1)):
        matching.write_keys(work, shard, hashes[starts[shard] : starts[shard + 1]])
    for part in range(parts):
        matching.match(work, part)
    found = [np.load(work.removed(part)) for part in range(parts)]
    return set(np.concatenate(found).astype(int).tolist())


@pytest.fixture(scope="module")
def originals():
    return photos(150)


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_are_found_and_little_else(tmp_path, originals, kind):
    first = np.stack([hashing.thumbnail(p) for p in originals])
    copies = np.stack([hashing.thumbnail(COPIES[kind](p)) for p in originals])
    count = len(originals)
    alone = removed(tmp_path / "alone", first)
    assert len(alone) <= 0.001 * count * (count - 1) / 2
    found = removed(tmp_path / "both", np.concatenate([first, copies]), cuts=(70, 200))
    assert sum(n >= count for n in found) >= 0.95 * count


def brute(known, excluded=0):
    """Records that the definition calls near an earlier one."""
    return {
        later
        for later in range(excluded, len(known))
        if any(known[later].near(known[earlier]) for earlier in range(later))
    }


@pytest.mark.parametrize("cuts, parts", [((), 1), ((10,), 4), ((5, 17, 40), 7)])
def test_equals_the_definition_for_any_shards_and_parts(tmp_path, definition, cuts, parts):
    rng = np.random.default_rng(3)
    bases = [definition.smooth(rng, contrast) for contrast in (60, 60, 30, 30, 10, 5, 2) * 2]
    rows = [definition.altered(rng, bases[int(rng.integers(len(bases)))]) for _ in range(60)]
    rows[4][:] = rows[9][:] = 0
    known = [definition.Known(row) for row in rows]
    for excluded in (0, 20):
        expected = brute(known, excluded)
        folder = tmp_path / str(excluded)
        assert removed(folder, np.stack(rows), "images", cuts, parts, excluded) == expected
        assert 5 < len(expected) < 50 - excluded


def test_many_copies_of_one_image_go_but_the_first(tmp_path, definition):
    rows = np.tile(definition.smooth(np.random.default_rng(0)), (700, 1))
    assert removed(tmp_path / "x", rows, cuts=(300,)) == set(range(1, 700))


@pytest.mark.parametrize("color", ["white", (3, 90, 200), "black"])
def test_plain_images_are_never_duplicates(tmp_path, color):
    picture = Image.new("RGB", (50, 50), color)
    assert not removed(tmp_path / "x", np.stack([hashing.thumbnail(picture)] * 3))


def test_nearly_plain_images_are_told_apart_and_their_copies_found(tmp_path):
    """Skies: a bright one, a darker one and one that darkens the other way."""
    ramp = np.broadcast_to(np.linspace(0, 24, 200), (160, 200))
    skies = [Image.fromarray((base + sign * ramp).astype(np.uint8)) for base, sign in
             ((200, 1), (150, 1), (224, -1))]
    copies = [jpeg(sky, 40) for sky in skies]
    rows = np.stack([hashing.thumbnail(sky) for sky in (*skies, *copies)])
    assert removed(tmp_path / "x", rows) == {3, 4, 5}


def test_captions_that_say_the_same(tmp_path):
    captions = [
        "a brown dog runs along the beach in the evening sun with a ball in its mouth",
        "two cats sleep on a red sofa",
        "A brown dog runs along the beach in the evening sun with a ball in its mouth!",
        "a brown dog runs along the beach in the evening sun with a stick in its mouth today",
        "two dogs sleep on a red sofa",
        "", "",
        "一只猫坐在窗台上看着外面的鸟", "一只猫坐在窗台上看着外面的鸟",
    ]
    signatures = np.stack([hashing.caption_signature(caption) for caption in captions])
    assert removed(tmp_path / "x", signatures, "captions", cuts=(3, 5)) == {2, 8}


def test_minhash_estimates_the_share_in_common():
    words = [f"w{n}" for n in range(200)]
    one, two = (hashing.caption_signature(" ".join(part)) for part in (words[:150], words[50:]))
    assert abs((one == two).mean() - 99 / 199) < 0.2
