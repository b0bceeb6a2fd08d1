"""Launches, bytes and the longest chain of a traced step, by block of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ledger.dispatches import Device, Launch
from ledger.graph import Array, Graph, Node
from ledger.steps import Blank
from moelocal.config import AttentionSpec, DeltaNetSpec, ModelConfig, MoESpec
from moelocal.model import Decoder

BLOCKS = (
    "embedding",
    "norms and residuals",
    "delta net",
    "attention",
    "router",
    "experts",
    "head",
    "sampling",
)
"""Where launches are counted. `experts` is the feed-forward of a dense model, too."""

_THROUGH = {
    "Reshape",
    "Flatten",
    "Unflatten",
    "Squeeze",
    "ExpandDims",
    "Transpose",
    "Broadcast",
    "Slice",
    "Split",
}
_THROUGH |= {"StopGradient", "Copy", "Depends", "View", "AsStrided", "Contiguous"}


@dataclass(slots=True)
class Block:
    """Counts of one block. `weights` and `caches` are bytes read or written there, `activations` the bytes of all other
    inputs and outputs of its kernels."""

    launches: int = 0
    weights: int = 0
    caches: int = 0
    activations: int = 0
    kernels: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Count:
    blocks: dict[str, Block]
    longest_chain: int

    @property
    def launches(self) -> int:
        return sum(block.launches for block in self.blocks.values())

    @property
    def nbytes(self) -> int:
        """Weights and caches."""
        return sum(block.weights + block.caches for block in self.blocks.values())


def count(graph: Graph, config: ModelConfig, context: int) -> Count:
    """Count a step of a model behind `context` tokens."""
    device = Device(graph)
    blocks = {name: Block() for name in BLOCKS}
    names = _block_names(graph)
    for launch in device.launches:
        block = blocks[names[id(launch.node)]]
        block.launches += len(launch.kernels)
        for kernel in map(_short, launch.kernels):
            block.kernels[kernel] = block.kernels.get(kernel, 0) + 1
        _traffic(launch, block, device, config, context)
    for array in graph.outputs[graph.results :]:
        source = _source(array)
        if source is not None and source.name != "Held":
            block = blocks[names[id(source)]]
            written = source.inputs[1].nbytes if source.name == "SliceUpdate" else array.nbytes
            block.caches += written
            block.activations -= written
    return Count(blocks, _longest(graph, device))


def _short(kernel: str) -> str:
    """A kernel's name without the shapes and dtypes that MLX appends."""
    return kernel.split("__")[0]


def _source(array: Array) -> Node | None:
    """What computes an array: views and reshapes are looked through."""
    node = array.source
    while node is not None and node.name in _THROUGH:
        node = node.inputs[0].source
    return node


def _kind(array: Array) -> str:
    """Whose memory an array is: "weights" (any constant), "caches" or "activations"."""
    node = _source(array)
    while node is not None and node.name in ("SliceUpdate", "DynamicSliceUpdate"):  # written in place
        node = _source(node.inputs[0])
    if node is None:
        return "weights"
    return "caches" if node.name == "Held" else "activations"


def _traffic(launch: Launch, block: Block, device: Device, config: ModelConfig, context: int) -> None:
    """Each kernel reads an input once, however often it is given, and writes its outputs once. Of tables it reads rows:
    of an embedding those of the tokens, of stacked experts the chosen ones, and our attention kernel of a cache those
    that are filled."""
    node = launch.node
    experts = next((layer.mlp for layer in config.layers if isinstance(layer.mlp, MoESpec)), None)
    for position, array in enumerate(dict.fromkeys(node.inputs)):
        strides = device.layout(array).strides
        size = array.dtype.size
        for length, stride in zip(array.shape, strides, strict=True):
            size *= length if stride else 1
        if node.name in ("Gather", "GatherAxis") and position == 0:
            size = node.outputs[0].nbytes
        elif node.name in ("SliceUpdate", "DynamicSliceUpdate") and position == 0:
            size = 0
        elif (
            experts and len(array.shape) == 3 and array.shape[0] == experts.experts and _source(array) is None
        ):
            size = size * experts.per_token // experts.experts
        elif launch.kernels[0].startswith("moelocal_attend_block") and _kind(array) == "caches":
            size = size * (context + 1) // array.shape[2]
        kind = _kind(array)
        setattr(block, kind, getattr(block, kind) + size)
    for array in node.outputs:
        block.activations += node.inputs[1].nbytes if node.name == "SliceUpdate" else array.nbytes


