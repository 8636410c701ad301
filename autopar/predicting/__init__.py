"""Prices layouts that a person names: `autopar.predict`.

    model -> Sample (trace of three layers) -> ModelTable -> one Prediction per layout

The table holds, per layer and pass, what every kernel does and how it shrinks with the degrees of a layout; no
formula in this package knows what a transformer is.
"""
