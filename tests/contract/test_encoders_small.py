"""Every row at the small size keeps the promises of an encoder."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from manyeyes.encoders import ENCODERS, FAMILIES, BlockEncoder, build_encoder
from manyeyes.encoders.encoder import Encoder
from manyeyes.errors import ShapeError
from manyeyes.model import ManyEyesConfig, ManyEyesForConditionalGeneration
from tests.pretended_cuda import pretended_cuda


def _variants() -> list[str]:
    """One row for each small network: rows that differ in nothing but the image size are one."""
    seen: dict[str, str] = {}
    for name, row in ENCODERS.items():
        small = {**row.architecture, **row.small}
        network = (
            FAMILIES[row.family].build.__qualname__,
            FAMILIES[row.family].build.__module__,
            sorted(small.items()),
        )
        seen.setdefault(repr((network, row.small_image_size)), name)
    return list(seen.values())


VARIANTS = _variants()
BLOCKS = [name for name in VARIANTS if isinstance(build_encoder(name, small=True), BlockEncoder)]


def pixels_for(encoder: Encoder, *, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, encoder.image_size, encoder.image_size, generator=generator)


def small(name: str) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(name, small=True)


@pytest.mark.parametrize("name", ENCODERS)
def test_feature_map_has_the_stated_shape_and_eval_is_deterministic(name: str) -> None:
    encoder = small(name).eval()
    pixels = pixels_for(encoder)
    with torch.no_grad():
        features = encoder(pixels)
        assert features.shape == (2, encoder.channels, encoder.grid, encoder.grid)
        assert features.std() > 0
        assert torch.equal(features, encoder(pixels))
        # An image does not depend on what else is in the batch.
        torch.testing.assert_close(encoder(pixels[1:]), features[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_encoder_runs_on_a_gpu(name: str) -> None:
    encoder = small(name).eval()
    pixels = pixels_for(encoder)
    with torch.no_grad():
        expected = encoder(pixels)
    with pretended_cuda() as cuda:
        features = encoder.to(cuda)(pixels.to(cuda))
        features.square().sum().backward()
        torch.testing.assert_close(features.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_same_seed_gives_the_same_encoder(name: str) -> None:
    first, second = small(name).state_dict(), small(name).state_dict()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_reaches_every_parameter(name: str) -> None:
    """A parameter that nothing uses would stall distributed training."""
    encoder = small(name)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    (encoder(pixels_for(encoder)) ** 2 * torch.linspace(0.5, 1.5, encoder.channels)[:, None, None]).sum().backward()
    idle = {key for key, parameter in encoder.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert not idle


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_passes_a_frozen_encoder_to_the_pixels(name: str) -> None:
    encoder = small(name).requires_grad_(False)
    pixels = pixels_for(encoder).requires_grad_()
    encoder(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())


def _kept_and_gradients(encoder: Encoder) -> tuple[int, list[Tensor]]:
    """Bytes that the forward pass keeps for the backward pass, parameters left out; and the gradients."""
    parameters = {parameter.data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = encoder(pixels_for(encoder)).square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    for parameter in encoder.parameters():
        parameter.grad = None
    return sum(kept.values()), gradients


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(name: str) -> None:
    encoder = small(name)
    whole, expected = _kept_and_gradients(encoder)
    encoder.set_checkpointing(True)
    kept, found = _kept_and_gradients(encoder)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert kept < 0.9 * whole
    encoder.eval()
    assert _kept_and_gradients(encoder)[0] > kept  # only while training


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks_in_groups_are_the_whole_encoder(name: str) -> None:
    encoder = small(name).eval()
    assert isinstance(encoder, BlockEncoder)
    pixels = pixels_for(encoder)
    tokens = encoder.embed(pixels)
    assert tokens.shape[2] == encoder.width
    for index in range(encoder.num_blocks):
        tokens = encoder.forward_blocks(tokens, start=index, stop=index + 1)
    assert torch.equal(encoder.finish(tokens), encoder(pixels))
    # Patches stand behind the prefix tokens, row by row.
    patches = tokens.shape[1] - encoder.num_prefix_tokens
    assert patches == int(patches**0.5) ** 2


@pytest.mark.parametrize("name", VARIANTS)
def test_onnx_graph_computes_the_same_for_any_batch(name: str, tmp_path: Path) -> None:
    encoder = small(name).eval()
    path = tmp_path / "encoder.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        # torch.onnx with dynamo warns about its own internals; the graph is what is tested.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            encoder,
            (pixels_for(encoder),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("images")},),
            verbose=False,
        )
        assert program is not None
        program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        pixels = pixels_for(encoder, batch=batch)
        (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, encoder(pixels).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "efficientnet" not in name and "pix2struct" not in name])
def test_image_size_that_does_not_fit_is_refused_with_the_nearest(name: str) -> None:
    if "so400m" in name:
        assert build_encoder(name, small=True, image_size=61).grid == 4
        return
    with pytest.raises(ShapeError, match="a multiple of"):
        build_encoder(name, small=True, image_size=101)


def _model() -> ManyEyesForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, pad_token_id=0
    )
    entries = [
        {"name": name, "encoder": name, "image_size": small(name).image_size, "small": True} for name in VARIANTS
    ]
    config = ManyEyesConfig(
        text_config=text,
        encoders=entries,
        fusion={"strategy": "channel-concat", "grid": 2},
        projector={"kind": "linear", "depth": 1},
    )
    model = ManyEyesForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.encoders.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model


@torch.no_grad()
def save_features(model: ManyEyesForConditionalGeneration, path: Path) -> None:
    pixels = {name: pixels_for(encoder) for name, encoder in model.encoders.items() if isinstance(encoder, Encoder)}
    torch.save(model.encoder_features(pixels), path)


def test_saved_encoders_load_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    """from_pretrained builds on the meta device: a table that is not saved must be filled again."""
    model = _model()
    model.save_pretrained(tmp_path / "checkpoint")
    save_features(model, tmp_path / "here.pt")
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from manyeyes.model import ManyEyesForConditionalGeneration\n"
        "from tests.contract.test_encoders_small import save_features\n"
        "folder = Path(sys.argv[1])\n"
        "model = ManyEyesForConditionalGeneration.from_pretrained(folder / 'checkpoint').eval()\n"
        "save_features(model, folder / 'there.pt')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    here, there = (torch.load(tmp_path / name) for name in ("here.pt", "there.pt"))
    assert list(here) == VARIANTS
    differing = [name for name in here if not torch.equal(here[name], there[name])]
    assert not differing


def test_tables_that_are_not_saved_survive_the_meta_device() -> None:
    for name in ("eva02-l16-det-1024", "pix2struct-l16-1024", "stable-diffusion-v21-512"):
        encoder = small(name).eval()
        with torch.device("meta"):
            empty = build_encoder(name, small=True)
        empty.to_empty(device="cpu")
        _spoil(empty)
        empty.load_state_dict(encoder.state_dict())
        for module in empty.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
        pixels = pixels_for(encoder)
        assert torch.equal(empty.eval()(pixels), encoder(pixels)), name


def _spoil(module: nn.Module) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(float("nan"))
