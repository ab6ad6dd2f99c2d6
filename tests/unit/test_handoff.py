"""What is handed to other servers fits their published schemas, and the image has the bundle's files, each a layer."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from manyeyes.errors import BundleError
from manyeyes.runtime.bundle_contents import DECODER, digest_files, pulled_variants, read_manifest
from manyeyes.serving.handoff import default_image, render_kserve, render_kubernetes, write_oci_layout
from tests.cli_calls import call
from tests.registry_store import add_variant, make_bundle
from tests.trainjob_server import _closed

URI = "oci://registry.example/team/model:1"
ROOT = Path(__file__).parents[2]


def blob(layout: Path, descriptor: dict[str, Any]) -> bytes:
    content = (layout / "blobs" / "sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()
    assert hashlib.sha256(content).hexdigest() == descriptor["digest"].removeprefix("sha256:")
    assert len(content) == descriptor["size"]
    return content


def read_layout(layout: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Layers of the image, and the files in them; each blob is checked."""
    assert json.loads((layout / "oci-layout").read_text(encoding="utf-8")) == {"imageLayoutVersion": "1.0.0"}
    (named,) = json.loads((layout / "index.json").read_text(encoding="utf-8"))["manifests"]
    images = [json.loads(blob(layout, image)) for image in json.loads(blob(layout, named))["manifests"]]
    assert images[0]["layers"] == images[1]["layers"]
    config = json.loads(blob(layout, images[0]["config"]))
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in images[0]["layers"]]
    files = {}
    for layer in images[0]["layers"]:
        blob(layout, layer)
        with tarfile.open(layout / "blobs" / "sha256" / layer["digest"].removeprefix("sha256:")) as tar:
            (entry,) = tar.getmembers()
            content = tar.extractfile(entry)
            assert content is not None
            files[entry.name] = content.read()
            assert (entry.mode, entry.uid, entry.mtime) == (0o644, 0, 0)
    return images[0]["layers"], files


def test_image_has_each_file_of_the_bundle_in_a_layer_of_its_own_and_versions_share_them(tmp_path: Path) -> None:
    first, second = make_bundle(tmp_path / "1", "a"), tmp_path / "2"
    shutil.copytree(first, second)
    (second / DECODER).write_bytes(b"trained on")
    manifest = json.loads((second / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][DECODER] = {"sha256": hashlib.sha256(b"trained on").hexdigest(), "bytes": 10}
    manifest["digest"] = digest_files(manifest["files"])
    (second / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    digests = [write_oci_layout(bundle, tmp_path / f"oci-{bundle.name}", tag="t") for bundle in (first, second)]
    layers, files = read_layout(tmp_path / "oci-1")
    assert files == {f"models/{file.relative_to(first)}": file.read_bytes() for file in first.rglob("*.*")}
    others, _ = read_layout(tmp_path / "oci-2")
    shared = {layer["digest"] for layer in layers} & {layer["digest"] for layer in others}
    assert len(shared) == len(layers) - 2, "all but the decoder and the manifest"
    assert write_oci_layout(first, tmp_path / "again", tag="t") == digests[0] != digests[1]


def test_damaged_bundle_is_not_handed_on(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "1", "a")
    file = next(path for path in bundle.glob("*.json") if path.name != "manifest.json")
    file.write_bytes(file.read_bytes()[::-1] + b"x")
    with pytest.raises(BundleError):
        write_oci_layout(bundle, tmp_path / "oci", tag="t")
    assert not (tmp_path / "oci").exists()


def test_deployment_and_service_fit_kubernetes_schema_and_need_no_rights() -> None:
    deployment, service = yaml.safe_load_all(render_kubernetes("toy", image=default_image(), models=URI))
    for manifest in (deployment, service):
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod["volumes"][0]["image"]["reference"] == "registry.example/team/model:1"
    assert container["command"][2].startswith(container["volumeMounts"][0]["mountPath"])
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("uri", [URI, "oci+native://registry.example/team/model:1", "s3://bucket/bundle"])
def test_inference_service_fits_kserves_schema(uri: str) -> None:
    schema = _closed(json.loads((ROOT / "tests/inferenceservice_crd.json").read_text(encoding="utf-8")))
    schema["properties"]["metadata"] = {"type": "object"}
    service = yaml.safe_load(render_kserve("toy", image=default_image(), models=uri))
    jsonschema.Draft202012Validator(schema).validate(service)
    predictor = service["spec"]["predictor"]
    assert predictor["storageUris"] == [{"uri": uri, "mountPath": predictor["containers"][0]["command"][2]}]
    del predictor["containers"][0]["name"]
    with pytest.raises(jsonschema.ValidationError, match="name"):
        jsonschema.Draft202012Validator(schema).validate(service)


def test_one_variant_is_handed_on_without_the_files_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = add_variant(make_bundle(tmp_path / "1", "a"))
    for target in ("oci", "triton", "kubernetes", "kserve"):
        command = ["handoff", str(bundle), str(tmp_path / target), "--to", target, "--uri", URI, "--variant"]
        assert call(monkeypatch, *command, "int4") == 0
        assert call(monkeypatch, *command[:2], str(tmp_path / "none"), *command[3:], "int3") == 2
        assert "this bundle has default, int4" in capsys.readouterr().err
    _, files = read_layout(tmp_path / "oci")
    names = {file.relative_to(bundle).as_posix() for file in bundle.rglob("*.*")} - {DECODER}
    assert files.keys() == {f"models/{name}" for name in names}
    handed = tmp_path / "triton" / "tiny" / "1" / "bundle"
    assert {file.relative_to(handed).as_posix() for file in handed.rglob("*.*")} == names
    for target in ("kubernetes", "kserve"):
        assert (tmp_path / target).read_text(encoding="utf-8").count("- --variant") == 1
    # What was pulled for one variant is that variant.
    assert pulled_variants(tmp_path / "triton" / "tiny" / "1" / "bundle", read_manifest(bundle)) == ["int4"]
    write_oci_layout(tmp_path / "triton" / "tiny" / "1" / "bundle", tmp_path / "again", tag="t")
    assert read_layout(tmp_path / "again")[1] == files


def test_names_and_places_that_no_cluster_takes_are_refused() -> None:
    for render in (render_kubernetes, render_kserve):
        for name, uri in (("Toy", URI), ("a" * 60, URI), ("toy", "")):
            with pytest.raises(BundleError):
                render(name, image="i", models=uri)
    with pytest.raises(BundleError, match="OCI image"):
        render_kubernetes("toy", image="i", models="s3://bucket/bundle")


def test_command_writes_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "1", "a")
    for target in ("oci", "kubernetes", "kserve"):
        out = tmp_path / target
        assert call(monkeypatch, "handoff", str(bundle), str(out), "--to", target, "--uri", URI) == 0
        assert capsys.readouterr().out.startswith(str(out))
    assert (tmp_path / "oci" / "index.json").is_file()
    assert (tmp_path / "kserve").read_text(encoding="utf-8").startswith("apiVersion: serving.kserve.io/v1beta1")
