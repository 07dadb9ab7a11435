"""A progress bar over the cells of a pass, for passes that may take more than two seconds."""

from collections.abc import Iterable, Iterator


def track_cells[Block](
    blocks: Iterable[tuple[object, Block]], num_cells: int, description: str, progress: bool
) -> Iterator[tuple[object, Block]]:
    """The blocks (positions, rows) unchanged; with `progress`, a bar that counts their cells on stderr."""
    if not progress:
        yield from blocks
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=num_cells)
        for positions, rows in blocks:
            yield positions, rows
            bar.advance(task, len(positions))
