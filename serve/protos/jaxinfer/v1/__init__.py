"""Stubs of the proto package `jaxinfer.v1`."""
