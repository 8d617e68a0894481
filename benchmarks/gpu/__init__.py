"""Everything that is worth measuring on a GPU, in one command that fits a few minutes: `python -m benchmarks.gpu`."""
