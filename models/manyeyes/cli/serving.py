"""``manyeyes serve``: a bundle behind an HTTP server."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click

from manyeyes.storage import cache_dir, check_out, is_there, write_file

MIB = 2**20


@click.command("serve")
@click.argument("model")
@click.option(
    "--variant", help="Which of the bundle's variants, for instance int4; of a registered one, it alone is fetched."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", default=8080, show_default=True, help="0 takes any that is free.")
@click.option("--threads", type=int, help="Threads a graph may use; every core by default.")
@click.option("--max-tokens", type=int, help="Slots of the batch; eight of the longest conversations by default.")
@click.option("--max-waiting", default=64, show_default=True, help="Requests that may wait; more get 429.")
@click.option("--cache-mb", default=256, show_default=True, help="MiB of images and prefixes to keep.")
@click.option("--max-body-mb", default=20, show_default=True, help="Largest body, and image that is fetched, in MiB.")
@click.option("--max-images", default=8, show_default=True, help="Images in one request.")
@click.option("--max-pixels", default=40_000_000, show_default=True, help="Width times height of an image.")
@click.option("--allow-image-host", "hosts", multiple=True, metavar="HOST", help="Fetch images from HOST, by http(s).")
@click.option("--follow-seconds", default=30.0, show_default=True, help="Between two looks at the alias.")
@click.option("--require-approved", is_flag=True, help="Refuse a version that nobody approved.")
@click.option(
    "--verify-key",
    type=click.Path(path_type=Path),
    help="Refuse a bundle that this public key does not vouch for; MANYEYES_VERIFY_KEY.",
)
@click.option("--stop-seconds", default=30.0, show_default=True, help="For running answers after SIGTERM.")
def serve_command(
    model: str,
    variant: str | None,
    host: str,
    port: int,
    threads: int | None,
    max_tokens: int | None,
    max_waiting: int,
    cache_mb: int,
    max_body_mb: int,
    max_images: int,
    max_pixels: int,
    hosts: tuple[str, ...],
    follow_seconds: float,
    require_approved: bool,
    verify_key: Path | None,
    stop_seconds: float,
) -> None:
    """Serve MODEL[@ALIAS or /VERSION], or the bundle in the folder MODEL, as OpenAI's chat completions.

    Another version at the alias takes over without a lost request. MANYEYES_API_KEYS holds the API keys, separated by
    commas; without it everybody may ask.
    """
    from manyeyes.runtime.bundle_contents import read_manifest
    from manyeyes.serving.app import Limits, run_server
    from manyeyes.serving.hosting import BundleSource, FolderSource, Host, RegistrySource, open_bundle
    from manyeyes.serving.images import ImageLimits

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder = Path(model)
    fixed = is_there(folder) and folder.is_dir()
    source: BundleSource = (
        FolderSource(folder, str(read_manifest(folder)["recipe"]), verify_key)
        if fixed
        # A folder of its own: old versions are deleted there.
        else RegistrySource(
            model,
            kept=cache_dir() / "served",
            require_approved=require_approved,
            variant=variant,
            verify_key=verify_key,
        )
    )
    limits = Limits(
        images=ImageLimits(max_images, max_pixels, max_body_mb * MIB, hosts),
        max_body_bytes=max_body_mb * MIB,
        max_waiting=max_waiting,
        stop_s=stop_seconds,
        keys=tuple(key for key in os.environ.get("MANYEYES_API_KEYS", "").split(",") if key),
    )
    serving = Host(
        source,
        lambda path: open_bundle(
            path, threads=threads, max_tokens=max_tokens, cache_bytes=cache_mb * MIB, variant=variant
        ),
    )
    run_server(
        serving,
        limits,
        address=(host, port),
        follow_s=None if fixed else follow_seconds,
        started=lambda port: click.echo(f"{serving.name} answers at http://{host}:{port}"),
    )


@click.command("handoff")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to", "target", type=click.Choice(["oci", "kubernetes", "kserve", "triton"]), required=True, help="What to write."
)
@click.option("--variant", help="Hand on this variant of the bundle alone, for instance int4; all by default.")
@click.option("--name", help="Of the service, or the image's tag; the recipe, or the bundle's digest, by default.")
@click.option("--uri", default="", help="Where the cluster finds the bundle: oci://REGISTRY/NAME:TAG, s3://..., ...")
@click.option("--image", help="The runtime image; manyeyes-runtime of this version by default.")
def handoff_command(
    model: str, out: Path, target: str, variant: str | None, name: str | None, uri: str, image: str | None
) -> None:
    """Write what other servers need of MODEL[@ALIAS or /VERSION], or of the bundle in the folder MODEL.

    oci (an image layout) and triton (a model repository) write the folder OUT, with the files of --variant where it is
    given; kubernetes and kserve the YAML file OUT, whose server then answers with that variant.
    """
    from manyeyes.runtime.bundle_contents import choose_variant, read_manifest
    from manyeyes.serving import handoff
    from manyeyes.serving.hosting import RegistrySource

    check_out(out, file=target in ("kubernetes", "kserve"))
    folder = Path(model)
    if not (is_there(folder) and folder.is_dir()):
        source = RegistrySource(model, kept=cache_dir() / "bundles", variant=variant)
        folder = source.fetch(source.find())
    manifest = read_manifest(folder)
    if target == "oci":
        tag = name or "-".join(filter(None, (str(manifest["digest"])[:12], variant)))
        digest = handoff.write_oci_layout(folder, out, tag=tag, variant=variant)
        click.echo(f"{out} ({digest})")
        return
    service = name or str(manifest["recipe"]).lower().replace("_", "-").replace(".", "-")
    if target == "triton":
        handoff.write_triton(folder, out, name=service, variant=variant)
        click.echo(str(out))
        return
    render = handoff.render_kserve if target == "kserve" else handoff.render_kubernetes
    if variant is not None:
        choose_variant(folder, manifest, variant)
    write_file(out, render(service, image=image or handoff.default_image(), models=uri, variant=variant))
    click.echo(str(out))
