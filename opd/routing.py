"""Where the student's tokens go: routers found, routing recorded, balance kept.

Recording hooks on each router note the logits and the chosen experts of the last forward; nothing in the model is edited. From them come
the expert counts (padding left out, summed over ranks once per step), the sequence-wise balance loss, and the comparison with the
routing of step 0 on a fixed probe.

Balance without a loss: after each step the bias of an expert that had fewer tokens than the mean rises by `router_bias_speed`, that of
one with more falls (DeepSeek-V3, arXiv:2412.19437, 2.1.2; kept by V4). The sequence-wise loss is sum_i f_i P_i with
f_i = E / (K T) count_i and P_i the mean normalised affinity of a sequence's T tokens to expert i (same source, eqs. 17-20).

B: rows. L: positions. N: real tokens of the probe, or completion tokens of a micro-batch. M: layers with routed experts. E: experts. K: experts per token.
"""

import torch
from torch import nn

from opd.distributed import Group, broadcast_object, reduce_sum
from rollout.routes import choice_of, find_routers

BALANCE_BIAS = "e_score_correction_bias"
"""Buffer of a router that is added to its scores when experts are chosen."""
HASH_TABLE = "tid2eid"
"""Buffer of a hash router: token id -> experts."""


class RoutingRecorder:
    """Counts where tokens are routed, during training forwards.

    counts: per layer, tokens of each expert [E] since `start_step`; of this rank until `sum_ranks`, then of all.
    agreement: (recorded choices that the routers made too, recorded choices) since then, likewise; None where nothing was compared.
    """

    def __init__(self, model: nn.Module):
        self.routers = find_routers(model)
        self.last: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.agreement: torch.Tensor | None = None
        self.forget()
        for name, router in self.routers.items():
            router.register_forward_hook(self._hook(name))

    def forget(self) -> None:
        """What comes is compared with the next step and the next probe."""
        self.start_entropy: dict[str, float] = {}
        self.probe_BL: torch.Tensor | None = None
        self.probe_real_BL: torch.Tensor | None = None
        self.probe_experts: dict[str, torch.Tensor] = {}

    def start_step(self) -> None:
        self.counts, self.agreement = {}, None

    def count(self, real_BL: torch.Tensor) -> None:
        """Add the last forward's routing to the counts; `real_BL` is False on padding."""
        for name, (logits, indices) in self.last.items():
            chosen = indices.reshape(real_BL.numel(), -1)[real_BL.flatten()].flatten()
            counts_E = torch.bincount(chosen, minlength=logits.shape[-1]).double()
            self.counts[name] = self.counts.get(name, 0) + counts_E

    def compare(self, routes_NMK: torch.Tensor, position_N: torch.Tensor, mask_N: torch.Tensor, own: dict[str, torch.Tensor]) -> None:
        """Add the last forward to the agreement: recorded experts of the masked tokens that are among those the router chose, as sets.

        own: what a router chose itself, where its choice was replayed.
        """
        matched = torch.zeros((), dtype=torch.float64, device=mask_N.device)
        for layer, (name, (_, indices)) in enumerate(self.last.items()):
            chosen_NK = own.get(name, indices).reshape(-1, indices.shape[-1])[position_N]
            is_matched_NK = (routes_NMK[:, layer, :, None] == chosen_NK[:, None, :]).any(-1)
            matched += (is_matched_NK & mask_N[:, None]).sum()
        compared = torch.stack([matched, mask_N.sum().double() * routes_NMK.shape[1] * routes_NMK.shape[2]])
        self.agreement = compared if self.agreement is None else self.agreement + compared

    def sum_ranks(self) -> None:
        """Add up the counts of all ranks, in one reduction; once per step, before `metrics` and `update_bias`."""
        if self.counts:
            sizes = [len(counts_E) for counts_E in self.counts.values()]
            agreement = torch.zeros_like(next(iter(self.counts.values()))[:2]) if self.agreement is None else self.agreement
            *summed, agreement = reduce_sum(torch.cat([*self.counts.values(), agreement]), Group.data).split([*sizes, 2])
            self.counts = dict(zip(self.counts, summed, strict=True))
            self.agreement = agreement if agreement[1] else None

    def balance_loss(self, real_BL: torch.Tensor) -> torch.Tensor:
        """Sum over the rows of the last forward, and mean over layers, of the sequence-wise balance loss; a row without a real token adds 0.

        Hash-routed layers are left out: their choice is fixed, so the loss could only distort their gates.
        """
        total = torch.zeros((), device=real_BL.device)
        rows, length = real_BL.shape
        learned = {name: last for name, last in self.last.items() if HASH_TABLE not in dict(self.routers[name].named_buffers())}
        for name, (logits, indices) in learned.items():
            affinity_BLE = _affinity(self.routers[name], logits.float()).reshape(rows, length, -1)
            affinity_BLE = affinity_BLE / affinity_BLE.sum(-1, keepdim=True)
            chosen_BLE = torch.zeros_like(affinity_BLE).scatter_(2, indices.reshape(rows, length, -1), 1.0)
            tokens_B1 = real_BL.sum(1, keepdim=True).clamp(min=1)
            fraction_BE = (chosen_BLE * real_BL[..., None]).sum(1) * chosen_BLE.shape[-1] / (indices.shape[-1] * tokens_B1)
            total = total + (fraction_BE * ((affinity_BLE * real_BL[..., None]).sum(1) / tokens_B1)).sum() / len(learned)
        return total

    def update_bias(self, speed: float) -> None:
        """Move each router's balance bias, where it has one, against its load."""
        biases = {name: dict(router.named_buffers()).get(BALANCE_BIAS) for name, router in self.routers.items()}
        for name, bias_E in biases.items():
            if bias_E is not None and name in self.counts:
                counts_E = self.counts[name]
                bias_E += speed * torch.sign(counts_E.mean() - counts_E).to(bias_E)

    def metrics(self) -> dict[str, float]:
        """Load entropy (nats, and its change since the first step) and dead experts of each layer; agreement with the recorded routes."""
        result = {} if self.agreement is None else {"router/agreement": float(self.agreement[0] / self.agreement[1])}
        for layer, (name, counts_E) in enumerate(self.counts.items()):
            share_E = counts_E / counts_E.sum()
            entropy = -float(torch.special.xlogy(share_E, share_E).sum())
            start = self.start_entropy.setdefault(name, entropy)
            result[f"router/layer_{layer:02d}/load_entropy"] = entropy
            result[f"router/layer_{layer:02d}/load_entropy_change"] = entropy - start
            result[f"router/layer_{layer:02d}/dead_experts"] = float((counts_E == 0).sum())
        return result

    @torch.no_grad()
    def probe(self, backbone: nn.Module, tokens_BL: torch.Tensor, real_BL: torch.Tensor) -> dict[str, float]:
        """Share of a fixed batch's routing decisions that are still those of the first call; padding does not count.

        The batch is that of the first call on the main rank, the same on every rank; every rank calls it.
        """
        if self.probe_BL is None:
            self.probe_BL, self.probe_real_BL = broadcast_object((tokens_BL.cpu(), real_BL.cpu()))
        backbone(input_ids=self.probe_BL.to(tokens_BL.device), use_cache=False)
        real_N = self.probe_real_BL.flatten()
        now = {name: indices.reshape(len(real_N), -1).cpu()[real_N] for name, (_, indices) in self.last.items()}
        self.probe_experts = self.probe_experts or now
        result = {}
        for layer, (name, indices) in enumerate(now.items()):
            same = (indices[:, :, None] == self.probe_experts[name][:, None, :]).any(-1)
            result[f"router/layer_{layer:02d}/routed_as_at_start"] = float(same.double().mean())
        return result

    def state(self) -> dict:
        return {name: self.__dict__[name] for name in ("start_entropy", "probe_BL", "probe_real_BL", "probe_experts")}

    def restore(self, state: dict) -> None:
        self.__dict__.update(state)

    def _hook(self, name: str):
        def note(_module, _inputs, output) -> None:
            self.last[name] = choice_of(name, output)

        return note


def _affinity(router: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """A router's non-negative scores: DeepSeek-V4 has a function of its own (sqrt of softplus), others softmax."""
    children = dict(router.named_children())
    return children["score_fn"](logits) if "score_fn" in children else torch.softmax(logits, dim=-1)

