"""Stubs of `draft.proto`, of the proto package `jaxinfer.v1`."""
