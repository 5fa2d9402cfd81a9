"""The whole run as one typed tree, and how it travels to the ranks.

The launcher composes it once and writes it into the run's folder; ranks read that file and
never compose again. In groups with several kinds (`model`, `data`, ...) `kind` says which.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.atomic_file import write_aside
from data.config import DATA_KINDS, DataConfig, check_data
from model.backends import KernelsConfig, check_kernels
from model.config import MODEL_KINDS, ModelConfig, check_model
from train.checkpoint.checkpoints import CheckpointConfig, check_checkpoint
from train.ema import EMAConfig, check_ema
from train.evaluation import EvaluationConfig, check_evaluation
from train.journal import LoggingConfig, check_logging
from train.layout.parallel import Offload, ParallelConfig, check_parallel
from train.layout.rules import Layout, check_layout
from train.optimizer.config import OPTIMIZER_KINDS, OptimizerConfig, check_optimizer
from train.precision import PrecisionConfig, check_precision
from train.profile.steps import check_steps
from train.schedule import SCHEDULE_KINDS, ScheduleConfig, check_schedule
from train.watch.watchdog import WatchdogConfig, check_watchdog

CONFIG_FILE = "config.yaml"
LAUNCHERS = ("launch", "grow")  # the launcher's own sections, of no concern to ranks


@dataclass(slots=True, kw_only=True)
class RunConfig:
    #: Sections whose class is chosen by their `kind`, but for the model (`model_schema`).
    KINDS: ClassVar[dict[str, dict[str, Any]]] = {
        "data": DATA_KINDS,
        "schedule": SCHEDULE_KINDS,
        "optimizer": OPTIMIZER_KINDS,
    }

    #: Folder of the run: config, metrics, logs, checkpoints. The same folder again continues it.
    run_dir: str
    #: Folder of another run, whose newest checkpoint's weights this run starts from: step 0, fresh
    #: moments, data from the beginning. The model must have the same tensors; RoPE may differ.
    init_from: str | None = None
    #: Decides initial weights and the order of the data.
    seed: int = 0
    #: Whether to measure where the time of some of this start's first steps goes, part by part:
    #: a table, and `profile.json` in the run's folder (docs/performance.md). Nothing that is
    #: computed changes.
    profile: bool = False
    #: How many steps `profile` takes apart; 3 warm up before, and as many run between untouched.
    profile_steps: int = 5
    #: Whether torch.compile turns chains of element-wise operations into one kernel each
    #: (docs/precision.md); on a CPU it needs a C++ compiler.
    compile: bool = False
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    #: Which implementation operations take; the table at a run's start says what that came to.
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    parallel: ParallelConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


def check_run(config: RunConfig, *, num_ranks: int) -> None:
    """Refuse, with a ValueError naming key, value, rule and way out, what can't be run."""
    check_model(config.model)
    check_data(config.data)
    check_optimizer(config.optimizer)
    check_schedule(config.schedule)
    check_precision(config.precision)
    check_kernels(config.kernels)
    check_checkpoint(config.checkpoint)
    check_ema(config.ema)
    check_evaluation(config.evaluation)
    check_logging(config.logging)
    check_watchdog(config.watchdog)
    if config.profile:
        check_steps(config.profile_steps, step=0, last=config.schedule.steps)
    check_parallel(config.parallel)
    check_layout(layout_of(config, num_ranks=num_ranks))
    if config.compile and config.parallel.overlap_comm:
        raise ValueError(
            "compile=true and parallel.overlap_comm=true don't go together: compiled backward "
            "passes have given DeepSpeed's stream gradients too early; choose "
            "parallel.overlap_comm=false"
        )
    if not config.run_dir:
        raise ValueError("run_dir is empty; name the folder of the run")
    if config.model.mtp.depth >= config.data.seq_len:
        raise ValueError(
            f"model.mtp.depth={config.model.mtp.depth} needs sequences longer than that, but "
            f"data.seq_len={config.data.seq_len}; choose a longer one or a smaller depth"
        )
    if config.checkpoint.asynchronous and config.parallel.offload_optimizer is Offload.nvme:
        raise ValueError(
            "checkpoint.asynchronous=true would copy into host memory what "
            "parallel.offload_optimizer=nvme keeps out of it; choose checkpoint.asynchronous=false"
        )
    if config.init_from == "":
        raise ValueError(
            "init_from is empty; give the folder of the run whose weights this one starts from, or "
            "init_from=null to start from random ones"
        )
    if config.init_from is not None and Path(config.init_from) == Path(config.run_dir):
        raise ValueError(
            f"init_from={config.init_from} is run_dir itself; leave init_from out to continue that "
            "run, or give another run_dir to start one from its weights"
        )


def layout_of(config: RunConfig, *, num_ranks: int) -> Layout:
    """The part of a run's config that says how it is laid out over ranks."""
    return Layout(
        parallel=config.parallel,
        model=config.model,
        data=config.data,
        optimizer=config.optimizer,
        precision=config.precision,
        schedule=config.schedule,
        ranks=num_ranks,
    )


def model_schema(kind: str) -> DictConfig:
    """The typed, empty model section of a kind.

    OmegaConf forgets the type of a section within a section when it merges, as long as nothing
    stands in it; so the attention's is put there.
    """
    schema = OmegaConf.structured(MODEL_KINDS[kind])
    schema.attention = get_type_hints(MODEL_KINDS[kind])["attention"]
    assert isinstance(schema, DictConfig)
    return schema


Config = TypeVar("Config", bound=RunConfig)


def read_config(path: Path, schema: type[Config]) -> Config:
    """The typed config written by `write_config`; keys that `schema` lacks are refused.

    Raises:
        ValueError: The file is missing or does not fit.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(values, dict), f"{path} holds a mapping"
        known = {field.name for field in fields(schema)}
        for section in LAUNCHERS:
            if section not in known:
                values.pop(section, None)
        return typed(values, schema)
    except (OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{path} is no config of a run: {error}") from error


def write_config(config: RunConfig, path: Path) -> None:
    """All values, resolved, as YAML that a person can read."""
    with write_aside(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def typed(values: Any, schema: type[Config]) -> Config:
    """`values` (plain containers) as `schema`, with the kinds of its groups chosen by `kind`."""
    config = OmegaConf.structured(schema)
    config.model = model_schema(values["model"]["kind"])
    for section, kinds in schema.KINDS.items():
        if section in values:
            config[section] = kinds[values[section]["kind"]]
    filled = OmegaConf.to_object(OmegaConf.merge(config, values))
    assert isinstance(filled, schema)
    return filled


def describe_config(config: RunConfig) -> dict[str, Any]:
    """The config as plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
