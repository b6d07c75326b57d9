"""What frozen features are worth, in seconds: a linear head on them, and their nearest neighbours.

The features are the class token's hidden states, without masks or dropout. Masked auto-encoders
usually have low values here and high ones once fine-tuned (He et al., 2022).
"""
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.data import Data
from support.fetch import BadInput
from support.loop import batch
from support.settings import Config, autocast, device

NEIGHBOURS = 20


@torch.no_grad()
def features(model: nn.Module, inputs: object, config: Config) -> Tensor:
    """Of all inputs, float32 [N, D], on the device."""
    model, found = copy.deepcopy(model).to(device(config)).eval(), []
    for index in torch.arange(len(inputs)).split(256):
        with autocast(config):
            found.append(model.encoder(batch(inputs, index, device(config)))[:, 0].float())
    return torch.cat(found)  # [N, D]


def linear(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """The classes Long[N'] that a linear head gives test [N', D], fitted by L-BFGS to train [N, D].

    Features have mean 0 and variance 1 over the training split; the weights decay a little.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6  # 2 of [D]
    train, test = (train - mean) / std, (test - mean) / std
    head = nn.utils.skip_init(nn.Linear, train.shape[1], classes, device=train.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(head(train), labels) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return head(test).argmax(1)


def neighbours(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """The classes Long[N'] that most of the nearest training features (by their angle) have."""
    alike = F.normalize(test) @ F.normalize(train).T  # [N', N]
    near = alike.topk(min(NEIGHBOURS, len(train))).indices  # [N', neighbours]
    return F.one_hot(labels[near], classes).sum(1).argmax(1)


def show(models: dict[str, nn.Module], data: Data, config: Config) -> None:
    """Print both accuracies on the test split, a line a model; BadInput where labels lack."""
    if not data.labelled:
        raise BadInput(f"{data.name} has no labels in both splits, which --probe needs")
    print(f"\n{'frozen features':24}{'linear head %':>15}{f'{NEIGHBOURS} neighbours %':>18}")
    for name, model in models.items():
        train, test = (features(model, inputs, config) for inputs in (data.train, data.test))
        y = data.train_labels.to(train.device)
        found = [judge(train, y, test, len(data.classes)).cpu() for judge in (linear, neighbours)]
        right = [(classes == data.test_labels).double().mean() for classes in found]
        print(f"{name:24}{100 * right[0]:15.2f}{100 * right[1]:18.2f}")
