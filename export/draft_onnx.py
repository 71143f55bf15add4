"""The draft as an ONNX graph (opset 23, standard operators, float16): what the runtime calls once per level of a tree.

inputs   input_ids int64 [T] · features float16 [T, D] · position_ids int64 [T]
         attention_mask bool [T, P + T] (True = may attend) · logit_rows int64 [R]
         past_key.i, past_value.i float16 [P, H, E] for each block i; P may be 0
outputs  top_token_ids int64 [R, K] · top_log_probs float32 [R, K] descending · hidden_states float16 [R, D]
         new_key.i, new_value.i float16 [T, H, E], keys after RoPE

Letters: T pairs in a call, P pairs in the cache, R rows wanted, K children, D hidden size, H key/value heads, E head
size, V vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dovetail.export.draft_model import DraftModel
from dovetail.export.quiet import quiet_torch
from numpy.typing import NDArray
from torch import Tensor, nn

OPSET = 23
TOP_K = 10
MAX_INLINE_BYTES = 1_500_000_000  # one protobuf file ends at 2 GB


class DraftGraph(nn.Module):
    """The draft with the contract's inputs and outputs, in the dtype of its weights."""

    def __init__(self, draft: DraftModel, top_k: int) -> None:
        super().__init__()
        self._draft, self._top_k = draft, top_k

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        logit_rows: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        dtype = self._draft.embedding.dtype
        # [P, H, E] -> [1, H, P, E]
        cache = [tuple(p.to(dtype).permute(1, 0, 2)[None] for p in past[i : i + 2]) for i in range(0, len(past), 2)]
        hidden, new = self._draft(input_ids[None], features.to(dtype)[None], position_ids, attention_mask, cache)
        rows = hidden[0].index_select(0, logit_rows)  # [R, D]
        log_probs = torch.log_softmax(self._draft.logits(rows).float(), dim=-1)  # [R, V]
        top_log_probs, top_token_ids = torch.topk(log_probs, self._top_k, dim=-1)
        caches = [x[0].permute(1, 0, 2).to(torch.float16) for pair in new for x in pair]
        return (top_token_ids, top_log_probs, rows.to(torch.float16), *caches)


def input_names(num_layers: int) -> list[str]:
    """Of the graph, in order."""
    past = [f"past_{kind}.{i}" for i in range(num_layers) for kind in ("key", "value")]
    return ["input_ids", "features", "position_ids", "attention_mask", "logit_rows", *past]


def output_names(num_layers: int) -> list[str]:
    """Of the graph, in order."""
    new = [f"new_{kind}.{i}" for i in range(num_layers) for kind in ("key", "value")]
    return ["top_token_ids", "top_log_probs", "hidden_states", *new]


def example_inputs(draft: DraftModel, length: int, past: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a causal call: `length` pairs after `past` cached ones, every second row wanted."""
    config, generator = draft.config, torch.Generator().manual_seed(seed)
    inputs = {
        "input_ids": torch.randint(0, config.vocab_size, (length,), generator=generator),
        "features": torch.randn(length, config.hidden_size, generator=generator).half(),
        "position_ids": torch.arange(past, past + length),
        "attention_mask": torch.ones(length, past + length, dtype=torch.bool).tril(past),
        "logit_rows": torch.arange(length - 1, -1, -2).flip(0),
    }
    for name in input_names(config.num_layers)[5:]:
        inputs[name] = torch.randn(past, config.num_kv_heads, config.head_dim, generator=generator).half()
    return inputs


def export_draft(draft: DraftModel, path: Path, *, top_k: int = TOP_K, dtype: torch.dtype = torch.float16) -> None:
    """Write the draft's graph to `path`, with the weights inside unless they are over 1.5 GB (then in `path.data`
    beside it).
    """
    assert top_k <= draft.config.vocab_size, "more children than tokens"
    graph = DraftGraph(copy.deepcopy(draft).to(dtype).eval(), top_k)
    example = tuple(example_inputs(draft, 5, 3).values())
    batch: dict[str, Any] = dict.fromkeys(("T", "P", "M", "R"), torch.export.Dim.DYNAMIC)
    shapes: list[Any] = [
        {0: batch["T"]},
        {0: batch["T"]},
        {0: batch["T"]},
        {0: batch["T"], 1: batch["M"]},
        {0: batch["R"]},
    ]
    pasts = tuple({0: batch["P"]} for _ in range(2 * draft.config.num_layers))
    bytes_of_weights = sum(
        t.numel() * t.element_size()
        for t in [*graph.state_dict().values(), graph._draft.embedding, graph._draft.lm_head]
    )
    with quiet_torch(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(*shapes, pasts),
            input_names=input_names(draft.config.num_layers),
            output_names=output_names(draft.config.num_layers),
            verbose=False,
        )
        assert program is not None
        _forget_origin(program.model)
        program.save(path, external_data=bytes_of_weights > MAX_INLINE_BYTES)
    check_graph(path, draft.config.num_layers)


def _forget_origin(model: Any) -> None:
    """Drop what the exporter notes of the Python it traced: stack traces with this machine's paths."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def check_graph(path: Path, num_layers: int) -> None:
    """Assert the contract: opset, standard operators only, the attention operator, names in order."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)], f"opsets {model.opset_import}"
    assert not model.functions, f"functions {[f.name for f in model.functions]}"
    assert {node.domain for node in model.graph.node} <= {""}, "operators beyond the standard"
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Attention") == num_layers, (
        f"{operators.count('Attention')} Attention operators, expected {num_layers}"
    )
    assert [i.name for i in model.graph.input] == input_names(num_layers), [i.name for i in model.graph.input]
    assert [o.name for o in model.graph.output] == output_names(num_layers), [o.name for o in model.graph.output]


def largest_difference(draft: DraftModel, path: Path, inputs: dict[str, Tensor]) -> float:
    """The largest absolute difference of hidden states and top log-probabilities between the graph at `path` and torch
    in float32.

    Log-probabilities are compared token by token at the graph's own choice, so that a near-tie that swaps two children
    is not a difference.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = dict(
        zip(
            [o.name for o in session.get_outputs()],
            session.run(None, {k: v.numpy() for k, v in inputs.items()}),
            strict=True,
        )
    )
    with torch.no_grad():
        past = [inputs[name].float() for name in input_names(draft.config.num_layers)[5:]]
        names = ("input_ids", "features", "position_ids", "attention_mask", "logit_rows")
        graph = DraftGraph(draft.float(), draft.config.vocab_size)
        plain = [inputs[name].float() if name == "features" else inputs[name] for name in names]
        ids, log_probs, _, *_ = graph(*plain, *past)
        hidden, _ = draft(
            inputs["input_ids"][None],
            inputs["features"].float()[None],
            inputs["position_ids"],
            inputs["attention_mask"],
            [(past[i].permute(1, 0, 2)[None], past[i + 1].permute(1, 0, 2)[None]) for i in range(0, len(past), 2)],
        )
    by_token = torch.empty_like(log_probs).scatter_(1, ids, log_probs).numpy()  # [R, V]
    expected_log_probs: NDArray[np.float32] = np.take_along_axis(by_token, outputs["top_token_ids"], axis=1)
    expected_hidden = hidden[0][inputs["logit_rows"]].numpy()
    return max(
        float(np.abs(outputs["top_log_probs"] - expected_log_probs).max()),
        float(np.abs(outputs["hidden_states"].astype(np.float32) - expected_hidden).max()),
    )
