"""The wire format: `.proto` files and the stubs generated from them (`python -m serve.protos.generate`)."""
