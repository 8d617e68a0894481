"""`python -m fastssl …`, the form that torchrun needs."""

from fastssl.cli import main

main()
