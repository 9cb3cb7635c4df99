"""`opd <command> [hydra overrides]`, and `opd bench SUBJECT [hydra overrides]`.

Without a command the quickstart pipeline runs. Configs are composed by Hydra from conf/ (and from ./conf of the working directory,
so that a domain can be added beside an installed package), checked against the dataclasses of opd/config.py, and only then
is anything heavy imported. A mistake in them is one sentence and exit code 2.
"""

import importlib
import logging
import os
import re
import sys
import traceback
from pathlib import Path

from omegaconf import OmegaConf

from opd.checkpoint_record import chosen_step
from opd.composition import STORED, compose_config, load_config, origins, quoted
from opd.errors import INTERRUPTED, USER_ERROR, Preempted, RankLost, nearest
from opd.run_log import begin_log
from opd.run_state import State, end_state, read_state
from opd.slurm import slurm_ranks
from rollout.errors import first_sentence

for name, value in {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}.items():
    os.environ.setdefault(name, value)  # the libraries read them when they are imported

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)  # transformers imports torchao where it is installed, which warns of kernels that we never call

COMMANDS = {
    "pipeline": "make base, teachers and student one after another; what `opd` alone does, on the embedded domains",
    "specialize": "fine-tune a model on a domain's reference answers, then on the grades of its own: makes a teacher",
    "distill": "distil all domains' teachers into one student",
    "check": "what distill with the same settings would refuse at its start, and what it would warn of; trains and writes nothing",
    "plan": "the memory that distill with the same settings takes on each rank, from the models' configs alone, and what does not fit",
    "evaluate": "accuracy and recovery on held-out prompts; `opd evaluate RUN checkpoints=all` judges a run's checkpoints and chooses one",
    "compare": "several ways to make one student of the same base and teachers, beside each other: distillation, its baselines, its controls",
    "merge": "all domains' teachers as one model by arithmetic on their weights, without training: a baseline; `opd merge RUN` those of a run",
    "export": "write the folder to serve, its experts packed in FP4, and verify it",
    "runs": "how the runs in a folder stand, as in `opd runs FOLDER`: state, step, time left, last checkpoint",
    "inspect": "rollouts that a run has kept, as in `opd inspect RUN domain=law`: where, and how, the student differs from the teacher",
    "report": "one HTML page on a run, as in `opd report RUN`: its table, curves, teachers' conflict, rollouts and settings",
    "bench": "time and memory beside other ways and libraries; the word after it says of what: divergence, qat, teachers, rollout, step",
}
FUNCTIONS = {"pipeline": "run_pipeline", "rehearsal": "rehearse", "inspection": "inspect_run"}
"""What a module's function is called where it is not called as the module."""

BEHIND = {"runs": "[FOLDER]", "inspect": "RUN[@STEP]", "report": "RUN [RUN ...]", "export": "[RUN[@STEP]]", "evaluate": "[RUN[@STEP]]"}
BEHIND |= dict.fromkeys(("distill", "specialize", "check", "plan", "merge", "pipeline", "compare"), "[RUN]")
"""What may stand behind a command, in place of settings that the run has."""

QUESTIONS = {"-h": "help", "--help": "help", "-c": "cfg", "--cfg": "cfg"}

ON_RANKS = ("distill", "specialize", "evaluate", "check")
"""The commands that divide their work among processes."""

READERS = ("runs", "inspect")
"""The commands that only look, in however many processes, and are there at once: they import no torch."""

