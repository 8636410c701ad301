"""Chooses a layout: branch and bound over all that a model, a batch and a cluster allow."""
