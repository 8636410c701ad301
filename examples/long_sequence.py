"""One long sequence on several processes: a Llama whose attention goes around a ring, next to the same on one device.

    torchrun --nproc-per-node 4 examples/long_sequence.py
    torchrun --nproc-per-node 4 examples/long_sequence.py --ring 2      # a ring of two, tensor parallel by two

Every rank holds its part of the sequence from the embedding to the loss; keys and values travel. Each process also
trains the plain model by itself and compares. The last line is the largest difference; the exit code is 1 if it is
more than rounding.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import autopar

BATCH, STEPS, LR = 1, 3, 1e-3
TOLERANCE = 1e-4  # float32, relative to the largest value


def model_and_batch(tokens: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama with grouped queries, and one sequence of random tokens."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (BATCH, tokens))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids.clone()}


def train(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses, and logits and parameters at the end, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    found: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss of step {step}"] = loss.detach()
    with torch.no_grad():
        found["logits"] = whole(model(**batch).logits)  # in the order of the tokens, whoever held them
    return found | {name: whole(param) for name, param in model.named_parameters()}


def whole(tensor: Any) -> torch.Tensor:
    """A tensor put together from its parts."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> int:
    """Train both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="length of the sequence")
    parser.add_argument("--ring", type=int, help="ranks that share the sequence; all if not given")
    options = parser.parse_args()

    torch.set_num_threads(1)
    cluster = autopar.ClusterSpec.local()
    model, batch = model_and_batch(options.tokens)
    plain = copy.deepcopy(model)
    ring = options.ring or cluster.devices
    pin = {"dp": 1, "cp": ring, "tp": cluster.devices // ring}
    program = autopar.compile(model, cluster, pin=pin, example_inputs=((), batch))

    found, expected = train(program, batch), train(plain, batch)
    differences = {n: ((found[n] - t).abs().max() / t.abs().max()).item() for n, t in expected.items()}
    worst = max(differences, key=lambda name: differences[name])
    agree = differences[worst] <= TOLERANCE
    if dist.get_rank() == 0:
        plan = program.plan
        assert plan is not None
        lowerings = {rule.lowering for decision in plan.decisions.nodes.values() for rule in decision.rules}
        how = "goes around a ring" if "ring" in lowerings else "needs no ring here: heads are cheaper"
        print(f"{options.tokens} tokens on {cluster.devices} ranks, {plan.layout()}: attention {how}")
        print(
            f"long_sequence: {'ok' if agree else 'FAILED'}: largest difference from one device after {STEPS} steps "
            f"{differences[worst]:.1e} ({worst})"
        )
    dist.barrier()  # by then torch's threads have let go of tensors, which they must not do while Python ends
    dist.destroy_process_group()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
