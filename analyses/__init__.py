"""Command line, reports, metrics and benchmarks: labels and files again."""
