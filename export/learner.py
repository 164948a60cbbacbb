"""The state changed by a training step: weights, Adam's moments, and the running average of the weights."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from reparam.models import VAE

PRIOR_RATE = 0.02  # weight of one batch in the running mean of a learned prior, at kl_weight 1


class Learner:
    """A network in training.

    All parameters are views of one vector, and so are all averaged parameters. A step is then a few operations on
    vectors rather than a few operations for each layer.

    model: the network in training.
    average: decay of the running average of the parameters; 0: no average. After t steps the decay is at most
        (1 + t) / (10 + t), so that initial parameters fade quickly (as in TensorFlow's ExponentialMovingAverage).

    Attribute `evaluated`: the network to evaluate and publish. With an average, a copy with the averaged parameters.
    """

    def __init__(self, model: VAE, average: float) -> None:
        self.model, self.evaluated, self.average = model, deepcopy(model) if average else model, average
        self._parameters = _as_one_vector(model)
        self._averages = _as_one_vector(self.evaluated) if average else None
        # Adam updates encoder and decoder. A learned prior has its own update. The prior's parameters belong to the
        # module itself, so they come first in the vector.
        self._prior = list(model.parameters(recurse=False))
        self._prior_size = sum(parameter.numel() for parameter in self._prior)
        self._weights = nn.Parameter(self._parameters[self._prior_size :])
        self._adam = torch.optim.Adam([self._weights], fused=True)
        self._steps = 0  # Adam's own counter may be on a GPU; reading that would wait for the GPU

    def step(self, gradient: Tensor, learning_rate: float, kl_weight: float) -> None:
        """Take one step: Adam on encoder and decoder, `learn_prior` on the prior, then the running average.

        gradient: gradient of all parameters in one vector, as `flat_gradient` returns.
        learning_rate: step size of Adam.
        kl_weight: weight of the KL term in the loss, above 0.
        """
        (group,) = self._adam.param_groups
        group["lr"] = learning_rate
        self._weights.grad = gradient[self._prior_size :]
        self._adam.step()
        parts = gradient[: self._prior_size].split([parameter.numel() for parameter in self._prior])
        shaped = [part.view_as(parameter) for part, parameter in zip(parts, self._prior, strict=True)]
        self.model.learn_prior(shaped, PRIOR_RATE / kl_weight)
        if self._averages is not None:
            decay = min(self.average, (1 + self._steps) / (10 + self._steps))
            self._averages.lerp_(self._parameters, 1 - decay)
        self._steps += 1

    def state(self) -> dict[str, Tensor]:
        """Return all tensors needed by `load` to continue the training.

        Returns: tensors by name. Prefixes of the names are `model.`, `optimizer.` (Adam's moments and step) and, with
            an average, `average.`.
        """
        averages = {} if self._averages is None else _prefixed("average", self.evaluated.state_dict())
        moments = _prefixed("optimizer", self._adam.state[self._weights])
        return _prefixed("model", self.model.state_dict()) | averages | moments

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`.

        state: tensors by name, on any device.

        Raises: KeyError, RuntimeError if the state belongs to another network.
        """
        self.model.load_state_dict(sub_state("model", state))
        if self._averages is not None:
            self.evaluated.load_state_dict(sub_state("average", state))
        moments, shape = sub_state("optimizer", state), self._weights.shape
        for name, expected in {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}.items():
            moment = moments[name]
            if moment.shape != expected or moment.dtype != torch.float32:
                raise RuntimeError(f"optimizer.{name} is {moment.dtype}{list(moment.shape)}")
            self._adam.state[self._weights][name] = moment.to(self._weights.device)
        self._steps = int(moments["step"])


def flat_gradient(loss: Tensor, model: VAE) -> Tensor:
    """Compute the gradient of the loss by all parameters, as one vector.

    `flatten` brings each gradient into row-major order. Autograd may return gradients of convolutions in another memory
    layout, and a fused Adam ignores strides.

    loss: scalar.

    Returns: float32 (P,), with P the number of all parameters, in the order of `model.parameters()`. A parameter
        without effect on the loss has zeros.
    """
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def sub_state(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors named <prefix>.<name>, by <name>."""
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in state.items() if key.startswith(f"{prefix}.")}


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


@torch.no_grad()
def _as_one_vector(model: VAE) -> Tensor:
    """Copy all parameters into one new vector, and make each parameter a view of the vector."""
    parameters = list(model.parameters())
    vector = torch.cat([parameter.flatten() for parameter in parameters])
    for parameter, part in zip(parameters, vector.split([each.numel() for each in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return vector
