"""Random numbers of one layer, which do not depend on the other layers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_draws(name: str, purpose: str, device: torch.device) -> Iterator[None]:
    """In the block, random numbers come from a stream of one layer. Other streams do not change.

    The stream depends on the seed of ``torch.manual_seed``, the layer and the purpose. So a random
    mask or an adapter is the same whenever it is drawn, on every rank with the same seed: in
    ``compile``, or later for a model on the meta device.

    Args:
        name: name of the layer.
        purpose: what is drawn, such as "mask".
        device: device of the tensors that are drawn.
    """
    text = f"{torch.initial_seed()} {purpose} {name}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    if device.type in ("cpu", "meta"):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    of_device = torch.get_device_module(device)
    index = of_device.current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type), of_device.device(index):
        of_device.manual_seed(seed)
        yield
