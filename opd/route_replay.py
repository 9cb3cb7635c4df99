"""Replaying routes: the student's routers choose, in training, the experts that they chose when the tokens were sampled (R3, arXiv:2510.11370).

Only the choice is replayed. A router computes logits and the weights of its experts with its present parameters and by its own formula, so that
gradients flow through the weights of the replayed experts to gate and hidden states. To that end nothing of a family is written again here: while a
router runs, the top-k that it takes gives the recorded indices, and their values of the very tensor it was taken of. What a router would have chosen itself
is kept, for the agreement. Hash-routed layers take no top-k and choose by the token, as they did for the sampler.

Positions without a record (rollout/routes.py) go where the router sends them: the prompt but for its last token, padding, the last token of all.

Recomputing activations in the backward (gradient checkpointing) runs the routers again, so routes stay in force until the next forward says otherwise.
Teachers have no record and are never touched.

B: rows. L: positions. N: completion tokens of a micro-batch, flattened. M: layers with routed experts. K: experts per token.
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from opd.batch import MicroBatch
from opd.routing import HASH_TABLE
from rollout.routes import find_routers
from rollout.types import Rollout


def require_routes(rollouts: list[Rollout], replays: bool, num_layers: int) -> None:
    """Raises ValueError for rollouts without routes that are to be replayed, and for routes of a model with other layers."""
    for rollout in rollouts:
        if rollout.routes_TMK is None and replays:
            raise ValueError(
                f"student.replay_routes=true, and request {rollout.prompt.request} has no routes: replay a run that sampled with rollout.record_routes=true"
            )
        if rollout.routes_TMK is not None and rollout.routes_TMK.shape[1] != num_layers:
            raise ValueError(f"the rollouts' routes are of {rollout.routes_TMK.shape[1]} layers, and the student routes in {num_layers}: they are another's")


class RouteReplay:
    """Has a student's routers choose what was recorded.

    own: by router, the experts [B * L, K] that it would have chosen in the last forward, where a choice was replayed.
    """

    def __init__(self, model: nn.Module, is_on: bool):
        """is_on: without it, `set` changes nothing."""
        self.is_on, self.batch = is_on, None
        self.own: dict[str, torch.Tensor] = {}
        for layer, (name, router) in enumerate(find_routers(model).items() if is_on else ()):
            if HASH_TABLE not in dict(router.named_buffers()):
                self._attach(layer, name, router)

    def set(self, batch: MicroBatch | None) -> None:
        """Replay a micro-batch's routes in the forwards and recomputations that follow; None: none."""
        self.batch, self.own = batch if self.is_on else None, {}

    def _attach(self, layer: int, name: str, router: nn.Module) -> None:
        running: list[_RecordedChoice] = []

        def begin(_module: nn.Module, _inputs: tuple) -> None:
            if self.batch is not None:
                running.append(_RecordedChoice(self.batch, layer))
                running[-1].__enter__()

        def end(_module: nn.Module, _inputs: tuple, _output: Any) -> None:
            if not running:
                return
            mode = running.pop()
            mode.__exit__(None, None, None)
            if mode.own is None:
                raise ValueError(f"the router {name} does not choose its experts by a top-k: student.replay_routes is not available for this family")
            self.own[name] = mode.own

        router.register_forward_pre_hook(begin)
        router.register_forward_hook(end, always_call=True)


class _RecordedChoice(TorchFunctionMode):
    """Within it, the top-k over a micro-batch's positions gives the recorded experts of one layer where there is a record."""

    def __init__(self, batch: MicroBatch, layer: int):
        super().__init__()
        self.position_N, self.chosen_NK = batch.position_N, batch.routes_NMK[:, layer].long()
        self.shape = (batch.tokens_BL.numel(), self.chosen_NK.shape[1])
        self.own: torch.Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function not in (torch.topk, torch.Tensor.topk) or found.indices.shape != self.shape:
            return found
        self.own = found.indices
        chosen = found.indices.index_copy(0, self.position_N, self.chosen_NK)
        return torch.return_types.topk((args[0].gather(-1, chosen), chosen))
