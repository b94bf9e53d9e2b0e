"""How the demo checkpoints were made; run with `python -m checkpoints.demo.train`."""
