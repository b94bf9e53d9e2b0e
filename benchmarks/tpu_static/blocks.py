"""Block sizes of jax's kernel that bench_tpu_static compiles: the best few of the sweep in README.md."""

# (tokens, queries) a block; decode by context, as a block beyond a row's end is fetched whole. The best of int8 pages
# is among them.
DECODE = {1024: ((1024, 2), (1024, 1)), 8192: ((2048, 1), (2048, 2), (1024, 2))}
# Prefill by chip; "" for those that were not swept.
PREFILL = {"v5e": ((2048, 128), (1024, 256)), "v6e": ((2048, 128), (1024, 128)), "": ((1024, 128),)}
