"""Capture: the joint graph computes what the model computes, and a Trace says what is what."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.trace import Trace, graph_hash, input_leaves, is_backward, trace
from tests.models import BATCH, HIDDEN, VOCAB, ModelAndInputs, tiny_bert, tiny_llama, tiny_mlp


def run_graph(traced: Trace, model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Run the joint graph on real values; the values of all its results by node name."""
    args, kwargs = inputs
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    leaves = input_leaves(model.forward, args, kwargs)
    feed: dict[str, Any] = {p.node: params[p.fqn].detach() for p in traced.params}
    feed |= {b.node: buffers[b.fqn].detach().clone() for b in traced.buffers}
    feed |= {c.node: c.value for c in traced.constants}
    feed |= {i.node: leaves[i.path] for i in traced.inputs}
    nodes = {n.name: n for n in traced.graph_module.graph.nodes}
    feed |= {
        name: torch.ones(nodes[name].meta["val"].shape, dtype=nodes[name].meta["val"].dtype) for name in traced.tangents
    }
    placeholders = [n.name for n in traced.graph_module.graph.find_nodes(op="placeholder")]
    assert set(placeholders) == set(feed)
    results = fx.Interpreter(traced.graph_module).run(*[feed[name] for name in placeholders])
    return dict(zip(traced.results, results, strict=True))


def assert_equals_eager(model: nn.Module, inputs: Any, tolerance: float = 1e-12) -> Trace:
    """Trace, run the graph, and compare results, buffer updates and every gradient with the model itself."""
    torch.manual_seed(3)
    traced = trace(model, inputs)
    check_invariants(traced)
    values = run_graph(traced, model, inputs)
    eager = copy.deepcopy(model)
    result = eager(*inputs[0], **inputs[1])
    rebuilt = traced.rebuild_output([values[o.node] for o in traced.outputs if o.node])
    assert pytree.tree_structure(rebuilt) == pytree.tree_structure(result)
    assert type(rebuilt) is type(result)
    for ours, theirs in zip(pytree.tree_leaves(rebuilt), pytree.tree_leaves(result), strict=True):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=tolerance)
        else:
            assert ours == theirs
    described = zip(traced.outputs, pytree.tree_leaves(result), strict=True)
    sum(leaf.sum() for output, leaf in described if output.tangent is not None).backward()
    for name, param in eager.named_parameters():
        assert (param.grad is not None) == (name in traced.grads)
        if param.grad is not None:
            torch.testing.assert_close(values[traced.grads[name]], param.grad, rtol=tolerance, atol=tolerance)
    after = dict(eager.named_buffers())
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, after[n])}
    assert changed <= set(traced.buffer_updates)
    for name, node in traced.buffer_updates.items():
        torch.testing.assert_close(values[node], after[name], rtol=tolerance, atol=tolerance)
    return traced


def check_invariants(traced: Trace) -> None:
    """What every Trace promises."""
    nodes = list(traced.graph_module.graph.nodes)
    kinds = [n.op for n in nodes]
    count = kinds.count("placeholder")
    assert kinds == ["placeholder"] * count + ["call_function"] * (len(nodes) - count - 1) + ["output"]
    assert all("val" in n.meta and n.meta["phase"] in ("forward", "backward") for n in nodes)
    ops = nodes[count:-1]
    assert [is_backward(n) for n in ops] == [False] * traced.num_forward + [True] * (len(ops) - traced.num_forward)
    described = [*traced.params, *traced.buffers, *traced.constants, *traced.inputs]
    assert [d.node for d in described] + [*traced.tangents] == [n.name for n in nodes[:count]]
    assert tuple(n.name for n in nodes[-1].args[0]) == traced.results
    assert all(not n.args or n.users or n.op == "output" for n in ops)


MODELS: dict[str, Any] = {
    "llama": tiny_llama,
    "llama_tied_grouped": lambda: tiny_llama(tied=True, kv_heads=4),
    "bert": tiny_bert,
    "mlp": tiny_mlp,
}


@pytest.mark.parametrize("name", MODELS)
def test_joint_graph_equals_eager(name: str) -> None:
    assert_equals_eager(*MODELS[name]())


