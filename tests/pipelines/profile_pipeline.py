"""A small pipeline for the golden files of the profiles: steps of every kind, one of them in a nested pipeline.

After a profile or its compiler changed: ``python -m tests.pipelines.profile_pipeline``, and read the difference.
"""

# kfp reads the annotations themselves: no future import here.
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl

IMAGE = "registry.example/manyeyes-steps@sha256:" + "0" * 64
GOLDEN = Path(__file__).with_name("golden")
PROFILES = ("cluster", "laptop")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(recipe: str) -> str:
    return recipe


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sft(recipe: str) -> str:
    return recipe


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(recipe: str) -> str:
    return recipe


@dsl.pipeline(name="stages")
def stages(recipe: str) -> str:
    with dsl.ParallelFor(["a", "b"]):
        sft(recipe=recipe)
    return sft(recipe=recipe).output


@dsl.pipeline(name="profiled")
def profiled(recipe: str = "tiny") -> None:
    resolved = preflight(recipe=recipe).set_env_variable("MANYEYES_IMAGE_DIGEST", "sha256:" + "0" * 64)
    register(recipe=stages(recipe=resolved.output).output)


def compile_plain(folder: Path) -> list[dict[str, Any]]:
    """The pipeline without a profile."""
    path = folder / "profiled.yaml"
    compiler.Compiler().compile(profiled, package_path=str(path))
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def compile_golden(profile: str, folder: Path) -> str:
    """What the golden file of a profile holds."""
    from manyeyes.kubeflow.profiles import apply_profile, load_profile

    documents = apply_profile(compile_plain(folder), load_profile(profile, root=Path(__file__).parents[2]))
    documents[0].pop("sdkVersion")
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        # The text of the SDK's wrapper, which changes with its version.
        executor["container"].pop("command")
    return yaml.safe_dump_all(documents, sort_keys=True, width=120)


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in PROFILES:
            (GOLDEN / f"{name}.yaml").write_text(compile_golden(name, Path(scratch)), encoding="utf-8")
