"""Write the trained weights as a checkpoint in the layout of the original releases.

`python tools/embedded/export.py --work DIR [--to FOLDER]`: config.json and model.safetensors (bfloat16) beside the
tokenizer and template that lie in the folder already.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from model import Embedded, OffsetNorm, Shape
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "src" / "moelocal" / "embedded"


def config(s: Shape, tokenizer: Path) -> dict:
    """The flagship's config.json with our sizes."""
    added = {t["content"]: t["id"] for t in json.loads(tokenizer.read_text())["added_tokens"]}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {
            "attention_bias": False,
            "attn_output_gate": True,
            "dtype": "bfloat16",
            "eos_token_id": added["<|endoftext|>"],
            "full_attention_interval": 4,
            "head_dim": s.head_dim,
            "hidden_act": "silu",
            "hidden_size": s.hidden,
            "layer_types": [
                "full_attention" if s.is_attention(i) else "linear_attention" for i in range(s.layers)
            ],
            "linear_conv_kernel_dim": s.conv_width,
            "linear_key_head_dim": s.delta_dim,
            "linear_num_key_heads": s.key_heads,
            "linear_num_value_heads": s.value_heads,
            "linear_value_head_dim": s.delta_dim,
            "mamba_ssm_dtype": "float32",
            "max_position_embeddings": 4096,
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": s.width,
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "num_attention_heads": s.heads,
            "num_experts": s.experts,
            "num_experts_per_tok": s.per_token,
            "num_hidden_layers": s.layers,
            "num_key_value_heads": s.kv_heads,
            "rms_norm_eps": s.eps,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [3, 3, 2],
                "partial_rotary_factor": s.rotary_dim / s.head_dim,
                "rope_theta": s.rope_base,
                "rope_type": "default",
            },
            "shared_expert_intermediate_size": s.shared_width,
            "tie_word_embeddings": False,
            "vocab_size": s.vocab,
        },
        "tie_word_embeddings": False,
    }


def exact_offset(w: Tensor) -> Tensor:
    """`w` rounded so that 1 + w is a bfloat16 number: mlx-lm adds the 1 in bfloat16, others in float32, and a rounding
    that only some of them do moves the logits by up to 0.6."""
    return (1 + w).to(torch.bfloat16).float() - 1


def export(model: Embedded, folder: Path) -> None:
    """Write config.json and model.safetensors into `folder`, each whole or not at all."""
    offsets = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, OffsetNorm)}
    tensors = {}
    for name, p in model.state_dict().items():
        stored = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        tensors[stored] = (exact_offset(p) if name in offsets else p).detach().to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    (folder / "model.tmp").chmod(0o644)  # save_file makes it private
    (folder / "model.tmp").replace(folder / "model.safetensors")
    text = json.dumps(config(model.shape, folder / "tokenizer.json"), indent=2) + "\n"
    (folder / "config.tmp").write_text(text)
    (folder / "config.tmp").replace(folder / "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=FOLDER)
    args = parser.parse_args()
    model = Embedded()
    state = torch.load(args.work / "state.pt", weights_only=False)
    model.load_state_dict(state["model"])
    export(model, args.to)
    print(f"step {state['done']['step']}, {state['done']['tokens']} tokens -> {args.to}")


if __name__ == "__main__":
    main()
