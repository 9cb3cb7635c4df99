"""Routes: the experts that a mixture-of-experts model chose while it sampled.

Row t of a rollout's routes belongs to the state that predicts completion token t, whose log-probability it shaped: to the forward position that read the
token before it, for the first token the prompt's last. So routes stand beside tokens, log-probabilities and what a teacher gives, row by row, and none is
missing. Not recorded are the positions of the prompt before its last, which are read many at once, and the one that reads a completion's last token, which
predicts nothing and which a sampler does not compute.

Layers come in the order of the model's modules. Hash-routed layers (DeepSeek-V4) are among them, although their experts depend on the token alone.

Where training and sampling route the same token differently, log-probabilities differ far more than rounding explains; hence the record
(R3, arXiv:2510.11370, which replays it: opd/route_replay.py).

W: rows of a batch. M: layers with routed experts. K: experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.experts import find_experts, find_packed

ROUTER_NAMES = ("gate", "router")

LARGEST_OF_A_BYTE = 256
"""Experts whose numbers fit into uint8; more take int16."""


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The router beside each module of routed experts, packed ones too, by name. Raises ValueError where experts have no router beside them."""
    routers = {}
    for name in [*find_experts(model), *dict.fromkeys(packed.rsplit(".", 1)[0] for packed in find_packed(model))]:
        parent = name.rsplit(".", 1)[0]
        children = dict(model.get_submodule(parent).named_children())
        found = [child for child in ROUTER_NAMES if child in children]
        if not found:
            raise ValueError(f"the routed experts {name} have no router named {' or '.join(ROUTER_NAMES)} beside them: this family is not supported")
        routers[f"{parent}.{found[0]}"] = children[found[0]]
    return routers


def require_routers(model: PreTrainedModel, role: str) -> None:
    """Raises ValueError for a model that routes nothing."""
    if not find_routers(model):
        raise ValueError(
            f"the {role} ({model.config.model_type}) has no routed experts whose routes could be recorded: leave out rollout.record_routes and "
            "student.replay_routes"
        )


def choice_of(name: str, output: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, chosen experts) from what a router returned. Raises ValueError for a family whose routers return something else."""
    if not (isinstance(output, tuple) and len(output) == 3):
        raise ValueError(f"the router {name} does not return (logits, weights, chosen experts): this family is not supported")
    logits, _weights, indices = output
    return logits, indices


class RouteListener:
    """Notes the routes of each row's last position, forward by forward.

    last_WMK: of the last forward that was listened to, uint8 (int16 where there are more than 256 experts), on the CPU.
    """

    def __init__(self, model: nn.Module):
        self.routers = find_routers(model)
        self.last_WMK: torch.Tensor | None = None

    @contextmanager
    def listening(self, num_rows: int) -> Iterator[None]:
        """Run one forward of so many rows inside."""
        layers: list[torch.Tensor] = []

        def hook(name: str):
            def note(_module: nn.Module, _inputs: tuple, output: object) -> None:
                logits, indices = choice_of(name, output)
                dtype = torch.uint8 if logits.shape[-1] <= LARGEST_OF_A_BYTE else torch.int16
                layers.append(indices.reshape(num_rows, -1, indices.shape[-1])[:, -1].to(dtype))

            return note

        handles = [router.register_forward_hook(hook(name)) for name, router in self.routers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.last_WMK = torch.stack(layers, dim=1).cpu()

    def reorder(self, keep_W: torch.Tensor) -> None:
        """As the cache's rows are, after the forward."""
        self.last_WMK = self.last_WMK[keep_W.cpu()]
