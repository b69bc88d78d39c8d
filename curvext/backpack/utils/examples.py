"""What BackPACK's example scripts import: batches of MNIST, and a Gauss-Newton diagonal to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..hessianfree.ggnvp import ggn_vector_product
from .convert_parameters import vector_to_parameter_list


def load_mnist_dataset() -> Dataset[Any]:
    """MNIST's training set, downloaded to ``./data`` and normalised; needs torchvision."""
    try:
        from torchvision import datasets, transforms
    except ImportError as error:
        raise ImportError("MNIST is loaded by torchvision: pip install torchvision") from error
    normalised = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    return datasets.MNIST(root="./data", train=True, transform=normalised, download=True)


def get_mnist_dataloader(batch_size: int = 64, shuffle: bool = True) -> DataLoader[Any]:
    """Batches of images ``[N, 1, 28, 28]`` and labels ``[N]``."""
    return DataLoader(load_mnist_dataset(), batch_size=batch_size, shuffle=shuffle)


def load_one_batch_mnist(batch_size: int = 64, shuffle: bool = True, flat: bool = False) -> tuple[Tensor, Tensor]:
    """One such batch, with images as rows ``[N, 784]`` if ``flat``."""
    x, y = next(iter(get_mnist_dataloader(batch_size, shuffle)))
    return (x.flatten(1) if flat else x), y


def autograd_diag_ggn_exact(
    X: Tensor, y: Tensor, model: nn.Module, loss_function: Callable[..., Tensor], idx: Iterable[int] | None = None
) -> Tensor:
    """diag(JᵀBJ) over all trained parameters, or those of its entries that ``idx`` names, by one product for each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = model(X)
    loss, n = loss_function(output, y), sum(p.numel() for p in parameters)
    entries = []
    for i in range(n) if idx is None else idx:
        unit = loss.new_zeros(n)
        unit[i] = 1
        column = ggn_vector_product(loss, output, model, vector_to_parameter_list(unit, parameters))
        entries.append(torch.cat([part.flatten() for part in column])[i])
    return torch.stack(entries)
