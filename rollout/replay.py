"""Rollout replay files: the rollouts of a step, saved so that it can be trained on again without sampling.

Format (schema version 1). `RUN/rollouts/step-000012.jsonl`: the first line is `{"schema": 1, "step": 12, "rollouts": R}`, then R JSON
objects, one per rollout of the whole step, over all ranks, in request order:

    {"domain", "request", "row", "sample", "prompt": [ids], "answer": str|null, "completion": [ids],
     "mask": [0|1], "logprob": [floats], "finished": bool, "policy_step": int}

and, where routes were recorded, "routes": {"dtype": "uint8"|"int16", "shape": [tokens, layers, experts per token], "data": base64 of the numbers, row by
row, little-endian}.

Log-probabilities are written with nine significant digits, which is enough to read the same float32 back.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch

from rollout.files import replace_text
from rollout.types import Prompt, Rollout

SCHEMA = 1


def replay_file(run: str | Path, step: int) -> Path:
    return Path(run) / "rollouts" / f"step-{step:06d}.jsonl"


def save_rollouts(path: Path, step: int, rollouts: list[Rollout]) -> None:
    """Write one step's rollouts; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"schema": SCHEMA, "step": step, "rollouts": len(rollouts)})]
    lines += [json.dumps(_to_json(rollout)) for rollout in sorted(rollouts, key=rollout_key)]
    replace_text(path, "\n".join(lines) + "\n")


def load_rollouts(path: Path) -> list[Rollout]:
    """Rollouts of one step in request order. Raises ValueError where the file is missing, cut, or of another schema."""
    if not path.is_file():
        raise ValueError(f"there are no saved rollouts at {path}: make them with rollout.save=true")
    damaged = f"the rollouts in {path} are damaged: make them again with rollout.save=true"
    try:
        header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(damaged) from error
    if header.get("schema") != SCHEMA:
        raise ValueError(f"the rollouts in {path} have schema {header.get('schema')}; this version reads schema {SCHEMA}")
    if header.get("rollouts") != len(records):
        raise ValueError(damaged)
    return [_from_json(record) for record in records]


def first_difference(here: list[Rollout], there: list[Rollout]) -> str | None:
    """Where two sets of rollouts first differ, in words, or None where every token is the same."""
    if [rollout_key(rollout) for rollout in here] != [rollout_key(rollout) for rollout in there]:
        return "the two runs sampled different prompts"
    for left, right in zip(here, there, strict=True):
        if left.prompt.tokens != right.prompt.tokens:
            return f"request {left.prompt.request} has another prompt"
        left_tokens, right_tokens = left.completion_T.tolist(), right.completion_T.tolist()
        for position, (a, b) in enumerate(zip(left_tokens, right_tokens, strict=False)):
            if a != b:
                return f"request {left.prompt.request} ({left.prompt.domain}), completion token {position}: {a} here, {b} there"
        if len(left_tokens) != len(right_tokens):
            return f"request {left.prompt.request} ({left.prompt.domain}) has {len(left_tokens)} tokens here, {len(right_tokens)} there"
    return None


def rollout_key(rollout: Rollout) -> tuple[int, int]:
    return rollout.prompt.request, rollout.sample


def _to_json(rollout: Rollout) -> dict:
    routes = {} if rollout.routes_TMK is None else {"routes": _routes_to_json(rollout.routes_TMK.numpy())}
    return {
        "domain": rollout.prompt.domain,
        "request": rollout.prompt.request,
        "row": rollout.prompt.row,
        "sample": rollout.sample,
        "prompt": list(rollout.prompt.tokens),
        "answer": rollout.prompt.answer,
        "completion": rollout.completion_T.tolist(),
        "mask": rollout.completion_mask_T.int().tolist(),
        "logprob": [float(f"{value:.9g}") for value in rollout.logprob_T.tolist()],
        "finished": rollout.finished,
        "policy_step": rollout.policy_step,
        **routes,
    }


def _from_json(record: dict) -> Rollout:
    prompt = Prompt(
        domain=record["domain"],
        request=record["request"],
        row=record["row"],
        tokens=tuple(record["prompt"]),
        answer=record["answer"],
    )
    return Rollout(
        prompt=prompt,
        completion_T=torch.tensor(record["completion"], dtype=torch.int64),
        completion_mask_T=torch.tensor(record["mask"], dtype=torch.bool),
        logprob_T=torch.tensor(record["logprob"], dtype=torch.float32),
        sample=record["sample"],
        finished=record["finished"],
        policy_step=record["policy_step"],
        routes_TMK=_routes_from_json(record["routes"]) if "routes" in record else None,
    )


def _routes_to_json(routes: np.ndarray) -> dict:
    data = base64.b64encode(routes.astype(routes.dtype.newbyteorder("<")).tobytes()).decode()
    return {"dtype": routes.dtype.name, "shape": list(routes.shape), "data": data}


def _routes_from_json(record: dict) -> torch.Tensor:
    dtype = np.dtype(record["dtype"])
    numbers = np.frombuffer(base64.b64decode(record["data"]), dtype.newbyteorder("<"))
    return torch.from_numpy(numbers.astype(dtype).reshape(record["shape"]))
