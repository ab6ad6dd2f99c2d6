"""The software bill of materials of a version, as CycloneDX: its files, what it was made of, and what runs it.

Source:
    https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from manyeyes import __version__
from manyeyes.registry.carried import RUNTIME_PACKAGES
from manyeyes.registry.lineage import NOT_STATED, Lineage, PretrainedPart, installed_packages
from manyeyes.sources import hub_id, split_pin


def render_sbom(manifest: Mapping[str, Any], lineage: Lineage | None) -> str:
    """CycloneDX 1.6, as JSON.

    The model is the component that the document is about; its files are inside that. Pretrained parts and data sets
    stand beside it with their licences, ``not stated`` where nobody says one. Of the Python packages those that run a
    bundle have the scope ``required``, the others of the environment that registered it ``excluded``.

    Args:
        manifest: The bundle's, from ``read_manifest``.
        lineage: What it was made of; without it only files and the packages that run it are known.
    """
    model = Component(
        name=str(manifest["recipe"]),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        version=str(manifest["digest"])[:12],
        description=lineage.description if lineage else None,
        components=[
            Component(
                name=name,
                type=ComponentType.FILE,
                bom_ref=f"file:{name}",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file["sha256"])],
                properties=[Property(name="manyeyes:bytes", value=str(file["bytes"]))],
            )
            for name, file in manifest["files"].items()
        ],
        properties=[
            Property(name=f"manyeyes:{name}", value=str(manifest[name]))
            for name in ("digest", "recipe_digest", "data_md5", "code_digest", "checkpoint_digest")
        ],
    )
    bom = Bom(components=[*_parts(lineage), *_datasets(lineage), *_packages(lineage)])
    # The same bundle made of the same things has the same number, wherever it is written.
    made_of = f"{manifest['digest']} {lineage.model_dump_json() if lineage else ''}"
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, made_of)
    bom.metadata.component = model
    bom.metadata.tools.components.add(Component(name="manyeyes", version=__version__, type=ComponentType.APPLICATION))
    bom.register_dependency(model, bom.components)
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def _licences(text: str) -> list[Any]:
    return [] if text == NOT_STATED else [LicenseFactory().make_from_string(text)]


def _stated(text: str) -> list[Property]:
    return [Property(name="manyeyes:licence", value=NOT_STATED)] if text == NOT_STATED else []


def _parts(lineage: Lineage | None) -> Iterator[Component]:
    for part in lineage.pretrained if lineage else ():
        place, sha256 = split_pin(part.source)
        yield Component(
            name=hub_id(part.source) or place,
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref=f"pretrained:{part.part}:{part.source}",
            version=place.partition("@")[2] or None,
            purl=_purl(part),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else [],
            licenses=_licences(part.licence),
            properties=[Property(name="manyeyes:part", value=part.part), *_stated(part.licence)],
        )


def _purl(part: PretrainedPart) -> PackageURL | None:
    scheme, _, rest = part.source.partition(":")
    if scheme == "hub":
        owner, _, name = hub_id(part.source).rpartition("/")
        return PackageURL("huggingface", owner or None, name, part.source.partition("@")[2])
    return PackageURL("pypi", name=rest.partition("/")[0]) if scheme == "package" else None


def _datasets(lineage: Lineage | None) -> Iterator[Component]:
    for dataset in lineage.datasets if lineage else ():
        yield Component(
            name=dataset.name,
            type=ComponentType.DATA,
            bom_ref=f"data:{dataset.use}:{dataset.name}",
            description=dataset.source or None,
            licenses=_licences(dataset.licence),
            properties=[Property(name="manyeyes:use", value=dataset.use), *_stated(dataset.licence)],
        )


def _packages(lineage: Lineage | None) -> Iterator[Component]:
    installed = lineage.packages if lineage else installed_packages()
    for name, version in installed.items():
        plain = re.sub(r"[-_.]+", "-", name).lower()  # as the package index compares names
        required = plain in RUNTIME_PACKAGES or plain.startswith("onnxruntime")
        if required or lineage:
            yield Component(
                name=name,
                type=ComponentType.LIBRARY,
                bom_ref=f"pypi:{name}",
                version=version,
                purl=PackageURL("pypi", name=plain, version=version),
                scope=ComponentScope.REQUIRED if required else ComponentScope.EXCLUDED,
            )
