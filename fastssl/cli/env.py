"""`fastssl env`: versions, and the kernel that runs each op."""

from rich.console import Console
from rich.table import Table

from fastssl.machine import facts
from fastssl.ops import dispatch


def command(words: list[str]) -> None:
    """fastssl env: versions, processor level, and the kernel that runs each op"""
    if words:
        raise ValueError(f"env: no arguments, got {' '.join(words)}: {command.__doc__}")
    console = Console()
    for name, value in facts().items():
        console.print(f"{name:<20} {value}", highlight=False)
    table = Table("op", "cpu", "cuda")
    rows: dict[str, dict[str, str]] = {}
    for op, device, implementation in dispatch.table():
        rows.setdefault(op, {})[device] = implementation
    for op, implementations in sorted(rows.items()):
        table.add_row(op, implementations["cpu"], implementations["cuda"])
    console.print(table)
