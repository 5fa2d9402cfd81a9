"""A benchmark's results as rows of a table, for whoever collects them (`bench/gpu_check.py`)."""

import json
import os
from pathlib import Path
from typing import NamedTuple

ROWS_VARIABLE = "THRIFTY_BENCH_ROWS"  # in the environment: the file that rows are added to


class Row(NamedTuple):
    benchmark: str  # what was measured, and at which sizes
    value: str  # with its unit
    peer: str = ""  # beside what, and that one's value
    ratio: str = ""  # of the two, or to a goal or a floor


def note(row: Row) -> None:
    """Print the row; where a file is named in the environment, add it there at once."""
    print(" | ".join(part for part in row if part), flush=True)
    name = os.environ.get(ROWS_VARIABLE)
    if name:
        with Path(name).open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """What has been noted there; a line that was cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Row(*json.loads(line)) for line in lines if line.endswith("\n")]
