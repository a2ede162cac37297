"""Choose a diffusers scheduler by name, among those that fit the prediction of a model."""

import inspect
from typing import Any, NamedTuple

import diffusers
from diffusers import DDPMScheduler

from ..common.errors import UserError
from .process import LearnedVarianceDDPMScheduler

NOISE = ("epsilon", "v_prediction", "sample")
FLOW = ("flow_prediction",)


class Sampler(NamedTuple):
    """A diffusers scheduler class, the predictions that it supports, and its options.

    The options are set in addition to the configuration of the trained process.
    """

    scheduler: str
    predictions: tuple[str, ...]
    options: dict[str, Any]


# fmt: off
SAMPLERS = {
    "ddpm": Sampler("DDPMScheduler", NOISE, {}),
    "ddim": Sampler("DDIMScheduler", NOISE, dict(timestep_spacing="leading", clip_sample=False)),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", NOISE, dict(solver_order=2)),
    "sde-dpmsolver++": Sampler("DPMSolverMultistepScheduler", NOISE,
                               dict(solver_order=2, algorithm_type="sde-dpmsolver++")),
    "unipc": Sampler("UniPCMultistepScheduler", NOISE, {}),
    "euler": Sampler("EulerDiscreteScheduler", NOISE, {}),
    "euler-ancestral": Sampler("EulerAncestralDiscreteScheduler", ("epsilon", "v_prediction"), {}),
    "heun": Sampler("HeunDiscreteScheduler", ("epsilon", "v_prediction"), {}),
    "flow-euler": Sampler("FlowMatchEulerDiscreteScheduler", FLOW, {}),
    "flow-heun": Sampler("FlowMatchHeunDiscreteScheduler", FLOW, {}),
    "flow-dpmsolver++": Sampler("DPMSolverMultistepScheduler", FLOW,
                                dict(use_flow_sigmas=True, prediction_type="flow_prediction")),
    "flow-unipc": Sampler("UniPCMultistepScheduler", FLOW,
                          dict(use_flow_sigmas=True, prediction_type="flow_prediction")),
}
# fmt: on


def prediction_type(scheduler: Any) -> str:
    """Return the prediction type that this scheduler expects of a model."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    return scheduler.config.get("prediction_type", "epsilon")


def samplers_for(prediction: str) -> list[str]:
    """Return the names of the samplers that support this prediction type."""
    return [name for name, sampler in SAMPLERS.items() if prediction in sampler.predictions]


def named_scheduler(name: str, trained: Any) -> Any:
    """Return the sampler ``name``, configured for the process of the ``trained`` scheduler.

    Raises:
        UserError: if the name is unknown, or the sampler does not support the model's prediction.
    """
    prediction = prediction_type(trained)
    fitting = samplers_for(prediction)
    if name not in fitting:
        reason = "is unknown"
        if name in SAMPLERS:
            supported = " or ".join(SAMPLERS[name].predictions)
            reason = f"needs a model that predicts {supported}, this model predicts {prediction}"
        raise UserError(f"scheduler {name!r} {reason}; those that fit are {', '.join(fitting)}")
    sampler = SAMPLERS[name]
    config = dict(trained.config)
    if sampler.scheduler != "DDPMScheduler":
        config.pop("variance_type", None)
    if not sampler.scheduler.startswith("FlowMatch") and "shift" in config:
        config["flow_shift"] = config["shift"]  # other scheduler classes have another name for it
    kind = getattr(diffusers, sampler.scheduler)
    # Leave out keys that the class does not know: it would warn about them.
    known = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in config.items() if key in known or key[0] == "_"}
    return kind.from_config(config, **sampler.options)


def check_scheduler(scheduler: Any, prediction: str) -> None:
    """Raise ``UserError`` unless ``scheduler`` supports the model's prediction."""
    if (expected := prediction_type(scheduler)) == prediction:
        return
    fitting = [SAMPLERS[name].scheduler for name in samplers_for(prediction)]
    raise UserError(
        f"{type(scheduler).__name__} needs a model that predicts {expected}, this model predicts "
        f"{prediction}; those that fit are {', '.join(dict.fromkeys(fitting))}"
    )


def check_steps(scheduler: Any, num_inference_steps: int) -> None:
    """Raise ``UserError`` if the trained process has fewer steps than requested."""
    limit = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= limit:
        raise UserError(
            f"num_inference_steps is {num_inference_steps}; it must lie in 1 … {limit}, the number "
            "of steps that the model was trained on"
        )


def prepare_scheduler(scheduler: Any, num_inference_steps: int) -> Any:
    """Return a new scheduler of the same configuration with its timesteps set.

    For a learned variance, this is :class:`LearnedVarianceDDPMScheduler`. Other scheduler classes
    do not support a learned variance, so their ``variance_type`` is set to ``None``.
    """
    kind: Any = type(scheduler)
    options: dict[str, Any] = {}
    if kind is DDPMScheduler and scheduler.config.variance_type == "learned_range":
        kind = LearnedVarianceDDPMScheduler
    elif not isinstance(scheduler, DDPMScheduler) and scheduler.config.get("variance_type"):
        options["variance_type"] = None
    fresh = kind.from_config(dict(scheduler.config), **options)
    fresh.set_timesteps(num_inference_steps)
    return fresh
