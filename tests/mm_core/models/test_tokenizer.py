from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertTokenizerFast

from mm_core.errors import ConfigError
from mm_core.models.sizes import SpecialTokens
from mm_core.models.tokenizer import caption_tokenizer, load_tokenizer, special_tokens, train_bpe

CAPTIONS = ["a red circle above a blue square", "three green stars", "a Red ring"] * 5


def test_the_same_captions_give_the_same_tokenizer_and_it_survives_a_folder(tmp_path: Path) -> None:
    tokenizer = train_bpe(CAPTIONS, vocab_size=320, context_length=12)
    assert tokenizer.backend_tokenizer.to_str() == train_bpe(CAPTIONS, vocab_size=320, context_length=12).backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert special_tokens(loaded) == special_tokens(tokenizer)
    assert loaded(["a red circle"])["input_ids"] == tokenizer(["a red circle"])["input_ids"]


def test_texts_are_marked_cut_and_padded() -> None:
    tokenizer = train_bpe(CAPTIONS, vocab_size=320, context_length=8)
    tokens = special_tokens(tokenizer)
    ids = caption_tokenizer(tokenizer, 8)(["red", "a red circle above a blue square " * 9, "", "äöü 漢字 🙂"])
    assert ids.shape == (4, 8)
    assert (ids[:, 0] == tokens.bos).all()
    assert all((row == tokens.eos).sum() == 1 for row in ids)
    assert ids[1, -1] == tokens.eos
    assert ids[0, -1] == tokens.pad
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "red"


def test_case_and_spacing_do_not_matter() -> None:
    tokenizer = train_bpe(CAPTIONS, vocab_size=320, context_length=8)
    assert (caption_tokenizer(tokenizer, 8)(["RED Circle", " red\n\tcircle "]) == caption_tokenizer(tokenizer, 8)(["red circle"])).all()


def test_the_order_of_the_captions_does_not_matter() -> None:
    one, other = (train_bpe(captions, vocab_size=320, context_length=8) for captions in (CAPTIONS, reversed(CAPTIONS)))
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


def test_berts_marks_are_marks() -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    assert special_tokens(tokenizer) == SpecialTokens(bos=2, eos=3, pad=0)
    assert caption_tokenizer(tokenizer, 5)(["red"]).tolist() == [[2, 5, 3, 0, 0]]


def test_what_cannot_be_a_clip_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 100 is below"):
        train_bpe(CAPTIONS, vocab_size=100, context_length=8)
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no tokenizer at .*give a folder with"):
        load_tokenizer(tmp_path)
    tokenizer = train_bpe(CAPTIONS, vocab_size=320, context_length=8)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token"):
        caption_tokenizer(tokenizer, 8)