def language_model(config_class: str, model_class: str, **config: Any) -> ModelAndInputs:
    import transformers

    settings = getattr(transformers, config_class)(vocab_size=VOCAB, **config)
    settings.use_cache = False
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(settings).double()
    ids = torch.randint(0, VOCAB, (BATCH, 16))
    return model, ((), {"input_ids": ids, "labels": ids.clone()})


def gpt2() -> ModelAndInputs:
    zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return language_model("GPT2Config", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=8, n_positions=32, **zero)


def t5() -> ModelAndInputs:
    sizes = {"d_model": 64, "d_kv": 8, "d_ff": 128, "num_layers": 2, "num_heads": 8, "dropout_rate": 0.0}
    return language_model("T5Config", "T5ForConditionalGeneration", decoder_start_token_id=0, pad_token_id=0, **sizes)


def mixtral(experts: str = "batched_mm") -> ModelAndInputs:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    model, inputs = language_model("MixtralConfig", "MixtralForCausalLM", num_local_experts=8, **sizes)
    model.config._experts_implementation = experts
    return model, inputs


@pytest.mark.parametrize("make", [gpt2, t5, mixtral])
def test_other_families(make: Any) -> None:
    traced = assert_equals_eager(*make())
    if make is gpt2:
        tied = {p.fqn: p.tied for p in traced.params if p.tied}
        assert tied == {"transformer.wte.weight": ("lm_head.weight",)}


