"""Trains the tokenizer that ships with the package on the project's own text.

    python scripts/train_tokenizer.py [OUTPUT]

The result depends on nothing but the templates in internvl_jax/data and the version of
sentencepiece. It has the properties of the LLaMA tokenizer: byte-pair encoding with byte
fallback, identity normaliser, leading space, repeated spaces kept, ids 0 <unk>, 1 <s>, 2 </s>,
and no padding piece.
"""

import io
import pathlib
import re
import sys
from collections.abc import Iterator

import sentencepiece

from internvl_jax.data import conversation, questions, scenes, templates, text, tokenizer

VOCABULARY_SIZE = 960
_BOUNDARY = "\t"  # no piece reaches across; tabs do not occur in the text

# Chinese writes no spaces. Without word boundaries the trainer would learn whole phrases such
# as "红色的大星星" as pieces, which say nothing about other colours and shapes.
_CHINESE_WORDS = sorted(
    {
        *text.COLORS["zh"].values(),
        *text.SHAPES["zh"].values(),
        *("一个", "一颗", "两个", "的", "大", "小", "照片", "图中", "有", "在", "左边", "右边"),
        *("上面", "下面", "数字", "手写", "物体", "什么", "颜色", "形状", "是", "几个", "吗"),
        *("这是",),
        *text.DIGITS["zh"],
    },
    key=len,
    reverse=True,
)
_CHINESE_WORD = re.compile("|".join(_CHINESE_WORDS))


def sentences() -> Iterator[str]:
    """The training text: captions, prompts, questions and answers of every kind of example."""
    pairs = scenes.SEEN_PAIRS
    singles = [(((*pair, size),), None) for pair in pairs for size in scenes.SIZES]
    doubles = []
    for k, first in enumerate(pairs):
        for step, relation in ((1, "left"), (11, "above"), (17, "left"), (29, "above")):
            second = pairs[(k + step) % len(pairs)]
            sizes = (("large", "large"), ("large", "small"), ("small", "large"))[(k + step) % 3]
            doubles.append((((*first, sizes[0]), (*second, sizes[1])), relation))
    for language in text.LANGUAGES:
        for description in singles + doubles:
            for caption in text.scene_captions(description, language):
                yield caption
                yield conversation.contrastive_text(caption)
            for question, answer in questions.about_scene(description, language):
                yield f"\n{question} ASSISTANT:"
                yield answer
        for digit in range(10):
            for _ in range(8):
                for caption in text.digit_captions(digit, language):
                    yield caption
                    yield conversation.contrastive_text(caption)
                for question, answer in questions.about_digit(digit, language):
                    yield f"\n{question} ASSISTANT:"
                    yield answer
        for _ in range(200):
            yield conversation.GENERATION_PROMPTS[language]
            yield "USER: "
    for _ in range(100):
        yield f"{templates.VICUNA_V1.system} USER: "


def train() -> bytes:
    """Returns the trained model file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(_CHINESE_WORD.sub(_mark, sentence) for sentence in sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        pretokenization_delimiter=_BOUNDARY,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        input_sentence_size=0,
        minloglevel=1,
    )
    return model.getvalue()


def _mark(match):
    return f"{_BOUNDARY}{match.group()}{_BOUNDARY}"


if __name__ == "__main__":
    output = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else tokenizer.DEFAULT_MODEL
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(train())
    print(f"wrote {output}: {tokenizer.Tokenizer(output).vocab_size} pieces")
