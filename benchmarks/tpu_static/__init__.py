"""What `bench_tpu_static` counts: programs compiled for TPUs that are not there, their machine code executed."""