class BatchNormNet(nn.Module):
    """Batch norm (buffer updates), a tensor attribute, a loop over a slice of layers, a frozen and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.offset = torch.arange(8.0, dtype=torch.float64)
        self.table = [torch.ones(8, dtype=torch.float64)]

    def forward(self, x: torch.Tensor, *rest: torch.Tensor, scale: dict[str, Any]) -> tuple[Any, ...]:
        self.steps.add_(1)
        y = self.norm(self.inputs(x + self.offset)) * self.table[0] * torch.tensor([2.0], dtype=x.dtype)
        for layer in self.layers[1:]:
            y = checkpoint(layer, y, use_reentrant=False).relu()
        y = self.frozen(y) + rest[0] * scale["a"]
        return y.square().mean(), y, y.view(-1), x, self.inputs.weight, scale["b"]


def batch_norm_net() -> ModelAndInputs:
    torch.manual_seed(0)
    x, bias = torch.randn(BATCH, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    return BatchNormNet().double(), ((x, bias), {"scale": {"a": torch.tensor(0.5), "b": 3}})


def test_buffers_constants_and_nested_inputs() -> None:
    model, inputs = batch_norm_net()
    traced = assert_equals_eager(model, inputs)
    updated = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "steps"}
    assert set(traced.buffer_updates) == updated
    assert {b.fqn: b.persistent for b in traced.buffers} == {n: n != "steps" for n in updated}
    assert [(i.path, i.batch_dim) for i in traced.inputs] == [("x", 0), ("rest[0]", 0), ("scale.a", None)]
    assert [(f.path, f.value) for f in traced.fixed_inputs] == [("scale.b", 3)]
    assert sorted(c.fqn or "" for c in traced.constants) == ["", "", "offset"]
    assert not any(name.startswith(("unused", "frozen", "layers.0")) for name in traced.grads)
    assert {p.fqn for p in traced.params if not p.requires_grad} == {"frozen.weight", "frozen.bias"}
    paths = {n.meta["module_path"] for n in traced.graph_module.graph.nodes}
    assert {"inputs", "norm", "layers.1", "layers.2", "frozen"} <= paths


def test_outputs_are_never_the_models_own_tensors() -> None:
    traced = trace(*batch_norm_net())
    placeholders = {n.name for n in traced.graph_module.graph.find_nodes(op="placeholder")}
    assert not placeholders & {o.node for o in traced.outputs}


def test_mlp_is_described() -> None:
    model, inputs = tiny_mlp()
    traced = trace(model, inputs)
    assert [(o.path, o.node is None, o.value) for o in traced.outputs] == [
        ("loss", False, None),
        ("logits", False, None),
        ("aux[0]", False, None),
        ("aux[1][0]", False, None),
        ("aux[1][1]", True, None),
        ("name", True, "mlp"),
    ]
    assert [(i.path, i.shape, i.dtype, i.batch_dim) for i in traced.inputs] == [
        ("x", (BATCH, HIDDEN), torch.float64, 0),
        ("target", (BATCH,), torch.int64, 0),
    ]
    assert [(f.path, f.value) for f in traced.fixed_inputs] == [("temperature", 2.0)]
    assert [(p.fqn, p.shape) for p in traced.params][:2] == [("up.weight", (256, 64)), ("up.bias", (256,))]
    code = traced.code()
    assert "parameter up.weight" in code and "self.down(hidden) / temperature" in code and "addmm" in code


def test_module_paths_reach_the_backward_pass() -> None:
    nodes = trace(*tiny_llama()).graph_module.graph.nodes
    for phase in ("forward", "backward"):
        paths = {n.meta["module_path"] for n in nodes if n.meta["phase"] == phase and n.op == "call_function"}
        assert {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.embed_tokens"} <= paths
        assert all(p == "" or p.split(".")[0] in ("model", "lm_head") for p in paths)


def shapes_only(traced: Trace) -> list[Any]:
    return [(n.op, str(n.target), tuple(getattr(n.meta["val"], "shape", ()))) for n in traced.graph_module.graph.nodes]


def on_meta(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta")


def on_fake(model: nn.Module) -> nn.Module:
    fake, mode = copy.deepcopy(model), FakeTensorMode(allow_non_fake_inputs=True)
    for module in fake.modules():
        for key, tensor in module._parameters.items():
            module._parameters[key] = None if tensor is None else nn.Parameter(mode.from_tensor(tensor.detach()))
    return fake


@pytest.mark.parametrize("name", ["mlp", "llama_tied"])
def test_meta_and_fake_models_trace_as_real_ones(name: str) -> None:
    real, inputs = tiny_mlp() if name == "mlp" else tiny_llama(layers=1, tied=True)
    expected = trace(real, inputs)
    meta_inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)
    for move, args in ((on_meta, inputs), (on_meta, meta_inputs), (on_fake, meta_inputs)):
        moved = move(real)
        if name == "llama_tied":
            moved.tie_weights()  # moving a model to meta unties it
        with FakeTensorMode():  # a mode that is active must not matter
            traced = trace(moved, args)
        assert shapes_only(traced) == shapes_only(expected)
        assert graph_hash(traced) == graph_hash(expected)


def test_meta_attribute_has_no_value() -> None:
    model, inputs = batch_norm_net()
    model.offset = model.offset.to("meta")
    traced = trace(model, inputs)
    assert [c.value is None for c in traced.constants if c.fqn == "offset"] == [True]


def test_graph_hash_tells_models_apart() -> None:
    variants = [tiny_mlp(), tiny_llama(layers=1), tiny_llama(layers=1, tied=True), tiny_llama(layers=1, kv_heads=4)]
    hashes = [graph_hash(trace(*v)) for v in variants]
    assert len(set(hashes)) == len(variants) and all(len(h) == 64 for h in hashes)
    other = tiny_mlp()
    other[1][1]["temperature"] = 3.0
    assert graph_hash(trace(*other)) != hashes[0]
    assert graph_hash(trace(*tiny_mlp(torch.float32))) != hashes[0]


def test_positional_and_keyword_arguments_agree() -> None:
    model, (args, kwargs) = tiny_mlp()
    assert graph_hash(trace(model, ((), {"x": args[0], **kwargs}))) == graph_hash(trace(model, (args, kwargs)))


class Held:
    """An object that pytree does not know, with an object inside that refers back to it."""

    def __init__(self, value: torch.Tensor, note: str) -> None:
        self.value, self.note, self.plain = value, note, None


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        hidden = self.layer(x)
        return {"loss": hidden.sum(), "extra": [Held(hidden * 2, "twice")]}


def test_objects_that_hold_tensors_come_back_as_they_are() -> None:
    model, x = Holding(), torch.randn(8, 4)
    traced = trace(model, ((x,), {}))
    assert [o.path for o in traced.outputs] == ["loss", "extra[0].value", "extra[0].note", "extra[0].plain"]
    rebuilt = traced.rebuild_output([torch.zeros(()), torch.ones(2)])["extra"][0]
    assert type(rebuilt) is Held and rebuilt.note == "twice" and torch.equal(rebuilt.value, torch.ones(2))
    assert pytree.tree_leaves([rebuilt]) == [rebuilt]  # to everyone else it is a leaf, as before


def test_a_language_model_with_its_cache() -> None:
    """transformers returns keys and values unless it is told not to; layers beyond the third are not traced."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2
    )
    model, ids = transformers.LlamaForCausalLM(config), torch.randint(0, VOCAB, (BATCH, 8))
    call: Any = ((), {"input_ids": ids, "labels": ids})
    program = autopar.compile(model, autopar.ClusterSpec.preset("cpu", gpus=1), example_inputs=call)
    found, expected = program(**call[1]), model(**call[1])
    found, expected = (dict(r)[next(k for k in r if k not in ("loss", "logits"))] for r in (found, expected))
    assert type(found) is transformers.DynamicCache and len(found.layers) == 5 and found.get_seq_length() == 8
    torch.testing.assert_close(found.layers[4].keys, expected.layers[4].keys)