def _longest(graph: Graph, device: Device) -> int:
    """Launches on the longest path through the graph."""
    steps = {id(launch.node): launch.steps for launch in device.launches}
    depth: dict[int, int] = {}
    for node in graph.nodes:
        before = max((depth[id(a.source)] for a in node.inputs if a.source is not None), default=0)
        depth[id(node)] = before + steps.get(id(node), 0)
    return max(depth.values())


def _block_names(graph: Graph) -> dict[int, str]:
    """The block of every node, from the functions that it was made in."""
    names: dict[int, str] = {}
    behind_experts: set[int] = set()
    for node in graph.nodes:
        name = _named(node.path)
        if name == "feed-forward":
            inner = any(
                part.startswith(("SwitchGLU", "Qwen3NextMLP", "MLP", "op experts")) for part in node.path
            )
            if inner or any(id(a.source) in behind_experts for a in node.inputs):
                behind_experts.add(id(node))
                name = "experts"
            else:
                name = "router"
        names[id(node)] = name
    return names


def _named(path: tuple[str, ...]) -> str:
    places = [part.split(".")[0] for part in path if not part.startswith(("compiled", "op "))]
    if not places or places[0] in ("Sampler", "MlxLm"):
        return "sampling"
    for place in places:
        if place in ("DeltaNet", "GatedDeltaNet", "Qwen3NextGatedDeltaNet"):
            return "delta net"
        if place in ("Attention", "AttentionCache", "Qwen3NextAttention"):
            return "attention"
        if place in ("MoE", "Qwen3NextSparseMoeBlock", "Qwen3MoeSparseMoeBlock"):
            return "feed-forward"
        if place in ("Dense", "Qwen3NextMLP", "MLP"):
            return "experts"
    if path[0] in ("Decoder.embed", "QuantizedEmbedding", "Embedding"):
        return "embedding"
    if path[0] == "Decoder.logits" or places[0] in ("RMSNorm", "QuantizedLinear"):
        return "head"
    return "norms and residuals"


_PLACES = {
    "embed_tokens": "embedding", "linear_attn": "delta net", "self_attn": "attention", "gate": "router",
    "shared_expert_gate": "router", "mlp": "experts", "input_layernorm": "norms and residuals",
    "post_attention_layernorm": "norms and residuals", "norm": "head", "lm_head": "head",
}  # fmt: skip


def minimum(raw: Mapping[str, Any], context: int) -> dict[str, int]:
    """Bytes that a step cannot do without, by block: every weight once (of experts the chosen ones, of the embedding a
    row), states read and written, the keys and values of `context` tokens read and those of one token written."""
    config = ModelConfig.parse(raw)
    blank = Blank(config)
    Decoder(blank, mx.bfloat16, evaluate=False)
    least = dict.fromkeys(BLOCKS, 0)
    for name, arrays in blank.asked.items():
        parts = name.removesuffix(".weight").split(".")
        place = next(
            _PLACES[p] for p in (parts[-1], *parts) if p in _PLACES and not (p == "norm" and len(parts) > 1)
        )
        size = sum(array.nbytes for array in arrays)
        if place == "embedding":
            least["head"] += size if config.tied else 0
            size //= config.vocab
        elif "switch_mlp" in parts:
            mlp = config.layers[int(parts[1])].mlp
            assert isinstance(mlp, MoESpec)
            size = size * mlp.per_token // mlp.experts
        least[place] += size
    item = mx.bfloat16.size
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, DeltaNetSpec):
            state = mixer.value_heads * mixer.value_dim * mixer.key_dim * mx.float32.size
            least["delta net"] += 2 * state + 2 * (mixer.conv_width - 1) * mixer.conv_channels * item
        elif isinstance(mixer, AttentionSpec):
            least["attention"] += 2 * (context + 1 + 1) * mixer.kv_heads * mixer.head_dim * item
    return least
