"""Plans made op by op: the same file, byte for byte, whatever processor or number of threads makes it."""

from __future__ import annotations

import os
import subprocess
import sys

import autopar

PLAN_IT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import autopar

config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=4, vocab_size=256, max_position_embeddings=64, use_cache=False)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=2)
whole = autopar.plan(model, cluster, seq=64, global_batch=16, time_limit_s=600)
figures = whole.predicted
limit = int(figures["peak_bytes"] - 0.3 * figures["breakdown"]["memory_bytes"]["activations"])
tight = autopar.plan(model, cluster, seq=64, global_batch=16, memory_limit_bytes=limit,
                      pin={"model.layers.0.mlp": "offload"}, time_limit_s=600)
sys.stdout.write(whole.dumps() + tight.dumps())
"""

MACHINES = (
    {"OMP_NUM_THREADS": "1"},
    {
        "OMP_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "2",
        "OPENBLAS_CORETYPE": "Prescott",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX2 FMA3",
        "ATEN_CPU_CAPABILITY": "default",
    },
)


def test_the_same_bytes_from_other_processors() -> None:
    """Fewer vector units, another BLAS kernel, other kernels of torch, another number of threads. In time, that is: a
    search that runs out of time ends where the machine has brought it."""
    texts = []
    for changed in MACHINES:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **changed}
        done = subprocess.run([sys.executable, "-c", PLAN_IT], env=env, capture_output=True, text=True, check=True)
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    first, second = (part for part in texts[0].split("\n}\n") if part.strip())
    plans = [autopar.Plan.loads(part + "\n}\n") for part in (first, second)]
    assert plans[1].predicted["peak_bytes"] < plans[0].predicted["peak_bytes"]
    assert plans[1].decisions.offloaded
