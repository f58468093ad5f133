"""`python -m benchmarks.gpu`: see `benchmarks.gpu.day`."""

from benchmarks.gpu.day import main

if __name__ == "__main__":
    main()