WITHOUT_MODELS = ("pipeline", "compare", "report", *READERS)
"""The commands that load no model themselves."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 a mistake of the user's, 3 stopped by an alarm or an accepted checkpoint, 4 a sweep with jobs that
    failed, 75 ended early with a checkpoint, 130 interrupted, 1 a defect of ours.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    try:
        asked, arguments = split_question(arguments)
        is_sweep = bool({"-m", "--multirun"} & set(arguments))
        arguments = [argument for argument in arguments if argument not in ("-m", "--multirun")]
        os.environ.update(slurm_ranks(os.environ))
        command, overrides = split_command(arguments)
        if asked is not None:
            return _answer(*asked, command, overrides)
        if is_sweep:
            from opd.sweep import sweep

            return sweep(command, overrides)
        cfg = load_config(command, overrides)
        if command in ON_RANKS:
            return _run_on_ranks(command, cfg, arguments)
        if command not in READERS:
            _require_one_process(command)
        _run(command, cfg)
        end_state(0, None)
    except ValueError as error:
        return _fail(f"opd: {' '.join(str(error).split())}", USER_ERROR)
    except Preempted as end:
        return _fail(f"opd: {end}", end.code)
    except RankLost as loss:
        return _fail(f"opd: {loss}", loss.code)
    except KeyboardInterrupt:
        return _fail("opd: interrupted; a training command, given again without fresh=true, continues from its last checkpoint", INTERRUPTED)
    except Exception as error:
        end_state(1, f"{type(error).__name__}: {first_sentence(error)}")
        raise
    finally:
        _stop()
    return 0


def split_question(arguments: list[str]) -> tuple[tuple[str, str] | None, list[str]]:
    """`--help` or `--cfg` and the path of a setting that may follow it, where one of them is asked, and the other arguments."""
    flags = [number for number, argument in enumerate(arguments) if argument in QUESTIONS]
    if not flags:
        return None, arguments
    after = flags[0] + 1
    has_path = len(arguments) > after and not any(sign in arguments[after] for sign in "=~") and arguments[after] not in QUESTIONS
    others = arguments[: flags[0]] + arguments[after + has_path :]
    return (QUESTIONS[arguments[flags[0]]], arguments[after] if has_path else ""), others


def _answer(question: str, path: str, command: str, overrides: list[str]) -> int:
    """Say what can be set (help), or what is set and where (cfg); nothing is run."""
    from opd.settings import print_config, print_help

    if question == "help":
        usage = " ".join(["opd", *command.split("_"), *([BEHIND[command]] if command in BEHIND else []), "[setting=value ...]"])
        print_help(command, f"usage: {usage}\n\n{COMMANDS[command.partition('_')[0]]}\n", path)
        return 0
    config = OmegaConf.to_container(compose_config(command, overrides), enum_to_str=True)
    print_config(config, origins(command, overrides), path, command)
    load_config(command, overrides)  # what is printed is also checked
    return 0


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command and its overrides; overrides alone belong to the pipeline."""
    if not arguments or any(sign in arguments[0] for sign in "=~"):
        return "pipeline", arguments
    if arguments[0] not in COMMANDS:
        raise ValueError(f"there is no command {arguments[0]!r}{nearest(arguments[0], list(COMMANDS))}; the commands are {', '.join(COMMANDS)}")
    if arguments[0] == "bench":
        return _bench_command(arguments[1:])
    runs = [argument for argument in arguments[1:] if _is_run(argument)] if arguments[0] == "report" else []
    if len(runs) > 1:
        for name in runs:
            _of_run("report", name)  # refuses a step
        return "report", [f"run_dir={quoted(runs[0])}", f"others=[{','.join(map(quoted, runs[1:]))}]", *(item for item in arguments[1:] if item not in runs)]
    named = next((argument for argument in arguments[1:] if "=" not in argument and _is_run(argument)), None)
    if named is not None and not _is_run(arguments[1]):  # after settings, as people write it
        arguments = [arguments[0], named, *(argument for argument in arguments[1:] if argument != named)]
    if len(arguments) > 1 and _is_run(arguments[1]):
        arguments = [arguments[0], *_of_run(arguments[0], arguments[1]), *arguments[2:]]
    if arguments[0] == "inspect":  # domain is a group of files elsewhere
        arguments = [argument.replace("domain=", "domain_name=", 1) if argument.startswith("domain=") else argument for argument in arguments]
    return arguments[0], arguments[1:]


def _is_run(argument: str) -> bool:
    """Whether an argument is RUN or RUN@STEP, and not a setting; a folder's name may hold any sign."""
    return Path(re.sub(r"@(\d+|chosen)$", "", argument)).is_dir() or not ("=" in argument or argument.startswith("~"))