def test_hidden_states_that_transformers_records_by_hooks() -> None:
    """They are put on the copy that is traced; on the model itself they appear when it is first called."""
    model, call = tiny_llama(layers=2)
    model.config.output_hidden_states = True  # type: ignore[union-attr]
    assert_equals_eager(model, call)
    fresh, _ = tiny_llama(layers=2)
    fresh.config.output_hidden_states = True  # type: ignore[union-attr]
    traced = trace(fresh, call)
    assert sum(o.path.startswith("hidden_states[") for o in traced.outputs) == 3
    assert not any(m._forward_hooks for m in fresh.modules())


def test_one_tensor_passed_twice_stays_two_inputs() -> None:
    model, (_, kwargs) = tiny_llama(layers=1)
    same = {"input_ids": kwargs["input_ids"], "labels": kwargs["input_ids"]}
    assert graph_hash(trace(model, ((), same))) == graph_hash(trace(model, ((), kwargs)))


def snapshot(model: nn.Module) -> list[Any]:
    return [
        (name, type(m), m.training, [(k, id(v)) for k, v in vars(m).items() if k != "training"],
         [(k, id(v)) for d in (m._parameters, m._buffers, m._modules) for k, v in d.items()])
        for name, m in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_model_and_random_state_are_left_untouched(training: bool) -> None:
    model, inputs = batch_norm_net()
    model.train(training)
    calls: list[int] = []
    model.inputs.register_forward_hook(lambda *_: calls.append(1))
    before, values = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trace(model, inputs)
    assert snapshot(model) == before and not calls
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


class Hooked(nn.Module):
    """Hooks on the model and on a layer, a bound method and a list of modules that stand elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.order = [self.other, self.layer]
        self.apply_all = self.run
        self.layer.register_forward_hook(lambda module, args, out: out * 2)
        self.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.order:
            x = layer(x).sin()
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_all(x).mean()


def test_hooks_and_references_within_the_model() -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 8, dtype=torch.float64)
    traced = assert_equals_eager(Hooked().double(), ((x,), {}))
    assert set(traced.grads) == {"layer.weight", "layer.bias", "other.weight", "other.bias"}
    assert traced.constants == () and [o.path for o in traced.outputs] == ["output"]


def test_bfloat16_and_no_grad_callers() -> None:
    model, inputs = tiny_llama(torch.bfloat16, layers=1)
    with torch.no_grad():
        traced = trace(model, inputs)
    assert {p.dtype for p in traced.params} == {torch.bfloat16} and len(traced.grads) == len(traced.params)
    assert_equals_eager(model, inputs, tolerance=0.0)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (nn.functional.dropout(self.layer(x), 0.5) for _ in range(2))
        return (a + b).mean()


def test_random_ops_are_never_merged() -> None:
    traced = trace(Dropped(), ((torch.zeros(BATCH, 8),), {}))
    drops = [n for n in traced.graph_module.graph.nodes if n.target is torch.ops.aten.native_dropout.default]
    linear = [n for n in traced.graph_module.graph.nodes if "addmm" in str(n.target)]
    assert len(drops) == 2 and len(linear) == 1


def test_no_dynamo_configuration_is_left_behind() -> None:
    from torch._dynamo import config

    before = config.get_config_copy()
    trace(*tiny_mlp())
    assert config.get_config_copy() == before
