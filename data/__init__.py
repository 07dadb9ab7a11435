"""From files of cells to populations, and back. AnnData ends here."""
