"""The table of `thrifty verify`: how far each component is from the reference, per quantity."""

from rich import box
from rich.table import Table

from model.cost import COMPONENTS
from train.verify.compare import EXACT, Difference
from train.verify.observation import BUFFER, FORWARD, LOAD, LOSS, NORM

HEADINGS = {FORWARD: "states", LOAD: "counts", BUFFER: "bias"}


def draw_differences(differences: list[Difference]) -> Table:
    """The largest difference of each component (rows) and quantity (columns), over all steps.

    Relative to the tensor's largest value; counts and biases absolute. Numbers of the whole step
    stand below, in the column of their kind.
    """
    quantities = list(dict.fromkeys(difference.key.quantity for difference in differences))
    columns = [quantity for quantity in quantities if quantity not in (LOSS, NORM)]
    table = Table("component", box=box.SIMPLE)
    for quantity in columns:
        table.add_column(HEADINGS.get(quantity, quantity), justify="right")
    for component, _ in COMPONENTS:
        cells = [_largest(differences, component, quantity) for quantity in columns]
        if any(cells):
            table.add_row(component, *cells)
    table.add_section()
    for quantity in (LOSS, NORM):
        names = [d.component for d in differences if d.key.quantity == quantity]
        for name in dict.fromkeys(names):
            table.add_row(name, _largest(differences, name, quantity))
    return table


def _largest(differences: list[Difference], component: str, quantity: str) -> str:
    """The cell: a difference, `equal` where there is none, empty where nothing is compared."""
    of_cell = [d for d in differences if d.component == component and d.key.quantity == quantity]
    if not of_cell:
        return ""
    worst = max(of_cell, key=lambda difference: difference.error)
    text = "equal" if worst.error == 0 else f"{worst.error:.1e}"
    if quantity in EXACT and worst.error:
        text = f"{worst.error:g}"
    return text if all(d.is_match for d in of_cell) else f"[bold red]{text}[/]"
