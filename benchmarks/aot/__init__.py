"""Whole steps compiled for accelerators that are not here, and what the compiled programs say of themselves."""
