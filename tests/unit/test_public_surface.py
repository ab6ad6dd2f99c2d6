"""What services and scripts import: a name or a parameter goes only when this file says so."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

PUBLIC = {
    "manyeyes.runtime": (
        "AnswerPiece Bundle Chat ChatAnswer Engine GeneratedAnswer Group ImageCache ImageLike ImageTokens Sampling "
        "load_bundle"
    ),
    "manyeyes.model": (
        "BranchAnswers BranchBatch BranchOutput CheckpointManifest ManyEyesConfig ManyEyesForConditionalGeneration "
        "ManyEyesOutput ManyEyesProcessor build_encoders build_model build_processor build_skeleton checkpoint_digest "
        "load_checkpoint match_checkpoint save_checkpoint write_manifest"
    ),
    "manyeyes.errors": (
        "INTERRUPTED NOT_PROMOTED OTHER_ERROR USER_ERROR BundleError CheckpointError DataError DrawingError "
        "EndpointError EvaluationError FetchError LockedError ManyEyesError PipelineError PreflightError "
        "ProcessLostError RecipeError RecordError RegistryError RegistryUnreachableError ServiceError ShapeError "
        "SnapshotError SourceError StorageError ValidationError did_you_mean"
    ),
}

SIGNATURES = {
    ("manyeyes.runtime", "load_bundle"): (
        "(path: 'str | Path', *, providers: 'Sequence[str] | None' = None, threads: 'int | None' = None, "
        "verify: 'bool' = True, image_cache: 'ImageCache | None' = None, "
        "variant: 'str | None' = None, prefill: 'bool | None' = None) -> 'Bundle'"
    ),
    ("manyeyes.runtime", "Bundle.answer"): (
        "(self, question: 'str', *, images: 'ImageLike | Sequence[ImageLike]' = (), max_new_tokens: 'int' = 32) "
        "-> 'str'"
    ),
    ("manyeyes.model", "load_checkpoint"): (
        "(path: 'Path', *, spec: 'ModelSpec | None' = None, dtype: 'torch.dtype | None' = None) "
        "-> 'tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]'"
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_these_and_each_of_them_is_there(name: str) -> None:
    module = importlib.import_module(name)

    assert sorted(module.__all__) == sorted(PUBLIC[name].split())
    for public in module.__all__:
        assert getattr(module, public) is not None
        assert public in dir(module)


@pytest.mark.parametrize(("module", "name"), SIGNATURES)
def test_signature_of_what_services_call_is_this(module: str, name: str) -> None:
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)

    assert str(inspect.signature(found)) == SIGNATURES[module, name]  # type: ignore[arg-type]


def test_every_error_and_exit_code_is_public() -> None:
    errors = importlib.import_module("manyeyes.errors")
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    codes = {name for name, value in vars(errors).items() if isinstance(value, int)}

    assert defined | codes == set(errors.__all__) - {"did_you_mean"}


def test_runtime_package_itself_loads_neither_onnx_runtime_nor_pillow() -> None:
    script = (
        "import sys, manyeyes.runtime\n"
        "assert not {'onnxruntime', 'numpy', 'PIL', 'tokenizers'} & set(sys.modules)\n"
        "assert manyeyes.runtime.load_bundle.__module__ == 'manyeyes.runtime.bundle'\n"
        "assert 'onnxruntime' in sys.modules"
    )

    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_name_of_the_runtime_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"manyeyes\.runtime.*load_bundles"):
        _ = importlib.import_module("manyeyes.runtime").load_bundles
