"""`scripts/benchmark_evidence`: the ways to evidence beside each other, at shares of what sixty full runs cost.

All on the demo's synthetic pool, one thread per process. Held-out quality is that of predictions of further real runs,
of another design seed, which no way pays for.
"""