def _of_run(command: str, name: str) -> list[str]:
    """The overrides that RUN, or RUN@STEP, stands for behind a command."""
    run, _, step = name.rpartition("@") if re.fullmatch(r".+@(\d+|chosen)", name) else (name, "", "")
    if step == "chosen":
        step = str(chosen_step(Path(run)))
    if command in ("distill", "specialize", "check", "plan", "merge", "pipeline", "compare") and (Path(run).is_dir() or "/" in run):
        if step and command == "merge":
            raise ValueError(f"opd merge is of a run's teachers, which have no step: write opd merge {run}")
        if step:
            raise ValueError(f"a run goes on from its newest checkpoint: write opd {command} {run}, or branch_from={name} and another run_dir for a new run")
        return [f"{STORED}{run}"]
    if command == "evaluate" and (Path(run).is_dir() or "/" in run):
        return [f"{STORED}{run}", *([f"checkpoints=[{int(step)}]"] if step else [])]
    if command == "export":
        if not step and (Path(run) / "config.yaml").is_file() and not (Path(run) / "student").is_dir():
            raise ValueError(f"{run} has no student yet, which a run writes at its end: write {run}@STEP or {run}@chosen")
        state = None if step else read_state(Path(run))
        if state is not None and state.state is not State.done and (Path(run) / "student").is_dir():
            raise ValueError(f"{run}/student is of an earlier end of the run, which has gone on since: write {run}@STEP, or student.model={run}/student")
        place = f"{run}/export-step-{int(step):06d}" if step else f"{run}/export"
        return [f"student.model={quoted(f'{run}@{step}' if step else f'{run}/student')}", f"run_dir={quoted(place)}"]
    if command in ("runs", "report") and step:
        raise ValueError(f"opd {command} is of a whole run: write opd {command} {run}; opd inspect, opd evaluate and opd export are of a step")
    if command == "runs":
        return [f"folders=[{quoted(run)}]"]
    if command == "inspect":
        return [f"run_dir={quoted(run)}", *([f"step={int(step)}"] if step else [])]
    if command == "report":
        return [f"run_dir={quoted(run)}"]
    raise ValueError(f"{name!r} is {'no folder of a run, and ' if command in BEHIND else ''}not a setting: write setting=value")


def _bench_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command that `divergence setting=value` means: each subject has settings of its own."""
    from opd.config import SCHEMAS

    subjects = [name.removeprefix("bench_") for name in SCHEMAS if name.startswith("bench_")]
    if not arguments or "=" in arguments[0]:
        raise ValueError(f"bench needs a subject, as in `opd bench {subjects[0]}`; the subjects are {', '.join(subjects)}")
    if arguments[0] not in subjects:
        raise ValueError(f"bench has no subject {arguments[0]!r}{nearest(arguments[0], subjects)}; the subjects are {', '.join(subjects)}")
    return f"bench_{arguments[0]}", arguments[1:]


def _run_on_ranks(command: str, cfg, arguments: list[str]) -> int:
    """Start the ranks of a command, or be one of them, or all there is; returns the exit code."""
    from opd.heartbeat import Heartbeat
    from opd.supervisor import Supervisor, needs_supervisor, require_no_fresh_requeue

    require_no_fresh_requeue(cfg)
    if needs_supervisor(cfg.launch):
        return Supervisor([sys.executable, "-m", "opd", *arguments], cfg).run()
    begin_log()
    with Heartbeat(cfg.launch.heartbeat_seconds):
        _run(command, cfg)
    end_state(0, None)
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
    name = "rehearsal" if command == "distill" and cfg.rehearse else "inspection" if command == "inspect" else command  # the library has an inspect too
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
    end_state(code, message.removeprefix("opd: "))
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr)
    return code


def _usage() -> str:
    lines = [f"  {name:<12} {what}" for name, what in COMMANDS.items()]
    usage = "usage: opd [command] [setting=value ...]\n\n" + "\n".join(lines) + "\n\nwithout a command: opd pipeline"
    questions = {"--help [PATH]": "its settings, or those under a path", "... --cfg [PATH]": "the values they have, and where each comes from"}
    questions["-m seed=1,2 ..."] = "each combination as a run of its own"
    return usage + "".join(f"\nopd COMMAND {flag}: {what}" for flag, what in questions.items())


if __name__ == "__main__":
    sys.exit(main())
