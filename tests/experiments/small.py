"""Specs of networks that compile quickly, where those of `MODELS` do not."""

import fishleg_jax as flj
from experiments.models.specs import MODELS


def small_spec(module, input_shape):
    """A network with batch norm; its other settings are those of ResNet-20."""

    def predict(params, inputs, constants):
        return module.apply({"params": params, "batch_stats": constants}, inputs)

    model = flj.Model(predict, flj.likelihoods.categorical())
    return MODELS["resnet20"]._replace(
        name="small", dataset="none", module=module, model=model, input_shape=input_shape
    )
