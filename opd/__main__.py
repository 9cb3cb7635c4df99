"""`opd <command> [hydra overrides]`, and `opd bench SUBJECT [hydra overrides]`.

Without a command the quickstart pipeline runs. Configs are composed by Hydra from conf/ (and from ./conf of the working directory,
so that a domain can be added beside an installed package), checked against the dataclasses of opd/config.py, and only then
is anything heavy imported. A mistake in them is one sentence and exit code 2.
"""

import functools
import importlib
import logging
import os
import sys
import traceback
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.errors import INTERRUPTED, PREEMPTED, USER_ERROR, Preempted, RankLost, explain, nearest
from opd.slurm import slurm_ranks

for name, value in {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}.items():
    os.environ.setdefault(name, value)  # the libraries read them when they are imported

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)  # transformers imports torchao where it is installed, which warns of kernels that we never call

CONF = Path(__file__).resolve().parent.parent / "conf"
COMMANDS = {
    "pipeline": "make base, teachers and student one after another; what `opd` alone does, on the embedded domains",
    "specialize": "fine-tune a model on a domain's reference answers, then on the grades of its own: makes a teacher",
    "distill": "distil all domains' teachers into one student",
    "check": "what distill with the same settings would refuse at its start, and what it would warn of; trains and writes nothing",
    "plan": "the memory that distill with the same settings takes on each rank, from the models' configs alone, and what does not fit",
    "evaluate": "accuracy and recovery on held-out prompts",
    "compare": "several ways to make one student of the same base and teachers, beside each other: distillation, its baselines, its controls",
    "merge": "all domains' teachers as one model by arithmetic on their weights, without training: a baseline",
    "export": "write the folder to serve, its experts packed in FP4, and verify it",
    "report": "one HTML page on a run, as in `opd report RUN`: its table, curves, teachers' conflict, rollouts and settings",
    "bench": "time and memory beside other ways and libraries; the word after it says of what: divergence, qat, teachers, rollout, step",
}
FUNCTIONS = {"pipeline": "run_pipeline", "rehearsal": "rehearse"}
"""What a module's function is called where it is not called as the module."""

ON_RANKS = ("distill", "specialize", "evaluate", "check")
"""The commands that divide their work among processes."""

WITHOUT_MODELS = ("pipeline", "compare", "report")
"""The commands that load no model themselves."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a mistake of the user's, 75 ended early with a checkpoint, 130 interrupted, 1 a defect of ours."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    try:
        os.environ.update(slurm_ranks(os.environ))
        command, overrides = split_command(arguments)
        cfg = load_config(command, overrides)
        if command in ON_RANKS:
            return _run_on_ranks(command, cfg, arguments)
        _require_one_process(command)
        _run(command, cfg)
    except ValueError as error:
        return _fail(f"opd: {' '.join(str(error).split())}", USER_ERROR)
    except Preempted as end:
        return _fail(f"opd: {end}", PREEMPTED)
    except RankLost as loss:
        return _fail(f"opd: {loss}", loss.code)
    except KeyboardInterrupt:
        return _fail("opd: interrupted; a training command, given again without fresh=true, continues from its last checkpoint", INTERRUPTED)
    finally:
        _stop()
    return 0


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command and its overrides; overrides alone belong to the pipeline."""
    if not arguments or any(sign in arguments[0] for sign in "=~"):
        return "pipeline", arguments
    if arguments[0] not in COMMANDS:
        raise ValueError(f"there is no command {arguments[0]!r}{nearest(arguments[0], list(COMMANDS))}; the commands are {', '.join(COMMANDS)}")
    if arguments[0] == "bench":
        return _bench_command(arguments[1:])
    if arguments[0] == "report" and len(arguments) > 1 and not any(sign in arguments[1] for sign in "=~"):
        return "report", [f"run_dir={_quoted(arguments[1])}", *arguments[2:]]
    return arguments[0], arguments[1:]


def _quoted(text: str) -> str:
    """A value as Hydra reads it back, whatever is in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _bench_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command that `divergence setting=value` means: each subject has settings of its own."""
    from opd.config import SCHEMAS

    subjects = [name.removeprefix("bench_") for name in SCHEMAS if name.startswith("bench_")]
    if not arguments or "=" in arguments[0]:
        raise ValueError(f"bench needs a subject, as in `opd bench {subjects[0]}`; the subjects are {', '.join(subjects)}")
    if arguments[0] not in subjects:
        raise ValueError(f"bench has no subject {arguments[0]!r}{nearest(arguments[0], subjects)}; the subjects are {', '.join(subjects)}")
    return f"bench_{arguments[0]}", arguments[1:]


