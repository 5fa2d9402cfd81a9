"""A corpus that another tool has tokenized: Megatron's `.bin/.idx` or datatrove's `.ds`, as it is.

Nothing is copied but the tokenizer; the manifest points to the files where they lie. They are read
once, to count tokens and to hash them.
"""

import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data import origin
from data.atomic_file import hash_file, write_aside
from data.config import TokenizedData, Verify
from data.corpus import find_token_files
from data.datatrove_index import SUFFIX as DATATROVE
from data.datatrove_index import mask_path
from data.documents import write_index
from data.loss_masks import Mask, find_learnt
from data.manifest import (
    FileRecord,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
    record_file,
    record_tokenizer,
    write_manifest,
)
from data.shards import Shard, bin_path, idx_path
from data.tokenizer import Tokenizer, load_tokenizer
from data.unigram import count_tokens

log = logging.getLogger(__name__)


def prepare_tokenized(config: TokenizedData, *, folder: Path, tokenizer_path: Path) -> Manifest:
    """The manifest of the corpus, written to `folder`.

    Raises:
        ValueError: A file is of neither format, damaged, or of another tokenizer or type of tokens.
    """
    given = config.tokenizer.path
    assert given is not None
    with write_aside(tokenizer_path) as file:
        file.write(Path(given).expanduser().read_bytes())
    tokenizer = load_tokenizer(tokenizer_path)
    origin.write_origin(folder, origin.describe_origin(config, verify=Verify.full))
    shards = {
        Split.train: find_token_files(config.paths, key="data.paths"),
        Split.validation: find_token_files(config.validation_paths, key="data.validation_paths"),
    }
    if twice := set(shards[Split.train]) & set(shards[Split.validation]):
        raise ValueError(
            f"{sorted(twice)[0]} belongs to data.paths and data.validation_paths; what is held out "
            "must not be trained on"
        )
    _refuse_two_types([prefix for split in shards.values() for prefix in split])
    manifest = Manifest(
        tokenizer=record_tokenizer(tokenizer_path),
        train=_describe(folder, Split.train, shards[Split.train], tokenizer),
        validation=_describe(folder, Split.validation, shards[Split.validation], tokenizer),
        empty_documents=0,
        origin=record_file(folder / origin.FILE),
    )
    write_manifest(folder, manifest)
    for split in Split:
        record = manifest.split(split)
        log.info(
            "%s: %s tokens, %s documents", split, f"{record.tokens:,}", f"{record.documents:,}"
        )
    return manifest


def _describe(
    folder: Path, split: Split, prefixes: list[Path], tokenizer: Tokenizer
) -> SplitRecord:
    unigram, index = folder / f"unigram-{split}.npy", folder / f"documents-{split}.i64"
    prompts = folder / f"prompts-{split}.i32"
    counts = count_tokens(prefixes, vocab_size=tokenizer.size)
    with write_aside(unigram) as file:
        np.save(file, counts)
    shards = [_record(prefix, split, tokenizer) for prefix in prefixes]
    prompt_tokens = sum(shard.prompt_tokens for shard in shards)
    write_index(
        {prefix: _has_mask(prefix) for prefix in prefixes},
        index,
        prompts if prompt_tokens else None,
    )
    return SplitRecord(
        documents=index.stat().st_size // 8 - 1,
        tokens=sum(shard.tokens for shard in shards),
        prompt_tokens=prompt_tokens,
        text_bytes=sum(shard.text_bytes for shard in shards),
        unigram=record_file(unigram),
        index=record_file(index),
        prompts=record_file(prompts) if prompt_tokens else None,
        shards=shards,
    )


def _record(prefix: Path, split: Split, tokenizer: Tokenizer) -> ShardRecord:
    shard = Shard(prefix)
    # Megatron's documents of several sequences are no prompts; datatrove says what is one.
    prompts = shard.prompt_lengths() * _has_mask(prefix)
    hidden = shard.count_hidden()
    has_gaps = hidden > int(prompts.sum())
    mask = np.memmap(mask_path(prefix), np.uint8, mode="r") if has_gaps else None
    # What a model is judged by is text, so only what is held out must be decoded.
    text_bytes = 0
    if split is Split.validation:
        text_bytes = _count_text_bytes(shard, prompts, mask, tokenizer)
    return ShardRecord(
        name=str(prefix),
        documents=shard.num_documents,
        tokens=len(shard.tokens),
        prompt_tokens=hidden,
        text_bytes=text_bytes,
        bin=_record_file(bin_path(prefix)),
        idx=_record_file(idx_path(prefix)),
        loss=_record_file(mask_path(prefix)) if has_gaps else None,
    )


def _record_file(path: Path) -> FileRecord:
    """The record of a file that stays where it is."""
    return FileRecord(str(path), path.stat().st_size, hash_file(path))


def _has_mask(prefix: Path) -> bool:
    return prefix.suffix == DATATROVE and mask_path(prefix).is_file()


def _count_text_bytes(
    shard: Shard, prompts: npt.NDArray[np.int32], mask: Mask | None, tokenizer: Tokenizer
) -> int:
    total = 0
    borders = pairwise(shard.all_starts().tolist())
    for (start, stop), prompt in zip(borders, prompts.tolist(), strict=True):
        start += prompt
        stretches = [(0, stop - start)] if mask is None else find_learnt(mask[start:stop])
        for first, last in stretches:
            text = tokenizer.decode(shard.tokens[start + first : start + last].tolist())
            total += len(text.encode(errors="replace"))
    return total


def _refuse_two_types(prefixes: list[Path]) -> None:
    types = {Shard(prefix).tokens.dtype: prefix for prefix in prefixes}
    if len(types) > 1:
        one, other = list(types.items())[:2]
        raise ValueError(
            f"{one[1]} holds tokens as {one[0]}, {other[1]} as {other[0]}; make a corpus of each "
            "(data=mixture reads several)"
        )
