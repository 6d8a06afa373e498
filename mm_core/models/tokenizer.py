"""Tokenizers: a byte-level BPE trained on a corpus, or any of Hugging Face's; both leave and load in its layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mm_core.data.text import CaptionTokenizer
from mm_core.errors import ConfigError
from mm_core.models.quiet import quiet
from mm_core.models.sizes import SpecialTokens

PAD, MASK, BOS, EOS = "<|pad|>", "<|mask|>", "<|startoftext|>", "<|endoftext|>"
_SPECIALS = [PAD, MASK, "<|unused|>", BOS, EOS]
"""The EOS must not have id 2 (see `clip.py`), so an id is left unused."""


def train_bpe(captions: Iterable[str], *, vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing, space-squeezing byte-level BPE; the same captions give the same tokenizer.

    Raises:
        ConfigError: `vocab_size` cannot hold the 256 bytes and the marks.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(_SPECIALS):
        raise ConfigError(f"tokenizer.vocab_size {vocab_size} is below {len(alphabet) + len(_SPECIALS)}, the bytes and marks alone")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=_SPECIALS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, bos), (EOS, eos)])
    marks = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "mask_token": MASK}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context_length, **marks)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or the hub.

    Raises:
        ConfigError: there is none, or it is not a fast one.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(source), use_fast=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ConfigError(f"no tokenizer at {source}: give a folder with tokenizer.json, or a hub id ({reason})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"the tokenizer at {source} has no fast (tokenizers) form, which mm needs")
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
    """Ids of the marks. BERT's tokenizers call the first [CLS], the last [SEP]; the end mark stands in for a begin mark or padding that
    the tokenizer lacks.

    Raises:
        ConfigError: it has no end mark, at which CLIP pools.
    """
    eos = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if eos is None:
        raise ConfigError("the tokenizer has no end-of-text token, at which CLIP pools: use another tokenizer")
    bos = _first(tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
    pad = _first(tokenizer.pad_token_id, eos)
    assert bos is not None, "the end mark stands in"
    assert pad is not None, "the end mark stands in"
    return SpecialTokens(bos=bos, eos=eos, pad=pad)


def mask_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """
    Raises:
        ConfigError: it has none.
    """
    if tokenizer.mask_token_id is None:
        raise ConfigError("words are hidden behind a mask token, and the tokenizer has none: take BERT's, or leave tokenizer.source out")
    return int(tokenizer.mask_token_id)


def _first(*ids: int | None) -> int | None:
    return next((int(token) for token in ids if token is not None), None)


def caption_tokenizer(tokenizer: PreTrainedTokenizerFast, context_length: int) -> CaptionTokenizer:
    """The same tokenizer in the form that read tasks, evaluation and serving use.

    Raises:
        ConfigError: it does not put the end mark behind a text.
    """
    tokens = special_tokens(tokenizer)
    light = CaptionTokenizer(
        tokenizer.backend_tokenizer.to_str(), context_length, tokens.pad, str(tokenizer.convert_ids_to_tokens(tokens.pad))
    )
    if tokens.eos not in light(["a"])[0]:
        raise ConfigError(
            "the tokenizer does not end a text with its end-of-text token, at which CLIP pools: use CLIP's own or one like it"
        )
    return light