def load_config(command: str, overrides: list[str]):
    """The typed config of a command: composed by Hydra, checked against its dataclass."""
    from opd.config import SCHEMAS, parse

    return parse(compose_config(command, overrides), SCHEMAS[command])


@functools.cache
def register_schemas() -> None:
    """Make the schemas known to Hydra, under the names in conf/COMMAND.yaml; once, since it takes a third of the time of composing."""
    from opd.config import SCHEMAS

    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)


def compose_config(command: str, overrides: list[str]) -> DictConfig:
    """Compose conf/COMMAND.yaml with overrides. Raises ValueError in words of the command line."""
    from opd.config import SCHEMAS

    register_schemas()
    own = Path.cwd() / "conf"
    search = [f"hydra.searchpath=[file://{own}]"] if own.is_dir() and own.resolve() != CONF else []
    for file in own.rglob("*.yaml") if search else ():
        shipped = CONF / file.relative_to(own)
        if shipped.is_file() and shipped.read_text() != file.read_text():
            raise ValueError(f"{file.relative_to(Path.cwd())} would be hidden by the file of that name that ships with opd: give it another name")
    stray = [override for override in overrides if "=" not in override and not override.startswith("~")]
    if stray:
        raise ValueError(f"{stray[0]!r} is not a setting: write setting=value")
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        try:
            config = compose(config_name=command, overrides=[*search, *_join_domains(overrides)])
            return OmegaConf.merge(OmegaConf.structured(SCHEMAS[command]), OmegaConf.to_container(config))  # with + Hydra adds any key
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error, command.replace("_", " "), SCHEMAS[command], [CONF, own])) from error


def _join_domains(overrides: list[str]) -> list[str]:
    """`domain=[a]` and `+domain=b` together as `domain=[a,b]`: Hydra would silently drop b."""
    chosen = [override for override in overrides if override.startswith("domain=")]
    added = [override.removeprefix("+domain=").strip("[]") for override in overrides if override.startswith("+domain=")]
    if not chosen or not added:
        return overrides
    names = [name for name in [chosen[-1].removeprefix("domain=").strip("[]"), *added] if name]
    return [override for override in overrides if not override.startswith(("domain=", "+domain="))] + [f"domain=[{','.join(names)}]"]


def _run_on_ranks(command: str, cfg, arguments: list[str]) -> int:
    """Start the ranks of a command, or be one of them, or all there is; returns the exit code."""
    from opd.heartbeat import Heartbeat
    from opd.supervisor import Supervisor, needs_supervisor, require_no_fresh_requeue

    require_no_fresh_requeue(cfg)
    if needs_supervisor(cfg.launch):
        return Supervisor([sys.executable, "-m", "opd", *arguments], cfg).run()
    with Heartbeat(cfg.launch.heartbeat_seconds):
        _run(command, cfg)
    return 0


def _require_one_process(command: str) -> None:
    from opd.distributed import launched_as

    number, count = launched_as()
    if count > 1:
        raise ValueError(f"opd {command} is for one process, and this is rank {number} of {count}: start it alone, as with srun --ntasks=1")


def _run(command: str, cfg) -> None:
    """Call the function that has the command's name, in the module of that name (but for FUNCTIONS)."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    _show_messages()
    if command not in WITHOUT_MODELS:
        from opd.distributed import set_threads

        set_threads(cfg.threads)
    if command not in WITHOUT_MODELS and not command.startswith("bench"):
        from opd.checkpoint_model import resolve_models

        resolve_models(cfg)
    name = "rehearsal" if command == "distill" and cfg.rehearse else command
    module = importlib.import_module(f"opd.{name}")
    getattr(module, FUNCTIONS.get(name, name))(cfg)


def _show_messages() -> None:
    """What our own modules log goes to standard error, from the first rank alone where it is no warning."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for package in ("opd", "teachers", "rollout"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        logger.handlers = [handler]


def _stop() -> None:
    if "opd.distributed" in sys.modules:
        sys.modules["opd.distributed"].stop_processes()


def _fail(message: str, code: int) -> int:
    if os.environ.get("OPD_TRACEBACK"):
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr)
    return code


def _usage() -> str:
    lines = [f"  {name:<12} {what}" for name, what in COMMANDS.items()]
    return "usage: opd [command] [setting=value ...]\n\n" + "\n".join(lines) + "\n\nwithout a command: opd pipeline"


if __name__ == "__main__":
    sys.exit(main())
