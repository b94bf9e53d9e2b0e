"""Stubs of the proto packages `jaxinfer.*`."""
