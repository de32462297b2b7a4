"""The only module that says `deepspeed`: joining the ranks, and one engine per stage that steps, saves and loads.

ranks = join_ranks()                      # torchrun, deepspeed, srun, a Ray trial or plain python
engine = Engine(task, optimizer, plan, ranks)
loss_sum, evidence = engine(batch)
engine.backward(loss)                     # once per micro-batch
engine.step(lr_factor)                    # once per micro-batch too; the weights move at the last one
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.optim import set_lr
from dstrain.schema import UserError

# ------------------------------------------------------------------------------------------------- the ranks


@dataclass(frozen=True)
class Place:
    """Who this process is among its peers, before any of them was met."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    launcher: str


def find_place(environ: Mapping[str, str]) -> Place:
    """Reads the launcher's variables: RANK (deepspeed, torchrun, a Ray trial), a step of srun, or neither.

    A process inside `sbatch` that srun did not start is one rank, whatever the job's size: only a step has
    SLURM_STEP_NUM_TASKS.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Place(
            int(environ["RANK"]),
            int(environ["WORLD_SIZE"]),
            int(environ.get("LOCAL_RANK", "0")),
            environ.get("MASTER_ADDR", "127.0.0.1"),
            int(environ.get("MASTER_PORT", "29500")),
            _launcher(environ),
        )
    if int(environ.get("SLURM_STEP_NUM_TASKS", "0")) > 1:
        job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
        return Place(
            int(environ["SLURM_PROCID"]),
            int(environ["SLURM_STEP_NUM_TASKS"]),
            int(environ["SLURM_LOCALID"]),
            environ.get("MASTER_ADDR") or _first_host(environ),
            int(environ.get("MASTER_PORT") or 20_000 + (job * 7 + step) % 20_000),  # every rank derives the same port
            "srun",
        )
    return Place(0, 1, 0, "127.0.0.1", free_port(), "plain python")


def _launcher(environ: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return environ.get("DSTRAIN_LAUNCHER", "deepspeed" if "CROSS_RANK" in environ else "RANK variables")


def _first_host(environ: Mapping[str, str]) -> str:
    if environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of this machine's address `host` on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, seen from one of them."""

    rank: int
    world: int
    device: torch.device
    launcher: str
    hosts: Any = None
    """The process group in which the hosts talk without waiting for their devices; None is the group of all."""

    def add(self, *numbers: float) -> tuple[float, ...]:
        """Sums over the ranks of numbers that each host knows; no device is waited for."""
        if self.world == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(sums, group=self.hosts)
        return tuple(sums.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (plain data), on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, json.dumps(value), group=self.hosts)
        return [json.loads(text) for text in found]

    def sum(self, values: Tensor) -> Tensor:
        """Adds a tensor up over the ranks, in place; every rank has the same afterwards."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def agree(self, value: Any) -> Any:
        """Rank 0's value (plain data) on every rank."""
        if self.world == 1:
            return value
        holder = [json.dumps(value)]
        torch.distributed.broadcast_object_list(holder)
        return json.loads(holder[0])

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """`with ranks.first() as mine: if mine: ...`: rank 0 works, the others wait; its UserError is raised on all."""
        problem = None
        try:
            yield self.rank == 0
        except UserError as error:
            problem = str(error)
        problem = self.agree(problem)
        if problem is not None:
            raise UserError(problem)


def join_ranks(timeout_minutes: float = 30.0) -> Ranks:
    """Meets the other ranks (NCCL on GPUs, gloo on CPUs) and picks this rank's device.

    Raises UserError when there are more ranks on this machine than GPUs.
    """
    place = find_place(os.environ)
    cuda = torch.cuda.is_available()
    if cuda and place.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {place.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
            "start as many ranks as there are GPUs, or look at CUDA_VISIBLE_DEVICES"
        )
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed guesses, and says so
    os.environ.update(
        RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address, MASTER_PORT=str(place.port),
    )  # fmt: skip
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        deepspeed = _deepspeed()
        with _silence():
            deepspeed.init_distributed(
                dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False,
                timeout=timedelta(minutes=timeout_minutes),
            )  # fmt: skip
    hosts = torch.distributed.new_group(backend="gloo") if cuda and place.world > 1 else None
    return Ranks(place.rank, place.world, device, place.launcher, hosts)


