"""What `bench_h200` measures: ours and the peers as contenders on one GPU, one module a question."""
