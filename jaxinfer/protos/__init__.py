"""The wire format between an engine and a drafter elsewhere; stubs are made by `python -m serve.protos.generate`."""
