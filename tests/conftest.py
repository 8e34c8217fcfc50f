"""One thread and reproducible property tests. HYPOTHESIS_PROFILE=explore searches further, at random."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=12, derandomize=True, database=None, **common)
settings.register_profile("explore", max_examples=100, database=None, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
