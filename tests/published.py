"""Wheels as an index has them, forged small: what lies in them has the formats of the published ones."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from mmicl_core.data.embedding import MOBILENET
from mmicl_core.data.files import file_digest
from mmicl_core.data.packages import Wheel
from tests.family_parts import make_tokenizer, spread_weights

__all__ = ["forge_wheel", "write_checkpoint", "write_language_model"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH, HIDDEN, BLOCKS, HEADS, KV_HEADS, LONGEST = 64, 96, 2, 2, 1, 256
MATRICES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // HEADS * KV_HEADS, WIDTH),
    "attn_v": (WIDTH // HEADS * KV_HEADS, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (HIDDEN, WIDTH),
    "ffn_up": (HIDDEN, WIDTH),
    "ffn_down": (WIDTH, HIDDEN),
}


def forge_wheel(project: str, member: str, part: Path, folder: Path) -> Wheel:
    """Publish a file as a wheel in `folder`; gives what is known of it."""
    wheel = Wheel(project, "1.0", "", member)
    stem = project.replace("-", "_")
    about = f"{stem}-{wheel.version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / wheel.file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(part, member)
        # Whatever runs code of a package runs this.
        archive.writestr(f"{stem}/__init__.py", "raise AssertionError('code of a package was run')\n")
        told = f"Metadata-Version: 2.1\nName: {project}\nVersion: {wheel.version}\nRequires-Dist: nobody\n"
        archive.writestr(f"{about}/METADATA", told)
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return Wheel(project, wheel.version, file_digest(folder / wheel.file), member)


def write_checkpoint(path: Path) -> None:
    """MobileNetV2 as torchvision keeps it: tensors in its order, under other names than Hugging Face's."""
    model = MobileNetV2ForImageClassification(MobileNetV2Config(**MOBILENET))
    spread_weights(model, seed=0)
    torch.save({f"tensor.{n}": tensor for n, tensor in enumerate(model.state_dict().values())}, path)


def write_language_model(path: Path) -> None:
    """A small Llama as llama.cpp keeps it: 4-bit matrices, its tokenizer and chat template beside them."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("Small")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(LONGEST)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    words = _add_tokenizer(writer)
    draw = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
        values = draw.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd", (words, WIDTH), GGMLQuantizationType.Q8_0)
    for block in range(BLOCKS):
        for name, shape in MATRICES.items():
            add(f"blk.{block}.{name}", shape, GGMLQuantizationType.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{name}", (WIDTH,), GGMLQuantizationType.F32)
    add("output_norm", (WIDTH,), GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter) -> int:
    unknown, start, end = SPECIAL
    named = {"unk_token": unknown, "bos_token": start, "eos_token": end}
    model = json.loads(make_tokenizer(named).backend_tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [TokenType.CONTROL if word in SPECIAL else TokenType.NORMAL for word in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_unk_token_id(words.index(unknown))
    writer.add_bos_token_id(words.index(start))
    writer.add_eos_token_id(words.index(end))
    writer.add_pad_token_id(words.index(end))
    writer.add_add_bos_token(False)
    writer.add_vocab_size(len(words))
    return len(words)
