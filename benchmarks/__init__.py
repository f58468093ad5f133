"""Benchmarks of speed and memory, each compared with a peer in the same run; results in docs/benchmarks.md."""
