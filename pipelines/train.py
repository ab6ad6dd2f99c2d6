"""From a recipe and a snapshot to a judged, registered model."""

# kfp reads the annotations themselves: no future import here.
from kfp import dsl

from components.evaluate.component import evaluate
from components.export_onnx.component import export_onnx
from components.gate.component import gate
from components.prealign_encoder.component import prealign_encoder
from components.preflight.component import preflight
from components.pretrain_projector.component import pretrain_projector
from components.register.component import register
from components.resolve_data.component import resolve_data
from components.sft.component import sft
from components.summarise_run.component import summarise_run
from components.validate_data.component import validate_data


# A pipeline of its own, because kfp.local 2.17 replaces every upstream parameter of a loop by the loop's item, and can
# loop over a task's output only when it is called Output (kfp/local/orchestrator/task_spec_utils.py and
# enhanced_dag_orchestrator.py). A nested pipeline's parameters are no upstream parameters. Fold it into train when that
# is fixed.
@dsl.pipeline(name="stages")
def stages(
    encoders: list,
    pretrain: str,
    tune: str,
    validation: dsl.Input[dsl.Dataset],
) -> dsl.Model:
    """Run the recipe's stages.

    Args:
        encoders: Encoders to prealign, each with what is pinned for it; one empty name for none.
        pretrain: What is pinned for pretrain_projector.
        tune: What is pinned for sft.
        validation: Profile, verdict and quarantine of the snapshot.
    """
    with dsl.ParallelFor(encoders) as encoder:
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
    return trained.outputs["checkpoint"]


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
        data_remote: A folder or s3://bucket/prefix that holds the snapshot. Empty in a checkout only.
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
    with dsl.ExitHandler(summary.set_caching_options(False), name="run"):
        checked = preflight(**form).set_caching_options(False)
        resolved = resolve_data(**form).set_caching_options(False).after(checked)
        pinned = resolved.outputs
        model_name = resolved.outputs["registry_model"]

        validation = validate_data(pinned=pinned["validate_data"]).outputs["validation"]
        trained = stages(
            encoders=pinned["prealign_encoder"],
            pretrain=pinned["pretrain_projector"],
            tune=pinned["sft"],
            validation=validation,
        )
        checkpoint = trained.output
        torch_scores = evaluate(
            kind="torch", model=checkpoint, registry_model=model_name, pinned=pinned["evaluate"]
        ).set_display_name("evaluate the checkpoint")
        exported = export_onnx(checkpoint=checkpoint, pinned=pinned["export_onnx"])
        bundle_scores = evaluate(
            kind="bundle",
            model=exported.outputs["bundle"],
            other_scorecard=torch_scores.outputs["scorecard"],
            registry_model=model_name,
            pinned=pinned["evaluate"],
        ).set_display_name("evaluate the bundle")
        evidence = {
            "validation": validation,
            "scorecard": torch_scores.outputs["scorecard"],
            "bundle_scorecard": bundle_scores.outputs["scorecard"],
            "parity": exported.outputs["parity"],
        }
        judged = gate(registry_model=model_name, **evidence, pinned=pinned["gate"]).set_caching_options(False)
        register(
            registry_model=model_name,
            bundle=exported.outputs["bundle"],
            gate=judged.outputs["gate"],
            **evidence,
            pinned=pinned["register"],
        ).set_caching_options(False)
