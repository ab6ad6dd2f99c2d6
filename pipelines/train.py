"""From a recipe and a snapshot to a judged, registered model."""

# kfp reads the annotations themselves: no future import here.
from typing import NamedTuple

from kfp import dsl

from components.evaluate.component import evaluate
from components.export_onnx.component import export_onnx
from components.prealign_encoder.component import prealign_encoder
from components.preflight.component import preflight
from components.pretrain_projector.component import pretrain_projector
from components.register.component import register
from components.sft.component import sft
from components.summarise_run.component import summarise_run
from components.validate_data.component import validate_data


class Trained(NamedTuple):
    """What the stages leave to the gate and the registry."""

    scorecard: dsl.Artifact
    bundle_scorecard: dsl.Artifact
    bundle: dsl.Model
    parity: dsl.Artifact


# A pipeline of its own, because kfp.local 2.17 replaces every upstream parameter of a loop by the loop's item, and can
# loop over a task's output only when it is called Output (kfp/local/orchestrator/task_spec_utils.py and
# enhanced_dag_orchestrator.py). A nested pipeline's parameters are no upstream parameters. Fold it into train when that
# is fixed.
@dsl.pipeline(name="stages")
def stages(
    encoders: list,
    pretrain: str,
    tune: str,
    export: str,
    score: str,
    validation: dsl.Input[dsl.Dataset],
    registry_model: str,
) -> Trained:
    """Run the recipe's stages, score the model, export it, and score what was exported.

    Args:
        encoders: Encoders to prealign, each with what is pinned for it; one empty name for none.
        pretrain: What is pinned for pretrain_projector.
        tune: What is pinned for sft.
        export: The same for export_onnx.
        score: The same for evaluate.
        validation: Profile, verdict and quarantine of the snapshot.
        registry_model: Name in the registry; reports compare with its champion.
    """
    with dsl.ParallelFor(encoders, name="each encoder") as encoder:
        aligned = prealign_encoder(encoder=encoder.encoder, validation=validation, pinned=encoder.pinned)
    one_encoder = aligned.outputs["encoder_checkpoint"]
    # One dsl.Collected each: compiling changes the object.
    pretrained = pretrain_projector(
        encoder_checkpoints=dsl.Collected(one_encoder), validation=validation, pinned=pretrain
    )
    trained = sft(
        encoder_checkpoints=dsl.Collected(one_encoder),
        pretrained=pretrained.outputs["checkpoint"],
        validation=validation,
        pinned=tune,
    )
    checkpoint = trained.outputs["checkpoint"]
    scored = evaluate(kind="torch", model=checkpoint, registry_model=registry_model, pinned=score).set_display_name(
        "evaluate the checkpoint"
    )
    exported = export_onnx(checkpoint=checkpoint, pinned=export)
    bundle_scored = evaluate(
        kind="bundle",
        model=exported.outputs["bundle"],
        other_scorecard=scored.outputs["scorecard"],
        registry_model=registry_model,
        pinned=score,
    ).set_display_name("evaluate the bundle")
    return Trained(
        scorecard=scored.outputs["scorecard"],
        bundle_scorecard=bundle_scored.outputs["scorecard"],
        bundle=exported.outputs["bundle"],
        parity=exported.outputs["parity"],
    )


@dsl.pipeline(name="train")
def train(
    recipe: str = "tiny",
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
    registry_model: str = "",
) -> None:
    """Train, judge, export and register a model.

    Args:
        recipe: A recipe's name.
        recipe_overrides: Changes to the recipe, one a line, for instance stages.sft.epochs=1
        recipe_text: A recipe of your own, as YAML, taken instead of recipe.
        data_md5: Snapshot (outs[0].md5 in data.dvc). Empty in a checkout only.
        data_remote: A folder, s3://bucket/prefix or hub:OWNER/NAME@COMMIT that holds the snapshot. Empty in a checkout
            only.
        registry_model: Name in the registry. Empty: the recipe's own.
    """
    form = {
        "recipe": recipe,
        "recipe_overrides": recipe_overrides,
        "recipe_text": recipe_text,
        "data_md5": data_md5,
        "data_remote": data_remote,
        "registry_model": registry_model,
    }
    summary = summarise_run(
        pipeline="train", subject=recipe, recipe_text=recipe_text, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER
    )
    with dsl.ExitHandler(summary.set_caching_options(False), name="train, judge and register"):
        pinned = preflight(**form).set_caching_options(False).outputs
        model_name = pinned["registry_model"]

        validation = validate_data(pinned=pinned["validate_data"]).outputs["validation"]
        trained = stages(
            encoders=pinned["prealign_encoder"],
            pretrain=pinned["pretrain_projector"],
            tune=pinned["sft"],
            export=pinned["export_onnx"],
            score=pinned["evaluate"],
            validation=validation,
            registry_model=model_name,
        ).set_display_name("train, score and export")
        registered = register(
            registry_model=model_name,
            validation=validation,
            **{name: trained.outputs[name] for name in ("scorecard", "bundle_scorecard", "parity", "bundle")},
            pinned=pinned["register"],
        )
        registered.set_caching_options(False).set_display_name("gate and register")
