"""Side-by-side measurements, one script each; results in docs/benchmarks.md."""
