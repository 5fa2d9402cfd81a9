"""What the doctor found: a check of a node is green, or red with a way out."""

from dataclasses import dataclass, field
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 120


class Finding(NamedTuple):
    """One check of one node."""

    check: str
    host: str
    is_good: bool
    text: str
    way_out: str = ""


@dataclass(slots=True)
class Findings:
    hosts: list[str]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what belongs to no single node

    @property
    def is_healthy(self) -> bool:
        return all(finding.is_good for finding in self.findings)

    def add(self, check: str, host: str, problem: str, text: str, way_out: str) -> None:
        """A green finding with `text` where there is no problem, else a red one."""
        self.findings.append(
            Finding(check, host, not problem, problem or text, way_out if problem else "")
        )


def report(findings: Findings) -> None:
    """A row per check and a column per node, then a way out for each red."""
    table = Table("check", box=box.SIMPLE)
    for host in findings.hosts:
        table.add_column(escape(host))
    cells: dict[str, dict[str, Finding]] = {}
    for finding in findings.findings:
        cells.setdefault(finding.check, {})[finding.host] = finding
    for check, row in cells.items():
        table.add_row(escape(check), *(_cell(row.get(host)) for host in findings.hosts))
    console = Console(width=max(WIDTH, 24 * (len(findings.hosts) + 1)), stderr=True)
    console.print(table)
    for note in findings.notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    for finding in findings.findings:
        if not finding.is_good:
            rest = escape(f"{finding.check}: {finding.text}; {finding.way_out}")
            console.print(
                f"[red]{escape(finding.host)}[/]: {rest}", soft_wrap=True, highlight=False
            )


def _cell(finding: Finding | None) -> str:
    if finding is None:
        return ""
    return f"[{'green' if finding.is_good else 'red'}]{escape(finding.text)}[/]"
