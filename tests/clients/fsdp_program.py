"""One of two processes that shard every convolution and every linear layer of a model by itself, and compare."""

import sys

import torch
from test_clients import built, images
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def main(family: str) -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    whole, model = built(family), built(family)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    outputs = [net(images()) for net in (model, whole)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for out in outputs:
        out.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            assert isinstance(ours.grad, DTensor), name
            close = {"rtol": 1e-3, "atol": 1e-4 * float(theirs.grad.abs().max()) + 1e-7}
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, **close)
    torch.distributed.destroy_process_group()


main(sys.argv[1])