def leave_ranks() -> None:
    """Ends the process group, so that the interpreter can exit without complaint and another run may join anew."""
    if torch.distributed.is_initialized():
        _deepspeed().comm.destroy_process_group()  # torch's own would leave DeepSpeed holding a group that is gone


def _deepspeed() -> Any:
    """DeepSpeed, imported late (it takes seconds) and with its chatter kept to warnings."""
    # The op is compiled with the ninja of this environment, which is not on PATH when nobody activated it.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    # What it compiles depends on this environment's torch: kept with it, no other environment makes it compile again.
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    # DeepSpeed's autotuner imports all of MLflow when it finds it, for a second and 100 MB that no rank has a use for.
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    # It calls torch's collectives by names that torch renames, and Python would tell so again at every step.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed prints to standard output; what is worth knowing of it, dstrain says itself."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# ------------------------------------------------------------------------------------------------ the engine


class Diverged(Exception):
    """The loss or a gradient is no longer a number, and nothing heals it."""


class Engine:
    """A DeepSpeed engine around one stage's task. It lives as long as the stage; no other run ever uses it again."""

    def __init__(self, task: nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any], ranks: Ranks) -> None:
        """`plan` is what `ds_plan.resolve` returned; `task(batch)` returns (loss_sum, evidence)."""
        deepspeed = _deepspeed()
        self.ranks = ranks
        with _silence():
            self._ds, *_ = deepspeed.initialize(model=task.to(ranks.device), optimizer=optimizer, config=plan)
        self._ds.checkpoint_engine = _safe_checkpoint_engine(self._ds.checkpoint_engine)
        self._stage = plan["zero_optimization"]["stage"]
        self._norm: Tensor | float = float("nan")
        self._names = [name for name, _ in task.named_parameters()]
        # At stage 0 in bf16 DeepSpeed takes a step with zero gradients to allocate the moments, and AdamW counts it.
        self._begin_anew(lambda group: True)

    @property
    def task(self) -> nn.Module:
        """The module that was given, now in the plan's precision (and partitioned, under ZeRO-3)."""
        return self._ds.module

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Forward pass of one micro-batch: (summed loss () float32, the objective's evidence)."""
        return self._ds(batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss`, which the caller has already divided by the whole step's weight.

        DeepSpeed averages over the ranks, so the loss is multiplied by their number: the ranks' gradients add up to
        the gradient of the global mean. `scale_wrt_gas=False` leaves accumulation to the same arithmetic.
        """
        self._ds.backward(loss * self.ranks.world, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """Counts a micro-batch; at a step's last one clips, updates with learning rate `lr` and zeroes gradients."""
        if self._ds.is_gradient_accumulation_boundary():
            set_lr(self._ds.optimizer, lr)
            self._keep_norm()
        try:
            self._ds.step()
        except Exception as error:
            if "minimum" in str(error):  # what DeepSpeed raises when halving the loss scale no longer helps
                raise Diverged(
                    f"fp16 overflows at its smallest loss scale ({error}); lower the learning rate, or take bf16, fp32"
                ) from error
            raise

    def _keep_norm(self) -> None:
        """At stage 0 in fp32 DeepSpeed clips without telling the norm; the gradients are all here, so take it first."""
        if self._stage == 0 and self._ds.get_global_grad_norm() is None:
            gradients = [parameter.grad for parameter in self._ds.module.parameters() if parameter.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)

    def set_group_scale(self, name: str, scale: float) -> None:
        """Multiplies the learning rate of the parameter groups called `name` (0 holds them still)."""
        for group in self._ds.optimizer.param_groups:
            if group.get("name") == name:
                group["lr_scale"] = scale

    def restart_moments(self, name: str) -> None:
        """Makes AdamW begin anew, moments and step count, for the groups called `name`.

        ZeRO keeps one flat state for a whole group and counts its steps even while every gradient is zero. Without
        this the bias correction would be missing, and a thawed layer's first updates three times too large. Moments
        are there too when a frozen table served as tied output weights.
        """
        self._begin_anew(lambda group: group.get("name") == name)

    def _begin_anew(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        wrapper = self._ds.optimizer
        inner = getattr(wrapper, "optimizer", wrapper)
        if self._stage == 3:
            group_of = wrapper.sub_group_to_group_id
            masters = [
                master
                for number, master in enumerate(wrapper.fp32_partitioned_groups_flat)
                if wanted(inner.param_groups[group_of[number]])
            ]
        else:
            masters = [master for group in inner.param_groups if wanted(group) for master in group["params"]]
        for master in masters:
            for key, value in inner.state.get(master, {}).items():
                if isinstance(value, Tensor):
                    value.zero_()
                else:
                    inner.state[master][key] = 0

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        norm = self._ds.get_global_grad_norm()
        return float(self._norm if norm is None else norm)

    @property
    def loss_scale(self) -> float:
        """fp16's current loss scale; 1 in other precisions."""
        return float(getattr(self._ds.optimizer, "cur_scale", 1.0) or 1.0)

    @property
    def skipped_steps(self) -> int:
        """Steps that fp16 left out because a gradient overflowed."""
        return int(self._ds.skipped_steps)

    def weights(self) -> dict[str, Tensor]:
        """Full fp32 weights on the CPU, by the task's own names: the optimizer's master copies where there are any.

        Collective: every rank calls it (ZeRO-3 gathers), every rank gets it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state: dict[str, Tensor] = {}
        masters = self._unlinked_masters()
        for name, parameter in self._ds.module.named_parameters():
            full = masters.get(parameter, safe_get_full_fp32_param(parameter))
            full = parameter if full is None else full
            state[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, buffer in self._ds.module.named_buffers():
            if name in self._persistent_buffers():
                state[name] = buffer.detach().to("cpu", copy=True).contiguous()
        return state

    def _unlinked_masters(self) -> dict[Tensor, Tensor]:
        """By parameter: the fp32 copies at stage 0 in 16 bits, which DeepSpeed does not link to the parameters."""
        wrapper = self._ds.optimizer
        low, high = getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", [])
        pairs = (pair for group in zip(low, high, strict=False) for pair in zip(*group, strict=True))
        return dict(pairs)

    def _persistent_buffers(self) -> set[str]:
        # state_dict() leaves out non-persistent buffers; it is cheap here because it only makes views
        return set(self._ds.module.state_dict()) - set(self._names)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Writes everything a resume needs to `folder`: under another name first, then renamed. Collective."""
        draft = folder.with_name(folder.name + ".draft")
        with self.ranks.first() as mine:
            if mine:
                shutil.rmtree(draft, ignore_errors=True)
                draft.parent.mkdir(parents=True, exist_ok=True)
        client_state = {"progress": json.dumps(state)}  # as text: a JSON number comes back bit for bit
        self._ds.save_checkpoint(str(draft), tag="engine", client_state=client_state, save_latest=False)
        with self.ranks.first() as mine:
            if mine:
                before = _before(folder)
                shutil.rmtree(before, ignore_errors=True)
                if folder.exists():
                    folder.rename(before)
                draft.rename(folder)
                shutil.rmtree(before, ignore_errors=True)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores what `save` wrote and returns its state. Collective. Raises UserError when it can't be read."""
        saved_by = len(list((folder / "engine").glob("*_optim_states.pt")))  # none at stage 0, where ranks are alike
        if saved_by not in (0, self.ranks.world):
            raise UserError(
                f"{folder}: this checkpoint was saved by {saved_by} ranks, and now there are {self.ranks.world}; "
                "start with as many ranks as before"
            )
        try:
            _, client = self._ds.load_checkpoint(str(folder), tag="engine", load_module_strict=True)
            return dict(json.loads(client["progress"]))
        except Exception as error:
            raise UserError(
                f"{folder}: this checkpoint cannot be read ({str(error) or type(error).__name__}); "
                "remove the folder to train its stage anew"
            ) from error

    def close(self) -> None:
        """Frees the optimizer's hooks and buffers."""
        self._ds.destroy()


def standing(folder: Path) -> Path | None:
    """The checkpoint to go on from: what `save` left at `folder`, or the one before if a death came between its renames."""
    return next((place for place in (folder, _before(folder)) if place.exists()), None)


def _before(folder: Path) -> Path:
    return folder.with_name(folder.name + ".before")


def _safe_checkpoint_engine(engine: Any) -> Any:
    """The same checkpoint engine, reading with an allow-list: a checkpoint may have come from somebody else."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, tensor_fragment]
    )

    class Allowing(type(engine)):  # type: ignore[misc]
        def load(self, path: str, map_location: Any = None) -> Any:
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.__class__ = Allowing
    return engine


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this rank has held, in GB: the GPU allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    # `make setup` calls this: DeepSpeed compiles its communication op on the first start on a machine.
    join_ranks()
    leave_ranks()
    print("DeepSpeed is ready")
