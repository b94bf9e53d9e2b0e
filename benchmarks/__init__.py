"""One bench a question; each compares what it measures in one interleaved run (`python -m benchmarks.bench_NAME`)."""
