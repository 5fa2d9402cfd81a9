"""Documents are left out for the reasons that the report gives, and for no other."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import Damaged, FilesData
from data.document import Document
from data.encode_shard import RECORDS, EncodedShard
from data.examine_shard import ShardExaminer
from data.manifest import FileRecord, Manifest, Split, SplitRecord, TokenizerRecord
from data.minhash import MinHash
from data.prepare import Prepared, prepare
from data.report import describe_report, describe_sources, make_report, read_report
from data.select import Filter, FilterConfig, SelectConfig, check_can_select, check_select
from data.select_corpus import compare, find_repeated
from data.tokenizer import TokenizerConfig
from tests.data.test_prepare import decode_split, read_folder

SYLLABLES = [
    f"{first}{middle}{last}" for first in "bdgkm" for middle in "aeiou" for last in "lnrst"
]
VOCABULARY = [first + last for first in SYLLABLES for last in SYLLABLES]
PROSE = "the cat and the dog have to be in a house that is with trees of a green colour "


NONE = FileRecord("", 0, "")


def examine(folder: Path, config: SelectConfig, texts: list[str], *, shard: int = 7) -> list[str]:
    """The reason of each text, "" where it is kept."""
    (folder / RECORDS).mkdir(exist_ok=True)
    examiner = ShardExaminer(folder, config)
    documents = [Document(text.encode()) for text in texts]
    starts = range(0, len(documents), shard)
    shards = [examiner.work(at, documents[at : at + shard]) for at in starts]
    selection = compare(config, shards)
    marked = list(selection.mark(documents))
    assert [document.text for document in marked] == [text.encode() for text in texts]
    return [document.left_out or "" for document in marked]


def draw_text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(VOCABULARY) for _ in range(words))


@settings(max_examples=30, deadline=None)
@given(keys=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), min_size=1))
def test_repeated_keys_are_those_that_a_loop_finds(keys: list[tuple[int, int, bool]]) -> None:
    seen, expected = set(), []
    for *key, is_candidate in keys:
        expected.append(is_candidate and tuple(key) in seen)
        if is_candidate:
            seen.add(tuple(key))
    words = np.array([key[:2] for key in keys], np.uint64)
    candidates = np.array([key[2] for key in keys])
    assert find_repeated(words, candidates).tolist() == expected


def test_each_document_has_the_first_reason_that_applies(tmp_path: Path) -> None:
    draw = random.Random(0)
    long, other = draw_text(draw, 200), draw_text(draw, 200)
    changed = long.replace(long.split()[100], "xxx", 1)
    texts = ["", long, "too short", other, long, changed, "\n \t", "too short", other.upper()]
    config = SelectConfig(
        filters=[FilterConfig(name=Filter.gopher_quality, options={"min_stop_words": 0})],
        exact_duplicates=True,
        near_duplicates=True,
    )
    no_words = "gopher_quality/no_words"
    short, exact, near = "gopher_quality/short_doc", "exact_duplicate", "near_duplicate"
    expected = ["empty", "", short, "", exact, near, no_words, short, near]
    assert examine(tmp_path, config, texts) == expected


def test_what_resembles_only_a_document_that_was_filtered_out_is_kept(tmp_path: Path) -> None:
    text = draw_text(random.Random(0), 200)
    config = SelectConfig(filters=[FilterConfig(name=Filter.gopher_quality)], near_duplicates=True)
    expected = ["gopher_quality/enough_stop_words", "", "near_duplicate"]
    assert examine(tmp_path, config, [text, f"the {text} of", f"the {text} of it"]) == expected


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        (Filter.gopher_quality, PROSE * 2, "short_doc"),
        (Filter.gopher_quality, (PROSE + "# # # # ") * 9, "too_many_hashes"),
        (Filter.gopher_quality, "kabelen ronut " * 50, "enough_stop_words"),
        (Filter.gopher_repetition, (PROSE + "\n") * 9, "dup_line_frac"),
        (Filter.fineweb_quality, "a short line\n" * 9, "line_punct_ratio"),
        (Filter.fineweb_quality, (PROSE + ".\n") * 9, "char_dup_ratio"),
    ],
)
def test_a_filter_names_the_rule_that_was_broken(
    name: Filter, text: str, rule: str, tmp_path: Path
) -> None:
    config = SelectConfig(filters=[FilterConfig(name=name)])
    assert examine(tmp_path, config, [text]) == [f"{name}/{rule}"]


@pytest.mark.parametrize("name", list(Filter))
def test_prose_passes_the_filters(name: Filter, tmp_path: Path) -> None:
    draw = random.Random(1)
    sentences = [draw_text(draw, 12) + " of the " + draw_text(draw, 3) + ".\n" for _ in range(30)]
    text = "And to have that: " + "".join(sentences)
    assert examine(tmp_path, SelectConfig(filters=[FilterConfig(name=name)]), [text]) == [""]


@pytest.mark.parametrize(
    "similarity",
    [0.72, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.5, 0.6, 0.8, 0.9))],
)
def test_near_duplicates_are_found_as_often_as_the_bands_say(similarity: float) -> None:
    draw, pairs, union = random.Random(2), 60, 100
    minhash = MinHash(SelectConfig(ngram=1))
    found = 0
    for _ in range(pairs):
        words = draw.sample(VOCABULARY, union)
        shared = round(union * similarity)
        first = words[: (union + shared) // 2]
        second = words[(union - shared) // 2 :]
        assert len(set(first) & set(second)) == similarity * union
        hashes = [minhash.hash_bands(" ".join(part)) for part in (first, second)]
        assert hashes[0] is not None
        assert hashes[1] is not None
        found += bool((hashes[0] == hashes[1]).any())
    expected = 1 - (1 - similarity**8) ** 14
    spread = (expected * (1 - expected) / pairs) ** 0.5
    assert abs(found / pairs - expected) < 3 * spread


def test_hashes_of_a_long_text_are_those_of_its_parts_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, minhash = draw_text(random.Random(3), 2000), MinHash(SelectConfig())
    whole = minhash.hash_bands(text)
    monkeypatch.setattr("data.minhash.SHINGLES_AT_ONCE", 100)
    assert (minhash.hash_bands(text) == whole).all()
    assert minhash.hash_bands("too few words") is None


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (SelectConfig(bands=0), r"data\.select\.bands=0 must be at least 1"),
        (
            SelectConfig(filters=[FilterConfig(name=Filter.gopher_quality, options={"min": 3})]),
            r"data\.select\.filters: gopher_quality .*'min'.*parameters of .*GopherQualityFilter",
        ),
    ],
)
def test_impossible_settings_are_refused(config: SelectConfig, complaint: str) -> None:
    check = check_can_select if config.filters else check_select
    with pytest.raises(ValueError, match=complaint):
        check(config)


def test_without_datatrove_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.select.find_spec", lambda name: None)
    check_can_select(SelectConfig(exact_duplicates=True))
    with pytest.raises(ValueError, match=r"need datatrove.*pip install 'thrifty\[select\]'"):
        check_can_select(SelectConfig(near_duplicates=True))


def test_stages_are_reported_in_their_order_also_where_they_drop_nothing() -> None:
    split = SplitRecord(
        documents=2,
        tokens=9,
        prompt_tokens=0,
        text_bytes=9,
        unigram=NONE,
        index=None,
        prompts=None,
        shards=[],
    )
    manifest = Manifest(
        tokenizer=TokenizerRecord(file=NONE, size=9, bos_id=0, eos_id=1, pad_id=2, fim=None),
        train=split,
        validation=split,
        empty_documents=1,
        origin=NONE,
    )
    left_out = {"empty": 1, "gopher_quality/short_doc": 5, "gopher_repetition/other": 2}
    shard = EncodedShard(
        text_sha256="",
        left_out=left_out,
        words=dict.fromkeys(Split, 5),
        whole_bytes=dict.fromkeys(Split, 10),
        train=None,
        validation=None,
    )
    names = (Filter.gopher_repetition, Filter.gopher_quality)
    config = SelectConfig(filters=[FilterConfig(name=name) for name in names], near_duplicates=True)
    report = make_report(manifest, [shard, shard], config)
    assert [(stage["stage"], stage["in"], stage["kept"]) for stage in report["stages"]] == [
        ("read", 20, 18),
        ("gopher_repetition", 18, 14),
        ("gopher_quality", 14, 4),
        ("near_duplicate", 4, 4),
    ]
    assert report["splits"]["train"]["bytes_per_token"] == 20 / (9 - 2 * 2)
    assert report["splits"]["train"]["tokens_per_word"] == (9 - 2 * 2) / 10


def test_sources_are_listed_with_their_fertility(prepared: Prepared) -> None:
    about = prepared.manifest.train
    header, line = describe_sources({"own": prepared.folder}).splitlines()
    assert header.split() == ["source", "documents", "tokens", "bytes/token", "tokens/word"]
    name, documents, tokens, bytes_per_token, _ = line.split()
    assert (name, documents, tokens) == ("own", f"{about.documents:,}", f"{about.tokens:,}")
    assert float(bytes_per_token) == pytest.approx(
        about.text_bytes / (about.tokens - 2 * about.documents), abs=1e-3
    )


def write_corpus(path: Path, tokenizer: Path, *, more: int = 0) -> FilesData:
    """240 documents: 200 of their own, 20 said twice, 20 with a word changed, 3 not to be read."""
    draw = random.Random(4)
    own = [draw_text(draw, 60) for _ in range(200)]
    texts = [*own, *own[:20]]
    texts += [f"{text} {draw.choice(VOCABULARY)}" for text in own[40:60]]
    draw.shuffle(texts)
    lines = [json.dumps({"text": text}).encode() for text in texts]
    lines[10:10] = [b'{"text": "cut in ha', b'{"text": "\xff"}', b'{"body": ""}', b'{"text": ""}']
    lines += [json.dumps({"text": draw_text(draw, 60)}).encode() for _ in range(more)]
    path.write_bytes(b"\n".join(lines))
    return FilesData(
        folder=str(path.with_suffix("")),
        paths=[str(path)],
        damaged=Damaged.leave_out,
        select=SelectConfig(exact_duplicates=True, near_duplicates=True),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        validation_fraction=0.2,
        shard_bytes=6000,
        processes=1,
    )


PREPARE_AND_DIE = """
import sys
from pathlib import Path
from data.prepare import prepare
from tests.data.dying import Dying
from tests.data.test_select import write_corpus

