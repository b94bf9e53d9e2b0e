"""What `bench_serve` measures: our server and a bare one in processes of their own, one module a question."""
