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

FILE = "report.json"

# In the order in which a document meets them; quality filters, `name/rule`, stand between them.
READING = ("not_utf8", "not_json", "no_text", "empty")
DUPLICATES = ("exact_duplicate", "near_duplicate")


def make_report(manifest: Manifest, shards: list[EncodedShard]) -> dict[str, Any]:
    """The report of a corpus whose shards are finished."""
    left_out: Counter[str] = Counter()
    for shard in shards:
        left_out.update(shard.left_out)
    kept = manifest.train.documents + manifest.validation.documents
    return {
        "documents_in": kept + left_out.total(),
        "stages": _list_stages(left_out, kept),
        "documents_kept": kept,
        "splits": {split: _describe_split(manifest, shards, split) for split in Split},
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Keeps the report beside the corpus."""
    write_json(folder / FILE, report)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a prepared corpus; None of one that was prepared before there were any."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else None


def print_report(report: dict[str, Any]) -> str:
    """The report as a table of stages and one of splits."""
    lines = [f"{'stage':<20}{'documents in':>14}{'dropped':>10}{'kept':>12}  why"]
    for stage in report["stages"]:
        why = ", ".join(f"{reason} {count:,}" for reason, count in stage["dropped"].items())
        dropped = sum(stage["dropped"].values())
        lines.append(
            f"{stage['stage']:<20}{stage['in']:>14,}{dropped:>10,}{stage['kept']:>12,}  {why}"
        )
    lines += ["", _row("split", "documents", "tokens", "bytes/token", "tokens/word")]
    for split, about in report["splits"].items():
        lines.append(describe_fertility(split, about))
    return "\n".join(line.rstrip() for line in lines)


def describe_fertility(name: str, about: dict[str, Any]) -> str:
    """A line of the table of splits, or of the sources of a mixture."""
    numbers = (about["documents"], about["tokens"])
    ratios = (about["bytes_per_token"], about["tokens_per_word"])
    return _row(
        name, *(f"{x:,}" for x in numbers), *("-" if x is None else f"{x:.3f}" for x in ratios)
    )


def _row(name: str, *columns: str) -> str:
    return f"{name:<20}" + "".join(f"{column:>14}" for column in columns)


def _list_stages(left_out: Counter[str], kept: int) -> list[dict[str, Any]]:
    """What each stage got, dropped and passed on; a stage that dropped nothing is left out, but for
    the first."""
    stages: dict[str, dict[str, int]] = {"read": {}}
    filters = sorted(left_out.keys() - {*READING, *DUPLICATES})
    for reason in (*READING, *filters, *DUPLICATES):
        if left_out[reason]:
            stage = "read" if reason in READING else reason.split("/")[0]
            stages.setdefault(stage, {})[reason.split("/")[-1]] = left_out[reason]
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
