"""The event-driven simulator of a training step: who runs what when, and how much memory that takes.

Read in this order: `schedules` (the order of passes on each pipeline stage, as plain data), `costs` (what a pass takes,
piece by piece), `engine` (when everything runs), `timeline` (memory along time), `simulation` (the result), `pricing`
(costs of a layout, from `autopar.predicting`), `chrome` (the trace to open in Perfetto).
"""
