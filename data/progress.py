"""A progress bar over the cells of a pass, for passes that may take more than two seconds."""

from collections.abc import Iterable, Iterator, Sized


def track_cells[Positions: Sized, Block](
    blocks: Iterable[tuple[Positions, Block]], num_cells: int, description: str, progress: bool
) -> Iterator[tuple[Positions, Block]]:
    """The blocks (positions, rows) unchanged; with `progress`, a bar on stderr, if that is a terminal."""
    if not progress:
        yield from blocks
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=num_cells)
        for positions, rows in blocks:
            yield positions, rows
            bar.advance(task, len(positions))
