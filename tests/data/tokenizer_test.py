"""The tokenizer: LLaMA conventions, special ids only by the caller's wish, the shipped model."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from internvl_jax.data import conversation, questions, scenes, text
from internvl_jax.data.tokenizer import DEFAULT_MODEL, Detokenizer, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORDED = sorted((ROOT / "tests" / "golden" / "data").glob("K_tokenizer_*/case.json"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def test_script_reproduces_the_shipped_model():
    path = ROOT / "scripts" / "train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trained = sentencepiece.SentencePieceProcessor(model_proto=script.train())
    shipped = sentencepiece.SentencePieceProcessor(model_file=str(DEFAULT_MODEL))
    assert trained.vocab_size() == shipped.vocab_size() == script.VOCABULARY_SIZE
    pieces = [[model.id_to_piece(i) for i in range(960)] for model in (trained, shipped)]
    assert pieces[0] == pieces[1]


def test_model_has_the_properties_of_the_original(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.pieces([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert tokenizer.pieces(tokenizer.encode("a  red")) == ["<s>", "▁a", "▁", "▁red"]
    assert tokenizer.decode(tokenizer.encode("Ünïcode 🐶 ＦＵＬＬ")) == "Ünïcode 🐶 ＦＵＬＬ"
    assert sentencepiece.SentencePieceProcessor(model_file=str(DEFAULT_MODEL)).pad_id() == -1


def test_prefix_is_joined_without_a_space(tokenizer):
    ids = tokenizer.encode(conversation.contrastive_text("A red star."), eos=True)
    assert tokenizer.pieces(ids) == ["<s>", "▁summarize", ":", "a", "▁red", "▁star", "</s>"]
    assert tokenizer.encode("summarize:", eos=True)[-1] == 2
    assert tokenizer.encode("", eos=True) == [1, 2]


@pytest.mark.parametrize("language", text.LANGUAGES)
def test_every_caption_fits_and_comes_back(tokenizer, language):
    longest = 0
    for index in range(800):
        for caption in text.scene_captions(scenes.scene("train", index).description, language):
            ids = tokenizer.encode(conversation.contrastive_text(caption), eos=True)
            longest = max(longest, len(ids))
            assert tokenizer.decode(ids) == "summarize:" + caption
            assert all(piece[:3] != "<0x" for piece in tokenizer.pieces(ids))
    assert longest <= 20


@pytest.mark.parametrize("language", text.LANGUAGES)
def test_colours_and_shapes_are_single_pieces(tokenizer, language):
    colors = text.COLORS[language].values()
    words = [w for c in colors for w in ([c] if isinstance(c, str) else c)]
    for word in [*words, *text.SHAPES[language].values()]:
        pieces = [p for p in tokenizer.pieces(tokenizer.encode(word, bos=False)) if p != "▁"]
        assert len(pieces) == 1, (word, pieces)


def test_answers_use_no_byte_pieces(tokenizer):
    for language in text.LANGUAGES:
        for digit in range(10):
            for pair in questions.about_digit(digit, language):
                for sentence in pair:
                    pieces = tokenizer.pieces(tokenizer.encode(sentence))
                    assert not any(piece.startswith("<0x") for piece in pieces), pieces


def test_truncation_keeps_the_end_of_text(tokenizer):
    ids = tokenizer.encode("a red star " * 50, eos=True, length=12)
    assert len(ids) == 12 and ids[0] == 1 and ids[-1] == 2
    assert tokenizer.encode("a red star " * 50, length=12)[:-1] == ids[:-1]


def test_batch_is_right_padded_with_zero(tokenizer):
    batch = tokenizer.encode_batch(["a red star", ""], 8)
    assert batch.shape == (2, 8) and batch.dtype == np.int32
    assert batch[1].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert tokenizer.decode(batch[0]) == "a red star"


@pytest.mark.parametrize("attack", ["</s>", "<s>", "<unk>", "<0x0A>", "a </s><s> b"])
def test_text_never_yields_special_ids(tokenizer, attack):
    ids = tokenizer.encode(attack, bos=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == attack


def test_special_text_is_parsed_on_request(tokenizer):
    ids = tokenizer.encode("a</s>b", parse_special=True)
    assert ids == [
        1,
        *tokenizer.encode("a", bos=False),
        2,
        *tokenizer.encode("b", bos=False),
    ]


@pytest.fixture(scope="module")
def with_symbols(tmp_path_factory):
    model = io.BytesIO()
    lines = [f"the cat number {i} sat on the mat <img> here" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        user_defined_symbols=["<img>", "<|end|>"],
        hard_vocab_limit=False,
        pad_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("model") / "symbols.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def test_user_defined_symbols_in_text_are_spelt_out(with_symbols):
    raw = sentencepiece.SentencePieceProcessor(model_file=str(with_symbols.path))
    symbols = {raw.piece_to_id("<img>"), raw.piece_to_id("<|end|>")}
    sentence = "the <img> cat<|end|> sat"
    assert symbols <= set(raw.encode(sentence))
    ids = with_symbols.encode(sentence)
    assert not symbols & set(ids)
    assert with_symbols.decode(ids) == sentence
    plain = "the cat sat on the mat"
    assert with_symbols.encode(plain, bos=False) == raw.encode(plain)


def test_missing_and_broken_models_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer model at .*absent.model"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "broken.model")


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.parent.name)
def test_ids_equal_those_of_the_slow_llama_tokenizer(path):
    case = json.loads(path.read_text(encoding="utf-8"))
    recorded = Tokenizer(path.parent / "tokenizer.model")
    assert recorded.vocab_size == case["vocab_size"]
    settings = {
        "clip_max80": ("summarize:", 80, True),
        "clip_max80_noprefix": ("", 80, True),
        "train_caption_32": ("", 32, True),
        "train_summarize_32": ("summarize:", 32, True),
        "raw": ("", None, False),
    }
    for name, (prefix, length, eos) in settings.items():
        for sentence, expected in zip(case["texts"], case["cases"][name]["ids"], strict=True):
            ids = recorded.encode(prefix + sentence, eos=eos, length=length, parse_special=True)
            assert ids + [0] * (len(expected) - len(ids)) == expected, (name, sentence)
    raw, decoded = case["cases"]["raw"]["ids"], case["cases"]["decode"]["text"]
    assert [recorded.decode(ids) for ids in raw] == decoded


def test_pieces_of_a_growing_text_add_up_to_it():
    tokenizer = Tokenizer()
    for line in ("a red star, 2 circles", "ein Bär 🐻‍❄️ 好 별 \U0001f9ec!", "una estrella roja"):
        ids = tokenizer.encode(line, bos=False, eos=True)
        growing = Detokenizer(tokenizer)
        pieces = [growing.push(token) for token in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + growing.end() == tokenizer.decode(ids)
    *letter, _ = tokenizer.encode("\U0001f9ec", bos=False)
    assert not "".join(map(Detokenizer(tokenizer).push, letter))  # bytes of one letter
