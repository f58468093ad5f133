"""`python -m benchmarks.gpu`: see `benchmarks.gpu.day`."""

from benchmarks.gpu.day import main

main()
