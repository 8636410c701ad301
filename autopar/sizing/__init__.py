"""How many GPUs, of which kind: the fewest that meet a target, the cheapest way, and time against cost."""
