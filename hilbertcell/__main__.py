"""`python -m hilbertcell` is the command line."""

from hilbertcell.analyses.cli import main

main()
