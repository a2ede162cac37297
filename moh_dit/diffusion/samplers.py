"""Samplers by name, as diffusers schedulers, and which of them fit what a model predicts."""

import inspect
from typing import Any, NamedTuple

import diffusers
from diffusers import DDPMScheduler

from ..common.errors import UserError
from .process import LearnedVarianceDDPMScheduler

NOISE = ("epsilon", "v_prediction", "sample")
FLOW = ("flow_prediction",)


class Sampler(NamedTuple):
    """A diffusers class, its options beyond the trained process, the predictions it can step."""

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
    """What a model stepped by this scheduler must predict, in diffusers' terms."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    return scheduler.config.get("prediction_type", "epsilon")


def samplers_for(prediction: str) -> list[str]:
    """Names of the samplers for a model that predicts ``prediction``."""
    return [name for name, sampler in SAMPLERS.items() if prediction in sampler.predictions]


def named_scheduler(name: str, trained: Any) -> Any:
    """The sampler ``name`` on the process of the ``trained`` scheduler.

    Raises:
        UserError: for an unknown name, or a sampler that does not fit what the model predicts.
    """
    prediction = prediction_type(trained)
    fitting = samplers_for(prediction)
    if name not in fitting:
        reason = "unknown"
        if name in SAMPLERS:
            steps = " or ".join(SAMPLERS[name].predictions)
            reason = f"the model predicts {prediction}, {name} steps {steps}"
        raise UserError(f"scheduler {name!r}: {reason}; those that fit are {', '.join(fitting)}")
    sampler = SAMPLERS[name]
    config = dict(trained.config)
    if sampler.scheduler != "DDPMScheduler":
        config.pop("variance_type", None)
    if not sampler.scheduler.startswith("FlowMatch") and "shift" in config:
        config["flow_shift"] = config["shift"]  # the same under the other classes' name
    kind = getattr(diffusers, sampler.scheduler)
    known = inspect.signature(kind.__init__).parameters  # what the class would warn about, left out
    config = {key: value for key, value in config.items() if key in known or key[0] == "_"}
    return kind.from_config(config, **sampler.options)


def check_scheduler(scheduler: Any, prediction: str) -> None:
    """Raise ``UserError`` unless ``scheduler`` steps what the model predicts."""
    if (stepped := prediction_type(scheduler)) == prediction:
        return
    fitting = [SAMPLERS[name].scheduler for name in samplers_for(prediction)]
    raise UserError(
        f"{type(scheduler).__name__} steps {stepped}, the model predicts {prediction}; "
        f"those that fit are {', '.join(dict.fromkeys(fitting))}"
    )


def check_steps(scheduler: Any, num_inference_steps: int) -> None:
    """Raise ``UserError`` unless the trained process has that many steps."""
    limit = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= limit:
        raise UserError(
            f"num_inference_steps is {num_inference_steps}; the model was trained on {limit} "
            f"steps, so give 1 … {limit}"
        )


def prepare_scheduler(scheduler: Any, num_inference_steps: int) -> Any:
    """A fresh scheduler of the same configuration, its timesteps set.

    The learned variance is stepped by this project's own class; elsewhere the variance type means
    another kind of model output, and is dropped with it.
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
