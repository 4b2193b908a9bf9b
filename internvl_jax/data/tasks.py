"""What an example of each training task holds: from one record to a dict of arrays.

Every text field is int32, right-padded with 0 to `length`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from internvl_jax.data import conversation, image, pictures, sources
from internvl_jax.data.errors import RecordError

TASKS = ("language", "contrastive", "generative", "retrieval", "instruct")
# How an image becomes a square; "none" resizes both sides whatever the aspect.
AUGMENTATIONS = (
    "none",
    "center_crop",
    "pad_to_square",
    "random_resized_crop",
    "random_resized_crop_and_flip",
)
Record = tuple[int, Any]  # number of the source, and the handle that it gave


@dataclasses.dataclass(frozen=True)
class Draft:
    """A conversation as `Maker.conversation` gives it.

    ids, labels: of its tokens. starts: the number of the first square of each image, and of
    squares in all. show: decodes the images, once; a list of uint8 [N, H, W, 3].
    """

    ids: list[int]
    labels: list[int]
    starts: tuple[int, ...]
    show: Callable[[], list[np.ndarray]]

    @property
    def squares(self) -> int:
        return self.starts[-1]


@dataclasses.dataclass(frozen=True)
class Maker:
    """Turns a record into an example of `task`, which has a method of its name.

    Raises RecordError for a record that cannot be used.
    """

    task: str
    sources: Sequence[sources.Source]
    tokenizer: object
    length: int
    image_size: int
    languages: tuple[str, ...]
    augment: str
    template: str
    rounds: int
    num_image_tokens: int
    max_tiles: int
    decoder: str
    scale: tuple[float, float]

    def __call__(self, source: int, handle: Any, rng: np.random.Generator) -> dict:
        return getattr(self, self.task)((source, handle), rng)

    def language(self, record, rng):
        """One text: a caption, plain or as in later stages, or a chat without its image."""
        kind = int(rng.integers(4))
        if kind == 3:
            rounds = self._rounds(record, rng)
            ids, _ = conversation.encode_chat(self.tokenizer, "brief", rounds, 0)
            return {"tokens": self._pad(ids, 0)}
        language, caption = self._caption(self._texts(record), rng)
        if kind == 2:
            ids, _ = self._captioning(caption, language)
            return {"tokens": ids}
        wrap = conversation.contrastive_text if kind == 1 else conversation.clean_caption
        return {"tokens": self._ids(wrap(caption))}

    def contrastive(self, record, rng):
        _, caption = self._caption(self._texts(record), rng)
        return {
            "image": self._image(record, rng),
            "text": self._ids(conversation.contrastive_text(caption)),
        }

    def generative(self, record, rng):
        example, caption, language = self._matching(record, rng)
        example["caption"], example["caption_labels"] = self._captioning(caption, language)
        return example

    def retrieval(self, record, rng):
        return self._matching(record, rng)[0]

    def instruct(self, record, rng):
        draft = self.conversation(*record, rng)
        tiles = np.zeros((self.tiles_in_all, self.image_size, self.image_size, 3), np.uint8)
        for squares, start in zip(draft.show(), draft.starts, strict=False):
            tiles[start : start + len(squares)] = squares
        return {
            "image": tiles,
            "tokens": self._pad(draft.ids, 0),
            "labels": self._pad(draft.labels, conversation.IGNORE),
        }

    def conversation(self, source: int, handle: Any, rng: np.random.Generator) -> "Draft":
        """A conversation whose room is known, and whose images are not decoded yet."""
        record = (source, handle)
        if self.template == "plain":
            rounds = [("", self._caption(self._texts(record), rng)[1])]
            found = self._fitting(record)
        else:
            rounds = self._rounds(record, rng)
            found = self._fitting(record)
            rounds = _marked(rounds, len(found))
        squares = [self._squares(one, len(found)) for one in found]
        counts = [self.num_image_tokens * number for number in squares]
        ids, labels = conversation.encode_chat(self.tokenizer, self.template, rounds, counts)
        ids, labels = ids[: self.length], labels[: self.length]
        if ids.count(conversation.IMAGE_TOKEN) < sum(counts):
            raise RecordError(
                "too_long", f"the images do not fit into {self.length} tokens with the text"
            )
        show = functools.partial(self._shown, found, rng)
        return Draft(ids, labels, tuple(itertools.accumulate(squares, initial=0)), show)

    @property
    def tiles_in_all(self) -> int:
        """Squares per example."""
        return squares_of(self.max_tiles)

    def _matching(self, record, rng):
        texts = self._texts(record)
        language, caption = self._caption(texts, rng)
        example = {
            "image": self._image(record, rng),
            "text": self._ids(conversation.contrastive_text(caption)),
            "positive": self._ids(conversation.clean_caption(caption)),
            "negative": self._ids(self._negative(record, texts, language, rng)),
            # Numbers of different sources must not meet by chance.
            "image_id": np.int32(sources.stable_number(f"{record[0]} {texts['image_id']}")),
        }
        return example, caption, language

    def _texts(self, record):
        source, handle = record
        return self.sources[source].texts_in(handle)

    def _caption(self, texts, rng):
        captions = texts["captions"]
        known = (*self.languages, conversation.MULTILINGUAL)
        languages = [x for x in known if captions.get(x)]
        if not languages:
            raise RecordError(
                "language",
                f"a record has captions in {', '.join(sorted(captions)) or 'no language'}, but "
                f"the pipeline reads {', '.join(self.languages)}",
            )
        language = languages[int(rng.integers(len(languages)))]
        return language, captions[language][int(rng.integers(len(captions[language])))]

    def _negative(self, record, texts, language, rng):
        """A caption in the same language of another image that is not described alike."""
        source = self.sources[record[0]]
        own = set(texts["captions"][language])
        for _ in range(100):
            try:
                other = source.texts(int(rng.integers(len(source))))
            except RecordError:
                continue
            captions = other["captions"].get(language)
            if captions and other["image_id"] != texts["image_id"] and own.isdisjoint(captions):
                caption = captions[int(rng.integers(len(captions)))]
                return conversation.clean_caption(caption)
        raise ValueError(
            f"found no second caption in {language!r} in {source.identity}; matching needs "
            "images with different captions"
        )

    def _rounds(self, record, rng):
        """A user's conversation as it is, or questions drawn in one language."""
        whole = self._texts(record).get("rounds")
        if whole:
            return list(whole)
        qa = self.sources[record[0]].questions_in(record[1])
        languages = [x for x in self.languages if any(x == entry[0] for entry in qa)]
        if not languages:
            raise RecordError(
                "missing_text",
                "a record has neither a conversation nor questions in "
                f"{', '.join(self.languages)}; this task needs one",
            )
        language = languages[int(rng.integers(len(languages)))]
        pairs = [entry[1:] for entry in qa if entry[0] == language]
        return [pairs[i] for i in rng.permutation(len(pairs))[: self.rounds]]

    def _image(self, record, rng):
        """A square of one image."""
        found = self._found(record)
        if not found:
            raise RecordError("missing_image", "the record has no image")
        return self._square(found[0], rng)

    def _found(self, record):
        source, handle = record
        found = self.sources[source].image_in(handle)
        if found is None:
            return ()
        return found if isinstance(found, tuple) else (found,)

    def _square(self, source, rng):
        size = (self.image_size, self.image_size)
        if self.augment == "none" and isinstance(source, np.ndarray) and source.shape[:2] == size:
            return source
        if self.augment in ("center_crop", "pad_to_square"):
            whole = image.decoded(source)
            if self.augment == "center_crop":
                return image.center_crop(whole, self.image_size)
            return image.square(image.pad_to_square(whole), self.image_size)
        picture = pictures.opened(source, self.decoder)
        if self.augment == "none":
            return picture.cut(picture.box, size)
        box = image.random_box(picture.width, picture.height, rng, self.scale)
        pixels = picture.cut(box, size)
        mirrored = self.augment.endswith("flip") and rng.random() < 0.5
        return pixels[:, ::-1] if mirrored else pixels

    def _fitting(self, record):
        """The images of a conversation, encoded."""
        found = self._found(record)
        if len(found) > self.tiles_in_all:
            raise RecordError(
                "invalid_conversation",
                f"{len(found)} images, but an example has room for {self.tiles_in_all}",
            )
        return found

    def _most(self, images):
        # The tiles of several images are shared out, and then none is shown as a whole beside.
        return max(1, self.max_tiles // images), images == 1

    def _squares(self, one, images):
        """How many squares one of a conversation's images becomes, by its header."""
        if self.max_tiles == 1:
            return 1
        width, height = pictures.size(one)
        most, whole_beside = self._most(images)
        return pictures.tile_count(width, height, self.image_size, most, whole_beside)

    def _shown(self, found, rng):
        """The squares of each image: a list of uint8 [N, H, W, 3]."""
        if self.max_tiles == 1:
            return [self._square(one, rng)[None] for one in found]
        return [
            pictures.tiles(
                pictures.opened(one, self.decoder), self.image_size, *self._most(len(found))
            )
            for one in found
        ]

    def _captioning(self, caption, language):
        return conversation.captioning_example(self.tokenizer, caption, language, self.length)

    def _ids(self, sentence):
        return self.tokenizer.encode_batch([sentence], self.length)[0]

    def _pad(self, ids, value):
        row = np.full(self.length, value, np.int32)
        row[: len(ids)] = ids[: self.length]
        return row


def squares_of(max_tiles: int) -> int:
    """Squares that a conversation may have: the tiles and, if it is cut, the whole image beside."""
    return max_tiles + (max_tiles > 1)


def _marked(rounds, images: int):
    """Rounds with a mark for each image, and none in the answers' stead.

    The picture of a conversation about one belongs to the first question, wherever the data put
    its mark. Several must be marked where they belong.
    """
    marks = sum(question.count(conversation.IMAGE_MARK) for question, _ in rounds)
    if images > 1:
        if marks != images:
            raise RecordError("invalid_conversation", f"{images} images, but {marks} image marks")
        return list(rounds)
    (question, answer), *rest = rounds
    bare = [(q.replace(conversation.IMAGE_MARK, "").strip(), a) for q, a in rest]
    if images == 0:
        return [(question.replace(conversation.IMAGE_MARK, "").strip(), answer), *bare]
    return [(conversation.image_first(question), answer), *bare]