if __name__ == "__main__":
    prepare(write_corpus(*map(Path, sys.argv[1:])), progress=Dying("select", shards=5))
"""


@pytest.mark.slow
def test_a_selection_is_reported_and_the_same_after_a_kill_and_with_other_processes(
    prepared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],  # type: ignore[no-untyped-def]
) -> None:
    tokenizer = prepared.folder / "tokenizer.model"
    (tmp_path / "killed").mkdir()
    arguments = [str(tmp_path / "killed" / "corpus.jsonl"), str(tokenizer)]
    process = subprocess.run(
        [sys.executable, "-c", PREPARE_AND_DIE, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    killed = write_corpus(Path(arguments[0]), tokenizer)
    kept = list(Path(killed.folder).glob("finished_shards/select-*.npz"))
    assert 5 <= len(kept) <= 6
    prepare(killed)
    config = write_corpus(tmp_path / "corpus.jsonl", tokenizer)
    config.processes = 3
    config.paths = killed.paths
    whole = prepare(config)
    assert read_folder(whole.folder) == read_folder(Path(killed.folder))
    report = read_report(whole.folder)
    assert report is not None
    assert [(stage["stage"], stage["in"], stage["dropped"]) for stage in report["stages"]] == [
        ("read", 244, {"not_utf8": 1, "not_json": 1, "no_text": 1, "empty": 1}),
        ("exact_duplicate", 240, {"exact_duplicate": 20}),
        ("near_duplicate", 220, {"near_duplicate": 20}),
    ]
    manifest = whole.manifest
    assert report["documents_kept"] == manifest.train.documents + manifest.validation.documents
    assert report["documents_kept"] == 200
    assert "near_duplicate                 220        20         200" in describe_report(report)


@pytest.mark.slow
def test_held_out_documents_stay_held_out_when_data_are_added_though_duplicates_go(
    prepared,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    tokenizer = prepared.folder / "tokenizer.model"
    before = prepare(write_corpus(tmp_path / "before.jsonl", tokenizer))
    after = prepare(write_corpus(tmp_path / "after.jsonl", tokenizer, more=100))
    held_out = set(decode_split(before.folder, before.manifest, Split.validation))
    assert len(held_out) > 20
    assert held_out < set(decode_split(after.folder, after.manifest, Split.validation))
    assert held_out.isdisjoint(decode_split(after.folder, after.manifest, Split.train))
