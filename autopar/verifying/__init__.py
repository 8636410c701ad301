"""Proves plans that take more than one program a rank, on CPU (of plans that take one: `autopar.verification`)."""
