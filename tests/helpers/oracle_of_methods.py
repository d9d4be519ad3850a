"""The methods' papers in float64, on dense weights and bool masks, with an AdamW of its own."""

import math

import torch
from torch import Tensor

from formulas import SlopeProduct, backward_mask, top_n_mask

BETAS, EPSILON = (0.9, 0.95), 1e-8


class Layer:
    """A sparse linear with an adapter, and how a method trains it."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor, n: int, m: int, numbers: dict):
        self.name, self.n, self.m, self.numbers = name, n, m, numbers
        self.weight = weight.double().requires_grad_()
        self.bias = bias.double().requires_grad_()
        self.mask = top_n_mask(weight.double().abs(), n, m)
        if name in ("slope", "evolve"):
            self.weight.data *= self.mask
        self.twice = backward_mask(self.weight.data, self.mask, n, m)
        self.fading = 1.0
        soft = self.soft()
        self.beta = (self.weight.data * soft).sum() / soft.square().sum()
        self.adapter = None
        self.scouts = False

    def soft(self) -> Tensor:
        groups = self.weight.data.view(len(self.weight), -1, self.m)
        threshold = groups.abs().sort(-1).values[..., self.m - self.n - 1, None]
        moved = groups.sign() * (groups.abs() - threshold).clamp_min(0)
        return moved.view_as(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        weight, straight = self.weight, None
        if self.name == "sr-ste":
            straight = self.weight.data * self.mask
        elif self.name == "s-ste":
            straight = self.beta * self.soft()
        if straight is not None:
            y = x @ (weight + (straight - weight).detach()).t()
        elif self.name == "gradual" and self.fading > 0:
            y = x @ (weight * (self.mask + self.fading * ~self.mask)).t()
        elif self.scouts:
            y = x @ weight.t()  # pruned elements are zero
        else:
            y = SlopeProduct.apply(x, weight, self.mask, self.twice)
        if self.adapter is not None:
            a, b, scale = self.adapter
            y = y + scale * (x @ a.t()) @ b.t()
        return y + self.bias


class Run:
    """A chain of layers with a GELU between them, trained to small outputs."""

    def __init__(self, layers: list[Layer], rate: float, decay: float, steps: int, interval: int):
        self.layers, self.rate, self.decay = layers, rate, decay
        self.steps, self.interval, self.step = steps, interval, 0
        self.state: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.prepare()

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(torch.nn.functional.gelu(x) if index else x)
        return x

    def prepare(self) -> None:
        for layer in self.layers:
            numbers = layer.numbers
            if layer.name == "gradual":
                layer.fading = min(1.0, max(0.0, 1 - self.step / (numbers["end"] * self.steps)))
            if layer.name == "evolve":
                now = self.step + 1
                layer.scouts = now % numbers["interval"] == 0 and now <= numbers["end"] * self.steps

    def train(self, x: Tensor) -> float:
        loss = self.forward(x.double()).square().mean()
        loss.backward()
        for layer in self.layers:
            dense = layer.weight.grad
            if layer.name == "sr-ste":
                dense += layer.numbers["decay"] * layer.weight.data * ~layer.mask
            if layer.name in ("slope", "evolve"):
                layer.weight.grad = dense * layer.mask
            for parameter in [layer.weight, layer.bias, *(layer.adapter or ())[:2]]:
                self.adam(parameter, self.decay if parameter is layer.weight else 0.0)
            if layer.name in ("slope", "evolve"):
                layer.weight.data *= layer.mask
            layer.dense_grad = dense
        self.step += 1
        for layer in self.layers:
            self.after(layer)
        self.prepare()
        return loss.item()

    def adam(self, parameter: Tensor, decay: float) -> None:
        grad, parameter.grad = parameter.grad, None
        zero = torch.zeros_like(grad), torch.zeros_like(grad), 0
        first, second, count = self.state.get(id(parameter), zero)
        first = BETAS[0] * first + (1 - BETAS[0]) * grad
        second = BETAS[1] * second + (1 - BETAS[1]) * grad**2
        count += 1
        self.state[id(parameter)] = first, second, count
        root = (second / (1 - BETAS[1] ** count)).sqrt() + EPSILON
        parameter.data *= 1 - self.rate * decay
        parameter.data -= self.rate * first / (1 - BETAS[0] ** count) / root

    def after(self, layer: Layer) -> None:
        n, m = layer.n, layer.m
        new = layer.name in ("sr-ste", "s-ste") or (layer.name == "gradual" and layer.fading > 0)
        if new:
            layer.mask = top_n_mask(layer.weight.data.abs(), n, m)
        if layer.scouts:
            self.swap(layer)
        if new or layer.scouts or self.step % self.interval == 0:
            read = layer.soft() if layer.name == "s-ste" else layer.weight.data * layer.mask
            layer.twice = backward_mask(read, layer.mask, n, m)

    def swap(self, layer: Layer) -> None:
        numbers, m = layer.numbers, layer.m
        turn = math.cos(math.pi * self.step / (numbers["end"] * self.steps))
        found = []
        for row in range(len(layer.weight)):
            for start in range(0, layer.weight.shape[1], m):
                columns = range(start, start + m)
                kept = [c for c in columns if layer.mask[row, c]]
                weak = min(kept, key=lambda c: abs(layer.weight.data[row, c]))
                pruned = [c for c in columns if not layer.mask[row, c]]
                strong = max(pruned, key=lambda c: abs(layer.dense_grad[row, c]))
                ratio = abs(layer.dense_grad[row, strong]) / abs(layer.weight.data[row, weak])
                found.append((ratio.item(), row, weak, strong, kept))
        count = round(numbers["rate"] * 0.5 * (1 + turn) * len(found))
        first, second, steps = self.state[id(layer.weight)]
        for _, row, weak, strong, kept in sorted(found, reverse=True)[:count]:
            layer.mask[row, weak], layer.mask[row, strong] = False, True
            second[row, strong] = second[row, kept].mean()
            for tensor in (layer.weight.data, first, second):
                tensor[row, weak] = 0
        self.state[id(layer.weight)] = first, second, steps
