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
    first = np.stack([hashing.image_hashes(p) for p in originals])
    copies = np.stack([hashing.image_hashes(COPIES[kind](p)) for p in originals])
    count = len(originals)
    alone = removed(tmp_path / "alone", first)
    assert len(alone) <= 0.001 * count * (count - 1) / 2
    found = removed(tmp_path / "both", np.concatenate([first, copies]), cuts=(70, 200))
    assert sum(n >= count for n in found) >= 0.95 * count


def brute(hashes, excluded=0):
    """The definition: within the bits of an earlier record, one of the two hashes of a whole, and
    equal in one band."""
    found = set()
    for later in range(len(hashes)):
        for earlier in range(later):
            for a in range(len(hashes[0])):
                for b in range(len(hashes[0])):
                    x, y = int(hashes[earlier, a]), int(hashes[later, b])
                    if (a and b) or not x or not y or later < excluded:
                        continue
                    bands = any((x ^ y) >> s & 0xFFFF == 0 for s in (0, 16, 32, 48))
                    if bands and (x ^ y).bit_count() <= hashing.IMAGE_BITS:
                        found.add(later)
    return found


@pytest.mark.parametrize("cuts, parts", [((), 1), ((10,), 4), ((5, 17, 40), 7)])
def test_equals_the_definition_for_any_shards_and_parts(tmp_path, cuts, parts):
    rng = np.random.default_rng(3)
    bases = rng.integers(0, 1 << 63, (12, len(hashing.PARTS)), np.uint64)
    hashes = bases[rng.integers(0, 12, 60)].copy()
    for row in hashes:
        for _ in range(int(rng.integers(0, 14))):
            row[int(rng.integers(len(row)))] ^= np.uint64(1) << np.uint64(rng.integers(64))
    hashes[[4, 9]] = 0
    for excluded in (0, 20):
        folder = tmp_path / str(excluded)
        assert removed(folder, hashes, cuts=cuts, parts=parts, excluded=excluded) == brute(
            hashes, excluded
        )


def test_plain_images_are_never_duplicates():
    assert not hashing.image_hashes(Image.new("RGB", (50, 50), "white")).any()


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
