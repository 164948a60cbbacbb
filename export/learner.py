"""What a step of training changes: the weights, Adam's moments, and the running average that is evaluated."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from reparam.models import VAE

PRIOR_RATE = 0.02  # share of a batch in a learned prior


class Learner:
    """A network in training.

    All its parameters are views of one vector, and so are the averaged ones: a step is a few operations on those, not a
    few for each layer.

    model: the network. evaluated: the one that is evaluated and published, with the averaged parameters if there is an
        average.
    average: what a step leaves of the running average; 0 for none. The first steps leave less, (1 + t) / (10 + t) after
        t of them (as in TensorFlow's ExponentialMovingAverage), so that the initial parameters are soon forgotten.
    """

    def __init__(self, model: VAE, average: float) -> None:
        self.model, self.evaluated, self.average = model, deepcopy(model) if average else model, average
        self._parameters = _as_one_vector(model)
        self._averages = _as_one_vector(self.evaluated) if average else None
        # Adam moves encoder and decoder. A learned prior, in the module itself and so at the front, goes its own way.
        self._prior = list(model.parameters(recurse=False))
        self._front = sum(parameter.numel() for parameter in self._prior)
        self._weights = nn.Parameter(self._parameters[self._front :])
        self._adam = torch.optim.Adam([self._weights], fused=True)
        self._steps = 0  # Adam counts them too, perhaps on a GPU, which nothing here waits for

    def step(self, gradient: Tensor, learning_rate: float, kl_weight: float) -> None:
        """gradient: of all parameters, one after the other (`gradient_of`); kl_weight: what the KL term had in it."""
        (group,) = self._adam.param_groups
        group["lr"] = learning_rate
        self._weights.grad = gradient[self._front :]
        self._adam.step()
        parts = gradient[: self._front].split([parameter.numel() for parameter in self._prior])
        shaped = [part.view_as(parameter) for part, parameter in zip(parts, self._prior, strict=True)]
        self.model.learn_prior(shaped, PRIOR_RATE / kl_weight)
        if self._averages is not None:
            left = min(self.average, (1 + self._steps) / (10 + self._steps))
            self._averages.lerp_(self._parameters, 1 - left)
        self._steps += 1

    def state(self) -> dict[str, Tensor]:
        """Everything that `load` needs to go on."""
        averages = {} if self._averages is None else _prefixed("average", self.evaluated.state_dict())
        moments = _prefixed("optimizer", self._adam.state[self._weights])
        return _prefixed("model", self.model.state_dict()) | averages | moments

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError, RuntimeError for a state that is not of this network."""
        self.model.load_state_dict(under("model", state))
        if self._averages is not None:
            self.evaluated.load_state_dict(under("average", state))
        moments, shape = under("optimizer", state), self._weights.shape
        for name, expected in {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}.items():
            moment = moments[name]
            if moment.shape != expected or moment.dtype != torch.float32:
                raise RuntimeError(f"optimizer.{name} is {moment.dtype}{list(moment.shape)}")
            self._adam.state[self._weights][name] = moment.to(self._weights.device)
        self._steps = int(moments["step"])


def gradient_of(loss: Tensor, model: VAE) -> Tensor:
    """d loss / d parameters, all of them one after the other; each in the order of its parameter's elements, however
    autograd has laid it (a fused Adam would take it as it lies)."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is named prefix.name, by name."""
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in state.items() if key.startswith(f"{prefix}.")}


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


@torch.no_grad()
def _as_one_vector(model: VAE) -> Tensor:
    """Lay a network's parameters one after the other in a new vector, of which they become views."""
    parameters = list(model.parameters())
    vector = torch.cat([parameter.flatten() for parameter in parameters])
    for parameter, part in zip(parameters, vector.split([each.numel() for each in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return vector
