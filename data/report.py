"""What became of a corpus' documents, stage by stage, and how well its tokenizer suits it.

`report.json` lies beside the shards; `thrifty prepare` prints it. It holds nothing that depends on
time, so that it is the same whenever it is made.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from data.atomic_file import read_json, write_json
from data.encode_shard import EncodedShard
from data.manifest import Manifest, Split
from data.select import EXACT, NEAR, SelectConfig

FILE = "report.json"

COLUMNS = ("documents", "tokens", "bytes/token", "tokens/word")


def make_report(
    manifest: Manifest, shards: list[EncodedShard], select: SelectConfig
) -> dict[str, Any]:
    """The report of a corpus whose shards are finished."""
    left_out: Counter[str] = Counter()
    for shard in shards:
        left_out.update(shard.left_out)
    kept = manifest.train.documents + manifest.validation.documents
    return {
        "documents_in": kept + left_out.total(),
        "stages": _list_stages(left_out, kept, select),
        "documents_kept": kept,
        "splits": {split: _describe_split(manifest, shards, split) for split in Split},
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Keeps the report beside the corpus."""
    write_json(folder / FILE, report)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a prepared corpus; None of one that was prepared before there were any."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else None


def describe_report(report: dict[str, Any]) -> str:
    """The report as a table of stages and one of splits."""
    lines = [f"{'stage':<20}{'documents in':>14}{'dropped':>10}{'kept':>12}  why"]
    for stage in report["stages"]:
        why = ", ".join(f"{reason} {count:,}" for reason, count in stage["dropped"].items())
        dropped = sum(stage["dropped"].values())
        lines.append(
            f"{stage['stage']:<20}{stage['in']:>14,}{dropped:>10,}{stage['kept']:>12,}  {why}"
        )
    lines += ["", _row("split", *COLUMNS)]
    for split, about in report["splits"].items():
        lines.append(_describe_fertility(split, about))
    return "\n".join(line.rstrip() for line in lines)


def describe_sources(folders: dict[str, Path]) -> str:
    """The training split of each prepared corpus, a line each."""
    lines = [_row("source", *COLUMNS)]
    for name, folder in folders.items():
        if (report := read_report(folder)) is not None:
            lines.append(_describe_fertility(name, report["splits"][Split.train]))
    return "\n".join(lines)


def _describe_fertility(name: str, about: dict[str, Any]) -> str:
    numbers = (about["documents"], about["tokens"])
    ratios = (about["bytes_per_token"], about["tokens_per_word"])
    return _row(
        name, *(f"{x:,}" for x in numbers), *("-" if x is None else f"{x:.3f}" for x in ratios)
    )


def _row(name: str, *columns: str) -> str:
    return f"{name:<20}" + "".join(f"{column:>14}" for column in columns)


def _list_stages(left_out: Counter[str], kept: int, select: SelectConfig) -> list[dict[str, Any]]:
    """What each stage got, dropped and passed on, in the order in which a document meets them."""
    stages: dict[str, dict[str, int]] = {"read": {}}
    stages |= {quality.name: {} for quality in select.filters}
    stages |= {EXACT: {}} if select.exact_duplicates else {}
    stages |= {NEAR: {}} if select.near_duplicates else {}
    for reason, count in sorted(left_out.items()):
        stage, _, rule = reason.partition("/")  # a filter's reason is `name/rule`
        stages[stage if stage in stages else "read"][rule or stage] = count
    rows: list[dict[str, Any]] = []
    documents = kept + left_out.total()
    for stage, dropped in stages.items():
        remaining = documents - sum(dropped.values())
        rows.append({"stage": stage, "in": documents, "dropped": dropped, "kept": remaining})
        documents = remaining
    assert documents == kept
    return rows


def _describe_split(manifest: Manifest, shards: list[EncodedShard], split: Split) -> dict[str, Any]:
    record = manifest.split(split)
    num_bytes = sum(shard.whole_bytes[split] for shard in shards)
    words = sum(shard.words[split] for shard in shards)
    tokens = record.tokens - 2 * record.documents  # bos and eos are no text
    return {
        "documents": record.documents,
        "tokens": record.tokens,
        "bytes": num_bytes,
        "words": words,
        "bytes_per_token": num_bytes / tokens if tokens else None,
        "tokens_per_word": tokens / words if words else None,
    }
